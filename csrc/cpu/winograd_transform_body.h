// What both ends of fused Winograd stand on: an algorithm's transforms in one dimension, written
// once over `Vec` and the points of winograd_points.h, and a job's tiles in their order.
#include "cpu/winograd.h"
#include "cpu/winograd_points.h"

namespace resnet_fused {
namespace RESNET_FUSED_ISA_NAMESPACE {

// The 1-D transforms of an algorithm, 16, 8 or 4 channels at a time.
template <class F>
struct Transform : WinogradSizes<F> {
  typedef WinogradSizes<F> S;
  static constexpr WinogradTables<F> kTables{};
  static constexpr int kZeros = F::kZero ? 1 : 0;

  // d: a window's row or column.
  static inline __attribute__((always_inline)) void input(const Reg (&d)[S::kWindow],
                                                          Reg (&t)[S::kPoints]) {
    if (F::kZero) t[0] = sum<F::kPairs>(d, kTables.all, 0);
#pragma GCC unroll 3
    for (int i = 0; i < F::kPairs; ++i) {
      const Reg point = Vec::set1(F::kPoints[i]);
      const Reg even = sum<F::kPairs - 1>(d, kTables.without[i], kZeros);
      const Reg odd = sum<F::kPairs - 1>(d, kTables.without[i], kZeros + 1);
      t[kZeros + 2 * i] = Vec::fma(point, even, odd);
      t[kZeros + 2 * i + 1] = Vec::fnma(point, even, odd);
    }
    t[S::kFinite] = sum<F::kPairs>(d, kTables.all, kZeros);
#pragma GCC unroll 4
    for (int i = 0; i < S::kPlain; ++i) t[S::kInterpolated + i] = d[2 * i + 1];
  }

  static inline __attribute__((always_inline)) void output(const Reg (&m)[S::kPoints],
                                                           Reg (&y)[F::kOut]) {
    Reg total[F::kPairs], difference[F::kPairs];
#pragma GCC unroll 3
    for (int i = 0; i < F::kPairs; ++i) {
      total[i] = Vec::add(m[kZeros + 2 * i], m[kZeros + 2 * i + 1]);
      difference[i] = Vec::sub(m[kZeros + 2 * i], m[kZeros + 2 * i + 1]);
    }
#pragma GCC unroll 5
    for (int k = 0; k < F::kOut; ++k) {
      const Reg* half = k % 2 == 0 ? total : difference;
      Reg value = k == 0 ? half[0] : Vec::mul(Vec::set1(kTables.power[0][k]), half[0]);
#pragma GCC unroll 3
      for (int i = 1; i < F::kPairs; ++i) {
        value = Vec::fma(Vec::set1(kTables.power[i][k]), half[i], value);
      }
      if (k == 0 && F::kZero) value = Vec::add(value, m[0]);
      if (k == F::kOut - 1) value = Vec::add(value, m[S::kFinite]);
      if (S::kPlain > 0) value = Vec::add(value, m[S::kInterpolated + k]);
      y[k] = value;
    }
  }

 private:
  // sum of c[k] * (value 2k + first of those that interpolation sees), k = 0 ... kTop; c[kTop]
  // is 1.
  template <int kTop>
  static inline __attribute__((always_inline)) Reg sum(const Reg (&d)[S::kWindow],
                                                       const double (&c)[F::kPairs + 1],
                                                       int first) {
    Reg value = d[F::kStride * (2 * kTop + first)];
#pragma GCC unroll 3
    for (int k = 0; k < kTop; ++k) {
      value = Vec::fma(Vec::set1(c[k]), d[F::kStride * (2 * k + first)], value);
    }
    return value;
  }
};

// The tiles of a job in order, of `m` output pixels a side.
struct TileCursor : GridCursor {
  TileCursor(const ConvShape& shape, int64_t m, int64_t tile)
      : GridCursor(ceil_div(shape.out_h(), m), ceil_div(shape.out_w(), m), tile) {}
};

}  // namespace RESNET_FUSED_ISA_NAMESPACE
}  // namespace resnet_fused
