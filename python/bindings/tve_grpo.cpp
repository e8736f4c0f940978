// The energies, the branch policy loss, and both in one. The [G] and [S] inputs come as lists of
// floats: for a dozen numbers a list costs less than a tensor in the right dtype and its view.
#include <algorithm>
#include <optional>
#include <vector>

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "kvpo/tve_grpo.h"
#include "trajectories.h"

namespace py = pybind11;
using kvpo::dlpack::kFloat;
using kvpo::dlpack::View;
using Numbers = std::vector<double>;

namespace {

void expect_size(const Numbers& numbers, int64_t size, const char* name) {
  KVPO_CHECK(static_cast<int64_t>(numbers.size()) == size, std::string(name) + " has wrong size");
}

size_t partials_size(const kvpo::Trajectories& x) {
  return static_cast<size_t>(x.branches * x.steps * kvpo::energy_chunks(x.numel));
}

Numbers velocity_energy(const py::capsule& pred, const py::capsule& target, const Numbers& weights,
                        int threads) {
  const auto x = kvpo::trajectories(View(pred, "pred"), View(target, "target"), threads);
  const auto stride = kvpo::weights_stride(x, static_cast<int64_t>(weights.size()), "weights");
  Numbers energies(static_cast<size_t>(x.branches));
  py::gil_scoped_release release;
  Numbers partials(partials_size(x));
  kvpo::cpu::velocity_energy({x, weights.data(), stride, partials.data(), energies.data()});
  return energies;
}

void velocity_gradient(const py::capsule& pred, const py::capsule& target,
                       const Numbers& coefficients, const py::capsule& grad, int threads) {
  const View p(pred, "pred");
  const auto x = kvpo::trajectories(p, View(target, "target"), threads);
  expect_size(coefficients, x.branches * x.steps, "coefficients");
  void* const out = kvpo::gradient_data(View(grad, "grad"), p);
  py::gil_scoped_release release;
  kvpo::cpu::velocity_gradient({x, coefficients.data(), out});
}

kvpo::BranchPolicyLoss policy(int64_t branches, const Numbers& old, const Numbers& advantages,
                              const std::optional<Numbers>& ref,
                              const kvpo::BranchPolicyObjective& objective, Numbers& numbers) {
  KVPO_CHECK(branches > 0, "there must be a branch");
  expect_size(old, branches, "old_scores");
  expect_size(advantages, branches, "advantages");
  if (ref)
    expect_size(*ref, branches, "ref_scores");
  return {branches,      objective,         nullptr,
          old.data(),    advantages.data(), ref ? ref->data() : nullptr,
          numbers.data()};
}

// Where the numbers go: a float or double tensor of the size that the kernel fills.
class Output {
public:
  Output(const py::capsule& capsule, int64_t branches, int64_t rows)
      : view_(capsule, "numbers"),
        numbers_(static_cast<size_t>(kvpo::kStatistics + rows * branches)) {
    view_.contiguous().expect({static_cast<int64_t>(numbers_.size())});
    KVPO_CHECK(view_.is(kFloat, 32) || view_.is(kFloat, 64), "numbers must be float32 or float64");
  }
  Numbers& numbers() { return numbers_; }
  void store() const {
    if (view_.is(kFloat, 64))
      std::copy(numbers_.begin(), numbers_.end(), static_cast<double*>(view_.data()));
    else
      std::transform(numbers_.begin(), numbers_.end(), static_cast<float*>(view_.data()),
                     [](double x) { return static_cast<float>(x); });
  }

private:
  View view_;
  Numbers numbers_;
};

void branch_policy_loss(const Numbers& scores, const Numbers& old, const Numbers& advantages,
                        const std::optional<Numbers>& ref, double clip_low, double clip_high,
                        double kl_coef, double log_ratio_clamp, double min_entropy_ratio,
                        double scale, double branch_mass, bool drop, const py::capsule& numbers) {
  const auto G = static_cast<int64_t>(scores.size());
  Output output(numbers, G, kvpo::kBranchRows);
  auto args = policy(
      G, old, advantages, ref,
      {clip_low, clip_high, kl_coef, log_ratio_clamp, min_entropy_ratio, scale, branch_mass, drop},
      output.numbers());
  args.scores = scores.data();
  kvpo::cpu::branch_policy_loss(args);
  output.store();
}

void tve_grpo(const py::capsule& pred, const py::capsule& target, const Numbers& weights,
              const Numbers& grad_weights, const Numbers& old, const Numbers& advantages,
              const std::optional<Numbers>& ref, double clip_low, double clip_high, double kl_coef,
              double log_ratio_clamp, double min_entropy_ratio, double scale, double branch_mass,
              bool drop, const py::capsule& numbers, const std::optional<py::capsule>& grad,
              int threads) {
  const View p(pred, "pred");
  const auto x = kvpo::trajectories(p, View(target, "target"), threads);
  const auto stride = kvpo::weights_stride(x, static_cast<int64_t>(weights.size()), "weights");
  expect_size(grad_weights, static_cast<int64_t>(weights.size()), "grad_weights");
  Output output(numbers, x.branches, kvpo::kBranchRows + 1); // and the energies
  double* const energies = output.numbers().data() + output.numbers().size() - x.branches;
  const auto loss = policy(
      x.branches, old, advantages, ref,
      {clip_low, clip_high, kl_coef, log_ratio_clamp, min_entropy_ratio, scale, branch_mass, drop},
      output.numbers());
  void* const out = grad ? kvpo::gradient_data(View(*grad, "grad"), p) : nullptr;
  py::gil_scoped_release release;
  Numbers partials(partials_size(x)), scores(static_cast<size_t>(x.branches));
  Numbers coefficients(static_cast<size_t>(x.branches * x.steps));
  kvpo::cpu::tve_grpo({{x, weights.data(), stride, partials.data(), energies},
                       grad_weights.data(),
                       loss,
                       scores.data(),
                       coefficients.data(),
                       out});
  output.store();
}

} // namespace

void bind_tve_grpo(py::module_& m) {
  m.def("velocity_energy", &velocity_energy);
  m.def("velocity_gradient", &velocity_gradient);
  m.def("branch_policy_loss", &branch_policy_loss);
  m.def("tve_grpo", &tve_grpo);
}
