// The Winograd algorithms: interpolation points, and the 1-D transforms that follow from them.
//
// F(m, r) computes m outputs of an r-tap correlation from m + r - 1 inputs d with as many
// multiplications: both are polynomials, evaluated at m + r - 2 finite points and at infinity. All
// points here come as pairs +-p, with or without 0, for two reasons: the two rows of a pair share
// their even and odd halves, and the rounding errors are the smallest. With z = 1 if 0 is a point,
// else 0, and Q(x) the product of (x^2 - p^2) over all pairs, Q_i that without pair i:
//
//   B^T d:  0: sum Q[k] d[2k]     +-p_i: sum Q_i[k] d[2k+1+z] +- p_i sum Q_i[k] d[2k+z]
//           infinity: sum Q[k] d[2k+z]
//   G w:    p: (1, p, p^2 ...) . w / prod (p - q) over the other finite points q; infinity: w[r-1]
//   A^T m:  y[k] = sum of p^k m[p] over the finite points, + m[infinity] for the last k
//
// Order of the points: 0 if present, +p_1, -p_1, +p_2, -p_2, ..., infinity.
//
// A 3-tap correlation of stride 2 is split by parity (polyphase): taps 0 and 2 see the even inputs
// at stride 1, which is an F(m, 2), and tap 1 the odd ones, which is m plain products. That takes
// 2m + 1 multiplications instead of 3m.
//
// Which points: relative rms error of one convolution of 64 channels in float32, simulated, against
// the usual points 0, +-1, +-2, +-1/2:
//   F(4, 3)  0, +-5/8, +-3/2        6.4e-7   (usual 1.6e-6; 0, +-3/4, +-3/2 6.5e-7)
//   F(5, 3)  +-1/4, +-7/8, +-7/4    1.2e-6   (usual 2.9e-6)
//   F(4, 2)  +-3/8, +-5/4           4.4e-7   (usual 1.0e-6)
#pragma once

#include <cstdint>

namespace resnet_fused {

// An algorithm in one dimension: kOut outputs of a 3-tap correlation of stride kStride.
struct Winograd2 {
  static constexpr int kOut = 2, kStride = 1, kPairs = 1;
  static constexpr bool kZero = true;
  static constexpr double kPoints[kPairs] = {1.0};
};
struct Winograd4 {
  static constexpr int kOut = 4, kStride = 1, kPairs = 2;
  static constexpr bool kZero = true;
  static constexpr double kPoints[kPairs] = {0.625, 1.5};
};
struct Winograd5 {
  static constexpr int kOut = 5, kStride = 1, kPairs = 3;
  static constexpr bool kZero = false;
  static constexpr double kPoints[kPairs] = {0.25, 0.875, 1.75};
};
struct Winograd2S2 {
  static constexpr int kOut = 2, kStride = 2, kPairs = 1;
  static constexpr bool kZero = false;
  static constexpr double kPoints[kPairs] = {1.0};
};
struct Winograd4S2 {
  static constexpr int kOut = 4, kStride = 2, kPairs = 2;
  static constexpr bool kZero = false;
  static constexpr double kPoints[kPairs] = {0.375, 1.25};
};

// Coefficients of x^0, x^2, x^4, ... of Q and of every Q_i, and the powers p_i^k.
template <class F>
struct WinogradTables {
  double all[F::kPairs + 1] = {};
  double without[F::kPairs][F::kPairs + 1] = {};
  double power[F::kPairs][F::kOut] = {};

  constexpr WinogradTables() {
    fill(all, -1);
    for (int i = 0; i < F::kPairs; ++i) {
      fill(without[i], i);
      power[i][0] = 1.0;
      for (int k = 1; k < F::kOut; ++k) power[i][k] = power[i][k - 1] * F::kPoints[i];
    }
  }

 private:
  static constexpr void fill(double (&value)[F::kPairs + 1], int without) {
    value[0] = 1.0;
    int degree = 0;
    for (int i = 0; i < F::kPairs; ++i) {
      if (i == without) continue;
      ++degree;
      const double square = F::kPoints[i] * F::kPoints[i];
      for (int k = degree; k >= 0; --k) {
        value[k] = (k > 0 ? value[k - 1] : 0.0) - (k < degree ? square * value[k] : 0.0);
      }
    }
  }
};

// What the transforms of an algorithm consist of, in one dimension.
template <class F>
struct WinogradSizes {
  static constexpr int kTaps = F::kStride == 1 ? 3 : 2;  // that interpolation handles
  static constexpr int kFinite = (F::kZero ? 1 : 0) + 2 * F::kPairs;
  static constexpr int kInterpolated = kFinite + 1;             // points with infinity
  static constexpr int kPlain = F::kStride == 1 ? 0 : F::kOut;  // products of the middle tap
  static constexpr int kPoints = kInterpolated + kPlain;
  static constexpr int kWindow = F::kStride * (F::kOut - 1) + 3;  // inputs of a tile
  static_assert(kInterpolated == F::kOut + kTaps - 1, "as many points as inputs");

  // The finite point at place i of the order above.
  static constexpr double point(int i) {
    const int place = i - (F::kZero ? 1 : 0);
    if (place < 0) return 0.0;
    return place % 2 == 0 ? F::kPoints[place / 2] : -F::kPoints[place / 2];
  }
};

// G: what each of the three taps contributes to each point.
template <class F>
struct WeightTransform {
  double value[WinogradSizes<F>::kPoints][3] = {};

  constexpr WeightTransform() {
    typedef WinogradSizes<F> S;
    const int spread = F::kStride;  // taps 0, 1, 2 or 0, 2
    for (int i = 0; i < S::kFinite; ++i) {
      const double p = S::point(i);
      double norm = 1.0;
      for (int j = 0; j < S::kFinite; ++j) {
        if (j != i) norm *= p - S::point(j);
      }
      double power = 1.0 / norm;
      for (int tap = 0; tap < S::kTaps; ++tap, power *= p) value[i][tap * spread] = power;
    }
    value[S::kFinite][2] = 1.0;  // infinity: the last tap
    for (int i = 0; i < S::kPlain; ++i) value[S::kInterpolated + i][1] = 1.0;
  }
};

}  // namespace resnet_fused
