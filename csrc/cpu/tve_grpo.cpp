#include "kvpo/tve_grpo.h"

#ifdef _OPENMP
#include <omp.h>
#endif

#include "simd.h"
#include "team.h"
#include "threads.h"

namespace kvpo::cpu::KVPO_ISA {
namespace {

// A gradient larger than this would push out of the cache what the next kernel wants, and reading
// its lines before they are overwritten would cost a third more traffic.
constexpr int64_t kStreamBytes = 8 << 20;
constexpr int kLanes = 64; // partial sums of a chunk, whatever the vector width
constexpr int kVecs = kLanes / kWidth;

template <int kCount> struct Count {
  static constexpr int value = kCount;
};

// Loads that go together, then their stores: malloc places tensors of whole pages 64 bytes apart
// within a page, and a core takes a load for dependent on a store whose address ends in the same 12
// bits.
constexpr int kTogether = KVPO_ISA_LEVEL >= 2 ? 16 : kVecs;

// Writes the differences to `kept` if it is not null.
template <bool kKeep, typename T>
float chunk_energy(const T* p, const T* t, [[maybe_unused]] T* kept, int64_t n) {
  Vec sum[kVecs];
  for (int j = 0; j < kVecs; ++j)
    sum[j] = zero();
  int64_t i = 0;
  const auto squares = [&](auto together) {
    constexpr int kCount = decltype(together)::value;
    for (; i + kCount * kWidth <= n; i += kCount * kWidth) {
      Vec d[kCount];
      for (int j = 0; j < kCount; ++j) {
        d[j] = sub(load(p + i + j * kWidth), load(t + i + j * kWidth));
        sum[j % kVecs] = fma(d[j], d[j], sum[j % kVecs]);
      }
      if constexpr (kKeep)
        for (int j = 0; j < kCount; ++j)
          store(kept + i + j * kWidth, d[j]);
    }
  };
  squares(Count<kTogether>());
  squares(Count<kVecs>());
  for (int j = 0; i + kWidth <= n; i += kWidth, ++j) {
    const Vec d = sub(load(p + i), load(t + i));
    sum[j] = fma(d, d, sum[j]);
    if constexpr (kKeep)
      store(kept + i, d);
  }
  float rest = 0.0f;
  for (; i < n; ++i) {
    const float d = to_float(p[i]) - to_float(t[i]);
    rest += d * d;
    if constexpr (kKeep)
      from_float(kept[i], d);
  }
  for (int half = kVecs / 2; half > 0; half /= 2)
    for (int j = 0; j < half; ++j)
      sum[j] = add(sum[j], sum[j + half]);
  return sum_lanes(sum[0]) + rest;
}

// With `kKept`, `out` holds the differences already.
template <bool kKept, typename T>
void chunk_gradient(const T* p, const T* t, float k, T* out, int64_t n, bool streaming) {
  int64_t i = 0;
  const auto one = [&](int64_t j) {
    const float d = kKept ? to_float(out[j]) : to_float(p[j]) - to_float(t[j]);
    from_float(out[j], k == 0.0f ? 0.0f : d * k);
  };
  if (streaming)
    for (; i < n && reinterpret_cast<uintptr_t>(out + i) % 64 != 0; ++i)
      one(i);
  const Vec factor = broadcast(k);
  const auto product = [&](int64_t j) {
    return mul(kKept ? load(out + j) : sub(load(p + j), load(t + j)), factor);
  };
  const auto put = [&](int64_t j, const Vec& v) {
    streaming ? stream(out + j, v) : store(out + j, v);
  };
  for (; k != 0.0f && i + kTogether * kWidth <= n; i += kTogether * kWidth) {
    Vec products[kTogether];
    for (int j = 0; j < kTogether; ++j)
      products[j] = product(i + j * kWidth);
    for (int j = 0; j < kTogether; ++j)
      put(i + j * kWidth, products[j]);
  }
  for (; i + kWidth <= n; i += kWidth)
    put(i, k == 0.0f ? zero() : product(i));
  for (; i < n; ++i)
    one(i);
}

// A thread's share of the chunks, numbered through all rows [g, s].
struct Share {
  int64_t begin, end;
};
Share share(int64_t tasks) {
#ifdef _OPENMP
  const int64_t t = omp_get_thread_num(), n = omp_get_num_threads();
#else
  const int64_t t = 0, n = 1;
#endif
  return {tasks * t / n, tasks * (t + 1) / n};
}

template <typename T> bool streams(const Trajectories& x) {
  return x.branches * x.steps * x.numel * static_cast<int64_t>(sizeof(T)) >= kStreamBytes;
}

int thread_count(const Trajectories& x) {
  return threads_for(Work::kVelocities, x.branches * x.steps * x.numel, x.threads);
}

template <bool kKeep, typename T> void energies_of(const VelocityEnergy& a, void* kept = nullptr) {
  const Trajectories& x = a.trajectories;
  const int64_t chunks = energy_chunks(x.numel);
  const Share mine = share(x.branches * x.steps * chunks);
  for (int64_t u = mine.begin; u < mine.end; ++u) {
    const int64_t first = u % chunks * kEnergyChunk, at = u / chunks * x.numel + first;
    a.partials[u] = chunk_energy<kKeep>(
        static_cast<const T*>(x.pred) + at, static_cast<const T*>(x.target) + at,
        kKeep ? static_cast<T*>(kept) + at : nullptr, min_of(kEnergyChunk, x.numel - first));
  }
}

void sum_partials(const VelocityEnergy& a) {
  const Trajectories& x = a.trajectories;
  const double* partial = a.partials;
  const int64_t chunks = energy_chunks(x.numel);
  for (int64_t g = 0; g < x.branches; ++g) {
    double energy = 0.0;
    for (int64_t s = 0; s < x.steps; ++s) {
      double sum = 0.0;
      for (int64_t c = 0; c < chunks; ++c)
        sum += *partial++;
      energy += a.weights[g * a.weights_stride + s] * (sum / static_cast<double>(x.numel));
    }
    a.energies[g] = energy;
  }
}

// Runs of chunks from the last to the first, so that what the energy pass read last is found in the
// cache; upwards within a run, which is what the hardware prefetcher follows.
template <bool kKept, typename T> void gradient_of(const VelocityGradient& a) {
  constexpr int64_t kRun = 32;
  const Trajectories& x = a.trajectories;
  const int64_t chunks = energy_chunks(x.numel), rows = x.branches * x.steps;
  const bool streaming = streams<T>(x);
  const Share mine = share(rows * chunks);
  for (int64_t end = mine.end; end > mine.begin; end -= kRun)
    for (int64_t u = max_of(end - kRun, mine.begin); u < end; ++u) {
      const int64_t row = u / chunks, first = u % chunks * kEnergyChunk, at = row * x.numel + first;
      chunk_gradient<kKept>(static_cast<const T*>(x.pred) + at,
                            static_cast<const T*>(x.target) + at,
                            static_cast<float>(a.coefficients[row]), static_cast<T*>(a.grad) + at,
                            min_of(kEnergyChunk, x.numel - first), streaming);
    }
  if (streaming)
    stream_fence();
}

template <typename T> void energy(const VelocityEnergy& a) {
  on_threads(thread_count(a.trajectories), [&] { energies_of<false, T>(a); });
  sum_partials(a);
}

template <typename T> void gradient(const VelocityGradient& a) {
  on_threads(thread_count(a.trajectories), [&] { gradient_of<false, T>(a); });
}

// From energies to the coefficients of the gradient, through the policy loss. The score gradient is
// rounded to float, as the caller sees it: so the two-pass form gives the same bits.
void policy(const TveGrpo& a) {
  const Trajectories& x = a.energy.trajectories;
  for (int64_t g = 0; g < x.branches; ++g)
    a.scores[g] = -static_cast<double>(static_cast<float>(a.energy.energies[g]));
  BranchPolicyLoss args = a.policy;
  args.scores = a.scores;
  cpu::branch_policy_loss(args);
  const double* kappa = args.numbers + kStatistics + kScoreGrad * x.branches;
  for (int64_t g = 0; g < x.branches; ++g)
    for (int64_t s = 0; s < x.steps; ++s)
      a.coefficients[g * x.steps + s] = -2.0 * static_cast<float>(kappa[g]) *
                                        a.grad_weights[g * a.energy.weights_stride + s] /
                                        static_cast<double>(x.numel);
}

// With `kKeep`, the differences wait in the gradient's memory for their coefficients.
template <bool kKeep, typename T> void fused(const TveGrpo& a) {
  on_threads(thread_count(a.energy.trajectories), [&] {
    energies_of<kKeep, T>(a.energy, a.grad);
#pragma omp barrier
#pragma omp single
    {
      sum_partials(a.energy);
      policy(a);
    }
    if (a.grad)
      gradient_of<kKeep, T>({a.energy.trajectories, a.coefficients, a.grad});
  });
}

// Keeping differences saves reading the inputs again, a fifth of the traffic, and costs writing
// them once: it pays where the gradient stays in the cache, and 16 bits would round them.
void fused_float(const TveGrpo& a) {
  a.grad && !streams<float>(a.energy.trajectories) ? fused<true, float>(a) : fused<false, float>(a);
}

} // namespace

void velocity_energy(const VelocityEnergy& args) {
  args.trajectories.bfloat16 ? energy<bf16>(args) : energy<float>(args);
}
void velocity_gradient(const VelocityGradient& args) {
  args.trajectories.bfloat16 ? gradient<bf16>(args) : gradient<float>(args);
}
void tve_grpo(const TveGrpo& args) {
  args.energy.trajectories.bfloat16 ? fused<false, bf16>(args) : fused_float(args);
}

} // namespace kvpo::cpu::KVPO_ISA
