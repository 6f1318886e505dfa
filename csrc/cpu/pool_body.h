// The max-pool of the stem behind a convolution that does not compute it itself, over `Vec`.
//
// Memory-bound: each pixel's channels are read where they lie, and the 9 pixels of a window reach
// 3 rows, which stay in the cache.
#include "cpu/pool.h"

namespace resnet_fused {
namespace RESNET_FUSED_ISA_NAMESPACE {

// The rows and columns of one window that lie inside the image.
struct Window {
  int64_t top, bottom, left, right;

  Window(const PoolArgs& args, int64_t row, int64_t col)
      : top(row > 0 ? 2 * row - 1 : 0),
        bottom(2 * row + 2 < args.in_h ? 2 * row + 2 : args.in_h),
        left(col > 0 ? 2 * col - 1 : 0),
        right(2 * col + 2 < args.in_w ? 2 * col + 2 : args.in_w) {}
};

template <typename T>
static inline void pool_pixel(const PoolArgs& args, const Window& window, const T* image, T* y) {
  for (int64_t c = 0; c < args.channels; c += Vec::kWidth) {
    const int64_t lanes = args.channels - c;
    Reg largest = Vec::set1(-__builtin_inff());
    for (int64_t row = window.top; row < window.bottom; ++row) {
      const T* x = image + row * args.in_w * args.channels + c;
      for (int64_t col = window.left; col < window.right; ++col) {
        const T* pixel = x + col * args.channels;
        largest = Vec::max(largest, load_lanes(pixel, lanes));
      }
    }
    store_lanes(y + c, largest, lanes);
  }
}

static inline void pool_pixel(const PoolArgs& args, const Window& window, const double* image,
                              double* y) {
  for (int64_t c = 0; c < args.channels; ++c) {
    double largest = -__builtin_inf();
    for (int64_t row = window.top; row < window.bottom; ++row) {
      for (int64_t col = window.left; col < window.right; ++col) {
        const double value = image[(row * args.in_w + col) * args.channels + c];
        if (value > largest || value != value) largest = value;  // a NaN is taken, and kept
      }
    }
    y[c] = largest;
  }
}

template <typename T>
static void pool_rows(const PoolArgs& args, int64_t begin, int64_t end) {
  const int64_t out_h = pooled(args.in_h), out_w = pooled(args.in_w);
  for (int64_t i = begin; i < end; ++i) {
    const T* image =
        static_cast<const T*>(args.x) + i / out_h * args.in_h * args.in_w * args.channels;
    T* y = static_cast<T*>(args.y) + i * out_w * args.channels;
    for (int64_t col = 0; col < out_w; ++col, y += args.channels) {
      pool_pixel(args, Window(args, i % out_h, col), image, y);
    }
  }
}

// Pooled rows [begin, end), counted through all images.
static void max_pool(const PoolArgs& args, int64_t begin, int64_t end) {
  switch (args.dtype) {
    case DType::kFloat32:
      return pool_rows<float>(args, begin, end);
    case DType::kBFloat16:
      return pool_rows<BFloat16>(args, begin, end);
    case DType::kFloat16:
      return pool_rows<Float16>(args, begin, end);
    case DType::kFloat64:
      return pool_rows<double>(args, begin, end);
  }
}

}  // namespace RESNET_FUSED_ISA_NAMESPACE
}  // namespace resnet_fused
