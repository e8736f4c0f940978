// The contrastive policy loss of a group of branches, and its gradient in closed form.
//
//   pi       = softmax(scores);  ratio[g] = exp(clamp(log pi[g] - log pi_old[g]))
//   grpo     = -mean_g min(ratio[g] A[g], clip(ratio[g]) A[g])
//   kl       = sum_g pi[g] (log(pi[g] + 1e-10) - log pi_ref[g])
//   loss     = scale (grpo + kl_coef kl)
//   entropy  = -sum_g m pi[g] log(m pi[g]),  m = branch_mass
//
// A few hundred flops in double, so there is one build of it for all machines, without threads.
#pragma once

#include <cstdint>

namespace kvpo {

struct BranchPolicyObjective {
  double clip_low, clip_high; // ratios are clipped to [1 - clip_low, 1 + clip_high]
  double kl_coef;
  double log_ratio_clamp;
  double min_entropy_ratio; // skip where entropy > log(G) (1 - this); 0 never skips
  double scale;
  double branch_mass;
  bool drop; // leave out branches with a non-finite input; else such a branch makes all NaN
};

// The results lie in one array: these statistics, then rows [G] in the order of BranchPolicyRow.
enum BranchPolicyStatistic {
  kLoss,
  kGrpo,
  kKl,
  kEntropy,
  kClipFraction,
  kSkip,
  kDropped,
  kStatistics
};
enum BranchPolicyRow { kScoreGrad, kRatio, kLogRatio, kFinite, kBranchRows };

struct BranchPolicyLoss {
  int64_t branches; // G >= 1
  BranchPolicyObjective objective;
  const double* scores;     // [G]
  const double* old_scores; // [G]
  const double* advantages; // [G]
  const double* ref_scores; // [G], or null: the old policy
  double* numbers;          // [kStatistics + kBranchRows * G]
};

namespace cpu {
void branch_policy_loss(const BranchPolicyLoss& args);
} // namespace cpu

} // namespace kvpo
