// What the elements of queries, frames and pools are.
#pragma once

#include <string>

#include "dlpack.h"
#include "kvpo/routed_attention.h"

namespace kvpo {

inline Float float_of(const dlpack::View& x, const std::string& name) {
  using namespace dlpack;
  if (x.is(kFloat, 32))
    return Float::kFloat32;
  if (x.is(kBfloat, 16))
    return Float::kBfloat16;
  KVPO_CHECK(x.is(kFloat, 16), "`" + name + "` must be float32, bfloat16 or float16");
  return Float::kFloat16;
}

// The bits of float8_e4m3fn come as bytes: DLPack has had a name for it only since 1.1.
inline Page page_of(const dlpack::View& pool) {
  using namespace dlpack;
  return pool.is(kInt, 8) ? Page::kInt8 : pool.is(kUint, 8) ? Page::kFloat8 : Page::kAsQueries;
}

// Where frames are about to be written: a compiled graph has not looked at the values.
inline void check_slots(const int64_t* slots, int64_t count, int64_t pool_slots) {
  for (int64_t i = 0; i < count; ++i)
    KVPO_CHECK(slots[i] >= 0 && slots[i] < pool_slots, "a slot is outside the pool");
}

} // namespace kvpo
