// The kernels of tve_grpo.cu, apart from their launches so that a CPU can run them in tests.
//
// A chunk of a block-step belongs to one block, eight neighbouring values to one thread. All sums
// have a fixed order: eight squares in a thread, the threads of a warp, the warps of a block, in
// double the chunks of a branch; and over branches smallest first. So neither the size of the grid
// nor the other branches matter to a bit.
#pragma once

#include <cstdint>

#include "device.h"
#include "kvpo/branch_policy_terms.h"
#include "kvpo/tve_grpo.h"

namespace kvpo::cuda {

using bf16 = uint16_t; // the bits of a bfloat16

constexpr int kWarps = kThreads / 32;
constexpr int kMaxChunks = 28; // of a block: 224 KiB of differences

// Shared memory of a block, before its differences.
struct BlockMemory {
  float warp_sums[kMaxChunks][kWarps];
  double values[kMaxBranches], sorted[kMaxBranches];
  int last;
};
constexpr size_t kBlockBytes = (sizeof(BlockMemory) + 15) / 16 * 16;
constexpr size_t kChunkBytes = kChunk * sizeof(float);

__device__ __forceinline__ BlockMemory& block_memory() {
  return *static_cast<BlockMemory*>(shared_memory());
}

// Differences of a block's i-th chunk: each thread has its own, in two pieces of 16 bytes that lie
// apart so that a warp's accesses touch every bank.
__device__ __forceinline__ float4* kept(int i) {
  char* const after = static_cast<char*>(shared_memory()) + kBlockBytes;
  return reinterpret_cast<float4*>(after + i * kChunkBytes) + threadIdx.x;
}

__device__ __forceinline__ float to_float(float x) {
  return x;
}
__device__ __forceinline__ float to_float(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}
__device__ __forceinline__ void from_float(float& to, float x) {
  to = x;
}
__device__ __forceinline__ void from_float(bf16& to, float x) {
  to = bfloat16_bits(x);
}

// A thread's values of a chunk, which may end before them, or between them.
struct Place {
  int row; // g * S + s
  int64_t at;
  int left;
};

__device__ __forceinline__ Place place(const Trajectories& x, int64_t u) {
  const auto chunks = static_cast<uint32_t>((x.numel + kChunk - 1) / kChunk);
  const uint32_t row = static_cast<uint32_t>(u) / chunks, chunk = static_cast<uint32_t>(u) % chunks;
  const int64_t n = chunk * kChunk + static_cast<int64_t>(threadIdx.x) * kPerThread;
  const int64_t left = x.numel - n;
  return {static_cast<int>(row), row * x.numel + n,
          static_cast<int>(left < 0 ? 0 : (left < kPerThread ? left : kPerThread))};
}

template <typename T> struct alignas(16) Values {
  T value[kPerThread];
};

template <typename T, bool kAligned>
__device__ __forceinline__ Values<T> load(const void* data, const Place& p) {
  const T* const from = static_cast<const T*>(data) + p.at;
  Values<T> v;
  if (kAligned && p.left == kPerThread)
    return *reinterpret_cast<const Values<T>*>(from);
  for (int j = 0; j < kPerThread; ++j)
    v.value[j] = j < p.left ? from[j] : T(0);
  return v;
}

template <typename T, bool kAligned>
__device__ __forceinline__ void store(void* data, const Place& p, const float* d, float factor) {
  T* const to = static_cast<T*>(data) + p.at;
  Values<T> v;
  for (int j = 0; j < kPerThread; ++j)
    from_float(v.value[j], factor == 0.0f ? 0.0f : d[j] * factor); // zeros whatever d is
  if (kAligned && p.left == kPerThread)
    *reinterpret_cast<Values<T>*>(to) = v;
  else
    for (int j = 0; j < p.left; ++j)
      to[j] = v.value[j];
}

template <typename T, bool kAligned>
__device__ __forceinline__ void differences(const Trajectories& x, const Place& p, float* d) {
  const Values<T> a = load<T, kAligned>(x.pred, p), b = load<T, kAligned>(x.target, p);
#pragma unroll
  for (int j = 0; j < kPerThread; ++j)
    d[j] = to_float(a.value[j]) - to_float(b.value[j]);
}

// The block's chunks u = blockIdx, blockIdx + gridDim, ...: sums of squares into `partials`.
template <typename T, bool kAligned, bool kKeep> __device__ void energy_pass(const TveGrpo& a) {
  const Trajectories& x = a.trajectories;
  const int64_t total = x.branches * x.steps * ((x.numel + kChunk - 1) / kChunk);
  BlockMemory& memory = block_memory();
  int mine = 0;
#pragma unroll 2
  for (int64_t u = blockIdx.x; u < total; u += gridDim.x, ++mine) {
    float d[kPerThread], sum = 0.0f;
    differences<T, kAligned>(x, place(x, u), d);
#pragma unroll
    for (int j = 0; j < kPerThread; ++j)
      sum = fmaf(d[j], d[j], sum);
    if (kKeep) {
      kept(mine)[0] = make_float4(d[0], d[1], d[2], d[3]);
      kept(mine)[kThreads] = make_float4(d[4], d[5], d[6], d[7]);
    }
    for (int step = 16; step > 0; step /= 2)
      sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (threadIdx.x % 32 == 0)
      memory.warp_sums[mine][threadIdx.x / 32] = sum;
  }
  __syncthreads();
  if (static_cast<int>(threadIdx.x) < mine) {
    double sum = 0.0;
    for (int w = 0; w < kWarps; ++w)
      sum += memory.warp_sums[threadIdx.x][w];
    a.partials[blockIdx.x + static_cast<int64_t>(threadIdx.x) * gridDim.x] = sum;
  }
}

// Over the first G threads, by every thread. Smallest first: the order of the branches does not
// matter to a bit, nor do zeros for those left out. Nobody may still be reading `values`; who reads
// `sorted` of the sum before is done by the first barrier.
__device__ inline double ordered_sum(double term, int G) {
  BlockMemory& memory = block_memory();
  const int g = static_cast<int>(threadIdx.x);
  if (g < G)
    memory.values[g] = term;
  __syncthreads();
  if (g < G) {
    int rank = 0;
    for (int i = 0; i < G; ++i) {
      const double other = memory.values[i];
      rank += other < term || (other == term && i < g);
    }
    memory.sorted[rank] = term;
  }
  __syncthreads();
  double sum = 0.0;
  for (int i = 0; i < G; ++i)
    sum += memory.sorted[i];
  return sum;
}

__device__ inline double log_softmax(double x, bool counts, int G) {
  BlockMemory& memory = block_memory();
  const int g = static_cast<int>(threadIdx.x);
  if (g < G)
    memory.values[g] = counts ? x : -INFINITY;
  __syncthreads();
  double peak = -INFINITY;
  for (int i = 0; i < G; ++i)
    peak = fmax(peak, memory.values[i]);
  __syncthreads(); // all have read the values
  return x - peak - log(ordered_sum(counts ? exp(x - peak) : 0.0, G));
}

// By one block, once all partials are there: energies, the policy loss with a thread for each
// branch, and the coefficients of the gradient.
__device__ inline void policy(const TveGrpo& a) {
  const Trajectories& x = a.trajectories;
  const BranchPolicyObjective& o = a.objective;
  const int G = static_cast<int>(x.branches), S = static_cast<int>(x.steps);
  const int g = static_cast<int>(threadIdx.x), lane = g % 32;
  float* const rows = a.numbers + kStatistics;
  float* const energies = rows + kBranchRows * G;

  const int64_t chunks = (x.numel + kChunk - 1) / kChunk, per_branch = S * chunks;
  for (int branch = g / 32; branch < G; branch += kWarps) {
    double energy = 0.0;
    for (int64_t i = lane; i < per_branch; i += 32)
      energy += __ldcg(a.partials + branch * per_branch + i) *
                a.weights[branch * a.weights_stride + i / chunks];
    for (int step = 16; step > 0; step /= 2)
      energy += __shfl_xor_sync(0xffffffffu, energy, step);
    if (lane == 0)
      energies[branch] = static_cast<float>(energy / static_cast<double>(x.numel));
  }
  __syncthreads();

  const bool there = g < G;
  const double score = there ? -static_cast<double>(energies[g]) : 0.0;
  const double old = there ? a.old_scores[g] : 0.0, A = there ? a.advantages[g] : 0.0;
  const double ref = there ? a.ref_scores[g] : 0.0;
  const bool finite = isfinite(score) && isfinite(old) && isfinite(A) && isfinite(ref);
  const bool counts = there && finite;
  const double count = ordered_sum(counts ? 1.0 : 0.0, G);
  double grad = 0.0, ratio = NAN, log_ratio = NAN;
  if (count == 0.0 || (count < G && !o.drop)) { // the same for all threads
    grad = void_value(o);
    if (g < kStatistics)
      a.numbers[g] = static_cast<float>(o.drop && g == kDropped ? G : grad);
  } else {
    const double log_pi = log_softmax(score, counts, G), log_old = log_softmax(old, counts, G);
    const double log_ref = log_softmax(ref, counts, G);
    const BranchTerms t = branch_terms(log_pi, log_old, log_ref, A, count, o);
    const auto sum = [&](double term) { return ordered_sum(counts ? term : 0.0, G); };
    const BranchTotals all{count,
                           sum(t.gain),
                           sum(t.pi * t.divergence),
                           sum(t.pi * t.log_pi),
                           sum(t.slope),
                           sum(t.pi * t.cost),
                           sum(t.outside)};
    if (counts) {
      grad = score_gradient(t, all, o);
      ratio = t.ratio;
      log_ratio = t.log_ratio;
    }
    if (g == 0)
      write_statistics(all, G, o, a.numbers);
  }
  if (!there)
    return;
  rows[kScoreGrad * G + g] = static_cast<float>(grad);
  rows[kRatio * G + g] = static_cast<float>(ratio);
  rows[kLogRatio * G + g] = static_cast<float>(log_ratio);
  rows[kFinite * G + g] = finite;
  // From the gradient as the caller sees it: so the two-pass form gives the same bits.
  const double kappa = static_cast<float>(grad);
  for (int s = 0; s < S; ++s)
    a.coefficients[g * S + s] = static_cast<float>(
        -2.0 * kappa * a.grad_weights[g * a.weights_stride + s] / static_cast<double>(x.numel));
}

// All in one cooperative launch, the differences kept in shared memory.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kThreads, 4) fused_kernel(const TveGrpo a) {
  energy_pass<T, kAligned, true>(a);
  grid_barrier();
  if (blockIdx.x == 0)
    policy(a);
  grid_barrier();
  const Trajectories& x = a.trajectories;
  const int64_t total = x.branches * x.steps * ((x.numel + kChunk - 1) / kChunk);
  int mine = 0;
  for (int64_t u = blockIdx.x; u < total; u += gridDim.x, ++mine) {
    const Place p = place(x, u);
    float d[kPerThread];
    *reinterpret_cast<float4*>(d) = kept(mine)[0];
    *reinterpret_cast<float4*>(d + 4) = kept(mine)[kThreads];
    store<T, kAligned>(a.grad, p, d, __ldcg(a.coefficients + p.row));
  }
}

// The first of two launches: the block that is last to arrive goes on with the policy.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kThreads, 4) energy_kernel(const TveGrpo a) {
  energy_pass<T, kAligned, false>(a);
  __threadfence();
  __syncthreads(); // every thread's partials are visible before the block is counted
  if (threadIdx.x == 0)
    block_memory().last = atomicAdd(a.arrived, 1) + 1 == static_cast<int>(gridDim.x);
  __syncthreads();
  if (block_memory().last) {
    __threadfence();
    policy(a);
  }
}

// The second: a block for each chunk, from the last to the first, since the cache holds what the
// energy pass read last.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kThreads, 4) gradient_kernel(const TveGrpo a) {
  const Place p = place(a.trajectories, static_cast<int64_t>(gridDim.x) - 1 - blockIdx.x);
  float d[kPerThread];
  differences<T, kAligned>(a.trajectories, p, d);
  store<T, kAligned>(a.grad, p, d, a.coefficients[p.row]);
}

} // namespace kvpo::cuda
