#include "team.h"

#include <atomic>

namespace kvpo::cpu {
namespace {

struct Threshold {
  const char* name;
  int64_t least;
};

// Each about 30 us of one thread, with AVX2 or AVX-512, of either dtype (benchmarks/threads.py). A
// team whose threads spin between calls, as they do by default, costs 2 us and would pay from 8 us
// on; one whose threads sleep (OMP_WAIT_POLICY=passive) costs 15 to 40 us. So near these sizes a
// call loses some 10 us one way or the other. On a busy machine a spinning team waits for the
// scheduler, 10 to 40 ms a call, and below these sizes nothing is to be won by that.
constexpr Threshold kThresholds[kWorks] = {
    {"attention", 3 << 19},          // 22 us of bfloat16, 40 us of float32
    {"attention_backward", 1 << 20}, // 22 and 33 us
    {"norm_rope", 1 << 17},          // 37 us
    {"norm_rope_backward", 1 << 16}, // 32 us
    {"store_frames", 1 << 18},       // 28 to 45 us
    {"velocities", 1 << 18},         // 20 to 26 us, and 60 with the gradient
};

std::atomic<bool> always{false};
thread_local int team = 0;

} // namespace

const char* name(Work kind) {
  return kThresholds[static_cast<int>(kind)].name;
}

int64_t least_work(Work kind) {
  return kThresholds[static_cast<int>(kind)].least;
}

int threads_for(Work kind, int64_t amount, int threads) {
  const bool pays = amount >= least_work(kind) || always.load(std::memory_order_relaxed);
  return team = threads > 1 && pays ? threads : 1;
}

void set_all_threads(bool value) {
  always.store(value, std::memory_order_relaxed);
}

int last_team() {
  return team;
}

} // namespace kvpo::cpu
