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
struct fp8 { // the bits of a float8_e4m3fn: no infinity, NaN is all ones
  uint8_t bits;
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

KVPO_INLINE float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
KVPO_INLINE uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}
// Half precision without hardware: exponents are re-biased by a multiplication, which also
// normalises subnormal values.
KVPO_INLINE float to_float(fp16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t rest = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  const bool special = (x.bits & 0x7c00u) == 0x7c00u; // infinity or NaN
  const uint32_t magnitude =
      special ? rest | 0x7f800000u : float_to_bits(bits_to_float(rest) * 0x1p112f);
  return bits_to_float(sign | magnitude);
}
// The same bits, four to the left and seen as a half, are the value times 2^-8.
KVPO_INLINE float to_float(fp8 x) {
  const uint16_t half = static_cast<uint16_t>((x.bits & 0x80u) << 8 | (x.bits & 0x7fu) << 7);
  const float value = to_float(fp16{half}) * 256.0f;
  return (x.bits & 0x7fu) == 0x7fu ? bits_to_float(0x7fc00000u) : value;
}
KVPO_INLINE void from_float(fp16& to, float x) { // round to nearest even; NaN stays NaN
  const uint32_t bits = float_to_bits(x), sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
  uint32_t half;
  if (rest > 0x7f800000u)
    half = 0x7e00u;
  else if (rest >= 0x47800000u) // 65536: past what rounding can bring back
    half = 0x7c00u;
  else if (rest < 0x38800000u) // subnormal: the addition rounds at 2^-24
    half = float_to_bits(bits_to_float(rest) + 0.5f) - 0x3f000000u;
  else
    half = (rest - 0x38000000u + 0xfffu + (rest >> 13 & 1u)) >> 13;
  to.bits = static_cast<uint16_t>(sign | half);
}
KVPO_INLINE uint32_t magnitude_bits(float x) {
  return float_to_bits(x) & 0x7fffffffu;
}
// Rounded to nearest even; |x| is at most 127, and 448, a rounding up included. NaN: 0, and NaN.
KVPO_INLINE void from_float(int8_t& to, float x) { // an addition of 1.5 * 2^23 rounds at 1
  to = x == x ? static_cast<int8_t>(float_to_bits(x + 12582912.0f)) : int8_t{0};
}
KVPO_INLINE void from_float(fp8& to, float x) {
  const uint32_t sign = float_to_bits(x) >> 24 & 0x80u, size = magnitude_bits(x);
  uint32_t code;
  if (size > 0x7f800000u)
    code = 0x7fu;
  else if (size < 0x3c800000u) // below 2^-6, subnormal: the addition rounds at 2^-9
    code = float_to_bits(bits_to_float(size) + 16384.0f) - 0x46800000u;
  else
    code = ((size + 0x7ffffu + (size >> 20 & 1u)) >> 20) - (120u << 3);
  to.bits = static_cast<uint8_t>(sign | code);
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
KVPO_INLINE Vec load(const fp16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
KVPO_INLINE Vec load(const int8_t* p) {
  return _mm512_cvtepi32_ps(
      _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
KVPO_INLINE Vec
load(const fp8* p) { // as `to_float`; a half's conversion takes subnormals as they are
  const __m256i raw = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m256i size = _mm256_and_si256(raw, _mm256_set1_epi16(0x7f));
  const __m256i sign = _mm256_slli_epi16(_mm256_srli_epi16(raw, 7), 15);
  const __m256i half = _mm256_or_si256(sign, _mm256_slli_epi16(size, 7));
  const __m256i nan = _mm256_cmpeq_epi16(size, _mm256_set1_epi16(0x7f));
  const __m512 value = _mm512_mul_ps(_mm512_cvtph_ps(half), _mm512_set1_ps(256.0f));
  return _mm512_castsi512_ps(
      _mm512_or_si512(_mm512_castps_si512(value), _mm512_cvtepi16_epi32(nan)));
}
KVPO_INLINE void store(fp16* p, Vec v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
// As `from_float`, of numbers.
KVPO_INLINE void store(int8_t* p, Vec v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)));
}
KVPO_INLINE void store(fp8* p, Vec v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i size = _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff));
  const __m512i sign = _mm512_and_si512(_mm512_srli_epi32(bits, 24), _mm512_set1_epi32(0x80));
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(size, 20), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(size, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7ffff)));
  const __m512i normal = _mm512_sub_epi32(_mm512_srli_epi32(rounded, 20), _mm512_set1_epi32(960));
  const __m512 shifted = _mm512_add_ps(_mm512_castsi512_ps(size), _mm512_set1_ps(16384.0f));
  const __m512i small =
      _mm512_sub_epi32(_mm512_castps_si512(shifted), _mm512_set1_epi32(0x46800000));
  const __mmask16 is_small = _mm512_cmplt_epi32_mask(size, _mm512_set1_epi32(0x3c800000));
  const __m512i code = _mm512_or_si512(sign, _mm512_mask_mov_epi32(normal, is_small, small));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(code));
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
KVPO_INLINE Vec larger_magnitude(Vec most, Vec v) { // as bits: NaN is above infinity; most >= 0
  const __m512i size = _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fffffff));
  return _mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(most), size));
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
KVPO_INLINE Vec where_greater(Vec a, Vec b, Vec yes, Vec no) { // no where a or b is NaN
  return _mm512_mask_mov_ps(no, _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), yes);
}
// x - floor(x), and p * 2^floor(x): 0 for x = -inf.
KVPO_INLINE Vec fraction(Vec x) {
  return _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
}
KVPO_INLINE Vec scale_by_power_of_two(Vec p, Vec x) {
  return _mm512_scalef_ps(p, x);
}
// In place: afterwards rows[i] holds what lane i of every row was.
KVPO_INLINE void transpose(Vec (&rows)[kWidth]) {
  Vec t[kWidth];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_ps(rows[2 * i], rows[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_ps(rows[2 * i], rows[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const __m512d a = _mm512_castps_pd(t[i + j]), b = _mm512_castps_pd(t[i + j + 2]);
      rows[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      rows[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) { // the 4x4 blocks are done; now their 4x4 arrangement
    t[i] = _mm512_shuffle_f32x4(rows[i], rows[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(rows[i], rows[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_f32x4(rows[i + 8], rows[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(rows[i + 8], rows[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    rows[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
    rows[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
    rows[i + 4] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
    rows[i + 12] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

#if KVPO_ISA_LEVEL >= 3 // bf16 pairs: a Vec whose 32-bit lanes hold two bf16, low half first
KVPO_INLINE Vec add_pair_products(Vec a, Vec b, Vec c) { // c + a.low * b.low + a.high * b.high
  return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b);
}
KVPO_INLINE Vec round_to_pairs(Vec low, Vec high) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(high, low);
  return _mm512_castsi512_ps(_mm512_permutexvar_epi16(order, halves));
}
// 2 * kWidth bf16 of each row become pairs (low[i], high[i]).
KVPO_INLINE void interleave(const bf16* low, const bf16* high, bf16* pairs) {
  const __m512i first = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40,
                                         8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
  const __m512i a = _mm512_loadu_si512(low), b = _mm512_loadu_si512(high);
  _mm512_storeu_si512(pairs, _mm512_permutex2var_epi16(a, first, b));
  _mm512_storeu_si512(pairs + 32, _mm512_permutex2var_epi16(a, second, b));
}
#endif

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
KVPO_INLINE Vec load(const fp16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
KVPO_INLINE Vec load(const int8_t* p) {
  return _mm256_cvtepi32_ps(
      _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
KVPO_INLINE Vec
load(const fp8* p) { // as `to_float`; a half's conversion takes subnormals as they are
  const __m128i raw = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  const __m128i size = _mm_and_si128(raw, _mm_set1_epi16(0x7f));
  const __m128i sign = _mm_slli_epi16(_mm_srli_epi16(raw, 7), 15);
  const __m128i half = _mm_or_si128(sign, _mm_slli_epi16(size, 7));
  const __m128i nan = _mm_cmpeq_epi16(size, _mm_set1_epi16(0x7f));
  const __m256 value = _mm256_mul_ps(_mm256_cvtph_ps(half), _mm256_set1_ps(256.0f));
  return _mm256_or_ps(value, _mm256_castsi256_ps(_mm256_cvtepi16_epi32(nan)));
}
KVPO_INLINE void store(fp16* p, Vec v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
KVPO_INLINE void store_low_bytes(void* p, __m256i v) { // of 32-bit lanes in [-128, 255]
  const __m256i bytes = _mm256_and_si256(v, _mm256_set1_epi32(0xff));
  const __m128i low = _mm256_castsi256_si128(bytes), high = _mm256_extracti128_si256(bytes, 1);
  const __m128i halves = _mm_packus_epi32(low, high);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(halves, halves));
}
KVPO_INLINE void store(int8_t* p, Vec v) {
  store_low_bytes(p, _mm256_cvtps_epi32(v));
}
KVPO_INLINE void store(fp8* p, Vec v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i size = _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff));
  const __m256i sign = _mm256_and_si256(_mm256_srli_epi32(bits, 24), _mm256_set1_epi32(0x80));
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(size, 20), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(size, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7ffff)));
  const __m256i normal = _mm256_sub_epi32(_mm256_srli_epi32(rounded, 20), _mm256_set1_epi32(960));
  const __m256 shifted = _mm256_add_ps(_mm256_castsi256_ps(size), _mm256_set1_ps(16384.0f));
  const __m256i small =
      _mm256_sub_epi32(_mm256_castps_si256(shifted), _mm256_set1_epi32(0x46800000));
  const __m256i is_small = _mm256_cmpgt_epi32(_mm256_set1_epi32(0x3c800000), size);
  store_low_bytes(p, _mm256_or_si256(sign, _mm256_blendv_epi8(normal, small, is_small)));
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
KVPO_INLINE Vec larger_magnitude(Vec most, Vec v) {
  const __m256i size = _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x7fffffff));
  return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(most), size));
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
KVPO_INLINE Vec where_greater(Vec a, Vec b, Vec yes, Vec no) { // no where a or b is NaN
  return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_GT_OQ));
}
KVPO_INLINE Vec fraction(Vec x) {
  return _mm256_sub_ps(x, _mm256_floor_ps(x));
}
// The exponent field is added to directly, so where x < -126 the result is 0.
KVPO_INLINE Vec scale_by_power_of_two(Vec p, Vec x) {
  const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(_mm256_floor_ps(x)), 23);
  const __m256 scaled = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), exponent));
  return _mm256_and_ps(scaled, _mm256_cmp_ps(x, _mm256_set1_ps(-126.0f), _CMP_NLT_UQ));
}
// In place: afterwards rows[i] holds what lane i of every row was.
KVPO_INLINE void transpose(Vec (&rows)[kWidth]) {
  Vec t[kWidth];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; ++j) {
      rows[i + 2 * j] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0x44);
      rows[i + 2 * j + 1] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0xee);
    }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm256_permute2f128_ps(rows[i], rows[i + 4], 0x20);
    t[i + 4] = _mm256_permute2f128_ps(rows[i], rows[i + 4], 0x31);
  }
  for (int i = 0; i < 8; ++i)
    rows[i] = t[i];
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
template <typename T> KVPO_INLINE void store(T* p, const Vec& v) { // of fewer bits
  for (int i = 0; i < kWidth; ++i)
    from_float(p[i], v.lane[i]);
}
KVPO_INLINE Vec load(const fp16* p) {
  return each([&](int i) { return to_float(p[i]); });
}
KVPO_INLINE Vec load(const int8_t* p) {
  return each([&](int i) { return static_cast<float>(p[i]); });
}
KVPO_INLINE Vec load(const fp8* p) {
  return each([&](int i) { return to_float(p[i]); });
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
KVPO_INLINE Vec larger_magnitude(const Vec& most, const Vec& v) {
  return each([&](int i) {
    return bits_to_float(max_of(float_to_bits(most.lane[i]), magnitude_bits(v.lane[i])));
  });
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
KVPO_INLINE Vec where_greater(const Vec& a, const Vec& b, const Vec& yes, const Vec& no) {
  return each([&](int i) { return a.lane[i] > b.lane[i] ? yes.lane[i] : no.lane[i]; });
}
KVPO_INLINE Vec fraction(const Vec& x) {
  return each([&](int i) { return x.lane[i] - __builtin_floorf(x.lane[i]); });
}
// 0 where x < -126; the comparison also keeps NaN, which p is then as well, off the cast.
KVPO_INLINE Vec scale_by_power_of_two(const Vec& p, const Vec& x) {
  return each([&](int i) {
    const bool normal = x.lane[i] >= -126.0f;
    const int exponent = normal ? static_cast<int>(__builtin_floorf(x.lane[i])) : -127;
    const float power = bits_to_float(static_cast<uint32_t>(exponent + 127) << 23);
    return x.lane[i] < -126.0f ? 0.0f : p.lane[i] * power;
  });
}
// In place: afterwards rows[i] holds what lane i of every row was.
KVPO_INLINE void transpose(Vec (&rows)[kWidth]) {
  for (int i = 0; i < kWidth; ++i)
    for (int j = 0; j < i; ++j) {
      const float swapped = rows[i].lane[j];
      rows[i].lane[j] = rows[j].lane[i];
      rows[j].lane[i] = swapped;
    }
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

// 2^x for x < 128: the minimax polynomial of degree 5 with p(0) = 1 on [0, 1], whose relative error
// is 8.2e-8, and 1.4e-7 (1.2 ulp) with the rounding of its evaluation. 2^0 is exactly 1 and 2^-inf
// exactly 0; below 2^-126 the result is subnormal or 0, as it comes cheapest. NaN stays NaN.
KVPO_INLINE Vec exp2(Vec x) {
  const Vec f = fraction(x);
  Vec p = broadcast(1.867130050e-3f);
  p = fma(p, f, broadcast(9.017030708e-3f));
  p = fma(p, f, broadcast(5.579991266e-2f));
  p = fma(p, f, broadcast(0.2401644439f));
  p = fma(p, f, broadcast(0.6931512952f));
  p = fma(p, f, broadcast(1.0f));
  return scale_by_power_of_two(p, x);
}

} // namespace
} // namespace kvpo::cpu::KVPO_ISA
