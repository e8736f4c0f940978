// Flash attention with the queries along the vectors: scores, weights and outputs are kept
// transposed, [keys, queries] and [D, queries], so that a key or value enters a product as a
// broadcast from where the pool keeps it, and the softmax needs no sum across lanes.
//
// A query block is walked through by one thread over all its keys in order, and a gradient of a
// live key is summed by one thread over all queries in order. So nothing depends on the number of
// threads or on what other rows there are.
#include "kvpo/routed_attention.h"

#ifdef _OPENMP
#include <omp.h>
#endif

#include "scratch.h"
#include "simd.h"
#include "team.h"
#include "threads.h"
#include "tile_product.h"

namespace kvpo::cpu::KVPO_ISA {
namespace {

constexpr int kChunkKeys = 96;             // their weights, of 48 queries, fill half of L1
constexpr size_t kSumBytes = 512 << 10;    // of grad_k and grad_v of a live block: half of L2
constexpr size_t kScratchLimit = 32 << 20; // of all threads together
constexpr float kLargest = 3.402823466e38f;
constexpr double kLn2 = 0.693147180559945309417;

using Forward = RoutedAttentionForward;
using Backward = RoutedAttentionBackward;
using Shape = RoutedAttentionShape;

KVPO_INLINE int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

template <typename T>
KVPO_INLINE const T* vector_at(const HeadVectors& x, int64_t outer, int64_t token, int64_t head) {
  return static_cast<const T*>(x.data) + outer * x.outer + token * x.token + head * x.head;
}

// Hands out pieces of scratch; on a null base it only measures.
struct Carver {
  char* base;
  size_t used;
  float* floats(size_t count) {
    float* piece = base ? reinterpret_cast<float*>(base + used) : nullptr;
    used += (count * sizeof(float) + 63) / 64 * 64;
    return piece;
  }
};

// Keys and values --------------------------------------------------------------------------------

// Some keys of one row and one key head, a constant stride apart.
template <typename T> struct Chunk {
  const T *k, *v;
  int64_t k_token, v_token; // strides in elements
  int keys;
  int64_t live;           // index of the first among the row's live tokens; -1 for a routed frame
  float k_scale, v_scale; // what the keys and values still have to be multiplied by
};

// Keys per chunk of a frame: balanced, so that the last one is not short, and whole tiles, which
// also keeps pairs of keys from straddling chunks. A function of the frame alone.
KVPO_INLINE int chunk_keys(int64_t tokens) {
  const int64_t keys = ceil_div(tokens, ceil_div(tokens, kChunkKeys));
  return static_cast<int>(ceil_div(keys, kTileRows) * kTileRows);
}

template <typename T, typename Visit>
KVPO_INLINE void for_chunks_of(Chunk<T> frame, int64_t tokens, bool live, Visit&& visit) {
  if (tokens == 0)
    return;
  const int keys = chunk_keys(tokens);
  for (int64_t first = 0; first < tokens; first += keys)
    visit(Chunk<T>{frame.k + first * frame.k_token, frame.v + first * frame.v_token, frame.k_token,
                   frame.v_token, static_cast<int>(min_of<int64_t>(keys, tokens - first)),
                   live ? first : -1, frame.k_scale, frame.v_scale});
}

template <typename T, typename Visit>
KVPO_INLINE void for_live_chunks(const Forward& a, int64_t row, int64_t kv_head, Visit&& visit) {
  if (a.shape.live_tokens == 0)
    return;
  const Chunk<T> live{vector_at<T>(a.k_live, row, 0, kv_head),
                      vector_at<T>(a.v_live, row, 0, kv_head),
                      a.k_live.token,
                      a.v_live.token,
                      0,
                      0,
                      1.0f,
                      1.0f};
  for_chunks_of(live, a.shape.live_tokens, true, visit);
}

// Values of a quantized page are few enough to be exact in T; its scale is applied to the scores
// and to the weights instead, of which there are fewer.
template <typename T, typename P>
KVPO_INLINE void widen(const P* from, int64_t token, int keys, int head_size, T* to) {
  for (int t = 0; t < keys; ++t)
    for (int d = 0; d < head_size; d += kWidth)
      store(to + t * head_size + d, load(from + t * token + d));
}

template <typename P, typename T, typename Visit>
KVPO_INLINE void for_quantized_chunks(const Forward& a, int64_t slot, int64_t kv_head, T* k, T* v,
                                      Visit&& visit) {
  const int head_size = static_cast<int>(a.shape.head_size);
  const int64_t scale = slot * a.shape.kv_heads + kv_head;
  const Chunk<P> frame{vector_at<P>(a.k_pool, slot, 0, kv_head),
                       vector_at<P>(a.v_pool, slot, 0, kv_head),
                       a.k_pool.token,
                       a.v_pool.token,
                       0,
                       -1,
                       a.k_scales[scale],
                       a.v_scales[scale]};
  for_chunks_of(frame, a.shape.frame_tokens, false, [&](const Chunk<P>& chunk) {
    widen(chunk.k, chunk.k_token, chunk.keys, head_size, k);
    widen(chunk.v, chunk.v_token, chunk.keys, head_size, v);
    visit(Chunk<T>{k, v, head_size, head_size, chunk.keys, -1, chunk.k_scale, chunk.v_scale});
  });
}

// `k_page` and `v_page` are scratch of a quantized pool's chunk, [keys, D] of T.
template <typename T, typename Visit>
KVPO_INLINE void for_routed_chunks(const Forward& a, int64_t row, int64_t kv_head, float* k_page,
                                   float* v_page, Visit&& visit) {
  const Shape& s = a.shape;
  T* const k = reinterpret_cast<T*>(k_page);
  T* const v = reinterpret_cast<T*>(v_page);
  for (int64_t r = 0; r < s.routed; ++r) {
    const int64_t slot = a.slots[row * s.routed + r];
    if (slot < 0 || slot >= s.slots)
      continue; // padding, or a table written to behind our back: never out of bounds
    if (a.page == Page::kInt8) {
      for_quantized_chunks<int8_t>(a, slot, kv_head, k, v, visit);
      continue;
    }
    if (a.page == Page::kFloat8) {
      for_quantized_chunks<fp8>(a, slot, kv_head, k, v, visit);
      continue;
    }
    const Chunk<T> frame{vector_at<T>(a.k_pool, slot, 0, kv_head),
                         vector_at<T>(a.v_pool, slot, 0, kv_head),
                         a.k_pool.token,
                         a.v_pool.token,
                         0,
                         -1,
                         1.0f,
                         1.0f};
    for_chunks_of(frame, s.frame_tokens, false, visit);
  }
}

// [keys, D] as elements along D: read in place, or converted to float where T is narrower.
template <Element kElement, typename T>
KVPO_INLINE Broadcasts along_head(const T* from, int64_t token, int keys, int head_size,
                                  float* converted) {
  if (kElement == Element::kBf16Pair || sizeof(T) == sizeof(float))
    return {from, static_cast<ptrdiff_t>(token * sizeof(T))};
  widen(from, token, keys, head_size, converted);
  return {converted, static_cast<ptrdiff_t>(head_size * sizeof(float))};
}

alignas(64) constexpr uint16_t kZeros[256] = {};

// [keys, D] as elements along the keys, which for pairs of bf16 means interleaving two rows; an odd
// last key is paired with zeros. Pairs are `head_size` apart.
template <typename T>
KVPO_INLINE void interleave_rows([[maybe_unused]] const T* from, [[maybe_unused]] int64_t token,
                                 [[maybe_unused]] int rows, [[maybe_unused]] int head_size,
                                 [[maybe_unused]] float* pairs) {
#if KVPO_ISA_LEVEL >= 3
  for (int t = 0; t < rows; t += 2) {
    const bf16* low = reinterpret_cast<const bf16*>(from + t * token);
    const bf16* high =
        t + 1 < rows ? reinterpret_cast<const bf16*>(from + (t + 1) * token) : kZeros;
    bf16* to = reinterpret_cast<bf16*>(pairs + (t / 2) * head_size);
    for (int d = 0; d < head_size; d += 2 * kWidth)
      interleave(low + d, high + d, to + 2 * d);
  }
#endif
}

template <Element kElement, typename T>
KVPO_INLINE Broadcasts along_keys(const T* from, int64_t token, int keys, int head_size,
                                  float* packed) {
  if (kElement == Element::kFloat)
    return along_head<kElement>(from, token, keys, head_size, packed);
  interleave_rows(from, token, keys, head_size, packed);
  return {packed, static_cast<ptrdiff_t>(head_size * sizeof(float))};
}

// Elements of a product over `count` of the summed index.
template <Element kElement> KVPO_INLINE int steps_of(int count) {
  return kElement == Element::kBf16Pair ? (count + 1) / 2 : count;
}

// Query blocks -----------------------------------------------------------------------------------

struct QueryBlock {
  int64_t row, head, first;
  int queries, vecs; // vecs * kWidth >= queries; the lanes beyond hold zeros
};

KVPO_INLINE QueryBlock query_block(const Shape& s, int64_t row, int64_t head, int64_t index) {
  const int64_t first = index * kTileColumns;
  const int queries = static_cast<int>(min_of<int64_t>(kTileColumns, s.queries - first));
  return {row, head, first, queries, (queries + kWidth - 1) / kWidth};
}

// to[element][query] <- from[query][element], zero for the lanes past `queries`.
template <Element kElement, typename T>
KVPO_INLINE void load_transposed(const T* from, int64_t token, const QueryBlock& block,
                                 int head_size, float* to) {
  const int elements = steps_of<kElement>(head_size);
  for (int q = 0; q < block.vecs * kWidth; q += kWidth)
    for (int e = 0; e < elements; e += kWidth) {
      Vec rows[kWidth];
      for (int i = 0; i < kWidth; ++i) {
        if (q + i >= block.queries)
          rows[i] = zero();
        else if (kElement == Element::kBf16Pair)
          rows[i] = load(reinterpret_cast<const float*>(from + (q + i) * token) + e);
        else
          rows[i] = load(from + (q + i) * token + e);
      }
      transpose(rows);
      for (int i = 0; i < kWidth; ++i)
        store(to + (e + i) * kTileColumns + q, rows[i]);
    }
}

// to[query][d] <- from[d][query] * factor[query]
template <typename T>
KVPO_INLINE void store_transposed(const float* from, const float* factor, const QueryBlock& block,
                                  int head_size, T* to, int64_t token) {
  for (int q = 0; q < block.queries; q += kWidth)
    for (int d = 0; d < head_size; d += kWidth) {
      Vec rows[kWidth];
      for (int i = 0; i < kWidth; ++i)
        rows[i] = mul(load(from + (d + i) * kTileColumns + q), load(factor + q));
      transpose(rows);
      for (int i = 0; i < kWidth && q + i < block.queries; ++i)
        store(to + (q + i) * token + d, rows[i]);
    }
}

KVPO_INLINE void fill(float* to, size_t count, float value) {
  for (size_t i = 0; i < count; ++i)
    to[i] = value;
}

// Every query with every key and value of its row; padding of the table counts as frames.
KVPO_INLINE int64_t products(const Shape& s) {
  const int64_t keys = s.routed * s.frame_tokens + s.live_tokens;
  return s.rows * s.heads * s.queries * keys * 2 * s.head_size;
}

// Runs `task(index, scratch)` for all indices below `tasks` on at most `threads` threads, each with
// `bytes` of scratch.
template <typename Task>
KVPO_INLINE void run_tasks(int64_t tasks, int threads, size_t bytes, Task&& task) {
  const int64_t fitting = static_cast<int64_t>(kScratchLimit / bytes);
  threads =
      tasks <= 1 ? 1 : static_cast<int>(max_of<int64_t>(1, min_of<int64_t>(threads, fitting)));
  const Scratch scratch(bytes * static_cast<size_t>(threads));
  char* const base = scratch.data();
  on_threads(threads, [&] {
#ifdef _OPENMP
    char* const mine = base + bytes * static_cast<size_t>(omp_get_thread_num());
#else
    char* const mine = base;
#endif
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < tasks; ++i)
      task(i, mine);
  });
}

// Forward ----------------------------------------------------------------------------------------

struct ForwardScratch {
  float *q, *out;         // [elements, columns], [D, columns]
  float *weights, *pairs; // [keys, columns]; the weights as bf16 pairs along the keys
  float *k, *v;           // chunks that cannot be read in place
  float *k_page, *v_page; // chunks of a quantized pool

