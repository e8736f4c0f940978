// Threads that compute as their caller does.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "simd.h"

namespace kvpo::cpu::KVPO_ISA {
namespace {

// How floats are rounded and whether subnormal ones are flushed. It belongs to a thread, and those
// of OpenMP keep what they were started with: without this, bits would follow the partition.
struct FloatMode {
#if defined(__x86_64__)
  unsigned bits = _mm_getcsr();
  void set() const { _mm_setcsr(bits); }
#elif defined(__aarch64__)
  uint64_t bits = read();
  static uint64_t read() {
    uint64_t now;
    __asm__ volatile("mrs %0, fpcr" : "=r"(now));
    return now;
  }
  void set() const { __asm__ volatile("msr fpcr, %0" : : "r"(bits)); }
#else
  void set() const {}
#endif
};

// Calls work() on so many threads; `omp for`, `single` and `barrier` in it share it out.
template <typename Work> KVPO_INLINE void on_threads(int threads, Work&& work) {
  const FloatMode caller;
#pragma omp parallel num_threads(threads)
  {
    const FloatMode own;
    caller.set();
    work();
    own.set();
  }
}

// Calls visit(i) for all i below `count`, each thread for a stretch of them.
template <typename Visit> KVPO_INLINE void for_each(int64_t count, int threads, Visit&& visit) {
  on_threads(threads, [&] {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < count; ++i)
      visit(i);
  });
}

} // namespace
} // namespace kvpo::cpu::KVPO_ISA
