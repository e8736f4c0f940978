// Products of small matrices, C[m][n] (+)= sum_k A[m][k] B[k][n], with n along the vectors.
//
// A enters one 32-bit element at a time, broadcast, so it may lie anywhere: keys and values are
// read where the pool keeps them. B and C are scratch with rows of whole vectors. A tile of C stays
// in registers for the whole sum, and every element of C is summed in the order of k: its bits do
// not depend on the tile it fell into. What C held is added last: a sum over many products is one
// of partial sums, whose rounding errors grow with their number and not with that of all terms.
#pragma once

#include "simd.h"

namespace kvpo::cpu::KVPO_ISA {
namespace {

#if KVPO_ISA_LEVEL >= 2
constexpr int kTileRows = 8, kTileVecs = 3; // 24 sums, 3 of B and 1 of A in 32 registers
#elif KVPO_ISA_LEVEL == 1
constexpr int kTileRows = 6, kTileVecs = 2; // 12 sums, 2 of B and 1 of A in 16 registers
#else
constexpr int kTileRows = 2, kTileVecs = 2;
#endif
constexpr int kTileColumns = kTileVecs * kWidth;

// What a 32-bit element of A and B is. C always holds floats.
enum class Element { kFloat, kBf16Pair };
// Which index of A has neighbours in memory; the stride of the other one is an argument.
enum class Packed { kRows, kSteps };

struct Broadcasts { // the operand A
  const void* data;
  ptrdiff_t stride; // in bytes, of the index that is not packed
};

// Walks over the cache lines of kRows rows, one per two steps of a tile's sum (which is how many
// there are), so that fetching what is needed next is spread over the arithmetic. The hardware does
// not follow rows this far apart.
template <int kRows, int kLocality> struct Prefetch {
  const char* line;
  ptrdiff_t stride;
  int row = 0;
  __attribute__((always_inline)) void next() {
    __builtin_prefetch(line, 0, kLocality);
    line += stride;
    if (++row == kRows) {
      row = 0;
      line += 64 - kRows * stride;
    }
  }
};

KVPO_INLINE float load_element(const char* p) { // bf16 pairs are aligned to 2 bytes only
  float x;
  std::memcpy(&x, p, sizeof(x));
#if KVPO_ISA_LEVEL == 0
  // GCC 12 joins the loads of neighbouring rows and steps, and reads a step beyond the last one.
#if defined(__x86_64__)
  __asm__("" : "+x"(x));
#elif defined(__aarch64__)
  __asm__("" : "+w"(x));
#endif
#endif
  return x;
}

template <Element kElement> KVPO_INLINE Vec multiply_add(Vec a, Vec b, Vec c) {
#if KVPO_ISA_LEVEL >= 3
  if (kElement == Element::kBf16Pair)
    return add_pair_products(a, b, c);
#endif
  return fma(a, b, c);
}

template <int kRows, int kVecs, bool kAdd, Element kElement, Packed kPacked>
KVPO_INLINE void one_tile(int steps, const char* a, ptrdiff_t stride, const float* b,
                          ptrdiff_t b_row, float* c, ptrdiff_t c_row, Broadcasts after) {
  const ptrdiff_t row = kPacked == Packed::kRows ? 4 : stride;
  const ptrdiff_t step = kPacked == Packed::kRows ? stride : 4;
  Vec sums[kRows][kVecs];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 16
    for (int j = 0; j < kVecs; ++j)
      sums[i][j] = zero();
  Prefetch<kRows, 3> next_rows{a + kRows * row, row};                                // into L1
  Prefetch<kRows, 2> used_after{static_cast<const char*>(after.data), after.stride}; // into L2
  for (int k = 0; k < steps; ++k, a += step, b += b_row) {
    if (kPacked == Packed::kSteps) {
      if (k % 2 == 0)
        next_rows.next();
      else
        used_after.next();
    }
    Vec columns[kVecs];
#pragma GCC unroll 16
    for (int j = 0; j < kVecs; ++j)
      columns[j] = load(b + j * kWidth);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const Vec x = broadcast(load_element(a + i * row));
#pragma GCC unroll 16
      for (int j = 0; j < kVecs; ++j)
        sums[i][j] = multiply_add<kElement>(x, columns[j], sums[i][j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 16
    for (int j = 0; j < kVecs; ++j) {
      float* to = c + i * c_row + j * kWidth;
      store(to, kAdd ? add(load(to), sums[i][j]) : sums[i][j]);
    }
}

template <int kRows, int kVecs, bool kAdd, Element kElement, Packed kPacked>
KVPO_INLINE void last_rows(int rows, int steps, const char* a, ptrdiff_t stride, const float* b,
                           ptrdiff_t b_row, float* c, ptrdiff_t c_row, Broadcasts after) {
  if constexpr (kRows > 0) {
    if (rows == kRows)
      one_tile<kRows, kVecs, kAdd, kElement, kPacked>(steps, a, stride, b, b_row, c, c_row, after);
    else
      last_rows<kRows - 1, kVecs, kAdd, kElement, kPacked>(rows, steps, a, stride, b, b_row, c,
                                                           c_row, after);
  }
}

// Columns of `kVecs` vectors, any number of rows. Not inlined: one copy per combination.
template <int kVecs, bool kAdd, Element kElement, Packed kPacked>
__attribute__((noinline)) void panel_product(int rows, int steps, Broadcasts a, const float* b,
                                             ptrdiff_t b_row, float* c, ptrdiff_t c_row,
                                             Broadcasts after) {
  const char* from = static_cast<const char*>(a.data);
  const char* then = static_cast<const char*>(after.data);
  const ptrdiff_t row = kPacked == Packed::kRows ? 4 : a.stride;
  int i = 0;
  for (; i + kTileRows <= rows; i += kTileRows)
    one_tile<kTileRows, kVecs, kAdd, kElement, kPacked>(steps, from + i * row, a.stride, b, b_row,
                                                        c + i * c_row, c_row,
                                                        {then + i * after.stride, after.stride});
  last_rows<kTileRows - 1, kVecs, kAdd, kElement, kPacked>(rows - i, steps, from + i * row,
                                                           a.stride, b, b_row, c + i * c_row, c_row,
                                                           {then + i * after.stride, after.stride});
}

// C [rows, vecs * kWidth] (+)= A [rows, steps] B [steps, vecs * kWidth]; rows of B and C are
// `b_row` and `c_row` floats apart; kAdd keeps what C holds. Where the steps of A are packed, rows
// ahead are prefetched, and with them the same rows of `after`, an operand of a later product.
template <bool kAdd, Element kElement, Packed kPacked>
KVPO_INLINE void product(int rows, int vecs, int steps, Broadcasts a, const float* b,
                         ptrdiff_t b_row, float* c, ptrdiff_t c_row, Broadcasts after) {
  for (; vecs >= kTileVecs; vecs -= kTileVecs, b += kTileColumns, c += kTileColumns)
    panel_product<kTileVecs, kAdd, kElement, kPacked>(rows, steps, a, b, b_row, c, c_row, after);
#if KVPO_ISA_LEVEL >= 2
  if (vecs == 2)
    return panel_product<2, kAdd, kElement, kPacked>(rows, steps, a, b, b_row, c, c_row, after);
#endif
  if (vecs == 1)
    panel_product<1, kAdd, kElement, kPacked>(rows, steps, a, b, b_row, c, c_row, after);
}
template <bool kAdd, Element kElement, Packed kPacked>
KVPO_INLINE void product(int rows, int vecs, int steps, Broadcasts a, const float* b,
                         ptrdiff_t b_row, float* c, ptrdiff_t c_row) {
  product<kAdd, kElement, kPacked>(rows, vecs, steps, a, b, b_row, c, c_row, a);
}

} // namespace
} // namespace kvpo::cpu::KVPO_ISA
