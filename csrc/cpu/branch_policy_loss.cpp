#include "kvpo/branch_policy_loss.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kvpo/branch_policy_terms.h"

namespace kvpo::cpu {
namespace {

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
    grad[g] = 0.0, ratio[g] = log_ratio[g] = kNan;
  }
  if (count == 0 || (count < G && !o.drop)) {
    const double value = void_value(o);
    std::fill(statistics, statistics + kStatistics, value);
    if (o.drop)
      statistics[kDropped] = static_cast<double>(G);
    std::fill(grad, grad + G, value);
    return;
  }

  const LogSoftmax log_pi(s, finite, G), log_old(old, finite, G), log_ref(ref, finite, G);
  const double n = static_cast<double>(count);
  std::vector<BranchTerms> terms(static_cast<size_t>(G));
  OrderedSum gains(G), divergences(G), negentropies(G), slopes(G), costs(G);
  double outside = 0.0;
  for (int64_t g = 0; g < G; ++g) {
    if (finite[g] == 0.0)
      continue;
    const BranchTerms t = terms[static_cast<size_t>(g)] =
        branch_terms(log_pi(s[g]), log_old(old[g]), log_ref(ref[g]), A[g], n, o);
    gains += t.gain;
    divergences += t.pi * t.divergence;
    negentropies += t.pi * t.log_pi;
    slopes += t.slope;
    costs += t.pi * t.cost;
    outside += t.outside;
    ratio[g] = t.ratio;
    log_ratio[g] = t.log_ratio;
  }
  const BranchTotals all{
      n,
      gains.total(),
      divergences.total(),
      negentropies.total(),
      slopes.total(),
      costs.total(),
      outside,
  };
  for (int64_t g = 0; g < G; ++g)
    if (finite[g] != 0.0)
      grad[g] = score_gradient(terms[static_cast<size_t>(g)], all, o);
  write_statistics(all, G, o, statistics);
}

} // namespace kvpo::cpu
