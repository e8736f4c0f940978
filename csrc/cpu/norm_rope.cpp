#include "kvpo/norm_rope.h"

#include <cmath>
#include <cstring>
#include <initializer_list>

#include "scratch.h"
#include "simd.h"
#include "team.h"
#include "threads.h"

namespace kvpo::cpu::KVPO_ISA {
namespace {

// Rotation as out = v * cosines + swap_pairs(v) * sines: each pair's cosine twice, its sine negated
// and not. The inverse rotation negates the sines.
void expand_angles(const float* cos, const float* sin, int64_t pairs, float sign, float* cosines,
                   float* sines) {
  for (int64_t i = 0; i < pairs; ++i) {
    cosines[2 * i] = cosines[2 * i + 1] = cos[i];
    sines[2 * i] = -sign * sin[i];
    sines[2 * i + 1] = sign * sin[i];
  }
}

template <typename T> KVPO_INLINE float inverse_rms(const T* x, int64_t n, float eps) {
  Vec a = zero(), b = zero();
  int64_t i = 0;
  for (; i + 2 * kWidth <= n; i += 2 * kWidth) {
    const Vec u = load(x + i), v = load(x + i + kWidth);
    a = fma(u, u, a);
    b = fma(v, v, b);
  }
  for (; i < n; i += kWidth) {
    const Vec u = load(x + i);
    a = fma(u, u, a);
  }
  return 1.0f / __builtin_sqrtf(sum_lanes(add(a, b)) / static_cast<float>(n) + eps);
}

int64_t values(const NormRopeShape& s) {
  return s.rows * s.tokens * s.heads * s.head_size;
}

// An output larger than this would push out of the cache what the next kernel wants, and reading
// its lines before they are overwritten would cost a third more traffic.
constexpr int64_t kStreamBytes = 8 << 20;

// Whether rows of heads at `data` may be written past the cache, in whole lines of 64 bytes.
template <typename T>
bool streams(const NormRopeShape& s, const void* data, std::initializer_list<int64_t> strides) {
  constexpr int64_t kLine = 64, kSize = sizeof(T);
  bool aligned = reinterpret_cast<uintptr_t>(data) % kLine == 0 && s.head_size * kSize % kLine == 0;
  for (const int64_t stride : strides)
    aligned = aligned && stride * kSize % kLine == 0;
  return aligned && values(s) * kSize >= kStreamBytes;
}

// The line at `data + i` into L2, once per line. Asked for one by one between the stores of a token
// two calls earlier, reads and writes overlap; asked for at once, they fill the core's miss
// buffers.
template <typename T> KVPO_INLINE void prefetch(const T* data, int64_t i) {
  if (i % (64 / static_cast<int64_t>(sizeof(T))) == 0)
    __builtin_prefetch(data + i, 0, 2);
}

// One token: head h of the result goes to out + h * head_stride. `soon` is a later token's input.
template <bool kStream, typename T>
KVPO_INLINE void token_forward(const NormRopeForward& a, const T* x, const float* cosines,
                               const float* sines, T* out, int64_t head_stride, const T* soon) {
  const int64_t D = a.shape.head_size;
  const Vec r = broadcast(inverse_rms(x, a.shape.heads * D, a.eps));
  for (int64_t h = 0; h < a.shape.heads; ++h)
    for (int64_t d = 0; d < D; d += kWidth) {
      prefetch(soon, h * D + d);
      const Vec y = mul(mul(load(x + h * D + d), r), load(a.weight + h * D + d));
      const Vec turned = fma(y, load(cosines + d), mul(swap_pairs(y), load(sines + d)));
      if constexpr (kStream)
        stream(out + h * head_stride + d, turned);
      else
        store(out + h * head_stride + d, turned);
    }
}

template <bool kStream, typename T>
KVPO_INLINE void token_copy(const NormRopeShape& s, const T* from, T* out, int64_t head_stride,
                            const T* soon) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t h = 0; h < s.heads; ++h) {
    const T *const x = from + h * s.head_size, *const later = soon + h * s.head_size;
    T* const to = out + h * head_stride;
    for (int64_t d = 0; d < s.head_size; d += kLine) {
      prefetch(later, d);
      if constexpr (kStream) // whole lines, whatever the elements are
        for (int64_t i = 0; i < 16; i += kWidth)
          stream(reinterpret_cast<float*>(to + d) + i,
                 load(reinterpret_cast<const float*>(x + d) + i));
    }
    if constexpr (!kStream)
      std::memcpy(to, x, static_cast<size_t>(s.head_size) * sizeof(T));
  }
}

