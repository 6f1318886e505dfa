#include "cpu/content.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>

#include "cpu/parallel.h"

namespace resnet_fused {
namespace {

using torch::stable::Tensor;

int64_t bits_at(const char* address, int64_t size) {
  int64_t bits = 0;
  std::memcpy(&bits, address, static_cast<size_t>(size));
  return bits;
}

// Calls visit(address, bytes) for each run of sampled values until it returns false; returns
// whether it never did.
template <typename Visit>
bool visit_samples(const Tensor& tensor, const Visit& visit) {
  const int64_t numel = tensor.numel();
  if (numel == 0) return true;
  const char* data = static_cast<const char*>(tensor.const_data_ptr());
  const int64_t size = static_cast<int64_t>(tensor.element_size());
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  if (sizes.size() == 1 && strides[0] == 1) return visit(data, numel * size);
  const int64_t count = sizes.size() <= 1 || numel < kSamples ? numel : kSamples;
  const int64_t step = numel / count;
  for (int64_t i = 0; i < count; ++i) {
    // The offset within each step differs, or a step that is a multiple of the kernel's area would
    // always look at the same tap.
    int64_t index = i * step + (i * 5) % step;
    int64_t offset = 0;
    for (size_t d = sizes.size(); d-- > 0;) {
      offset += index % sizes[d] * strides[d];
      index /= sizes[d];
    }
    if (!visit(data + offset * size, size)) return false;
  }
  return true;
}

// Calls visit(value) for the address, the dtype, all sizes and strides.
template <typename Visit>
void visit_layout(const Tensor& tensor, const Visit& visit) {
  visit(static_cast<int64_t>(reinterpret_cast<uintptr_t>(tensor.const_data_ptr())));
  visit(static_cast<int64_t>(tensor.scalar_type()));
  visit(tensor.dim());
  for (const int64_t size : tensor.sizes()) visit(size);
  for (const int64_t stride : tensor.strides()) visit(stride);
}

constexpr uint64_t kPrime = 0x9e3779b97f4a7c15u;
constexpr int64_t kBlock = int64_t{1} << 18;  // bytes hashed by one job

uint64_t mix(uint64_t hash, uint64_t word) {
  hash = (hash ^ word) * kPrime;
  return hash ^ (hash >> 29);
}

// Four independent chains, because one would wait for the multiplier's latency.
uint64_t hash_block(const char* data, int64_t bytes) {
  uint64_t lanes[4] = {1, 2, 3, 4};
  int64_t at = 0;
  for (; at + 32 <= bytes; at += 32) {
    for (int i = 0; i < 4; ++i) {
      lanes[i] = mix(lanes[i], static_cast<uint64_t>(bits_at(data + at + 8 * i, 8)));
    }
  }
  for (; at < bytes; at += 8) {
    lanes[0] =
        mix(lanes[0], static_cast<uint64_t>(bits_at(data + at, std::min<int64_t>(8, bytes - at))));
  }
  return mix(mix(mix(lanes[0], lanes[1]), lanes[2]), lanes[3]);
}

uint64_t hash_tensor(const Tensor& tensor) {
  const Tensor dense = torch::stable::contiguous(tensor);
  const int64_t bytes = dense.numel() * static_cast<int64_t>(dense.element_size());
  if (bytes == 0) return 0;
  const char* data = static_cast<const char*>(dense.const_data_ptr());
  std::vector<uint64_t> blocks(static_cast<size_t>((bytes + kBlock - 1) / kBlock));
  for_each_job(static_cast<int64_t>(blocks.size()), [&](int64_t i) {
    blocks[static_cast<size_t>(i)] =
        hash_block(data + i * kBlock, std::min(kBlock, bytes - i * kBlock));
  });
  uint64_t hash = static_cast<uint64_t>(bytes);
  for (const uint64_t block : blocks) hash = mix(hash, block);
  return hash;
}

}  // namespace

std::vector<char> content_sample(const std::vector<Tensor>& tensors) {
  std::vector<char> sample;
  for (const Tensor& tensor : tensors) {
    visit_samples(tensor, [&](const char* address, int64_t bytes) {
      sample.insert(sample.end(), address, address + bytes);
      return true;
    });
  }
  return sample;
}

bool content_equal(const std::vector<Tensor>& tensors, const char* sample, int64_t count) {
  int64_t at = 0;
  for (const Tensor& tensor : tensors) {
    const bool same = visit_samples(tensor, [&](const char* address, int64_t bytes) {
      if (at + bytes > count ||
          std::memcmp(sample + at, address, static_cast<size_t>(bytes)) != 0) {
        return false;
      }
      at += bytes;
      return true;
    });
    if (!same) return false;
  }
  return at == count;
}

ContentWatch::ContentWatch(const std::vector<Tensor>& tensors) : sample_(content_sample(tensors)) {
  for (const Tensor& tensor : tensors) {
    visit_layout(tensor, [&](int64_t value) { layout_.push_back(value); });
    visit_samples(tensor, [&](const char* address, int64_t bytes) {
      runs_.push_back({address, static_cast<size_t>(bytes)});
      return true;
    });
  }
}

void ContentWatch::prefetch() const {
  constexpr size_t kLine = 64;
  for (const Run& run : runs_) {
    for (size_t at = 0; at < run.bytes; at += kLine) __builtin_prefetch(run.address + at);
  }
}

bool ContentWatch::holds(const std::vector<Tensor>& tensors) const {
  size_t next = 0;
  bool same = true;
  for (const Tensor& tensor : tensors) {
    visit_layout(tensor, [&](int64_t value) {
      same = same && next < layout_.size() && layout_[next] == value;
      ++next;
    });
  }
  if (!same || next != layout_.size()) return false;
  const char* expected = sample_.data();
  for (const Run& run : runs_) {
    if (std::memcmp(expected, run.address, run.bytes) != 0) return false;
    expected += run.bytes;
  }
  return true;
}

int64_t content_hash(const std::vector<Tensor>& tensors) {
  uint64_t hash = 0;
  for (const Tensor& tensor : tensors) hash = mix(hash, hash_tensor(tensor));
  return static_cast<int64_t>(hash >> 1);
}

}  // namespace resnet_fused
