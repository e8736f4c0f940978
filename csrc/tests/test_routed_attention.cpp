// The kernels against sums in double written out by hand, on every instruction set of this machine.
// Frames that no row names are NaN, buffers are exactly as long as they must be (for ASan), and the
// outputs start as NaN.
#include "kvpo/routed_attention.h"

#include <cmath>
#include <cstdio>
#include <vector>

#include "isa.h"
#include "team.h"

namespace {

constexpr int64_t B = 2, Q = 19, H = 2, D = 32, F = 3, T = 5, L = 7, kOne = H * D;
constexpr int32_t kSlots[B][2] = {{2, 0}, {-1, -1}}; // the second row has live tokens only

struct Problem {
  std::vector<float> q, k_pool, v_pool, k_live, v_live, grad_out;

  Problem()
      : q(values(B * Q, 1)), k_pool(values(F * T, 2)), v_pool(values(F * T, 3)),
        k_live(values(B * L, 4)), v_live(values(B * L, 5)), grad_out(values(B * Q, 6)) {
    for (int64_t i = 0; i < T * kOne; ++i) // frame 1 is named by nobody
      k_pool[T * kOne + i] = v_pool[T * kOne + i] = NAN;
  }

  static std::vector<float> values(int64_t vectors, int seed) {
    std::vector<float> x(static_cast<size_t>(vectors * kOne));
    for (size_t i = 0; i < x.size(); ++i)
      x[i] = static_cast<float>(std::sin(0.37 * static_cast<double>(i) + seed));
    return x;
  }
  std::vector<const float*> keys(int64_t b, const std::vector<float>& pool,
                                 const std::vector<float>& live) const {
    std::vector<const float*> rows;
    for (int32_t slot : kSlots[b])
      for (int64_t t = 0; slot >= 0 && t < T; ++t)
        rows.push_back(&pool[static_cast<size_t>((slot * T + t) * kOne)]);
    for (int64_t t = 0; t < L; ++t)
      rows.push_back(&live[static_cast<size_t>((b * L + t) * kOne)]);
    return rows;
  }
};

// A quantized pool, and in `values` what it stands for. Nobody names frame 1: its scale is NaN.
struct Pages {
  std::vector<uint8_t> codes = std::vector<uint8_t>(F * T * kOne);
  std::vector<float> scales, values;

