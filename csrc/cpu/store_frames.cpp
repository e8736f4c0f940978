#include "kvpo/store_frames.h"

#include "simd.h"
#include "team.h"
#include "threads.h"

namespace kvpo::cpu::KVPO_ISA {
namespace {

constexpr float kLeastScale = 1e-30f; // products with it stay normal numbers

template <typename T> constexpr float per_largest();
template <> constexpr float per_largest<int8_t>() {
  return static_cast<float>(1.0 / 127.0);
}
template <> constexpr float per_largest<fp8>() {
  return static_cast<float>(1.0 / 448.0);
}

// A head's rows of a frame lie a token apart, which no hardware prefetcher follows from page to
// page: the lines of a row a few tokens on.
template <bool kWrite, typename T>
KVPO_INLINE void prefetch_row(const T* row, int64_t t, int64_t tokens, int64_t stride, int64_t D) {
  constexpr int64_t kAhead = 8, kLine = 64 / sizeof(T);
  const T* const soon = row + min_of(kAhead, tokens - 1 - t) * stride;
  for (int64_t d = 0; d < D; d += kLine)
    __builtin_prefetch(soon + d, kWrite, 3);
}

// Of the magnitudes' bits, which have their order; NaN is above infinity there.
template <typename T> uint32_t largest_bits(const T* x, int64_t tokens, int64_t stride, int64_t D) {
  Vec most = zero();
  uint32_t bits = 0;
  for (int64_t t = 0; t < tokens; ++t, x += stride) {
    prefetch_row<false>(x, t, tokens, stride, D);
    int64_t d = 0;
    for (; d + kWidth <= D; d += kWidth)
      most = larger_magnitude(most, load(x + d));
    for (; d < D; ++d)
      bits = max_of(bits, magnitude_bits(to_float(x[d])));
  }
  float lanes[kWidth];
  store(lanes, most);
  for (int i = 0; i < kWidth; ++i)
    bits = max_of(bits, magnitude_bits(lanes[i]));
  return bits;
}

template <typename T, typename P> void head(const StoreFrames& a, int64_t frame, int64_t h) {
  const int64_t D = a.head_size, stride = a.heads * D;
  const T* x = static_cast<const T*>(a.frames) + (frame * a.tokens * a.heads + h) * D;
  const uint32_t bits = largest_bits(x, a.tokens, stride, D);
  const bool finite = bits < 0x7f800000u;
  const float scale =
      bits == 0 ? 1.0f : max_of(bits_to_float(bits) * per_largest<P>(), kLeastScale);
  const int64_t slot = a.slots[frame];
  a.scales[slot * a.heads + h] = finite ? scale : bits_to_float(0x7fc00000u);
  P* to = static_cast<P*>(a.pool) + slot * a.pool_slot + h * a.pool_head;
  const float inverse = 1.0f / scale;
  const Vec factor = broadcast(inverse);
  for (int64_t t = 0; t < a.tokens; ++t, x += stride, to += a.pool_token) {
    if (!finite) {
      for (int64_t d = 0; d < D; ++d)
        from_float(to[d], bits_to_float(0x7fc00000u));
      continue;
    }
    prefetch_row<false>(x, t, a.tokens, stride, D);
    prefetch_row<true>(to, t, a.tokens, a.pool_token, D);
    int64_t d = 0;
    for (; d + kWidth <= D; d += kWidth)
      store(to + d, mul(load(x + d), factor));
    for (; d < D; ++d)
      from_float(to[d], to_float(x[d]) * inverse);
  }
}

// A head of a frame is read twice, the second time from the core's own cache.
template <typename T, typename P> void store_all(const StoreFrames& a) {
  const int64_t heads = a.count * a.heads;
  for_each(heads, threads_for(Work::kStoreFrames, heads * a.tokens * a.head_size, a.threads),
           [&](int64_t i) { head<T, P>(a, i / a.heads, i % a.heads); });
}

template <typename T> void store_all(const StoreFrames& a) {
  a.page == Page::kInt8 ? store_all<T, int8_t>(a) : store_all<T, fp8>(a);
}

} // namespace

void store_frames(const StoreFrames& args) {
  switch (args.dtype) {
  case Float::kFloat32:
    return store_all<float>(args);
  case Float::kBfloat16:
    return store_all<bf16>(args);
  case Float::kFloat16:
    return store_all<fp16>(args);
  }
}

} // namespace kvpo::cpu::KVPO_ISA