// The angles of a run of tokens, expanded once for all rows. A row's tokens of a run lie together:
// going through the rows token by token would open a stream per row, all in the same cache sets.
struct Angles {
  static constexpr int64_t kFloats = 4096; // 16 KiB for each of the two, half of an L1 cache

  alignas(64) float cosines[kFloats], sines[kFloats];

  static int64_t run(int64_t head_size) {
    return max_of<int64_t>(1, min_of<int64_t>(16, kFloats / head_size));
  }

  void expand(const NormRopeForward& a, int64_t first, int64_t last, float sign) {
    const int64_t D = a.shape.head_size;
    for (int64_t n = first; n < last; ++n)
      expand_angles(a.cos + n * D / 2, a.sin + n * D / 2, D / 2, sign, cosines + (n - first) * D,
                    sines + (n - first) * D);
  }
};

// Where a token's input lies, and that of the token two calls later: a row's part of a run is so
// short that the hardware's prefetcher would begin anew at each.
struct Token {
  int64_t row, n, at, soon;
};

// Calls visit(angles of the token, token) for every token of every row, in parallel over runs.
template <bool kStream, typename Visit>
void for_each_token(const NormRopeForward& a, int threads, const Visit& visit) {
  const auto& s = a.shape;
  const int64_t D = s.head_size, C = s.heads * D, run = Angles::run(D),
                runs = (s.tokens + run - 1) / run;
  for_each(runs, threads, [&](int64_t i) {
    const int64_t first = i * run, last = min_of<int64_t>(s.tokens, first + run);
    Angles angles;
    angles.expand(a, first, last, 1.0f);
    for (int64_t b = 0; b < s.rows; ++b)
      for (int64_t n = first; n < last; ++n) {
        const int64_t wrap = n + 2 < last ? 0 : s.tokens - (last - first);
        const int64_t soon = min_of(b * s.tokens + n + 2 + wrap, s.rows * s.tokens - 1);
        visit(angles.cosines + (n - first) * D, angles.sines + (n - first) * D,
              Token{b, n, (b * s.tokens + n) * C, soon * C});
      }
    if constexpr (kStream)
      stream_fence();
  });
}

template <bool kStream, typename T> void forward(const NormRopeForward& a) {
  const auto& s = a.shape;
  const int threads = threads_for(Work::kNormRope, values(s), a.threads);
  for_each_token<kStream>(a, threads, [&](const float* cosines, const float* sines, Token token) {
    const T* const x = static_cast<const T*>(a.x);
    token_forward<kStream>(a, x + token.at, cosines, sines, static_cast<T*>(a.out) + token.at,
                           s.head_size, x + token.soon);
  });
}

template <bool kStream, typename T> void write(const NormRopeWrite& w) {
  const NormRopeForward& a = w.keys;
  const auto& s = a.shape;
  const int64_t frames = s.tokens / w.frame_tokens;
  const int threads = threads_for(Work::kNormRope, 2 * values(s), a.threads);
  for_each_token<kStream>(a, threads, [&](const float* cosines, const float* sines, Token token) {
    const T *const x = static_cast<const T*>(a.x), *const values = static_cast<const T*>(w.v);
    const int64_t frame = token.n / w.frame_tokens, t = token.n % w.frame_tokens;
    const int64_t slot = w.slots[token.row * frames + frame];
    T* k = static_cast<T*>(w.k_pool.data) + slot * w.k_pool.slot + t * w.k_pool.token;
    T* v = static_cast<T*>(w.v_pool.data) + slot * w.v_pool.slot + t * w.v_pool.token;
    token_forward<kStream>(a, x + token.at, cosines, sines, k, w.k_pool.head, x + token.soon);
    token_copy<kStream>(s, values + token.at, v, w.v_pool.head, values + token.soon);
  });
}

