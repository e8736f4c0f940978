// Trajectory velocity energies, their gradient, and both with the branch policy loss between them.
//
//   energy[g]     = sum_s weights[g, s] mean((pred[g, s] - target[g, s])^2)
//   grad[g, s]    = coefficients[g, s] (pred[g, s] - target[g, s])
//
// Differences are taken in float and summed in a fixed order: float within a chunk of
// kEnergyChunk values, double across chunks. Results do not depend on the number of threads, and a
// branch's results do not depend on the other branches. A coefficient of 0 writes zeros whatever
// the difference is. Re-entrant: all scratch memory is the caller's.
#pragma once

#include <cstdint>

#include "kvpo/branch_policy_loss.h"

namespace kvpo {

constexpr int64_t kEnergyChunk = 4096;

struct Trajectories {
  int64_t branches;   // G
  int64_t steps;      // S
  int64_t numel;      // N, values of one block-step
  bool bfloat16;      // else float
  const void* pred;   // [G, S, N]
  const void* target; // [G, S, N]
  int threads;        // upper bound
};

// Internal linkage: an inline function of one instruction set must not serve another.
[[maybe_unused]] static int64_t energy_chunks(int64_t numel) {
  return (numel + kEnergyChunk - 1) / kEnergyChunk;
}

struct VelocityEnergy {
  Trajectories trajectories;
  const double* weights;  // [S], or [G, S]
  int64_t weights_stride; // from branch to branch: 0, or S
  double* partials;       // scratch [G, S, chunks]
  double* energies;       // [G]
};

struct VelocityGradient {
  Trajectories trajectories;
  const double* coefficients; // [G, S]
  void* grad;                 // [G, S, N], dtype of pred
};

// The scores are the negative energies rounded to float, as the caller sees them.
struct TveGrpo {
  VelocityEnergy energy;
  const double* grad_weights; // as `weights`, 0 for a block-step without gradient
  BranchPolicyLoss policy;    // `scores` is ignored: this fills `scores`
  double* scores;             // scratch [G]
  double* coefficients;       // scratch [G, S]
  void* grad;                 // [G, S, N], or null
};

namespace cpu {
void velocity_energy(const VelocityEnergy& args);
void velocity_gradient(const VelocityGradient& args);
void tve_grpo(const TveGrpo& args);
} // namespace cpu

// On a GPU. All pointers are the current device's; results stay there and nothing waits for them.
namespace cuda {

constexpr int kThreads = 256, kPerThread = 8;
constexpr int64_t kChunk = kThreads * kPerThread; // values whose squares are added up in float
constexpr int64_t kMaxBranches = kThreads;

struct TveGrpo {
  Trajectories trajectories;  // `threads` is ignored
  const double* weights;      // [S], or [G, S]
  const double* grad_weights; // as `weights`, 0 for a block-step without gradient
  int64_t weights_stride;     // from branch to branch: 0, or S
  BranchPolicyObjective objective;
  const float* old_scores; // [G]
  const float* advantages; // [G]
  const float* ref_scores; // [G], may be `old_scores`
  double* partials;        // scratch [G, S, chunks of kChunk]
  float* coefficients;     // scratch [G, S]
  int* arrived;            // scratch [1]
  float* numbers;          // [kStatistics + (kBranchRows + 1) * G]: last the energies
  void* grad;              // [G, S, N], or null
};

// One launch where the GPU's shared memory holds all differences between the passes, else two.
// Throws Error for what it cannot run, CudaError for what the runtime refuses.
void tve_grpo(const TveGrpo& args, void* stream);
} // namespace cuda

} // namespace kvpo
