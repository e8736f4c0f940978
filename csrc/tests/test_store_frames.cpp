// The kernel on every instruction set of this machine: each value's code is the nearest one, scales
// are the formula's, strides and bounds are kept, threads do not matter.
#include "kvpo/store_frames.h"

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "isa.h"
#include "team.h"

namespace {

int failures = 0;

void expect(bool condition, const char* what, const char* isa, int64_t head_size) {
  if (condition)
    return;
  std::printf("FAILED: %s (%s, D %lld)\n", what, isa, static_cast<long long>(head_size));
  ++failures;
}

// Of a float8_e4m3fn's bits, by its definition.
double value_of(uint8_t bits) {
  const int exponent = bits >> 3 & 15, mantissa = bits & 7;
  const double size = exponent ? std::ldexp(8 + mantissa, exponent - 10) : std::ldexp(mantissa, -9);
  return bits & 0x80 ? -size : size;
}

// Distance of x from its code, and that of the best code, an even one where two are as good.
bool is_nearest_float8(uint8_t code, double x) {
  const double error = std::fabs(value_of(code) - x);
  for (int other = 0; other < 256; ++other) {
    if ((other & 0x7f) == 0x7f)
      continue;
    const double distance = std::fabs(value_of(static_cast<uint8_t>(other)) - x);
    if (distance < error || (distance == error && (code & 1) && !(other & 1)))
      return false;
  }
  return (code & 0x7f) != 0x7f && std::signbit(value_of(code)) == std::signbit(x);
}

constexpr int64_t kSlots = 4, kTokens = 5, kHeads = 3, kGap = 7;
constexpr uint8_t kUntouched = 0x55;

struct Pool {
  std::vector<uint8_t> pages;
  std::vector<float> scales;
};

Pool run(const std::vector<float>& frames, int64_t D, kvpo::Page page, int threads) {
  const int64_t token = kHeads * (D + 1), slot = kTokens * token + kGap;
  Pool pool{std::vector<uint8_t>(static_cast<size_t>(kSlots * slot), kUntouched),
            std::vector<float>(static_cast<size_t>(kSlots * kHeads), -1.0f)};
  const std::vector<int64_t> slots = {2, 0};
  kvpo::cpu::store_frames({2, kTokens, kHeads, D, kvpo::Float::kFloat32, page, threads,
                           frames.data(), pool.pages.data(), slot, token, D + 1, pool.scales.data(),
                           slots.data()});
  return pool;
}

void check(int64_t D, kvpo::Page page, const char* isa) {
  uint32_t state = 12345;
  std::vector<float> frames(static_cast<size_t>(2 * kTokens * kHeads * D));
  const auto at = [&](int64_t i, int64_t t, int64_t h, int64_t d) {
    return static_cast<size_t>(((i * kTokens + t) * kHeads + h) * D + d);
  };
  for (float& x : frames) { // of many sizes, so that float8 has subnormals, and ties of halves
    state = state * 1664525u + 1013904223u;
    const int exponent = static_cast<int>(state >> 8 & 15) - 12;
    x = std::ldexp(static_cast<float>(static_cast<int>(state >> 16 & 255) - 128), exponent);
  }
  for (int64_t t = 0; t < kTokens; ++t)
    for (int64_t d = 0; d < D; ++d)
      frames[at(1, t, 0, d)] = 0.0f;
  frames[at(0, 2, 1, D - 1)] = NAN;
  frames[at(1, 0, 2, 0)] = INFINITY;
  const float most = page == kvpo::Page::kInt8 ? 127.0f : 448.0f;
  frames[at(0, 1, 2, D / 2)] = most * 8; // scale 8 in effect: ties stay ties

  const Pool pool = run(frames, D, page, 2);
  const int64_t token = kHeads * (D + 1), slot = kTokens * token + kGap;
  std::vector<bool> written(pool.pages.size());
  for (int64_t i = 0; i < 2; ++i)
    for (int64_t h = 0; h < kHeads; ++h) {
      const int64_t to = i ? 0 : 2;
      float largest = 0.0f;
      for (int64_t t = 0; t < kTokens; ++t)
        for (int64_t d = 0; d < D; ++d)
          largest = std::fmax(largest, std::fabs(frames[at(i, t, h, d)]));
      const bool broken = (i == 0 && h == 1) || (i == 1 && h == 2), zeros = i == 1 && h == 0;
      const float scale = pool.scales[static_cast<size_t>(to * kHeads + h)];
      if (broken)
        expect(std::isnan(scale), "scale of a head with NaN or infinity", isa, D);
      else // two roundings of float
        expect(zeros ? scale == 1.0f : std::fabs(scale * most / largest - 1.0f) < 3e-7f, "scale",
               isa, D);
      for (int64_t t = 0; t < kTokens; ++t)
        for (int64_t d = 0; d < D; ++d) {
          const size_t place = static_cast<size_t>(to * slot + t * token + h * (D + 1) + d);
          const uint8_t code = pool.pages[place];
          written[place] = true;
          const float scaled = frames[at(i, t, h, d)] * (1.0f / scale);
          if (broken)
            expect(code == (page == kvpo::Page::kInt8 ? 0 : 0x7f), "code of NaN", isa, D);
          else if (page == kvpo::Page::kInt8)
            expect(static_cast<int8_t>(code) == std::nearbyint(scaled), "int8 code", isa, D);
          else
            expect(is_nearest_float8(code, scaled), "float8 code", isa, D);
        }
    }
  for (size_t i = 0; i < written.size(); ++i)
    expect(written[i] || pool.pages[i] == kUntouched, "wrote outside its slots", isa, D);
  for (int64_t h = 0; h < kHeads; ++h)
    for (int64_t s : {1, 3})
      expect(pool.scales[static_cast<size_t>(s * kHeads + h)] == -1.0f, "scale of another slot",
             isa, D);
  for (int threads : {1, 3}) {
    const Pool again = run(frames, D, page, threads);
    const size_t bytes = pool.scales.size() * sizeof(float);
    expect(again.pages == pool.pages &&
               std::memcmp(again.scales.data(), pool.scales.data(), bytes) == 0,
           "threads matter", isa, D);
  }
}

} // namespace

int main() {
  kvpo::cpu::set_all_threads(true); // the problems are small
  using kvpo::cpu::Isa;
  for (Isa isa : {Isa::kPortable, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16}) {
    kvpo::cpu::set_isa_limit(isa);
    if (kvpo::cpu::isa() != isa)
      continue;
    for (int64_t D : {1, 16, 37, 128})
      for (kvpo::Page page : {kvpo::Page::kInt8, kvpo::Page::kFloat8})
        check(D, page, name(isa));
  }
  std::printf(failures ? "%d failures\n" : "ok\n", failures);
  return failures != 0;
}
