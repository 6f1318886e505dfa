// Which convolutions the sm_90a kernel serves, and with which tile, splits and blocks. Host only;
// the same arithmetic on a machine without a GPU, where the tests hold it.
#pragma once

#include <string>
#include <vector>

#include "cuda/sm90/tiles.h"

namespace resnet_fused::sm90 {

// A tile of kTiles and the number of parts that the reduction is cut into; or the tap-shift kernel,
// in one part.
struct Choice {
  int tile, splits;
};
constexpr int kTapShift = kTileCount;
// What of the device the choice depends on.
struct Device {
  int multiprocessors;
  int largest_cluster;  // blocks; less than 8 on a small part of a GPU (cluster.h)
};
struct Cost {
  double microseconds;  // modelled; plan.cpp says by which measurements
  int blocks;
};

// Empty where the kernel serves this convolution, else one sentence.
std::string refuses(const Problem& p);
// Empty where this choice serves it on this device.
std::string refuses(const Problem& p, const Choice& choice, const Device& device);
Cost cost(const Problem& p, const Choice& choice, const Device& device);
Choice choose(const Problem& p, const Device& device);
// What is worth measuring: tap-shift where it serves and every tile of the right chunk with its
// best number of splits, the least cost first.
std::vector<Choice> ranked(const Problem& p, const Device& device);
int blocks(const Problem& p, const Choice& choice, const Device& device);

// "sm90 c128x256 split 4", or "sm90 tap-shift split 1", and back; false where the text names none.
std::string text(const Choice& choice);
bool parse(const std::string& text, Choice* choice);

}  // namespace resnet_fused::sm90
