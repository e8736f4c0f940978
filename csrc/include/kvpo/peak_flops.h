// The fastest this machine can multiply and add, which benchmarks divide by.
#pragma once

#include <cstdint>

namespace kvpo {

struct PeakFlops {
  bool pairs;         // products of bf16 pairs instead of floats, where the machine has them
  int threads;        // each does the same work
  int64_t iterations; // of one thread's loop
  double* operations; // written: floating-point operations done by all threads together
};

namespace cpu {
// Independent multiply-adds in registers, no memory. The caller takes the time.
void peak_flops(const PeakFlops& args);
} // namespace cpu

} // namespace kvpo
