// The interpolation points of the Winograd transforms, and what is derived from them.
#pragma once

namespace resnet_fused {

// F(4, 3) on the points 0, +-a, +-b and infinity with a = 5/8, b = 3/2. The usual points 0, +-1,
// +-2 are cheaper to write down and 2.5 times less accurate: rms error at 64 and 256
// channels 3.2e-7 and 4.3e-7 of the output's deviation against 7.9e-7 and 8.5e-7 (direct: 1.2e-7
// and 2.2e-7).
constexpr double kPointA = 0.625;
constexpr double kPointB = 1.5;

// G of F(4, 3): row p is (1, p, p^2) / prod of (p - q) over the other finite points q.
constexpr double kA2 = kPointA * kPointA, kB2 = kPointB * kPointB;
constexpr double kNormA = 2 * kA2 * (kA2 - kB2), kNormB = 2 * kB2 * (kB2 - kA2);
constexpr double kWeights4[6][3] = {
    {1 / (kA2 * kB2), 0, 0},
    {1 / kNormA, kPointA / kNormA, kA2 / kNormA},
    {1 / kNormA, -kPointA / kNormA, kA2 / kNormA},
    {1 / kNormB, kPointB / kNormB, kB2 / kNormB},
    {1 / kNormB, -kPointB / kNormB, kB2 / kNormB},
    {0, 0, 1},
};

// G of F(2, 3) on the points 0, 1, -1 and infinity.
constexpr double kWeights2[4][3] = {{1, 0, 0}, {0.5, 0.5, 0.5}, {0.5, -0.5, 0.5}, {0, 0, 1}};

}  // namespace resnet_fused
