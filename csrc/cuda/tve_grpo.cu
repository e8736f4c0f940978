#include <cuda_runtime.h>

#include "kvpo/error.h"
#include "tve_grpo.cuh"

namespace kvpo::cuda {
namespace {

void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess)
    throw CudaError(std::string(what) + ": " + cudaGetErrorString(status));
}

int attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

struct Grid {
  int blocks; // 0: it does not fit
  size_t shared_bytes;
};

// As many blocks as run at the same time and hold the differences of all chunks among them: more
// blocks on a multiprocessor hide more latency. The kernel's launch bounds leave registers for 4.
Grid resident_grid(int64_t chunks) {
  const int64_t processors = attribute(cudaDevAttrMultiProcessorCount);
  const auto per_block = static_cast<size_t>(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
  const auto together = static_cast<size_t>(attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor));
  const auto reserved = static_cast<size_t>(attribute(cudaDevAttrReservedSharedMemoryPerBlock));
  for (int64_t each = 4; each > 0; --each) {
    const int64_t blocks = processors * each < chunks ? processors * each : chunks;
    const int64_t held = (chunks + blocks - 1) / blocks;
    const size_t bytes = kBlockBytes + static_cast<size_t>(held) * kChunkBytes;
    if (held <= kMaxChunks && bytes <= per_block &&
        static_cast<size_t>(each) * (bytes + reserved) <= together)
      return {static_cast<int>(blocks), bytes};
  }
  return {0, 0};
}

// Always the same limit: calls of other sizes on other threads may come between this and the
// launch.
void allow_all_shared_memory(const void* kernel) {
  cudaFuncAttributes facts;
  check(cudaFuncGetAttributes(&facts, kernel), "tve_grpo: kernel");
  const int most = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             most - static_cast<int>(facts.sharedSizeBytes)),
        "tve_grpo: shared memory");
}

template <typename T, bool kAligned> void run(const TveGrpo& a, cudaStream_t stream) {
  const Trajectories& x = a.trajectories;
  const int64_t chunks = x.branches * x.steps * ((x.numel + kChunk - 1) / kChunk);
  const dim3 threads(kThreads);
  TveGrpo copy = a;
  void* arguments[] = {&copy};
  if (a.grad && attribute(cudaDevAttrCooperativeLaunch)) {
    const Grid grid = resident_grid(chunks);
    if (grid.blocks > 0) {
      const auto kernel = reinterpret_cast<const void*>(&fused_kernel<T, kAligned>);
      allow_all_shared_memory(kernel);
      const cudaError_t status =
          cudaLaunchCooperativeKernel(kernel, dim3(static_cast<unsigned>(grid.blocks)), threads,
                                      arguments, grid.shared_bytes, stream);
      if (status == cudaSuccess)
        return;
      cudaGetLastError(); // forget it
      // Others share the GPU, or it is partitioned: two launches will do.
      if (status != cudaErrorCooperativeLaunchTooLarge && status != cudaErrorNotSupported)
        check(status, "tve_grpo: launch");
    }
  }
  const int64_t few = 8 * static_cast<int64_t>(attribute(cudaDevAttrMultiProcessorCount));
  const int64_t needed = (chunks + kMaxChunks - 1) / kMaxChunks;
  const int64_t blocks = few < needed ? needed : (few < chunks ? few : chunks);
  check(cudaMemsetAsync(a.arrived, 0, sizeof(int), stream), "tve_grpo: counter");
  energy_kernel<T, kAligned><<<static_cast<unsigned>(blocks), threads, kBlockBytes, stream>>>(a);
  check(cudaGetLastError(), "tve_grpo: energy launch");
  if (!a.grad)
    return;
  gradient_kernel<T, kAligned><<<static_cast<unsigned>(chunks), threads, 0, stream>>>(a);
  check(cudaGetLastError(), "tve_grpo: gradient launch");
}

bool aligned(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % sizeof(uint4) == 0;
}

} // namespace

void tve_grpo(const TveGrpo& a, void* stream) {
  const Trajectories& x = a.trajectories;
  KVPO_CHECK(x.branches <= kMaxBranches, "takes up to " + std::to_string(kMaxBranches) +
                                             " branches, got " + std::to_string(x.branches));
  KVPO_CHECK(x.branches * x.steps * ((x.numel + kChunk - 1) / kChunk) < (int64_t{1} << 31),
             "too many values for one call");
  const bool whole =
      aligned(x.pred) && aligned(x.target) && aligned(a.grad) && x.numel % kPerThread == 0;
  const auto s = static_cast<cudaStream_t>(stream);
  if (x.bfloat16)
    whole ? run<bf16, true>(a, s) : run<bf16, false>(a, s);
  else
    whole ? run<float, true>(a, s) : run<float, false>(a, s);
}

} // namespace kvpo::cuda