  static ForwardScratch carve(Carver& from, int head_size, bool quantized) {
    const size_t columns = kTileColumns, d = static_cast<size_t>(head_size);
    ForwardScratch s;
    s.q = from.floats(d * columns);
    s.out = from.floats(d * columns);
    s.weights = from.floats(kChunkKeys * columns);
    s.pairs = from.floats(kChunkKeys / 2 * columns);
    s.k = from.floats(kChunkKeys * d);
    s.v = from.floats(kChunkKeys * d);
    s.k_page = quantized ? from.floats(kChunkKeys * d) : nullptr;
    s.v_page = quantized ? from.floats(kChunkKeys * d) : nullptr;
    return s;
  }
};

// The running softmax of a query block. A weight is 2^(score * factor + shift) with factor =
// |scale| log2(e) and shift = -factor * (largest score so far), in log2 units; the shift is kept
// rather than the largest score, so that its rounding cancels in lse and in the rescaling. It may
// lag behind by kSlack: a weight up to 2^kSlack costs no accuracy, while rescaling costs as much as
// the weights of half a chunk. Lane by lane, so that a query's bits do not depend on the others'.
constexpr float kSlack = 8.0f;
struct RunningSoftmax {
  alignas(64) float shift[kTileColumns];
  alignas(64) float sum[kTileColumns];
};

// Turns the scores of a chunk into weights, rescaling `out` where the largest score has grown. With
// kScaled the weights are multiplied by `v_scale` once they have been summed.
template <Element kElement, bool kScaled>
KVPO_INLINE void weigh_chunk(float factor, [[maybe_unused]] float v_scale, int keys, int vecs,
                             int head_size, float* weights, [[maybe_unused]] float* pairs,
                             float* out, RunningSoftmax& softmax) {
  const Vec scale = broadcast(factor);
  const auto scaled = [of_values = broadcast(v_scale)](const Vec& weight) {
    return kScaled ? mul(weight, of_values) : weight;
  };
  for (int column = 0; column < vecs * kWidth; column += kWidth) {
    float* w = weights + column;
    Vec largest = load(w), other = largest;
    int t = 1;
    for (; t + 1 < keys; t += 2) {
      largest = max_of(largest, load(w + t * kTileColumns));
      other = max_of(other, load(w + (t + 1) * kTileColumns));
    }
    if (t < keys)
      largest = max_of(largest, load(w + t * kTileColumns));
    largest = max_of(largest, other);

    Vec shift = load(softmax.shift + column), sum = load(softmax.sum + column);
    const Vec exact = mul(largest, broadcast(-factor)), bound = add(exact, broadcast(kSlack));
    if (any_greater(shift, bound)) {
      const Vec next = where_greater(shift, bound, exact, shift);
      const Vec keep = exp2(sub(next, shift)); // exactly 1 for a lane that did not change
      sum = mul(sum, keep);
      for (int d = 0; d < head_size; ++d) {
        float* o = out + d * kTileColumns + column;
        store(o, mul(load(o), keep));
      }
      shift = next;
      store(softmax.shift + column, shift);
    }
    Vec even = zero(), odd = zero();
    t = 0;
    for (; t + 1 < keys; t += 2) {
      const Vec a = exp2(fma(load(w + t * kTileColumns), scale, shift));
      const Vec b = exp2(fma(load(w + (t + 1) * kTileColumns), scale, shift));
      even = add(even, a);
      odd = add(odd, b);
#if KVPO_ISA_LEVEL >= 3
      if (kElement == Element::kBf16Pair) {
        store(pairs + t / 2 * kTileColumns + column, round_to_pairs(scaled(a), scaled(b)));
        continue;
      }
#endif
      store(w + t * kTileColumns, scaled(a));
      store(w + (t + 1) * kTileColumns, scaled(b));
    }
    if (t < keys) {
      const Vec a = exp2(fma(load(w + t * kTileColumns), scale, shift));
      even = add(even, a);
#if KVPO_ISA_LEVEL >= 3
      if (kElement == Element::kBf16Pair)
        store(pairs + t / 2 * kTileColumns + column, round_to_pairs(scaled(a), zero()));
      else
#endif
        store(w + t * kTileColumns, scaled(a));
    }
    store(softmax.sum + column, add(sum, add(even, odd)));
  }
}

template <typename T, Element kElement>
KVPO_INLINE void forward_block(const Forward& a, const QueryBlock& block,
                               const ForwardScratch& my) {
  const Shape& s = a.shape;
  const int head_size = static_cast<int>(s.head_size), vecs = block.vecs;
  const float factor = __builtin_fabsf(a.scale) * kLog2e;
  load_transposed<kElement>(vector_at<T>(a.q, block.row, block.first, block.head), a.q.token, block,
                            head_size, my.q);
  fill(my.out, static_cast<size_t>(head_size) * kTileColumns, 0.0f);
  RunningSoftmax softmax;
  fill(softmax.shift, kTileColumns, kLargest);
  fill(softmax.sum, kTileColumns, 0.0f);

  const auto attend = [&](const Chunk<T>& chunk) {
    const Broadcasts k = along_head<kElement>(chunk.k, chunk.k_token, chunk.keys, head_size, my.k);
    const Broadcasts v_rows{chunk.v, static_cast<ptrdiff_t>(chunk.v_token * sizeof(T))};
    product<false, kElement, Packed::kSteps>(chunk.keys, vecs, steps_of<kElement>(head_size), k,
                                             my.q, kTileColumns, my.weights, kTileColumns, v_rows);
    const float chunk_factor = factor * __builtin_fabsf(chunk.k_scale);
    if (a.scale * chunk.k_scale < 0) // so that the largest score has the largest weight
      for (int i = 0; i < chunk.keys * kTileColumns; i += kWidth)
        store(my.weights + i, sub(zero(), load(my.weights + i)));
    if (chunk.v_scale == 1.0f)
      weigh_chunk<kElement, false>(chunk_factor, 1.0f, chunk.keys, vecs, head_size, my.weights,
                                   my.pairs, my.out, softmax);
    else
      weigh_chunk<kElement, true>(chunk_factor, chunk.v_scale, chunk.keys, vecs, head_size,
                                  my.weights, my.pairs, my.out, softmax);
    const Broadcasts v = along_keys<kElement>(chunk.v, chunk.v_token, chunk.keys, head_size, my.v);
    const float* weights = kElement == Element::kBf16Pair ? my.pairs : my.weights;
    product<true, kElement, Packed::kRows>(head_size, vecs, steps_of<kElement>(chunk.keys), v,
                                           weights, kTileColumns, my.out, kTileColumns);
  };
  const int64_t kv_head = block.head / (s.heads / s.kv_heads);
  for_routed_chunks<T>(a, block.row, kv_head, my.k_page, my.v_page, attend);
  for_live_chunks<T>(a, block.row, kv_head, attend);

  float* lse = a.lse + (block.row * s.heads + block.head) * s.queries + block.first;
  for (int i = 0; i < block.queries; ++i) {
    const double sum = softmax.sum[i];
    lse[i] = sum == 0 ? -kInf : static_cast<float>(kLn2 * (__builtin_log2(sum) - softmax.shift[i]));
    softmax.sum[i] = sum == 0 ? 0.0f : static_cast<float>(1 / sum); // no key, or none above -inf
  }
  T* out = static_cast<T*>(a.out) +
           ((block.row * s.queries + block.first) * s.heads + block.head) * s.head_size;
  store_transposed(my.out, softmax.sum, block, head_size, out, s.heads * s.head_size);
}

template <typename T, Element kElement> void forward(const Forward& a) {
  const Shape& s = a.shape;
  const int64_t blocks = ceil_div(s.queries, kTileColumns);
  const int head_size = static_cast<int>(s.head_size);
  const bool quantized = a.page != Page::kAsQueries;
  Carver measure{nullptr, 0};
  ForwardScratch::carve(measure, head_size, quantized);
  // Heads outermost: rows that share frames then follow each other, and find them in cache.
  const int threads = threads_for(Work::kAttention, products(s), a.threads);
  run_tasks(s.rows * s.heads * blocks, threads, measure.used, [&](int64_t task, char* scratch) {
    Carver carver{scratch, 0};
    const QueryBlock block =
        query_block(s, task / blocks % s.rows, task / blocks / s.rows, task % blocks);
    forward_block<T, kElement>(a, block, ForwardScratch::carve(carver, head_size, quantized));
  });
}

// Backward ---------------------------------------------------------------------------------------

struct BackwardScratch {
  float *q, *grad_out;            // [elements, columns]
  float* grad_q;                  // [query blocks, D, columns]
  float *q_rows, *grad_out_rows;  // [queries, D], for pairs interleaved along the queries
  float *weights, *grads;         // [keys, columns]: weights, and gradients of the scores
  float* grad_pairs;              // the latter as bf16 pairs along the keys
  float *weight_rows, *grad_rows; // [keys, columns] bf16: pairs along the queries
  float *k, *v, *k_pairs;         // chunks that cannot be read in place
  float *k_page, *v_page;         // chunks of a quantized pool
  float *k_sums, *v_sums;         // [live block, D]

