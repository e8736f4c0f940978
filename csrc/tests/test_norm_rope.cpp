// The kernels on every instruction set of this machine: values against float64, the pool write
// against the forward, independence of threads and alignment, bounds of writes.
#include "kvpo/norm_rope.h"

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "isa.h"
#include "team.h"

namespace {

int failures = 0;

void expect(bool condition, const char* what, const char* isa, const char* shape) {
  if (condition)
    return;
  std::printf("FAILED: %s (%s, %s)\n", what, isa, shape);
  ++failures;
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
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  to = static_cast<uint16_t>(bits >> 16); // truncated: the test only wants some bfloat16 values
}

struct Random {
  uint32_t state = 12345;
  float operator()() {
    state = state * 1664525u + 1013904223u;
    return static_cast<float>(state >> 8) / static_cast<float>(1 << 23) - 1.0f;
  }
};

template <typename T> std::vector<T> random_values(int64_t n, Random& random) {
  std::vector<T> values(static_cast<size_t>(n));
  for (auto& v : values)
    from_float(v, random());
  return values;
}

constexpr size_t kGuard = 64; // elements around an output that must stay as they are
constexpr float kEps = 1e-6f;

// `offset` elements before the arrays shift them out of alignment.
template <typename T> struct Problem {
  kvpo::NormRopeShape shape;
  std::vector<T> x, grad;
  std::vector<float> weight, cos, sin;

  explicit Problem(kvpo::NormRopeShape s) : shape(s) {
    Random random;
    const int64_t C = s.heads * s.head_size, pairs = s.head_size / 2;
    x = random_values<T>(s.rows * s.tokens * C, random);
    grad = random_values<T>(s.rows * s.tokens * C, random);
    weight = random_values<float>(C, random);
    for (int64_t i = 0; i < s.tokens * pairs; ++i) {
      const double angle = 3.0 * random();
      cos.push_back(static_cast<float>(std::cos(angle)));
      sin.push_back(static_cast<float>(std::sin(angle)));
    }
  }

  kvpo::NormRopeForward arguments(const T* from, T* out, int threads) const {
    return {shape, sizeof(T) == 2, kEps, threads, from, weight.data(), cos.data(), sin.data(), out};
  }
};

template <typename T> struct Guarded {
  std::vector<T> storage;
  size_t offset, size;

  Guarded(size_t n, size_t shift) : storage(n + 2 * kGuard), offset(kGuard + shift), size(n) {
    std::memset(storage.data(), 0x55, storage.size() * sizeof(T));
  }
  T* data() { return storage.data() + offset; }
  std::vector<T> values() const {
    return {storage.begin() + static_cast<int64_t>(offset),
            storage.begin() + static_cast<int64_t>(offset + size)};
  }
  bool intact() const {
    const auto* bytes = reinterpret_cast<const unsigned char*>(storage.data());
    for (size_t i = 0; i < storage.size() * sizeof(T); ++i) {
      const size_t element = i / sizeof(T);
      if ((element < offset || element >= offset + size) && bytes[i] != 0x55)
        return false;
    }
    return true;
  }
};

template <typename T>
std::vector<T> forward(const Problem<T>& p, int threads, size_t shift, const char* isa) {
  std::vector<T> x(shift);
  x.insert(x.end(), p.x.begin(), p.x.end());
  Guarded<T> out(p.x.size(), shift);
  kvpo::cpu::norm_rope_forward(p.arguments(x.data() + shift, out.data(), threads));
  expect(out.intact(), "forward wrote outside its output", isa, "");
  return out.values();
}

template <typename T>
void check(kvpo::NormRopeShape s, int64_t frames, const char* isa, const char* name) {
  const Problem<T> p(s);
  const int64_t C = s.heads * s.head_size, pairs = s.head_size / 2;
  // One rounding to the dtype, and in float one of each of the five operations of a value.
  const double unit = sizeof(T) == 2 ? 1.0 / 256 : 0, few = 1e-6;
  const std::vector<T> out = forward(p, 2, 0, isa);
  std::vector<double> grad_weight(static_cast<size_t>(C)), grad_x(p.x.size());
  for (int64_t row = 0; row < s.rows * s.tokens; ++row) {
    const int64_t n = row % s.tokens;
    double mean = 0.0, dot = 0.0;
    for (int64_t c = 0; c < C; ++c)
      mean += std::pow(to_float(p.x[static_cast<size_t>(row * C + c)]), 2) / static_cast<double>(C);
    const double r = 1.0 / std::sqrt(mean + kEps);
    std::vector<double> turned(static_cast<size_t>(C)); // gradient of y
    for (int64_t c = 0; c < C; c += 2) {
      const size_t at = static_cast<size_t>(row * C + c), w = static_cast<size_t>(c);
      const size_t angle = static_cast<size_t>(n * pairs + c % s.head_size / 2);
      const double even = to_float(p.x[at]) * r * p.weight[w],
                   odd = to_float(p.x[at + 1]) * r * p.weight[w + 1];
      const double cos = p.cos[angle], sin = p.sin[angle];
      const double truth[2] = {even * cos - odd * sin, even * sin + odd * cos};
      for (size_t j = 0; j < 2; ++j)
        expect(std::fabs(to_float(out[at + j]) - truth[j]) <=
                   unit * std::fabs(truth[j]) + few * (std::fabs(even) + std::fabs(odd)),
               "forward", isa, name);
      const double g0 = to_float(p.grad[at]), g1 = to_float(p.grad[at + 1]);
      turned[w] = g0 * cos + g1 * sin;
      turned[w + 1] = g1 * cos - g0 * sin;
    }
    for (int64_t c = 0; c < C; ++c) {
      const size_t w = static_cast<size_t>(c);
      const double xi = to_float(p.x[static_cast<size_t>(row * C + c)]);
      grad_weight[w] += turned[w] * xi * r;
      dot += turned[w] * p.weight[w] * xi / static_cast<double>(C);
    }
    for (int64_t c = 0; c < C; ++c) {
      const size_t at = static_cast<size_t>(row * C + c), w = static_cast<size_t>(c);
      grad_x[at] = r * (turned[w] * p.weight[w] - to_float(p.x[at]) * r * r * dot);
    }
  }

  Guarded<T> new_x(p.x.size(), 3);
  Guarded<float> new_weight(static_cast<size_t>(C), 1);
  kvpo::NormRopeBackward b{p.arguments(p.x.data(), nullptr, 2), p.grad.data(), new_x.data(),
                           new_weight.data()};
  kvpo::cpu::norm_rope_backward(b);
  expect(new_x.intact() && new_weight.intact(), "backward wrote outside its outputs", isa, name);
  const auto got_x = new_x.values();
  const auto got_weight = new_weight.values();
  for (size_t i = 0; i < got_x.size(); ++i)
    expect(std::fabs(to_float(got_x[i]) - grad_x[i]) <= unit * std::fabs(grad_x[i]) + 1e-5,
           "gradient of x", isa, name);
  const double tokens = static_cast<double>(s.rows * s.tokens);
  for (size_t i = 0; i < got_weight.size(); ++i) // a float sum of terms below 4
    expect(std::fabs(got_weight[i] - grad_weight[i]) <= 1e-6 * tokens, "gradient of weight", isa,
           name);

  for (int threads : {1, 3}) {
    for (size_t shift : {size_t{0}, size_t{1}, size_t{5}})
      expect(forward(p, threads, shift, isa) == out, "threads or alignment matter", isa, name);
    std::vector<float> again(static_cast<size_t>(C));
    b.forward.threads = threads;
    b.grad_weight = again.data();
    kvpo::cpu::norm_rope_backward(b);
    expect(again == got_weight && new_x.values() == got_x, "threads matter backward", isa, name);
  }

  // Slots in reverse, one more than needed; that one and the guards must stay.
  const int64_t slots = s.rows * frames + 1, page = s.tokens / frames * C;
  std::vector<int64_t> table;
  for (int64_t i = 0; i < s.rows * frames; ++i)
    table.push_back(slots - 1 - i);
  Guarded<T> k(static_cast<size_t>(slots * page), 1), v(static_cast<size_t>(slots * page), 2);
  kvpo::NormRopeWrite w{p.arguments(p.x.data(), nullptr, 2),
                        p.grad.data(),
                        s.tokens / frames,
                        {k.data(), page, C, s.head_size},
                        {v.data(), page, C, s.head_size},
                        table.data()};
  kvpo::cpu::norm_rope_write(w);
  expect(k.intact() && v.intact(), "write left the pool", isa, name);
  const auto keys = k.values(), values = v.values();
  for (size_t i = 0; i < table.size(); ++i) {
    const size_t from = i * static_cast<size_t>(page),
                 bytes = static_cast<size_t>(page) * sizeof(T),
                 to = static_cast<size_t>(table[i] * page);
    expect(std::memcmp(&keys[to], &out[from], bytes) == 0, "keys of a slot", isa, name);
    expect(std::memcmp(&values[to], &p.grad[from], bytes) == 0, "values of a slot", isa, name);
  }
  const auto* untouched = reinterpret_cast<const unsigned char*>(keys.data());
  for (size_t i = 0; i < static_cast<size_t>(page) * sizeof(T); ++i)
    expect(untouched[i] == 0x55, "a slot that nobody named was written", isa, name);
}

} // namespace

int main() {
  kvpo::cpu::set_all_threads(true); // the problems are small
  using kvpo::cpu::Isa;
  for (Isa isa : {Isa::kPortable, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16}) {
    kvpo::cpu::set_isa_limit(isa);
    if (kvpo::cpu::isa() != isa)
      continue;
    const char* const n = name(isa);
    // One token; an odd number of tokens over several runs; several rows, more tokens than chunks.
    check<float>({1, 1, 1, 16}, 1, n, "1x1x1x16");
    check<uint16_t>({2, 21, 3, 32}, 3, n, "2x21x3x32");
    check<float>({2, 21, 3, 32}, 3, n, "2x21x3x32");
    check<float>({3, 150, 2, 48}, 3, n, "3x150x2x48");
    check<uint16_t>({1, 34, 2, 128}, 2, n, "1x34x2x128");
    check<float>({1, 2, 1, 1024}, 1, n, "1x2x1x1024");
  }
  std::printf(failures ? "%d failures\n" : "ok\n", failures);
  return failures != 0;
}
