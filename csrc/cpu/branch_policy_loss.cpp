#include "kvpo/branch_policy_loss.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace kvpo::cpu {
namespace {

constexpr double kKlEpsilon = 1e-10; // of the official KL: log(pi + eps)
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

// A sum that does not depend on the order of the branches, to the bit: smallest terms first, NaN
// last.
class OrderedSum {
public:
  explicit OrderedSum(int64_t size) { terms_.reserve(static_cast<size_t>(size)); }
  void operator+=(double term) { terms_.push_back(term); }
  double total() {
    std::sort(terms_.begin(), terms_.end(),
              [](double a, double b) { return a < b || (std::isnan(b) && !std::isnan(a)); });
    double sum = 0.0;
    for (const double term : terms_)
      sum += term;
    return sum;
  }

private:
  std::vector<double> terms_;
};

// Log-softmax over the kept entries.
struct LogSoftmax {
  double peak = -std::numeric_limits<double>::infinity(), log_sum = 0.0;

  LogSoftmax(const double* x, const double* kept, int64_t size) {
    for (int64_t g = 0; g < size; ++g)
      if (kept[g] != 0.0 && x[g] > peak)
        peak = x[g];
    OrderedSum sum(size);
    for (int64_t g = 0; g < size; ++g)
      if (kept[g] != 0.0)
        sum += std::exp(x[g] - peak);
    log_sum = std::log(sum.total());
  }
  double operator()(double x) const { return x - peak - log_sum; }
};

} // namespace

void branch_policy_loss(const BranchPolicyLoss& args) {
  const int64_t G = args.branches;
  const BranchPolicyObjective& o = args.objective;
  const double *s = args.scores, *old = args.old_scores, *A = args.advantages;
  const double* ref = args.ref_scores ? args.ref_scores : old;
  double* const statistics = args.numbers;
  double* const rows = args.numbers + kStatistics;
  double* const grad = rows + kScoreGrad * G;
  double* const ratio = rows + kRatio * G;
  double* const log_ratio = rows + kLogRatio * G;
  double* const finite = rows + kFinite * G;

  int64_t count = 0;
  for (int64_t g = 0; g < G; ++g) {
    finite[g] = std::isfinite(s[g]) && std::isfinite(old[g]) && std::isfinite(A[g]) &&
                std::isfinite(ref[g]);
    count += finite[g] != 0.0;
  }
  if (count == 0 || (count < G && !o.drop)) {
    const double value = o.drop ? 0.0 : kNan;
    for (int i = 0; i < kStatistics; ++i)
      statistics[i] = value;
    if (o.drop)
      statistics[kDropped] = static_cast<double>(G);
    for (int64_t g = 0; g < G; ++g)
      grad[g] = value, ratio[g] = log_ratio[g] = kNan;
    return;
  }

  const LogSoftmax log_pi(s, finite, G), log_old(old, finite, G), log_ref(ref, finite, G);
  const double n = static_cast<double>(count), low = 1.0 - o.clip_low, high = 1.0 + o.clip_high;
  OrderedSum gains(G), divergences(G), negentropies(G), slopes(G), costs(G);
  double outside = 0.0;
  for (int64_t g = 0; g < G; ++g) {
    if (finite[g] == 0.0) {
      grad[g] = 0.0, ratio[g] = log_ratio[g] = kNan;
      continue;
    }
    const double lp = log_pi(s[g]), pi = std::exp(lp), r = lp - log_old(old[g]);
    const double clamped = std::fmin(std::fmax(r, -o.log_ratio_clamp), o.log_ratio_clamp);
    const double rho = std::exp(clamped), clipped = std::fmin(std::fmax(rho, low), high);
    gains += std::fmin(rho * A[g], clipped * A[g]);
    const bool active =
        !(A[g] > 0 && rho > high) && !(A[g] < 0 && rho < low) && std::fabs(r) <= o.log_ratio_clamp;
    const double divergence = std::log(pi + kKlEpsilon) - log_ref(ref[g]);
    divergences += pi * divergence;
    negentropies += pi * lp;
    outside += rho < low || rho > high;
    grad[g] = active ? -A[g] * rho / n : 0.0;
    slopes += grad[g];
    costs += pi * (divergence + pi / (pi + kKlEpsilon));
    ratio[g] = rho;
    log_ratio[g] = r;
  }
  const double objective = gains.total(), kl = divergences.total(), sum_a = slopes.total(),
               mean_c = costs.total();
  for (int64_t g = 0; g < G; ++g) {
    if (finite[g] == 0.0)
      continue;
    const double pi = std::exp(log_pi(s[g]));
    const double c = std::log(pi + kKlEpsilon) - log_ref(ref[g]) + pi / (pi + kKlEpsilon);
    grad[g] = o.scale * (grad[g] - pi * sum_a + o.kl_coef * pi * (c - mean_c));
  }
  const double entropy = -o.branch_mass * (negentropies.total() + std::log(o.branch_mass));
  statistics[kLoss] = o.scale * (-objective / n + o.kl_coef * kl);
  statistics[kGrpo] = -objective / n;
  statistics[kKl] = kl;
  statistics[kEntropy] = entropy;
  statistics[kClipFraction] = outside / n;
  statistics[kSkip] =
      o.min_entropy_ratio > 0 && entropy > std::log(n) * (1.0 - o.min_entropy_ratio);
  statistics[kDropped] = static_cast<double>(G - count);
}

} // namespace kvpo::cpu
