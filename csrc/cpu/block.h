// A residual block on raw pointers, as a part of a team's program:
//
//   y = act(conv_n(... conv_1(x)) + shortcut(x))        shortcut: the identity or a convolution
//
// The last convolution adds the shortcut in its epilogue. A convolution on the shortcut runs in the
// loop of conv_1. Large maps go through the block a few images at a time, so that what one
// convolution wrote is still in the cache when the next one reads it: images_at_once has the rule
// and its measurements. A convolution by itself is a block that adds nothing; a max-pool may follow
// it, in the same pass where its plan can.
#pragma once

#include <cstdint>
#include <vector>

#include "conv.h"
#include "cpu/conv_jobs.h"

namespace resnet_fused {

struct BlockConv {
  ConvShape shape;
  Plan plan;  // any but kTorch
  bool relu;
  const float* packed;
  const float* scale;
  const float* shift;
  int64_t packed_bytes;
};

// x, y and everything between have `dtype` and are dense NHWC; no output is empty.
struct Block {
  DType dtype;
  std::vector<BlockConv> convs;   // the main path in order, then the shortcut's if there is one
  bool has_shortcut, adds, pool;  // without `adds` one convolution, and `pool` only there

  int64_t main() const { return static_cast<int64_t>(convs.size()) - has_shortcut; }
  const ConvShape& last() const { return convs[static_cast<size_t>(main() - 1)].shape; }
  int64_t input_bytes() const;   // of one image, like all below
  int64_t output_bytes() const;  // pooled
};

// A block as it is about to run, on what the calling thread found when the call began.
class BlockRun {
 public:
  BlockRun(const Block& block, const Workers& workers);

  // Memory for what lies between x and y. The next block may use it, too.
  int64_t bytes() const { return bytes_; }
  // Memory for this run alone, and what the calling thread does with it before any job starts.
  int64_t edge_bytes() const { return edge_bytes_; }
  void clear_edges(char* edges) const;

  void run(Member& member, const char* x, char* y, char* memory, char* edges) const;

 private:
  bool pools_at_once() const { return block_.pool && block_.convs[0].plan == Plan::kStem; }
  ConvJobs pooled_stem(const char* x, char* y) const;

  const Block& block_;
  Workers workers_;
  int64_t together_;  // images
  int64_t bytes_, edge_bytes_;
};

// The bytes of activations that go through a block together, for the whole process; 0: as measured.
void set_block_budget(int64_t bytes);

}  // namespace resnet_fused
