#include "cpu/block.h"

#include <algorithm>
#include <atomic>

#include "cpu/arena.h"
#include "cpu/l2.h"
#include "cpu/pool.h"
#include "cpu/pooled_stem.h"

namespace resnet_fused {
namespace {

int64_t element_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

int64_t output_bytes_of(DType dtype, const ConvShape& s) {
  return s.out_h() * s.out_w() * s.out_channels * element_size(dtype);
}

// What lies between x and y, in bytes: the outputs of the main path alternate between two buffers,
// the shortcut's has a third.
struct Buffers {
  int64_t sizes[3] = {0, 0, 0};

  Buffers(const Block& block, int64_t images) {
    const auto reserve = [&](int64_t& size, const BlockConv& conv) {
      const int64_t bytes = images * output_bytes_of(block.dtype, conv.shape);
      size = std::max(size, aligned(bytes));
    };
    const int64_t main = block.main();
    for (int64_t i = 0; i + 1 < main; ++i) reserve(sizes[i % 2], block.convs[i]);
    if (block.has_shortcut) reserve(sizes[2], block.convs[main]);
    if (block.pool) reserve(sizes[0], block.convs[0]);
  }
  int64_t total() const { return sizes[0] + sizes[1] + sizes[2]; }
};

std::atomic<int64_t> forced_budget{0};

// Output pixels that a slice has for each thread, at the block's smallest map: enough for two jobs
// of full size, which read their weights once.
constexpr int64_t kPixelsPerThread = 768;

// How many images go through the block together.
//
// Measured with ResNet-18's and ResNet-50's blocks at batch 32, 2 threads with 1 MiB of L2 each
// (image: x, y and all between):
//
//                       image     weights   images a slice, and the time of a slice of 32
//   56 x 56,  64        2.3 MiB   1.1 MiB   1: -14%, 2: -13%, 4: -7%, 8: -1%
//   56 to 28, 64-128    1.9       2.6       1: -6%, 2: -7%, 4: -5%, 8: -1%
//   28 x 28, 128        1.2       4.5       1: -2%, 2: -10%, 4: -6%, 8: -1%
//   28 to 14, 128-256   1.0       10        2: +1%, 4: -1%, 8: 0
//   14 x 14, 256        0.6       18        1: +13%, 4: +6%, 8: +3%, 16: +1%
//   7 x 7, 512          0.3       32        1: +5%, 4: +4%, 8: +4%, 16: +2%
//   56 x 56, 64-256     8.4       0.7       1: -11%, 2: -3%, 4: -1%
//   28 x 28, 128-512    3.8       2.8       1: +11%, 2: +2%, 4: +1%
//
// So: as many images as fit one and a half times the threads' L2, but enough that every thread has
// jobs of full size, and weights that do not stay in the cache are not read more often than
// activations; all images where such a slice would not stay in the cache either.
int64_t images_at_once(const Block& block, int64_t threads) {
  const ConvShape& first = block.convs[0].shape;
  if (!block.adds) return first.batch;  // nothing is read again
  const int64_t image = block.input_bytes() + Buffers(block, 1).total() + block.output_bytes();
  int64_t weights = 0, smallest_map = first.in_h * first.in_w;
  for (const BlockConv& conv : block.convs) {
    weights += conv.packed_bytes;
    smallest_map = std::min(smallest_map, conv.shape.out_h() * conv.shape.out_w());
  }
  int64_t together;  // at most the batch: the products below then count what the op has checked
  if (const int64_t forced = forced_budget.load(std::memory_order_relaxed)) {
    together = std::clamp<int64_t>(forced / image, 1, first.batch);
  } else {
    const int64_t cache = l2_bytes() * threads;
    const int64_t wanted = weights > 4 * cache ? weights : cache * 3 / 2;
    const int64_t pixels = ceil_div(kPixelsPerThread * threads, smallest_map);
    together = std::clamp<int64_t>(std::max(wanted / image, pixels), 1, first.batch);
    if (together * image > 8 * cache) together = first.batch;
  }
  return ceil_div(first.batch, ceil_div(first.batch, together));  // equal slices
}

// One slice of `images` images through all convolutions.
class Slice {
 public:
  Slice(const Block& block, const Workers& workers, int64_t images, const char* x, char* y,
        char* memory)
      : block_(block), workers_(workers), images_(images), x_(x), y_(y) {
    const Buffers buffers(block, images);
    main_[0] = memory;
    main_[1] = main_[0] + buffers.sizes[0];
    shortcut_ = main_[1] + buffers.sizes[1];
  }

