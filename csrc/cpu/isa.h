// The instruction sets that the CPU kernels are compiled for, and the one this machine runs.
#pragma once

namespace kvpo::cpu {

// Ordered: each one includes the ones before it. Non-x86 machines have only kPortable.
enum class Isa : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3 };

// The best one both compiled in and supported here, lowered by `set_isa_limit`.
Isa isa();
// Lowers the choice (tests and benchmarks compare instruction sets); the highest value lifts it.
void set_isa_limit(Isa limit);
const char* name(Isa isa);

} // namespace kvpo::cpu
