// Which instruction set's kernels run: chosen once by CPUID, forced with RESNET_FUSED_ISA.
#include <cpuid.h>

#include <atomic>
#include <cstdlib>

#include "check.h"
#include "cpu/kernels.h"

namespace resnet_fused {
namespace {

bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool has_avx512bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

// gcc 12's __builtin_cpu_supports does not know AMX: CPUID leaf 7 does.
bool has_amx_bf16() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx >> 22 & 1);
}

// where: what asks for `isa`, for errors; an empty isa is the widest that the CPU has.
const Kernels* find(const std::string& isa, const char* where) {
  const auto demand = [&](bool has, const Kernels& wanted) {
    check(has, where, " must be an instruction set of this CPU, got \"", isa, "\"");
    return &wanted;
  };
  if (isa.empty()) {
    if (has_avx512bf16()) return &kAvx512Bf16Kernels;
    if (has_avx512()) return &kAvx512Kernels;
    if (has_avx2()) return &kAvx2Kernels;
    return &kScalarKernels;
  }
  if (isa == "scalar") return &kScalarKernels;
  if (isa == "avx2") return demand(has_avx2(), kAvx2Kernels);
  if (isa == "avx512") return demand(has_avx512(), kAvx512Kernels);
  if (isa == "avx512bf16") return demand(has_avx512bf16(), kAvx512Bf16Kernels);
  fail(where, " must be scalar, avx2, avx512 or avx512bf16, got \"", isa, "\"");
}

const Kernels* find_at_start() {
  const char* variable = "RESNET_FUSED_ISA";
  const char* value = std::getenv(variable);
  return find(value ? value : "", variable);
}

std::atomic<const Kernels*> current{nullptr};

}  // namespace

const Kernels& kernels() {
  const Kernels* chosen = current.load(std::memory_order_acquire);
  if (!chosen) {
    chosen = find_at_start();
    current.store(chosen, std::memory_order_release);
  }
  return *chosen;
}

void use_isa(const std::string& isa) {
  current.store(isa.empty() ? find_at_start() : find(isa, "set_cpu_isa: isa"),
                std::memory_order_release);
}

std::string cpu_features() {
  std::string features = "scalar";
  if (has_avx2()) features += " avx2";
  if (has_avx512()) features += " avx512";
  if (has_avx512bf16()) features += " avx512bf16";
  if (has_amx_bf16()) features += " amx_bf16";
  return features;
}

}  // namespace resnet_fused
