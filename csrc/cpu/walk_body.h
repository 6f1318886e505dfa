// How kernels walk: over the output pixels or tiles of a job, over the channels of a pixel.
#include "cpu/kernels.h"

namespace resnet_fused {
namespace RESNET_FUSED_ISA_NAMESPACE {

// The places of a grid on each image in order: output pixels or tiles.
struct GridCursor {
  int64_t rows, cols;  // of an image
  int64_t image, row, col;

  GridCursor(int64_t rows, int64_t cols, int64_t place)
      : rows(rows),
        cols(cols),
        image(place / cols / rows),
        row(place / cols % rows),
        col(place % cols) {}
  void next() {
    if (++col < cols) return;
    col = 0;
    if (++row < rows) return;
    row = 0;
    ++image;
  }
};

// A vector from memory or to it where only `lanes` lanes may be left, with zeros behind them.
template <typename T>
static inline Reg load_lanes(const T* source, int64_t lanes) {
  return lanes >= Vec::kWidth ? Vec::load(source) : Vec::load(source, lanes);
}
template <typename T>
static inline void store_lanes(T* target, Reg value, int64_t lanes) {
  if (lanes >= Vec::kWidth) {
    Vec::store(target, value);
  } else {
    Vec::store(target, value, lanes);
  }
}

}  // namespace RESNET_FUSED_ISA_NAMESPACE
}  // namespace resnet_fused
