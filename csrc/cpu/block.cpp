#include "cpu/block.h"

#include <algorithm>
#include <atomic>

#include "cpu/arena.h"
#include "cpu/conv_jobs.h"
#include "cpu/l2.h"
#include "cpu/parallel.h"

namespace resnet_fused {
namespace {

constexpr int64_t kAlignment = 64;  // bytes

int64_t element_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Bytes of one image.
int64_t input_bytes(const BlockArgs& block, const ConvShape& s) {
  return s.in_h * s.in_w * s.in_channels * element_size(block.dtype);
}
int64_t output_bytes(const BlockArgs& block, const ConvShape& s) {
  return s.out_h() * s.out_w() * s.out_channels * element_size(block.dtype);
}

// What lies between x and y, in bytes: the outputs of the main path alternate between two buffers,
// the shortcut's has a third.
struct Buffers {
  int64_t sizes[3] = {0, 0, 0};

  Buffers(const BlockArgs& block, int64_t images) {
    const auto reserve = [&](int64_t& size, const BlockConv& conv) {
      const int64_t bytes = images * output_bytes(block, conv.shape);
      size = std::max(size, ceil_div(bytes, kAlignment) * kAlignment);
    };
    for (int64_t i = 0; i + 1 < block.main; ++i) reserve(sizes[i % 2], block.convs[i]);
    if (block.has_shortcut) reserve(sizes[2], block.convs[block.main]);
  }
  int64_t total() const { return sizes[0] + sizes[1] + sizes[2]; }
};

std::atomic<int64_t> forced_budget{0};

// Output pixels that a slice has for each thread, at the block's smallest map: enough for two jobs
// of full size, which read their weights once.
constexpr int64_t kPixelsPerThread = 768;

// One slice of `images` images through all convolutions.
class Slice {
 public:
  Slice(const BlockArgs& block, int64_t images, const char* x, char* y, char* arena)
      : block_(block), images_(images), threads_(thread_count()), x_(x), y_(y) {
    const Buffers buffers(block, images);
    main_[0] = arena;
    main_[1] = main_[0] + buffers.sizes[0];
    shortcut_ = main_[1] + buffers.sizes[1];
  }

  void run() const {
    const int64_t last = block_.main - 1;
    const void* input = x_;
    for (int64_t i = 0; i < last; ++i) {
      const ConvJobs conv = jobs(i, input, main_[i % 2], nullptr);
      if (i == 0 && block_.has_shortcut) {
        run_convs(conv, shortcut_jobs());
      } else {
        run_conv(conv);
      }
      input = main_[i % 2];
    }
    if (last == 0 && block_.has_shortcut) run_conv(shortcut_jobs());
    run_conv(jobs(last, input, y_, block_.has_shortcut ? shortcut_ : x_));
  }

 private:
  ConvJobs jobs(int64_t index, const void* x, void* y, const void* residual) const {
    const BlockConv& conv = block_.convs[index];
    ConvArgs args{conv.shape,  block_.dtype, conv.plan,  conv.relu, x,
                  conv.packed, conv.scale,   conv.shift, residual,  y};
    args.shape.batch = images_;
    return ConvJobs(args, threads_);
  }
  ConvJobs shortcut_jobs() const { return jobs(block_.main, x_, shortcut_, nullptr); }

  const BlockArgs& block_;
  int64_t images_, threads_;
  const char* x_;
  char* y_;
  char* main_[2];
  char* shortcut_;
};

}  // namespace

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
int64_t images_at_once(const BlockArgs& block) {
  const ConvShape& first = block.convs[0].shape;
  const int64_t image = input_bytes(block, first) + Buffers(block, 1).total() +
                        output_bytes(block, block.convs[block.main - 1].shape);
  int64_t weights = 0, smallest_map = first.in_h * first.in_w;
  for (int64_t i = 0; i < block.main + block.has_shortcut; ++i) {
    const ConvShape& shape = block.convs[i].shape;
    weights += block.convs[i].packed_bytes;
    smallest_map = std::min(smallest_map, shape.out_h() * shape.out_w());
  }
  int64_t together;  // at most the batch: the products below then count what the op has checked
  if (const int64_t forced = forced_budget.load(std::memory_order_relaxed)) {
    together = std::clamp<int64_t>(forced / image, 1, first.batch);
  } else {
    const int64_t threads = thread_count(), cache = l2_bytes() * threads;
    const int64_t wanted = weights > 4 * cache ? weights : cache * 3 / 2;
    const int64_t pixels = ceil_div(kPixelsPerThread * threads, smallest_map);
    together = std::clamp<int64_t>(std::max(wanted / image, pixels), 1, first.batch);
    if (together * image > 8 * cache) together = first.batch;
  }
  return ceil_div(first.batch, ceil_div(first.batch, together));  // equal slices
}

void set_block_budget(int64_t bytes) { forced_budget.store(bytes, std::memory_order_relaxed); }

void run_block(const BlockArgs& block) {
  const ConvShape& first = block.convs[0].shape;
  const int64_t together = images_at_once(block);
  const int64_t x_step = input_bytes(block, first);
  const int64_t y_step = output_bytes(block, block.convs[block.main - 1].shape);
  char* arena = static_cast<char*>(thread_arena(Buffers(block, together).total()));
  for (int64_t image = 0; image < first.batch; image += together) {
    const int64_t images = std::min(together, first.batch - image);
    Slice(block, images, static_cast<const char*>(block.x) + image * x_step,
          static_cast<char*>(block.y) + image * y_step, arena)
        .run();
  }
}

}  // namespace resnet_fused
