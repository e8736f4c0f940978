// One vector type over the instruction sets, included only by files compiled once per ISA.
//
// Everything here has internal linkage and no standard-library template is instantiated: an inline
// function compiled for AVX-512 that the linker picks for the common path would raise SIGILL on
// older machines.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if KVPO_ISA_LEVEL >= 1
#include <immintrin.h>
#endif

#define KVPO_INLINE [[maybe_unused]] static inline __attribute__((always_inline))

namespace kvpo::cpu::KVPO_ISA {
namespace {

using bf16 = uint16_t; // the bits of a bfloat16
struct fp16 {          // the bits of an IEEE half, a type of its own so that overloads differ
  uint16_t bits;
};

constexpr float kLog2e = 1.44269504088896340736f;
constexpr float kInf = __builtin_inff();

template <typename T> KVPO_INLINE constexpr T min_of(T a, T b) {
  return a < b ? a : b;
}
template <typename T> KVPO_INLINE constexpr T max_of(T a, T b) {
  return a < b ? b : a;
}

KVPO_INLINE float to_float(float x) {
  return x;
}
KVPO_INLINE float to_float(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
KVPO_INLINE void from_float(float& to, float x) {
  to = x;
}
KVPO_INLINE void from_float(bf16& to, float x) { // round to nearest even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  if ((bits & 0x7fffffffu) > 0x7f800000u)
    to = static_cast<bf16>((bits >> 16) | 0x40u);
  else
    to = static_cast<bf16>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

#if KVPO_ISA_LEVEL >= 2 // AVX-512 ------------------------------------------------------------
using Vec = __m512;
constexpr int kWidth = 16; // floats in a Vec

KVPO_INLINE Vec load(const float* p) {
  return _mm512_loadu_ps(p);
}
KVPO_INLINE Vec load(const bf16* p) {
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}
KVPO_INLINE void store(float* p, Vec v) {
  _mm512_storeu_ps(p, v);
}
KVPO_INLINE void store(bf16* p, Vec v) {
#if KVPO_ISA_LEVEL >= 3
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(v));
#else
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i bias = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
  __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, bias), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(rounded));
#endif
}
KVPO_INLINE Vec zero() {
  return _mm512_setzero_ps();
}
KVPO_INLINE Vec broadcast(float x) {
  return _mm512_set1_ps(x);
}
KVPO_INLINE Vec add(Vec a, Vec b) {
  return _mm512_add_ps(a, b);
}
KVPO_INLINE Vec sub(Vec a, Vec b) {
  return _mm512_sub_ps(a, b);
}
KVPO_INLINE Vec mul(Vec a, Vec b) {
  return _mm512_mul_ps(a, b);
}
KVPO_INLINE Vec max_of(Vec a, Vec b) {
  return _mm512_max_ps(a, b);
}
KVPO_INLINE Vec fma(Vec a, Vec b, Vec c) {
  return _mm512_fmadd_ps(a, b, c);
} // a * b + c
KVPO_INLINE Vec swap_pairs(Vec v) {
  return _mm512_permute_ps(v, 0xB1);
} // 1 0 3 2 ...
KVPO_INLINE bool any_greater(Vec a, Vec b) {
  return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0;
}
KVPO_INLINE Vec scale_by_power_of_two(Vec p, Vec n) {
  return _mm512_scalef_ps(p, n);
}
KVPO_INLINE Vec round_to_integer(Vec x) {
  return _mm512_roundscale_ps(x, 0);
}

#elif KVPO_ISA_LEVEL == 1 // AVX2 --------------------------------------------------------------
using Vec = __m256;
constexpr int kWidth = 8;

KVPO_INLINE Vec load(const float* p) {
  return _mm256_loadu_ps(p);
}
KVPO_INLINE Vec load(const bf16* p) {
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
}
KVPO_INLINE void store(float* p, Vec v) {
  _mm256_storeu_ps(p, v);
}
KVPO_INLINE void store(bf16* p, Vec v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i bias = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
  __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, bias), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
  const __m128i low = _mm256_castsi256_si128(rounded), high = _mm256_extracti128_si256(rounded, 1);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packus_epi32(low, high));
}
KVPO_INLINE Vec zero() {
  return _mm256_setzero_ps();
}
KVPO_INLINE Vec broadcast(float x) {
  return _mm256_set1_ps(x);
}
KVPO_INLINE Vec add(Vec a, Vec b) {
  return _mm256_add_ps(a, b);
}
KVPO_INLINE Vec sub(Vec a, Vec b) {
  return _mm256_sub_ps(a, b);
}
KVPO_INLINE Vec mul(Vec a, Vec b) {
  return _mm256_mul_ps(a, b);
}
KVPO_INLINE Vec max_of(Vec a, Vec b) {
  return _mm256_max_ps(a, b);
}
KVPO_INLINE Vec fma(Vec a, Vec b, Vec c) {
  return _mm256_fmadd_ps(a, b, c);
}
KVPO_INLINE Vec swap_pairs(Vec v) {
  return _mm256_permute_ps(v, 0xB1);
}
KVPO_INLINE bool any_greater(Vec a, Vec b) {
  return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)) != 0;
}
// n must be >= -126: the exponent field is added to directly.
KVPO_INLINE Vec scale_by_power_of_two(Vec p, Vec n) {
  const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), exponent));
}
KVPO_INLINE Vec round_to_integer(Vec x) {
  return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

#else // portable: plain loops, which the compiler vectorises for what it targets ---------------
constexpr int kWidth = 8;
struct Vec {
  float lane[kWidth];
};

template <typename F> KVPO_INLINE Vec each(F&& f) {
  Vec r;
  for (int i = 0; i < kWidth; ++i)
    r.lane[i] = f(i);
  return r;
}
KVPO_INLINE Vec load(const float* p) {
  return each([&](int i) { return p[i]; });
}
KVPO_INLINE Vec load(const bf16* p) {
  return each([&](int i) { return to_float(p[i]); });
}
KVPO_INLINE void store(float* p, const Vec& v) {
  std::memcpy(p, v.lane, sizeof(v));
}
KVPO_INLINE void store(bf16* p, const Vec& v) {
  for (int i = 0; i < kWidth; ++i)
    from_float(p[i], v.lane[i]);
}
KVPO_INLINE Vec zero() {
  return Vec{};
}
KVPO_INLINE Vec broadcast(float x) {
  return each([&](int) { return x; });
}
KVPO_INLINE Vec add(const Vec& a, const Vec& b) {
  return each([&](int i) { return a.lane[i] + b.lane[i]; });
}
KVPO_INLINE Vec sub(const Vec& a, const Vec& b) {
  return each([&](int i) { return a.lane[i] - b.lane[i]; });
}
KVPO_INLINE Vec mul(const Vec& a, const Vec& b) {
  return each([&](int i) { return a.lane[i] * b.lane[i]; });
}
KVPO_INLINE Vec max_of(const Vec& a, const Vec& b) {
  return each([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}
KVPO_INLINE Vec fma(const Vec& a, const Vec& b, const Vec& c) {
  return each([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
}
KVPO_INLINE Vec swap_pairs(const Vec& v) {
  return each([&](int i) { return v.lane[i ^ 1]; });
}
KVPO_INLINE bool any_greater(const Vec& a, const Vec& b) {
  for (int i = 0; i < kWidth; ++i)
    if (a.lane[i] > b.lane[i])
      return true;
  return false;
}
KVPO_INLINE Vec scale_by_power_of_two(const Vec& p, const Vec& n) {
  return each(
      [&](int i) { return p.lane[i] * __builtin_ldexpf(1.0f, static_cast<int>(n.lane[i])); });
}
KVPO_INLINE Vec round_to_integer(const Vec& x) {
  return each([&](int i) { return __builtin_nearbyintf(x.lane[i]); });
}
#endif

// Stores past the cache, for outputs that will not be read soon. `p` must be aligned to the bytes
// written; `stream_fence` before anyone else reads them.
#if KVPO_ISA_LEVEL >= 2
KVPO_INLINE void stream(float* p, Vec v) {
  _mm512_stream_ps(p, v);
}
#elif KVPO_ISA_LEVEL == 1
KVPO_INLINE void stream(float* p, Vec v) {
  _mm256_stream_ps(p, v);
}
#else
KVPO_INLINE void stream(float* p, const Vec& v) {
  store(p, v);
}
#endif
KVPO_INLINE void stream(bf16* p, const Vec& v) {
#if KVPO_ISA_LEVEL >= 2
  alignas(32) bf16 rounded[kWidth];
  store(rounded, v);
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p),
                      _mm256_load_si256(reinterpret_cast<const __m256i*>(rounded)));
#elif KVPO_ISA_LEVEL == 1
  alignas(16) bf16 rounded[kWidth];
  store(rounded, v);
  _mm_stream_si128(reinterpret_cast<__m128i*>(p),
                   _mm_load_si128(reinterpret_cast<const __m128i*>(rounded)));
#else
  store(p, v);
#endif
}
KVPO_INLINE void stream_fence() {
#if KVPO_ISA_LEVEL >= 1
  _mm_sfence();
#endif
}

// Sum over the lanes, in one fixed order.
KVPO_INLINE float sum_lanes(Vec v) {
  float lane[kWidth];
  store(lane, v);
  for (int half = kWidth / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i)
      lane[i] += lane[i + half];
  return lane[0];
}

// 2^x for x <= 0 or so: degree-5 polynomial on [-1/2, 1/2], relative error 2.4e-6... of float32.
// Below -126 the result is 2^-126 or 0, which a softmax cannot tell from 0.
KVPO_INLINE Vec exp2(Vec x) {
  x = max_of(x, broadcast(-126.0f));
  const Vec n = round_to_integer(x), f = sub(x, n);
  Vec p = broadcast(1.3333558e-3f);
  p = fma(p, f, broadcast(9.6180e-3f));
  p = fma(p, f, broadcast(5.550411e-2f));
  p = fma(p, f, broadcast(0.24022651f));
  p = fma(p, f, broadcast(0.69314718f));
  p = fma(p, f, broadcast(1.0f));
  return scale_by_power_of_two(p, n);
}

} // namespace
} // namespace kvpo::cpu::KVPO_ISA
