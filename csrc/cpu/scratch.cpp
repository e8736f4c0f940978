#include "scratch.h"

#include <cstdlib>

#include "kvpo/error.h"

namespace kvpo::cpu {

void* allocate_scratch(size_t bytes) {
  void* memory = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
  if (!memory)
    throw OutOfMemory(bytes);
  return memory;
}

void free_scratch(void* memory) {
  std::free(memory);
}

} // namespace kvpo::cpu
