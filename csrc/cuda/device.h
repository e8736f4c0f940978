// What the kernels need of the device beyond the language. Compiled for a CPU, where tests run the
// kernels thread by thread, it is csrc/tests/cuda_on_cpu.h.
#pragma once

#ifdef __CUDACC__

#include <cooperative_groups.h>

namespace kvpo::cuda {

// The launch's dynamic shared memory.
__device__ __forceinline__ void* shared_memory() {
  extern __shared__ uint4 memory[];
  return memory;
}

// All threads of a cooperative launch.
__device__ __forceinline__ void grid_barrier() {
  cooperative_groups::this_grid().sync();
}

// To bfloat16, to nearest even.
__device__ __forceinline__ uint16_t bfloat16_bits(float x) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}

} // namespace kvpo::cuda

#else
#include "cuda_on_cpu.h"
#endif
