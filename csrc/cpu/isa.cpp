#include "isa.h"

#include <atomic>

namespace kvpo::cpu {
namespace {

Isa detect() {
#if KVPO_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return Isa::kAvx512Bf16;
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return Isa::kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c"))
    return Isa::kAvx2;
#endif
  return Isa::kPortable;
}

std::atomic<int> limit{static_cast<int>(Isa::kAvx512Bf16)};

} // namespace

Isa isa() {
  static const Isa best = detect();
  const int allowed = limit.load(std::memory_order_relaxed);
  return static_cast<int>(best) < allowed ? best : static_cast<Isa>(allowed);
}

void set_isa_limit(Isa value) {
  limit.store(static_cast<int>(value), std::memory_order_relaxed);
}

const char* name(Isa value) {
  switch (value) {
  case Isa::kPortable:
    return "portable";
  case Isa::kAvx2:
    return "avx2";
  case Isa::kAvx512:
    return "avx512";
  case Isa::kAvx512Bf16:
    return "avx512_bf16";
  }
  return "unknown";
}

} // namespace kvpo::cpu
