// Measuring the machine: the clock, the threads, the reads.
#include "cpu/peak.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>

#include "check.h"
#include "cpu/kernels.h"
#include "cpu/team.h"

namespace resnet_fused {
namespace {

constexpr int64_t kSteps = 4096;  // between two looks at the clock: about 15 microseconds

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Steps a second of all threads together. A thread that starts late has less time, as in a kernel.
double steps_per_second(double seconds, void (*chains)(int64_t)) {
  std::atomic<int64_t> done{0};
  const double start = now();
  for_each_job(thread_count(), [&](int64_t) {
    int64_t steps = 0;
    do {
      chains(kSteps);
      steps += kSteps;
    } while (now() - start < seconds);
    done.fetch_add(steps, std::memory_order_relaxed);
  });
  return static_cast<double>(done.load()) / (now() - start);
}

typedef uint64_t Words __attribute__((vector_size(16)));

// Sixteen-byte loads: two a cycle are as much as an L2 gives.
uint64_t xor_words(const char* data, int64_t bytes) {
  Words parts[8] = {};
  int64_t at = 0;
  for (; at + 128 <= bytes; at += 128) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      Words words;
      std::memcpy(&words, data + at + 16 * i, sizeof words);
      parts[i] ^= words;
    }
  }
  for (int i = 1; i < 8; ++i) parts[0] ^= parts[i];
  uint64_t result = parts[0][0] ^ parts[0][1];
  for (; at + 8 <= bytes; at += 8) {
    uint64_t word;
    std::memcpy(&word, data + at, sizeof word);
    result ^= word;
  }
  return result;
}

}  // namespace

double multiply_peak(double seconds) {
  const Kernels& isa = kernels();
  return steps_per_second(seconds, isa.multiply_chains) * kChains * isa.lanes;
}

double multiply_peak_bf16(double seconds) {
  const Kernels& isa = kernels();
  check(isa.bf16_products,
        "multiply_peak: dtype \"bfloat16\" must have the instruction set avx512bf16, got ",
        isa.isa);
  return steps_per_second(seconds, isa.multiply_chains_bf16) * kChains * 2 * isa.lanes;
}

uint64_t read_words(const void* data, int64_t bytes) {
  constexpr int64_t kLine = 64, kGrain = 1 << 14;  // bytes
  std::atomic<uint64_t> result{0};
  const char* first = static_cast<const char*>(data);
  for_each_span(ceil_div(bytes, kLine), kGrain / kLine, [&](int64_t begin, int64_t end) {
    result.fetch_xor(xor_words(first + begin * kLine, std::min(end * kLine, bytes) - begin * kLine),
                     std::memory_order_relaxed);
  });
  return result.load();
}

}  // namespace resnet_fused