  static BackwardScratch carve(Carver& from, int head_size, bool quantized, int64_t live_block,
                               int64_t query_blocks) {
    const size_t columns = kTileColumns, d = static_cast<size_t>(head_size);
    BackwardScratch s;
    s.q = from.floats(d * columns);
    s.grad_out = from.floats(d * columns);
    s.grad_q = from.floats(static_cast<size_t>(query_blocks) * d * columns);
    s.q_rows = from.floats(d * columns);
    s.grad_out_rows = from.floats(d * columns);
    s.weights = from.floats(kChunkKeys * columns);
    s.grads = from.floats(kChunkKeys * columns);
    s.grad_pairs = from.floats(kChunkKeys / 2 * columns);
    s.weight_rows = from.floats(kChunkKeys / 2 * columns);
    s.grad_rows = from.floats(kChunkKeys / 2 * columns);
    s.k = from.floats(kChunkKeys * d);
    s.v = from.floats(kChunkKeys * d);
    s.k_pairs = from.floats(kChunkKeys / 2 * d);
    s.k_page = quantized ? from.floats(kChunkKeys * d) : nullptr;
    s.v_page = quantized ? from.floats(kChunkKeys * d) : nullptr;
    s.k_sums = from.floats(static_cast<size_t>(live_block) * d);
    s.v_sums = from.floats(static_cast<size_t>(live_block) * d);
    return s;
  }
};

// What a backward pass keeps of each query of a block.
struct QueryState {
  alignas(64) float shift[kTileColumns]; // -lse in log2 units: a weight is 2^(score + shift)
  alignas(64) float dot[kTileColumns];   // grad_out . out = sum over keys of weight * its gradient
};

// weights <- 2^(scores + shift); grads <- weights * (grads - dot), the gradient of the scaled
// scores. Pairs go to `grad_pairs` for grad_q and to the rows for grad_k and grad_v, if these are
// wanted. With kScaled, grads come without `v_scale` and go with `k_scale`.
template <Element kElement, bool kScaled>
KVPO_INLINE void weigh_gradients(float factor, [[maybe_unused]] float k_scale,
                                 [[maybe_unused]] float v_scale, int keys, int vecs,
                                 [[maybe_unused]] bool for_queries, [[maybe_unused]] bool for_live,
                                 const QueryState& state, const BackwardScratch& my) {
  const Vec scale = broadcast(factor);
  [[maybe_unused]] const Vec of_keys = broadcast(k_scale), of_values = broadcast(v_scale);
  for (int column = 0; column < vecs * kWidth; column += kWidth) {
    const Vec shift = load(state.shift + column), dot = load(state.dot + column);
    const auto weight = [&](int t) {
      return exp2(fma(load(my.weights + t * kTileColumns + column), scale, shift));
    };
    const auto gradient = [&](int t, Vec w) {
      const Vec grad = load(my.grads + t * kTileColumns + column);
      if (kScaled)
        return mul(mul(w, of_keys), sub(mul(grad, of_values), dot));
      return mul(w, sub(grad, dot));
    };
#if KVPO_ISA_LEVEL >= 3
    if (kElement == Element::kBf16Pair) {
      bf16* weight_rows = reinterpret_cast<bf16*>(my.weight_rows) + column;
      bf16* grad_rows = reinterpret_cast<bf16*>(my.grad_rows) + column;
      for (int t = 0; t < keys; t += 2) {
        const bool both = t + 1 < keys;
        const Vec w0 = weight(t), w1 = both ? weight(t + 1) : zero();
        const Vec g0 = gradient(t, w0), g1 = both ? gradient(t + 1, w1) : zero();
        if (for_queries)
          store(my.grad_pairs + t / 2 * kTileColumns + column, round_to_pairs(g0, g1));
        if (for_live) {
          store(weight_rows + t * kTileColumns, w0);
          store(grad_rows + t * kTileColumns, g0);
          if (both) {
            store(weight_rows + (t + 1) * kTileColumns, w1);
            store(grad_rows + (t + 1) * kTileColumns, g1);
          }
        }
      }
      continue;
    }
#endif
    for (int t = 0; t < keys; ++t) {
      const Vec w = weight(t);
      store(my.grads + t * kTileColumns + column, gradient(t, w));
      store(my.weights + t * kTileColumns + column, w);
    }
  }
}

// [queries, D] as the right operand of a product over the queries.
struct QueryRows {
  const float* data;
  ptrdiff_t row; // in floats
};
template <Element kElement, typename T>
KVPO_INLINE QueryRows query_rows(const T* from, int64_t token, int queries, int head_size,
                                 float* packed) {
  if (kElement == Element::kFloat) {
    const Broadcasts rows = along_head<kElement>(from, token, queries, head_size, packed);
    return {static_cast<const float*>(rows.data), rows.stride / ptrdiff_t{sizeof(float)}};
  }
  interleave_rows(from, token, queries, head_size, packed);
  return {packed, head_size};
}

// A query block's grad_q, which may grow over several visits; null where a visit is not about it.
struct QueryGradient {
  float* sums; // [D, columns]
  bool first;  // this visit starts it, with the routed frames
  bool last;   // this visit writes it out
};

// The part of the backward pass that belongs to one query block and to the live tokens in
// [live_first, live_end), all of whose chunks are either in or out: adds to grad_q, and to the sums
// of grad_k and grad_v if `for_live`.
template <typename T, Element kElement>
KVPO_INLINE void backward_block(const Backward& b, const QueryBlock& block, QueryGradient grad_q,
                                int64_t live_first, int64_t live_end, bool for_live,
                                const BackwardScratch& my) {
  const Forward& a = b.forward;
  const Shape& s = a.shape;
  const int head_size = static_cast<int>(s.head_size), vecs = block.vecs, queries = block.queries;
  const float factor = a.scale * kLog2e;
  const T* q = vector_at<T>(a.q, block.row, block.first, block.head);
  const T* grad_out = vector_at<T>(b.grad_out, block.row, block.first, block.head);
  const int64_t out_token = s.heads * s.head_size;
  const int64_t out_at =
      ((block.row * s.queries + block.first) * s.heads + block.head) * s.head_size;
  const T* out = static_cast<const T*>(a.out) + out_at;
  const float* lse = a.lse + (block.row * s.heads + block.head) * s.queries + block.first;

  load_transposed<kElement>(q, a.q.token, block, head_size, my.q);
  load_transposed<kElement>(grad_out, b.grad_out.token, block, head_size, my.grad_out);
  QueryRows q_rows{}, grad_out_rows{};
  if (for_live) {
    q_rows = query_rows<kElement>(q, a.q.token, queries, head_size, my.q_rows);
    grad_out_rows =
        query_rows<kElement>(grad_out, b.grad_out.token, queries, head_size, my.grad_out_rows);
  }
  QueryState state;
  fill(state.shift, kTileColumns, -kLargest); // weight 0 in the lanes past the last query
  fill(state.dot, kTileColumns, 0.0f);
  for (int i = 0; i < queries; ++i) {
    Vec sum = zero();
    for (int d = 0; d < head_size; d += kWidth)
      sum = fma(load(grad_out + i * b.grad_out.token + d), load(out + i * out_token + d), sum);
    state.dot[i] = sum_lanes(sum);
    if (lse[i] != -kInf) // else all scores are -inf and no weight is above 0
      state.shift[i] = -lse[i] * kLog2e;
  }
  const bool for_queries = grad_q.sums != nullptr;
  if (for_queries && grad_q.first)
    fill(grad_q.sums, static_cast<size_t>(head_size) * kTileColumns, 0.0f);

  const auto differentiate = [&](const Chunk<T>& chunk) {
    const bool live = chunk.live >= 0, sums = live && for_live;
    if (live && (chunk.live < live_first || chunk.live >= live_end))
      return;
    const Broadcasts k = along_head<kElement>(chunk.k, chunk.k_token, chunk.keys, head_size, my.k);
    const Broadcasts v = along_head<kElement>(chunk.v, chunk.v_token, chunk.keys, head_size, my.v);
    const int head_steps = steps_of<kElement>(head_size);
    product<false, kElement, Packed::kSteps>(chunk.keys, vecs, head_steps, k, my.q, kTileColumns,
                                             my.weights, kTileColumns);
    product<false, kElement, Packed::kSteps>(chunk.keys, vecs, head_steps, v, my.grad_out,
                                             kTileColumns, my.grads, kTileColumns);
    if (chunk.k_scale == 1.0f && chunk.v_scale == 1.0f)
      weigh_gradients<kElement, false>(factor, 1.0f, 1.0f, chunk.keys, vecs, for_queries, sums,
                                       state, my);
    else
      weigh_gradients<kElement, true>(factor * chunk.k_scale, chunk.k_scale, chunk.v_scale,
                                      chunk.keys, vecs, for_queries, sums, state, my);
    constexpr bool kPairs = kElement == Element::kBf16Pair;
    if (for_queries) {
      const Broadcasts k_columns =
          kPairs ? along_keys<kElement>(chunk.k, chunk.k_token, chunk.keys, head_size, my.k_pairs)
                 : k;
      product<true, kElement, Packed::kRows>(head_size, vecs, steps_of<kElement>(chunk.keys),
                                             k_columns, kPairs ? my.grad_pairs : my.grads,
                                             kTileColumns, grad_q.sums, kTileColumns);
    }
    if (sums) {
      const ptrdiff_t row = kTileColumns * (kPairs ? sizeof(bf16) : sizeof(float));
      if (kPairs && queries % 2) {
        // The last query is paired with a lane past it, whose weight is NaN where a key is
        // infinite.
        uint16_t* lane = reinterpret_cast<uint16_t*>(my.weight_rows) + queries;
        uint16_t* lane_of_grads = reinterpret_cast<uint16_t*>(my.grad_rows) + queries;
        for (int t = 0; t < chunk.keys; ++t)
          lane[t * kTileColumns] = lane_of_grads[t * kTileColumns] = 0;
      }
      const Broadcasts weights{kPairs ? my.weight_rows : my.weights, row};
      const Broadcasts grads{kPairs ? my.grad_rows : my.grads, row};
      const int steps = steps_of<kElement>(queries), columns = head_size / kWidth;
      const ptrdiff_t at = (chunk.live - live_first) * head_size;
      product<true, kElement, Packed::kSteps>(chunk.keys, columns, steps, grads, q_rows.data,
                                              q_rows.row, my.k_sums + at, head_size);
      product<true, kElement, Packed::kSteps>(chunk.keys, columns, steps, weights,
                                              grad_out_rows.data, grad_out_rows.row, my.v_sums + at,
                                              head_size);
    }
  };
  const int64_t kv_head = block.head / (s.heads / s.kv_heads);
  if (for_queries && grad_q.first)
    for_routed_chunks<T>(a, block.row, kv_head, my.k_page, my.v_page, differentiate);
  for_live_chunks<T>(a, block.row, kv_head, differentiate);
  if (for_queries && grad_q.last) {
    fill(state.dot, kTileColumns, a.scale);
    store_transposed(grad_q.sums, state.dot, block, head_size, static_cast<T*>(b.grad_q) + out_at,
                     out_token);
  }
}

// grad_k and grad_v of the live tokens [first, end) of one row and key head; with `for_queries`
// also what these tokens, and for the first ones the routed frames, add to grad_q of all queries
// that attend to this head.
template <typename T, Element kElement>
KVPO_INLINE void backward_live(const Backward& b, int64_t row, int64_t kv_head, int64_t first,
                               int64_t end, bool for_queries, const BackwardScratch& my) {
  const Shape& s = b.forward.shape;
  const int64_t group = s.heads / s.kv_heads, blocks = ceil_div(s.queries, kTileColumns);
  const size_t sums = static_cast<size_t>((end - first) * s.head_size);
  fill(my.k_sums, sums, 0.0f);
  fill(my.v_sums, sums, 0.0f);
  for (int64_t i = 0; i < group * blocks; ++i) {
    float* const own = for_queries ? my.grad_q + i * s.head_size * kTileColumns : nullptr;
    backward_block<T, kElement>(b, query_block(s, row, kv_head * group + i / blocks, i % blocks),
                                {own, first == 0, end == s.live_tokens}, first, end, true, my);
  }
  const Vec scale = broadcast(b.forward.scale);
  for (int64_t t = first; t < end; ++t) {
    const int64_t to = ((row * s.live_tokens + t) * s.kv_heads + kv_head) * s.head_size;
    const int64_t from = (t - first) * s.head_size;
    for (int64_t d = 0; d < s.head_size; d += kWidth) {
      store(static_cast<T*>(b.grad_k_live) + to + d, mul(load(my.k_sums + from + d), scale));
      store(static_cast<T*>(b.grad_v_live) + to + d, load(my.v_sums + from + d));
    }
  }
}

// Tokens of a live block: whole chunks whose sums stay in L2.
KVPO_INLINE int64_t live_block_tokens(const Shape& s) {
  if (s.live_tokens == 0)
    return 0;
  const int64_t chunk = chunk_keys(s.live_tokens);
  const int64_t fitting =
      static_cast<int64_t>(kSumBytes) / (2 * int64_t{sizeof(float)} * s.head_size);
  return min_of<int64_t>(max_of<int64_t>(1, fitting / chunk) * chunk,
                         ceil_div(s.live_tokens, chunk) * chunk);
}

template <typename T, Element kElement> void backward(const Backward& b) {
  const Forward& a = b.forward;
  const Shape& s = a.shape;
  const int head_size = static_cast<int>(s.head_size);
  const int64_t live_block = live_block_tokens(s);
  const int64_t live_blocks = s.live_tokens ? ceil_div(s.live_tokens, live_block) : 0;
  const int64_t query_blocks = ceil_div(s.queries, kTileColumns), owners = s.rows * s.kv_heads;
  const int64_t owned = s.heads / s.kv_heads * query_blocks;
  const int64_t owned_bytes = owned * s.head_size * kTileColumns * int64_t{sizeof(float)};
  const int threads = threads_for(Work::kAttentionBackward, products(s), a.threads);
  // With tasks to spare, the one that owns the live tokens computes grad_q as well and saves two
  // products over these tokens. The sums are taken in the same order either way.
  const bool shared = live_blocks > 0 && s.queries > 0 && owners >= 4 * int64_t{threads} &&
                      owned_bytes * threads <= static_cast<int64_t>(kScratchLimit / 2);
  const int64_t query_tasks = shared ? 0 : s.rows * s.heads * query_blocks;
  const int64_t kept = shared ? owned : 1;
  Carver measure{nullptr, 0};
  const bool quantized = a.page != Page::kAsQueries;
  BackwardScratch::carve(measure, head_size, quantized, live_block, kept);
  const auto live = [&](int64_t owner, int64_t first, const BackwardScratch& my) {
    backward_live<T, kElement>(b, owner % s.rows, owner / s.rows, first,
                               min_of<int64_t>(first + live_block, s.live_tokens), shared, my);
  };
  const auto task = [&](int64_t index, char* scratch) {
    Carver carver{scratch, 0};
    const BackwardScratch my =
        BackwardScratch::carve(carver, head_size, quantized, live_block, kept);
    if (shared) {
      for (int64_t i = 0; i < live_blocks; ++i)
        live(index, i * live_block, my);
    } else if (index < query_tasks) {
      const int64_t i = index / query_blocks;
      const QueryBlock block = query_block(s, i % s.rows, i / s.rows, index % query_blocks);
      backward_block<T, kElement>(b, block, {my.grad_q, true, true}, 0, s.live_tokens, false, my);
    } else {
      const int64_t i = index - query_tasks;
      live(i % owners, i / owners * live_block, my);
    }
  };
  run_tasks(shared ? owners : query_tasks + owners * live_blocks, threads, measure.used, task);
}

} // namespace

void routed_attention_forward(const RoutedAttentionForward& args) {
  switch (args.dtype) {
  case Float::kFloat32:
    return forward<float, Element::kFloat>(args);
  case Float::kFloat16:
    return forward<fp16, Element::kFloat>(args);
  case Float::kBfloat16:
#if KVPO_ISA_LEVEL >= 3
    if (args.shape.head_size % (2 * kWidth) == 0)
      return forward<bf16, Element::kBf16Pair>(args);
#endif
    return forward<bf16, Element::kFloat>(args);
  }
}

void routed_attention_backward(const RoutedAttentionBackward& args) {
  switch (args.forward.dtype) {
  case Float::kFloat32:
    return backward<float, Element::kFloat>(args);
  case Float::kFloat16:
    return backward<fp16, Element::kFloat>(args);
  case Float::kBfloat16:
#if KVPO_ISA_LEVEL >= 3
    if (args.forward.shape.head_size % (2 * kWidth) == 0)
      return backward<bf16, Element::kBf16Pair>(args);
#endif
    return backward<bf16, Element::kFloat>(args);
  }
}

} // namespace kvpo::cpu::KVPO_ISA
