// Working memory of one kernel call.
#pragma once

#include <cstddef>

namespace kvpo::cpu {

// Out of line and compiled for the baseline instruction set: the kernel files may not instantiate
// anything of the standard library. Throws kvpo::OutOfMemory naming the bytes. 64-byte aligned.
void* allocate_scratch(size_t bytes);
void free_scratch(void* memory);

} // namespace kvpo::cpu

#ifdef KVPO_ISA // a kernel file: internal linkage, as everything inline in simd.h
namespace kvpo::cpu::KVPO_ISA {
namespace {

// Freed when it leaves scope. One per call, so calls from several threads do not meet.
class Scratch {
public:
  explicit Scratch(size_t bytes) : memory_(allocate_scratch(bytes)) {}
  ~Scratch() { free_scratch(memory_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  char* data() const { return static_cast<char*>(memory_); }

private:
  void* memory_;
};

} // namespace
} // namespace kvpo::cpu::KVPO_ISA
#endif
