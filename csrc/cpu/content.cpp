#include "cpu/content.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>

#include "conv.h"
#include "cpu/samples.h"
#include "cpu/team.h"

namespace resnet_fused {
namespace {

using torch::stable::Tensor;

int64_t bits_at(const char* address, int64_t size) {
  int64_t bits = 0;
  std::memcpy(&bits, address, static_cast<size_t>(size));
  return bits;
}

template <typename Visit>
bool visit_samples_of(const Tensor& tensor, const Visit& visit) {
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  const Layout layout{static_cast<const char*>(tensor.const_data_ptr()),
                      static_cast<int64_t>(tensor.element_size()), tensor.dim(), sizes.data(),
                      strides.data()};
  return visit_samples(layout, visit);
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
  std::vector<uint64_t> blocks(static_cast<size_t>(ceil_div(bytes, kBlock)));
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
    visit_samples_of(tensor, [&](const char* address, int64_t bytes) {
      sample.insert(sample.end(), address, address + bytes);
      return true;
    });
  }
  return sample;
}

bool content_equal(const std::vector<Tensor>& tensors, const char* sample, int64_t count) {
  int64_t at = 0;
  for (const Tensor& tensor : tensors) {
    const bool same = visit_samples_of(tensor, [&](const char* address, int64_t bytes) {
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

int64_t content_hash(const std::vector<Tensor>& tensors) {
  uint64_t hash = 0;
  for (const Tensor& tensor : tensors) hash = mix(hash, hash_tensor(tensor));
  return static_cast<int64_t>(hash >> 1);
}

}  // namespace resnet_fused