template <typename T> void forward(const NormRopeForward& a) {
  streams<T>(a.shape, a.out, {}) ? forward<true, T>(a) : forward<false, T>(a);
}

template <typename T> void write(const NormRopeWrite& w) {
  const auto aligned = [&](const PoolPages& p) {
    return streams<T>(w.keys.shape, p.data, {p.slot, p.token, p.head});
  };
  aligned(w.k_pool) && aligned(w.v_pool) ? write<true, T>(w) : write<false, T>(w);
}

// With y = x r w and g = the rotated-back gradient of y:
//   grad_w = sum over tokens of g x r,   grad_x = r (g w - x r^2 mean(g w x))
template <typename T> void backward(const NormRopeBackward& args) {
  const NormRopeForward& a = args.forward;
  const auto& s = a.shape;
  const int64_t C = s.heads * s.head_size, D = s.head_size, pairs = D / 2;
  // A fixed number of partial sums of grad_w, so that threads do not change the order.
  const int64_t chunks = min_of<int64_t>(s.tokens, 64);
  const Scratch scratch(static_cast<size_t>(max_of<int64_t>(chunks, 1) * 2 * C) * sizeof(float));
  float* partial = reinterpret_cast<float*>(scratch.data()); // [chunks, C] sums, [chunks, C] g
  const int threads = threads_for(Work::kNormRopeBackward, values(s), a.threads);
  for_each(chunks, threads, [&](int64_t chunk) {
    float* grad_w = partial + chunk * C;
    float* g = partial + (chunks + chunk) * C;
    for (int64_t i = 0; i < C; i += kWidth)
      store(grad_w + i, zero());
    for (int64_t n = chunk * s.tokens / chunks; n < (chunk + 1) * s.tokens / chunks; ++n) {
      float cosines[Angles::kFloats], sines[Angles::kFloats];
      expand_angles(a.cos + n * pairs, a.sin + n * pairs, pairs, -1.0f, cosines, sines);
      for (int64_t b = 0; b < s.rows; ++b) {
        const int64_t at = (b * s.tokens + n) * C;
        const T* x = static_cast<const T*>(a.x) + at;
        const T* grad = static_cast<const T*>(args.grad) + at;
        T* grad_x = static_cast<T*>(args.grad_x) + at;
        const float r = inverse_rms(x, C, a.eps);
        const Vec rv = broadcast(r);
        Vec dot = zero();
        for (int64_t h = 0; h < s.heads; ++h)
          for (int64_t d = 0; d < D; d += kWidth) {
            const int64_t i = h * D + d;
            const Vec in = load(grad + i), xi = load(x + i);
            const Vec gi = fma(in, load(cosines + d), mul(swap_pairs(in), load(sines + d)));
            store(grad_w + i, fma(gi, mul(xi, rv), load(grad_w + i)));
            const Vec gw = mul(gi, load(a.weight + i));
            store(g + i, gw);
            dot = fma(gw, xi, dot);
          }
        const Vec shift = broadcast(-r * r * sum_lanes(dot) / static_cast<float>(C));
        for (int64_t i = 0; i < C; i += kWidth)
          store(grad_x + i, mul(rv, fma(load(x + i), shift, load(g + i))));
      }
    }
  });
  for (int64_t i = 0; i < C; i += kWidth) {
    Vec sum = zero();
    for (int64_t chunk = 0; chunk < chunks; ++chunk)
      sum = add(sum, load(partial + chunk * C + i));
    store(args.grad_weight + i, sum);
  }
}

} // namespace

void norm_rope_forward(const NormRopeForward& args) {
  args.bfloat16 ? forward<bf16>(args) : forward<float>(args);
}
void norm_rope_backward(const NormRopeBackward& args) {
  args.forward.bfloat16 ? backward<bf16>(args) : backward<float>(args);
}
void norm_rope_write(const NormRopeWrite& args) {
  args.keys.bfloat16 ? write<bf16>(args) : write<float>(args);
}

} // namespace kvpo::cpu::KVPO_ISA
