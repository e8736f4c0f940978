// The CUDA kernels, thread by thread on the CPU: against the CPU kernels, to a bit over grids,
// alignments and orders of the branches, and within their bounds.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

#include "tve_grpo.cuh"

namespace {

using namespace kvpo::cuda;
using kvpo::kBranchRows;
using kvpo::kStatistics;

int failures = 0;
uint32_t state = 20240601;

float uniform() { // in [-1, 1)
  state = state * 1664525u + 1013904223u;
  return static_cast<float>(state >> 8) / static_cast<float>(1 << 23) - 1.0f;
}

void expect(bool condition, const char* what, int64_t numel, int64_t branches) {
  if (condition)
    return;
  std::printf("FAILED: %s (N = %ld, G = %ld)\n", what, static_cast<long>(numel),
              static_cast<long>(branches));
  ++failures;
}

template <typename T> T rounded(float x) {
  T value;
  from_float(value, x);
  return value;
}

template <typename T> struct Problem {
  int64_t G, S, N;
  std::vector<T> pred, target;
  std::vector<double> weights, grad_weights;
  std::vector<float> old, advantages, ref;
  kvpo::BranchPolicyObjective objective;

  Problem(int64_t G, int64_t S, int64_t N, bool own_weights = false) : G(G), S(S), N(N) {
    const auto size = static_cast<size_t>(G * S * N);
    for (size_t i = 0; i < size; ++i) {
      pred.push_back(rounded<T>(uniform()));
      target.push_back(rounded<T>(uniform()));
    }
    for (int64_t s = 0; s < (own_weights ? G * S : S); ++s) {
      weights.push_back(0.5 + 0.125 * static_cast<double>(s % 7));
      grad_weights.push_back(s % S == 1 ? 0.0 : weights.back());
    }
    for (int64_t g = 0; g < G; ++g) {
      old.push_back(uniform());
      advantages.push_back(2 * uniform());
      ref.push_back(uniform());
    }
    objective = {0.1, 0.2, 10.0, 20.0, 0.05, 0.5, 0.5, false};
  }

  int64_t weights_stride() const { return static_cast<int64_t>(weights.size()) == S ? 0 : S; }

  // The same branches in another order.
  Problem permuted(const std::vector<int64_t>& order) const {
    Problem p = *this;
    for (size_t i = 0; i < order.size(); ++i) {
      const auto from = static_cast<size_t>(order[i]), row = static_cast<size_t>(S * N);
      std::copy_n(pred.begin() + static_cast<std::ptrdiff_t>(from * row), row,
                  p.pred.begin() + static_cast<std::ptrdiff_t>(i * row));
      std::copy_n(target.begin() + static_cast<std::ptrdiff_t>(from * row), row,
                  p.target.begin() + static_cast<std::ptrdiff_t>(i * row));
      p.old[i] = old[from], p.advantages[i] = advantages[from], p.ref[i] = ref[from];
    }
    return p;
  }
};

template <typename T> struct Result {
  std::vector<float> numbers;
  std::vector<T> grad;

  bool operator==(const Result& other) const { // bits: a NaN equals itself
    return std::memcmp(numbers.data(), other.numbers.data(), numbers.size() * sizeof(float)) == 0 &&
           std::memcmp(grad.data(), other.grad.data(), grad.size() * sizeof(T)) == 0;
  }
};

// With `blocks` > 0 one cooperative launch of so many, else two. `offset` values before the
// gradient shift it out of alignment.
template <typename T>
Result<T> run(const Problem<T>& p, int64_t blocks, bool aligned, size_t offset = 0) {
  const int64_t chunks = p.G * p.S * ((p.N + kChunk - 1) / kChunk);
  Result<T> r;
  const auto size = static_cast<size_t>(p.G * p.S * p.N);
  std::vector<T> grad(offset + size + 16, rounded<T>(7.0f));
  r.numbers.assign(static_cast<size_t>(kStatistics + (kBranchRows + 1) * p.G), 7.0f);
  // Scratch as it may come: the kernels must write before they read.
  std::vector<double> partials(static_cast<size_t>(chunks), NAN);
  std::vector<float> coefficients(static_cast<size_t>(p.G * p.S), NAN);
  int arrived = 0;
  const TveGrpo a{{p.G, p.S, p.N, sizeof(T) == 2, p.pred.data(), p.target.data(), 0},
                  p.weights.data(),
                  p.grad_weights.data(),
                  p.weights_stride(),
                  p.objective,
                  p.old.data(),
                  p.advantages.data(),
                  p.ref.data(),
                  partials.data(),
                  coefficients.data(),
                  &arrived,
                  r.numbers.data(),
                  grad.data() + offset};
  if (blocks > 0) {
    const auto held = static_cast<size_t>((chunks + blocks - 1) / blocks);
    Grid grid(static_cast<unsigned>(blocks), kThreads, kBlockBytes + held * kChunkBytes);
    grid.run([&] { aligned ? fused_kernel<T, true>(a) : fused_kernel<T, false>(a); });
  } else {
    Grid first(static_cast<unsigned>((chunks + 1) / 2), kThreads, kBlockBytes);
    first.run([&] { aligned ? energy_kernel<T, true>(a) : energy_kernel<T, false>(a); });
    Grid second(static_cast<unsigned>(chunks), kThreads, 0);
    second.run([&] { aligned ? gradient_kernel<T, true>(a) : gradient_kernel<T, false>(a); });
  }
  for (size_t i = 0; i < offset; ++i)
    expect(to_float(grad[i]) == 7.0f, "a value before the gradient was written", p.N, p.G);
  for (size_t i = offset + size; i < grad.size(); ++i)
    expect(to_float(grad[i]) == 7.0f, "a value after the gradient was written", p.N, p.G);
  r.grad.assign(grad.begin() + static_cast<std::ptrdiff_t>(offset),
                grad.begin() + static_cast<std::ptrdiff_t>(offset + size));
  return r;
}

// What the CPU kernels make of it.
template <typename T> void compare(const Problem<T>& p, const Result<T>& r) {
  const auto G = static_cast<size_t>(p.G);
  const std::vector<double> old(p.old.begin(), p.old.end());
  const std::vector<double> advantages(p.advantages.begin(), p.advantages.end());
  const std::vector<double> ref(p.ref.begin(), p.ref.end());
  std::vector<double> numbers(static_cast<size_t>(kStatistics + kBranchRows * p.G)), energies(G),
      scores(G), coefficients(static_cast<size_t>(p.G * p.S)),
      partials(static_cast<size_t>(p.G * p.S * kvpo::energy_chunks(p.N)));
  std::vector<T> grad(r.grad.size());
  kvpo::cpu::tve_grpo(
      {{{p.G, p.S, p.N, sizeof(T) == 2, p.pred.data(), p.target.data(), 1},
        p.weights.data(),
        p.weights_stride(),
        partials.data(),
        energies.data()},
       p.grad_weights.data(),
       {p.G, p.objective, nullptr, old.data(), advantages.data(), ref.data(), numbers.data()},
       scores.data(),
       coefficients.data(),
       grad.data()});
  numbers.insert(numbers.end(), energies.begin(), energies.end());
  for (size_t i = 0; i < numbers.size(); ++i) {
    const double ours = r.numbers[i], truth = numbers[i];
    // Energies differ by the order of float sums, and all else through them; 5e-6 is the KL weight
    // times that.
    const bool close = std::fabs(ours - truth) <= 5e-6 * (1 + std::fabs(truth));
    expect(std::isnan(truth) ? std::isnan(ours) : close, "a number differs from the CPU's", p.N,
           p.G);
  }
  for (size_t i = 0; i < grad.size(); ++i) {
    const double ours = to_float(r.grad[i]), truth = to_float(grad[i]);
    // bfloat16: a rounding to either side.
    const double allowed = std::fabs(truth) * (sizeof(T) == 2 ? 1.0 / 128 : 1e-4) + 1e-9;
    expect(std::isnan(truth) ? std::isnan(ours) : std::fabs(ours - truth) <= allowed,
           "the gradient differs from the CPU's", p.N, p.G);
  }
}

// Each branch with weights of its own.
void check_own_weights() {
  const Problem<float> p(3, 2, 100, true);
  for (int64_t blocks : {2, 0})
    compare(p, run(p, blocks, false));
}

template <typename T> void check(int64_t G, int64_t S, int64_t N) {
  const Problem<T> p(G, S, N);
  const bool whole = N % kPerThread == 0;
  const int64_t chunks = G * S * ((N + kChunk - 1) / kChunk);
  const int64_t least = (chunks + kMaxChunks - 1) / kMaxChunks;
  const Result<T> r = run(p, least, whole);
  compare(p, r);
  for (int64_t blocks : {least + 2, int64_t{0}}) // 0: two launches
    expect(run(p, blocks, whole) == r, "the grid matters", N, G);
  expect(run(p, least + 1, false, 3) == r, "alignment matters", N, G);

  std::vector<int64_t> order(static_cast<size_t>(G));
  std::iota(order.begin(), order.end(), 0);
  std::rotate(order.begin(), order.begin() + G / 2, order.end());
  const Result<T> moved = run(p.permuted(order), least, whole);
  expect(std::equal(moved.numbers.begin(), moved.numbers.begin() + kStatistics, r.numbers.begin()),
         "the order of the branches matters", N, G);
  for (size_t i = 0; i < order.size(); ++i) {
    const auto row = static_cast<size_t>(S * N), from = static_cast<size_t>(order[i]);
    expect(std::memcmp(&moved.grad[i * row], &r.grad[from * row], row * sizeof(T)) == 0,
           "the order of the branches matters to the gradient", N, G);
  }
}

// A branch that is not finite makes all NaN, or is left out.
void check_nonfinite() {
  Problem<float> p(5, 2, 100);
  p.pred[250] = std::numeric_limits<float>::quiet_NaN(); // of branch 1
  for (int64_t blocks : {2, 0}) {
    p.objective.drop = false;
    const Result<float> all = run(p, blocks, false);
    compare(p, all);
    // Block-step 1 carries no gradient, but NaN times its weight 0 is NaN.
    expect(std::all_of(all.grad.begin(), all.grad.end(), [](float x) { return std::isnan(x); }),
           "a NaN must not be lost", p.N, p.G);
    p.objective.drop = true;
    const Result<float> dropped = run(p, blocks, false);
    compare(p, dropped);
    expect(dropped.numbers[kvpo::kDropped] == 1.0f, "one branch is dropped", p.N, p.G);
    expect(std::all_of(dropped.grad.begin() + 200, dropped.grad.begin() + 400,
                       [](float x) { return x == 0.0f; }),
           "a dropped branch has no gradient", p.N, p.G);
    Problem<float> none = p;
    std::fill(none.advantages.begin(), none.advantages.end(), INFINITY);
    compare(none, run(none, blocks, false));
  }
}

} // namespace

int main() {
  // A value, some threads' and a bit, whole vectors, several chunks; one branch, many.
  for (int64_t N : {int64_t{1}, int64_t{13}, kChunk + 8, kChunk + 1003}) {
    check<float>(3, 2, N);
    check<bf16>(3, 2, N);
  }
  check<float>(1, 1, 40);
  check<bf16>(70, 1, 24);
  check_own_weights();
  check_nonfinite();
  std::printf(failures ? "%d failures\n" : "ok\n", failures);
  return failures != 0;
}
