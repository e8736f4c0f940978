// The branch policy loss, one branch at a time: what its CPU and CUDA code have in common. They
// differ in how they add up over branches.
//
// Only for sources that are compiled once: as inline functions of several instruction sets these
// would collide.
#pragma once

#include <cmath>

#include "kvpo/branch_policy_loss.h"

#ifdef __CUDACC__
#define KVPO_ANYWHERE __host__ __device__
#else
#define KVPO_ANYWHERE
#endif

namespace kvpo {

constexpr double kKlEpsilon = 1e-10; // of the official KL: log(pi + eps)

struct BranchTerms {
  double pi, log_pi, log_ratio, ratio;
  double gain;       // min(ratio A, clip(ratio) A)
  double divergence; // log(pi + eps) - log pi_ref
  double slope;      // d(grpo)/d(log ratio)
  double cost;       // d(kl)/d(log pi), over pi
  bool outside;      // of the clip range
};

// Sums over the branches that count.
struct BranchTotals {
  double count, gain, kl, negentropy, slope, cost, outside;
};

// Of a branch with these log-probabilities under the policy, the old one and the reference, one of
// `count` branches.
KVPO_ANYWHERE inline BranchTerms branch_terms(double log_pi, double log_old, double log_ref,
                                              double advantage, double count,
                                              const BranchPolicyObjective& o) {
  const double low = 1.0 - o.clip_low, high = 1.0 + o.clip_high, A = advantage;
  BranchTerms t;
  t.pi = exp(log_pi);
  t.log_pi = log_pi;
  t.log_ratio = log_pi - log_old;
  t.ratio = exp(fmin(fmax(t.log_ratio, -o.log_ratio_clamp), o.log_ratio_clamp));
  t.gain = fmin(t.ratio * A, fmin(fmax(t.ratio, low), high) * A);
  const bool active = !(A > 0 && t.ratio > high) && !(A < 0 && t.ratio < low) &&
                      fabs(t.log_ratio) <= o.log_ratio_clamp;
  t.slope = active ? -A * t.ratio / count : 0.0;
  t.divergence = log(t.pi + kKlEpsilon) - log_ref;
  t.cost = t.divergence + t.pi / (t.pi + kKlEpsilon);
  t.outside = t.ratio < low || t.ratio > high;
  return t;
}

// d(loss)/d(score).
KVPO_ANYWHERE inline double score_gradient(const BranchTerms& t, const BranchTotals& all,
                                           const BranchPolicyObjective& o) {
  return o.scale * (t.slope - t.pi * all.slope + o.kl_coef * t.pi * (t.cost - all.cost));
}

// The statistics of `branches` branches, of which `all.count` count.
template <typename T>
KVPO_ANYWHERE void write_statistics(const BranchTotals& all, int64_t branches,
                                    const BranchPolicyObjective& o, T* statistics) {
  const double grpo = -all.gain / all.count;
  const double entropy = -o.branch_mass * (all.negentropy + log(o.branch_mass));
  const bool skip =
      o.min_entropy_ratio > 0 && entropy > log(all.count) * (1.0 - o.min_entropy_ratio);
  statistics[kLoss] = static_cast<T>(o.scale * (grpo + o.kl_coef * all.kl));
  statistics[kGrpo] = static_cast<T>(grpo);
  statistics[kKl] = static_cast<T>(all.kl);
  statistics[kEntropy] = static_cast<T>(entropy);
  statistics[kClipFraction] = static_cast<T>(all.outside / all.count);
  statistics[kSkip] = static_cast<T>(skip);
  statistics[kDropped] = static_cast<T>(static_cast<double>(branches) - all.count);
}

// Where no branch counts, or one that must is not finite: what every statistic and gradient is.
KVPO_ANYWHERE inline double void_value(const BranchPolicyObjective& o) {
  return o.drop ? 0.0 : static_cast<double>(NAN);
}

} // namespace kvpo
