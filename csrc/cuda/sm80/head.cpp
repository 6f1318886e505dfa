// How the head's kernel cuts its work, and what it serves; without the CUDA runtime.
#include "cuda/sm80/head.h"

#include <algorithm>
#include <sstream>

namespace resnet_fused::sm80 {
namespace {

constexpr int kBlocks = 64;  // about; of all images
// Above, what all blocks read takes 4.4 us, or what one of them does 3.8: PyTorch's kernels, which
// read nothing twice, come near.
constexpr double kMostBytes = 24e6, kMostBlockBytes = 384e3;

}  // namespace

int head_block_classes(const HeadProblem& p) {
  return kHeadWarps * ceil_div(int(p.classes * p.images), kHeadWarps * kBlocks);
}

int head_blocks(const HeadProblem& p) { return ceil_div(int(p.classes), head_block_classes(p)); }

std::string head_refuses(const HeadProblem& p, Type type) {
  const int bytes = element_bytes(type), vector = 16 / bytes;
  constexpr int64_t kMost = 1 << 15;  // nothing below overflows
  std::ostringstream text;
  if (std::min({p.images, p.pixels, p.channels, p.classes}) < 1 ||
      std::max({p.images, p.pixels, p.channels, p.classes}) > kMost)
    text << "its kernel takes 1 to " << kMost << " images, pixels, channels and classes, got "
         << p.images << ", " << p.pixels << ", " << p.channels << " and " << p.classes;
  else if (p.channels % vector)
    text << "its kernel needs channels in multiples of " << vector << ", got " << p.channels;
  else if (head_shared_bytes(int(p.channels), bytes) > 48 << 10)
    text << "its kernel has no shared memory for " << p.channels << " channels";
  if (!text.str().empty()) return text.str();
  const double row = double(p.channels) * bytes, blocks = head_blocks(p);
  const double all = double(p.images) * row * (blocks * double(p.pixels) + double(p.classes));
  const double each = row * (double(p.pixels) + std::min<double>(head_block_classes(p), p.classes));
  if (all > kMostBytes || each > kMostBlockBytes)
    text << "its kernel would read " << int64_t(all / 1e6) << " MB, " << int64_t(each / 1e3)
         << " KB a block, and PyTorch's are as fast";
  return text.str();
}

}  // namespace resnet_fused::sm80