  Pages(kvpo::Page page, int seed) : values(Problem::values(F * T, seed)) {
    for (int64_t i = 0; i < F * H; ++i)
      scales.push_back(i / H == 1 ? NAN : (i % 2 ? -0.002f : 0.003f) * static_cast<float>(1 + i));
    for (size_t i = 0; i < codes.size(); ++i) {
      const auto code = static_cast<uint8_t>(37 * i + static_cast<size_t>(seed));
      const bool nan = page == kvpo::Page::kFloat8 && (code & 0x7f) == 0x7f;
      codes[i] = nan ? 0 : code;
      const size_t head = i / D % H, frame = i / (T * kOne);
      values[i] = value(page, codes[i]) * scales[frame * H + head];
    }
  }
  static float value(kvpo::Page page, uint8_t code) {
    if (page == kvpo::Page::kInt8)
      return static_cast<float>(static_cast<int8_t>(code));
    const int exponent = code >> 3 & 15, mantissa = code & 7;
    const float size = exponent ? std::ldexp(8.0f + static_cast<float>(mantissa), exponent - 10)
                                : std::ldexp(static_cast<float>(mantissa), -9);
    return code & 0x80 ? -size : size;
  }
};

struct Results {
  std::vector<double> out = std::vector<double>(B * Q * kOne), lse = std::vector<double>(B * H * Q);
  std::vector<double> grad_q = out, grad_k = std::vector<double>(B * L * kOne), grad_v = grad_k;
};

Results by_hand(const Problem& p, double scale) {
  Results r;
  for (int64_t b = 0; b < B; ++b) {
    const auto k = p.keys(b, p.k_pool, p.k_live), v = p.keys(b, p.v_pool, p.v_live);
    for (int64_t i = 0; i < Q; ++i)
      for (int64_t h = 0; h < H; ++h) {
        const auto at = static_cast<size_t>((b * Q + i) * kOne + h * D);
        std::vector<double> weight(k.size()), grad(k.size());
        double sum = 0, mean = 0;
        for (size_t t = 0; t < k.size(); ++t) {
          for (size_t d = 0; d < D; ++d) {
            weight[t] += scale * p.q[at + d] * k[t][h * D + static_cast<int64_t>(d)];
            grad[t] +=
                static_cast<double>(p.grad_out[at + d]) * v[t][h * D + static_cast<int64_t>(d)];
          }
          sum += weight[t] = std::exp(weight[t]);
        }
        r.lse[static_cast<size_t>((b * H + h) * Q + i)] = std::log(sum);
        for (size_t t = 0; t < k.size(); ++t)
          mean += (weight[t] /= sum) * grad[t];
        for (size_t t = 0; t < k.size(); ++t)
          for (size_t d = 0; d < D; ++d) {
            const auto from = h * D + static_cast<int64_t>(d);
            const double score = scale * weight[t] * (grad[t] - mean);
            r.out[at + d] += weight[t] * v[t][from];
            r.grad_q[at + d] += score * k[t][from];
            if (t + L >= k.size()) {
              const auto to = static_cast<size_t>(
                  (b * L + static_cast<int64_t>(t + L - k.size())) * kOne + from);
              r.grad_k[to] += score * p.q[at + d];
              r.grad_v[to] += weight[t] * p.grad_out[at + d];
            }
          }
      }
  }
  return r;
}

bool close(const char* what, const std::vector<float>& actual,
           const std::vector<double>& expected) {
  for (size_t i = 0; i < actual.size(); ++i)
    if (!(std::fabs(actual[i] - expected[i]) < 1e-5)) { // sums of at most 19 numbers near 1
      std::printf("FAILED: %s, %s[%zu] = %g, not %g\n", kvpo::cpu::name(kvpo::cpu::isa()), what, i,
                  static_cast<double>(actual[i]), expected[i]);
      return false;
    }
  return true;
}

bool agrees(Problem p, kvpo::Page page, float scale, int threads) {
  const Pages k_pages(page, 2), v_pages(page, 3);
  const bool quantized = page != kvpo::Page::kAsQueries;
  if (quantized) {
    p.k_pool = k_pages.values;
    p.v_pool = v_pages.values;
  }
  std::vector<float> out(B * Q * kOne, NAN), lse(B * H * Q, NAN), grad_q = out;
  std::vector<float> grad_k(B * L * kOne, NAN), grad_v = grad_k;
  const auto vectors = [](const std::vector<float>& x, int64_t tokens) {
    return kvpo::HeadVectors{x.data(), tokens * kOne, kOne, D};
  };
  const auto pool = [&](const std::vector<float>& x, const Pages& pages) {
    return quantized ? kvpo::HeadVectors{pages.codes.data(), T * kOne, kOne, D} : vectors(x, T);
  };
  kvpo::RoutedAttentionBackward b{};
  b.forward = {{B, Q, H, H, D, F, T, 2, L},
               kvpo::Float::kFloat32,
               page,
               scale,
               threads,
               vectors(p.q, Q),
               pool(p.k_pool, k_pages),
               pool(p.v_pool, v_pages),
               vectors(p.k_live, L),
               vectors(p.v_live, L),
               k_pages.scales.data(),
               v_pages.scales.data(),
               &kSlots[0][0],
               out.data(),
               lse.data()};
  b.grad_out = vectors(p.grad_out, Q);
  b.grad_q = grad_q.data();
  b.grad_k_live = grad_k.data();
  b.grad_v_live = grad_v.data();
  kvpo::cpu::routed_attention_forward(b.forward);
  kvpo::cpu::routed_attention_backward(b);
  const Results r = by_hand(p, static_cast<double>(scale));
  return close("out", out, r.out) && close("lse", lse, r.lse) &&
         close("grad_q", grad_q, r.grad_q) && close("grad_k", grad_k, r.grad_k) &&
         close("grad_v", grad_v, r.grad_v);
}

} // namespace

int main() {
  kvpo::cpu::set_all_threads(true); // the problems are small
  using kvpo::cpu::Isa;
  const Problem p;
  bool ok = true;
  for (Isa isa : {Isa::kPortable, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16}) {
    kvpo::cpu::set_isa_limit(isa);
    for (kvpo::Page page : {kvpo::Page::kAsQueries, kvpo::Page::kInt8, kvpo::Page::kFloat8})
      for (float scale : {0.2f, -0.3f})
        for (int threads : {1, 3})
          ok = agrees(p, page, scale, threads) && ok;
  }
  std::printf("%s\n", ok ? "passed" : "failed");
  return ok ? 0 : 1;
}