  void run(Member& member) const {
    const int64_t last = block_.main() - 1;
    const void* input = x_;
    for (int64_t i = 0; i < last; ++i) {
      const ConvJobs conv = jobs(i, input, main_[i % 2], nullptr);
      if (i == 0 && block_.has_shortcut) {
        run_convs(member, conv, shortcut_jobs());
      } else {
        run_conv(member, conv);
      }
      input = main_[i % 2];
    }
    if (last == 0 && block_.has_shortcut) run_conv(member, shortcut_jobs());
    if (block_.pool) return run_pooled(member);
    const char* added = block_.has_shortcut ? shortcut_ : x_;
    run_conv(member, jobs(last, input, y_, block_.adds ? added : nullptr));
  }

  ConvJobs jobs(int64_t index, const void* x, void* y, const void* residual) const {
    const BlockConv& conv = block_.convs[index];
    ConvArgs args{conv.shape,  block_.dtype, conv.plan,  conv.relu, x,
                  conv.packed, conv.scale,   conv.shift, residual,  y};
    args.shape.batch = images_;
    return ConvJobs(args, workers_);
  }

 private:
  ConvJobs shortcut_jobs() const { return jobs(block_.main(), x_, shortcut_, nullptr); }

  // A convolution, and its max-pool in a loop of its own, row by row.
  void run_pooled(Member& member) const {
    run_conv(member, jobs(0, x_, main_[0], nullptr));
    const ConvShape& s = block_.last();
    const PoolArgs args{block_.dtype, s.out_h(), s.out_w(), s.out_channels, main_[0], y_};
    member.for_each_job(images_ * pooled(s.out_h()),
                        [&](int64_t row) { workers_.isa->max_pool(args, row, row + 1); });
  }

  const Block& block_;
  const Workers& workers_;
  int64_t images_;
  const char* x_;
  char* y_;
  char* main_[2];
  char* shortcut_;
};

}  // namespace

int64_t Block::input_bytes() const {
  const ConvShape& s = convs[0].shape;
  return s.in_h * s.in_w * s.in_channels * element_size(dtype);
}

int64_t Block::output_bytes() const {
  const ConvShape& s = last();
  if (!pool) return output_bytes_of(dtype, s);
  return pooled(s.out_h()) * pooled(s.out_w()) * s.out_channels * element_size(dtype);
}

void set_block_budget(int64_t bytes) { forced_budget.store(bytes, std::memory_order_relaxed); }

BlockRun::BlockRun(const Block& block, const Workers& workers)
    : block_(block),
      workers_(workers),
      together_(images_at_once(block, workers.threads)),
      bytes_(pools_at_once() ? 0 : Buffers(block, together_).total()),
      edge_bytes_(pools_at_once() ? stem_edge_bytes(pooled_stem(nullptr, nullptr)) : 0) {}

ConvJobs BlockRun::pooled_stem(const char* x, char* y) const {
  return Slice(block_, workers_, together_, x, y, nullptr).jobs(0, x, y, nullptr);
}

void BlockRun::clear_edges(char* edges) const {
  if (pools_at_once()) clear_stem_edges(pooled_stem(nullptr, nullptr), edges);
}

void BlockRun::run(Member& member, const char* x, char* y, char* memory, char* edges) const {
  if (pools_at_once()) return run_pooled_stem(member, pooled_stem(x, y), edges);
  const int64_t batch = block_.convs[0].shape.batch;
  for (int64_t image = 0; image < batch; image += together_) {
    const int64_t images = std::min(together_, batch - image);
    Slice(block_, workers_, images, x + image * block_.input_bytes(),
          y + image * block_.output_bytes(), memory)
        .run(member);
  }
}

}  // namespace resnet_fused
