// Frames rounded to 8 bits, with one scale per frame and head, into the slots of a pool.
//
//   scale[slot, h]      = max over t, d of |frames[i, t, h, d]| / largest
//   pool[slot, t, h, d] = round(frames[i, t, h, d] * (1 / scale[slot, h]))
//
// `largest` is 127 for int8 and 448 for float8_e4m3fn; rounding is to nearest even. A head of zeros
// has scale 1; one with a NaN or an infinity has scale NaN.
//
// Shape letters: n frames, F slots, T tokens per frame, H heads, D head size.
#pragma once

#include <cstdint>

#include "kvpo/routed_attention.h" // Float, Page

namespace kvpo {

struct StoreFrames {
  int64_t count;                            // n
  int64_t tokens, heads, head_size;         // T, H, D
  Float dtype;                              // of the frames
  Page page;                                // of the pool, quantized
  int threads;                              // at most this many
  const void* frames;                       // [n, T, H, D] contiguous
  void* pool;                               // [F, T, H, D], the last axis contiguous
  int64_t pool_slot, pool_token, pool_head; // its other strides, in elements
  float* scales;                            // [F, H] contiguous
  const int64_t* slots;                     // [n], each in [0, F), all different
};

namespace cpu {
// The bits of a head depend on nothing but that head.
void store_frames(const StoreFrames& args);
} // namespace cpu

} // namespace kvpo
