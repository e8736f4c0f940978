// Softmax attention of B rows of queries over the frames of a shared pool, named by slot.
//
//   keys(b) = pool[slots[b, 0]], pool[slots[b, 1]], ..., live[b]        laid end to end, not copied
//   out[b] = softmax(scale * q[b] keys(b)^T) values(b),   lse[b] = log sum exp of the same scores
//
// Shape letters: B rows, Q queries, H heads, Hkv key heads, D head size, F slots, T tokens per
// frame, R routed frames per row, L live tokens.
#pragma once

#include <cstdint>

namespace kvpo {

enum class Float : int32_t { kFloat32, kBfloat16, kFloat16 };
// Of what the pool's elements are. A quantized one holds integers or float8_e4m3fn, times a scale
// per slot and key head.
enum class Page : int32_t { kAsQueries, kInt8, kFloat8 };

// A tensor [outer, token, head, D] of any strides but the last one, which is 1.
struct HeadVectors {
  const void* data;
  int64_t outer, token, head; // strides in elements
};

struct RoutedAttentionShape {
  int64_t rows;         // B
  int64_t queries;      // Q
  int64_t heads;        // H, a multiple of kv_heads
  int64_t kv_heads;     // Hkv
  int64_t head_size;    // D, a multiple of 16, at most 256
  int64_t slots;        // F
  int64_t frame_tokens; // T
  int64_t routed;       // R
  int64_t live_tokens;  // L
};

struct RoutedAttentionForward {
  RoutedAttentionShape shape;
  Float dtype;                // of every void pointer here but the pools'
  Page page;                  // of the pools
  float scale;                // multiplies q.k before the softmax; finite, of any sign
  int threads;                // at most this many
  HeadVectors q;              // [B, Q, H, D]
  HeadVectors k_pool, v_pool; // [F, T, Hkv, D]
  HeadVectors k_live, v_live; // [B, L, Hkv, D]; not read where L = 0
  const float* k_scales;      // [F, Hkv] of a quantized pool, else null
  const float* v_scales;      // as k_scales
  const int32_t* slots;       // [B, R]; a value outside [0, F) names no frame
  void* out;                  // [B, Q, H, D] contiguous
  float* lse;                 // [B, H, Q], natural log
};

struct RoutedAttentionBackward {
  RoutedAttentionForward forward; // as the forward call had it; out and lse are its results, read
  HeadVectors grad_out;           // [B, Q, H, D]
  void* grad_q;                   // [B, Q, H, D] contiguous
  void* grad_k_live;              // [B, L, Hkv, D] contiguous
  void* grad_v_live;              // [B, L, Hkv, D] contiguous
};

namespace cpu {
// Outputs are overwritten. A row without keys gets out 0, lse -inf and gradient 0. The bits of a
// row depend neither on the number of threads nor on the other rows. Working memory is at most
// 32 MiB for any shape; throws kvpo::OutOfMemory before anything is written.
void routed_attention_forward(const RoutedAttentionForward& args);
void routed_attention_backward(const RoutedAttentionBackward& args);
} // namespace cpu

} // namespace kvpo
