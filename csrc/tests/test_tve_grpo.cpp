// The kernels on every instruction set of this machine: values, determinism, bounds of writes.
#include "kvpo/tve_grpo.h"

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "isa.h"
#include "team.h"

namespace {

int failures = 0;

void expect(bool condition, const char* what, const char* isa, int64_t numel) {
  if (condition)
    return;
  std::printf("FAILED: %s (%s, N = %ld)\n", what, isa, static_cast<long>(numel));
  ++failures;
}

uint16_t to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return static_cast<uint16_t>(bits >> 16); // truncated: the test only wants some bfloat16 values
}

float to_float(float x) {
  return x;
}
float to_float(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
void from_float(float& to, float x) {
  to = x;
}
void from_float(uint16_t& to, float x) {
  to = to_bfloat16(x);
}

struct Result {
  std::vector<double> energies, numbers;
  std::vector<unsigned char> grad;

  bool operator==(const Result& other) const {
    return energies == other.energies && numbers == other.numbers && grad == other.grad;
  }
};

constexpr int64_t kBranches = 3, kSteps = 2;

// `offset` elements before the arrays shift them out of alignment.
template <typename T>
Result run(const std::vector<T>& pred, const std::vector<T>& target, int64_t numel, int threads,
           size_t offset) {
  const size_t size = static_cast<size_t>(kBranches * kSteps * numel);
  std::vector<T> p(offset), t(offset), grad(offset + size + 64);
  p.insert(p.end(), pred.begin(), pred.end());
  t.insert(t.end(), target.begin(), target.end());
  std::memset(grad.data(), 0x55, grad.size() * sizeof(T));
  const double weights[kSteps] = {0.5, 0.25}, grad_weights[kSteps] = {0.5, 0.0};
  const double old_scores[kBranches] = {-0.3, -0.2, -0.4}, advantages[kBranches] = {1, -1, 0.5};
  Result r;
  r.energies.resize(kBranches);
  r.numbers.resize(kvpo::kStatistics + kvpo::kBranchRows * kBranches);
  std::vector<double> partials(
      static_cast<size_t>(kBranches * kSteps * kvpo::energy_chunks(numel)));
  std::vector<double> scores(kBranches), coefficients(kBranches * kSteps);
  kvpo::TveGrpo args{};
  args.energy = {
      {kBranches, kSteps, numel, sizeof(T) == 2, p.data() + offset, t.data() + offset, threads},
      weights,
      0,
      partials.data(),
      r.energies.data()};
  args.grad_weights = grad_weights;
  args.policy.branches = kBranches;
  args.policy.objective = {0.5, 0.5, 1.0, 20.0, 0.0, 1.0, 1.0, false};
  args.policy.old_scores = old_scores;
  args.policy.advantages = advantages;
  args.policy.numbers = r.numbers.data();
  args.scores = scores.data();
  args.coefficients = coefficients.data();
  args.grad = grad.data() + offset;
  kvpo::cpu::tve_grpo(args);
  const auto* bytes = reinterpret_cast<const unsigned char*>(grad.data());
  for (size_t i = 0; i < offset * sizeof(T); ++i)
    expect(bytes[i] == 0x55, "a byte before the gradient was written", "", numel);
  for (size_t i = (offset + size) * sizeof(T); i < grad.size() * sizeof(T); ++i)
    expect(bytes[i] == 0x55, "a byte after the gradient was written", "", numel);
  r.grad.assign(bytes + offset * sizeof(T), bytes + (offset + size) * sizeof(T));
  return r;
}

template <typename T> void check(int64_t numel, const char* isa) {
  const size_t size = static_cast<size_t>(kBranches * kSteps * numel);
  std::vector<T> pred(size), target(size);
  uint32_t state = 12345;
  const auto next = [&] {
    state = state * 1664525u + 1013904223u;
    return static_cast<float>(state >> 8) / static_cast<float>(1 << 24) - 0.5f;
  };
  for (size_t i = 0; i < size; ++i)
    from_float(pred[i], next()), from_float(target[i], next());

  const Result r = run(pred, target, numel, 2, 0);
  const double weights[kSteps] = {0.5, 0.25};
  double sum_of_grad = 0.0;
  for (int64_t g = 0; g < kBranches; ++g) {
    double energy = 0.0;
    for (int64_t s = 0; s < kSteps; ++s) {
      double sum = 0.0;
      for (int64_t i = 0; i < numel; ++i) {
        const size_t at = static_cast<size_t>((g * kSteps + s) * numel + i);
        const double d = static_cast<double>(to_float(pred[at])) - to_float(target[at]);
        sum += d * d;
        T grad;
        std::memcpy(&grad, r.grad.data() + at * sizeof(T), sizeof(T));
        const double kappa = r.numbers[static_cast<size_t>(kvpo::kStatistics + g)];
        const double truth = s == 0 ? -2 * 0.5 * kappa * d / static_cast<double>(numel) : 0.0;
        // One rounding to the dtype and three in float.
        const double allowed = std::fabs(truth) * (sizeof(T) == 2 ? 1.0 / 256 : 3e-7);
        expect(std::fabs(to_float(grad) - truth) <= allowed, "gradient", isa, numel);
      }
      energy += weights[s] * sum / static_cast<double>(numel);
    }
    expect(std::fabs(r.energies[static_cast<size_t>(g)] - energy) <= 1e-6 * energy, "energy", isa,
           numel);
    sum_of_grad += r.numbers[static_cast<size_t>(kvpo::kStatistics + g)];
  }
  expect(std::fabs(sum_of_grad) < 1e-12, "the score gradient sums to zero", isa, numel);
  for (int threads : {1, 3})
    for (size_t offset : {0, 1, 5})
      expect(run(pred, target, numel, threads, offset) == r, "threads or alignment matter", isa,
             numel);
}

} // namespace

int main() {
  kvpo::cpu::set_all_threads(true); // the problems are small
  using kvpo::cpu::Isa;
  for (Isa isa : {Isa::kPortable, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16}) {
    kvpo::cpu::set_isa_limit(isa);
    if (kvpo::cpu::isa() != isa)
      continue;
    // A value, an odd tail, a chunk and a bit, several chunks; the last streams in float.
    for (int64_t numel : {1, 77, 4101, 20000})
      check<float>(numel, name(isa)), check<uint16_t>(numel, name(isa));
    check<float>(350003, name(isa));
  }
  std::printf(failures ? "%d failures\n" : "ok\n", failures);
  return failures != 0;
}
