// Which convolutions the sm_80 kernel serves, and with which tile, splits and workspace. Host only;
// the same arithmetic on a machine without a GPU, where the tests hold it.
#pragma once

#include <string>
#include <vector>

#include "cuda/sm80/tiles.h"

namespace resnet_fused::sm80 {

// Elements, and how they are multiplied.
enum class Type { kBFloat16, kFloat16, kTf32, kFloat32 };
constexpr int element_bytes(Type type) { return type < Type::kTf32 ? 2 : 4; }
constexpr Math math_of(Type type) {
  return type < Type::kTf32 ? Math::kTensor : type == Type::kTf32 ? Math::kTf32 : Math::kFloat32;
}

// A tile of kTiles and the number of parts that the reduction is cut into.
struct Choice {
  int tile, splits;
};
// What of the device the choice depends on.
struct Device {
  int multiprocessors;
  int shared_bytes;  // of one
};

// Empty where the kernel serves this convolution, else one sentence.
std::string refuses(const Problem& p);
constexpr const char* kFar = "its taps reach further than indices of 31 bits do";
// Empty where this choice serves it.
std::string refuses(const Problem& p, Type type, const Choice& choice);
Choice choose(const Problem& p, Type type, const Device& device);
// What is worth measuring: every tile that serves, with its best number of splits, the least cost
// first.
std::vector<Choice> ranked(const Problem& p, Type type, const Device& device);
// Modelled clocks of the busiest multiprocessor, by what plan.cpp assumes of Ampere. Only
// comparisons mean something.
double cost(const Problem& p, Type type, const Choice& choice, const Device& device);

// "sm80 64x64 split 4", and back; false where the text names none.
std::string text(const Choice& choice);
bool parse(const std::string& text, Choice* choice);

struct Grid {
  int tiles, splits, threads, shared_bytes;
};
Grid grid_of(const Problem& p, Type type, const Choice& choice);

// Split-K's: one ticket a tile, zero between launches, and the sums. Zeros without splits.
struct Workspace {
  int64_t tickets, partial_floats;
};
Workspace workspace_of(const Problem& p, Type type, const Choice& choice);

// Dense tensors; all but scale and shift at multiples of 16 bytes. Null where there is none.
struct Operands {
  bool relu;
  const void *x, *weight, *shortcut_x, *shortcut_weight;
  const float *scale, *shift, *shortcut_scale, *shortcut_shift;
  const void* residual;
  void* y;
  float* partial;
  unsigned* tickets;  // zero; the kernel leaves them zero
};
KernelParams params_of(const Problem& p, Type type, const Choice& choice, const Operands& o);

}  // namespace resnet_fused::sm80
