// RMSNorm over the model dimension and rotation of each head's pairs (2i, 2i+1), and the same with
// the result written into the slots of a frame pool.
//
//   y = x / sqrt(mean(x^2 over H and D) + eps) * weight,   out = rotate(y, cos, sin of the token)
//
// Shape letters: B rows, N tokens of a block = frames * T, H heads, D head size, F slots of the
// pool, T tokens per frame. Tensors are contiguous unless strides are given. Arithmetic is float32.
#pragma once

#include <cstdint>

namespace kvpo {

struct NormRopeShape {
  int64_t rows, tokens; // B, N
  int64_t heads;        // H
  int64_t head_size;    // D, a multiple of 16
};

struct NormRopeForward {
  NormRopeShape shape;
  bool bfloat16;       // x and out are bfloat16, else float32
  float eps;           // added to the mean square
  int threads;         // at most this many
  const void* x;       // [B, N, H, D]
  const float* weight; // [H * D]
  const float* cos;    // [N, D / 2]
  const float* sin;    // [N, D / 2]
  void* out;           // [B, N, H, D]; not used by norm_rope_write
};

struct NormRopeBackward {
  NormRopeForward forward; // as the forward call had it; out is not read
  const void* grad;        // [B, N, H, D]
  void* grad_x;            // [B, N, H, D]
  float* grad_weight;      // [H * D]
};

// A pool [F, T, H, D] of any strides but the last one, which is 1; strides in elements.
struct PoolPages {
  void* data;
  int64_t slot, token, head;
};

struct NormRopeWrite {
  NormRopeForward keys; // x is k
  const void* v;        // [B, N, H, D]
  int64_t frame_tokens; // T
  PoolPages k_pool, v_pool;
  const int64_t* slots; // [B, N / T], each in [0, F), all different
};

namespace cpu {
// The bits of a token depend on nothing but that token; grad_weight is summed in an order that the
// number of threads does not change.
void norm_rope_forward(const NormRopeForward& args);
void norm_rope_backward(const NormRopeBackward& args);
void norm_rope_write(const NormRopeWrite& args);
} // namespace cpu

} // namespace kvpo
