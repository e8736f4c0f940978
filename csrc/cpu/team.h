// How many threads a kernel call takes: no more than its work is worth.
#pragma once

#include <cstdint>

namespace kvpo::cpu {

// The ops, as far as their work per value differs, and the unit that it is counted in.
enum class Work : int {
  kAttention,         // products of a query with a key or with a value: B H Q (R T + L) 2 D
  kAttentionBackward, // the same number; it does 3 to 3.5 times as much for each
  kNormRope,          // values of x, and of v where they are written
  kNormRopeBackward,  // values of x
  kStoreFrames,       // values of the frames
  kVelocities,        // values of the predictions
};
constexpr int kWorks = 6;
const char* name(Work kind);

// Where the second thread begins to pay.
int64_t least_work(Work kind);

// `threads`, or 1 for less work than that. Nothing between: GNU's OpenMP ends the threads that a
// smaller team leaves out, and the next large one has to start them again, 20 us for each on an
// idle machine, milliseconds on a busy one; with all of them waiting, a region costs 2 us.
int threads_for(Work kind, int64_t amount, int threads);

// Lifts the thresholds (tests of the partition take small problems; benchmarks compare).
void set_all_threads(bool always);

// Threads of the last team that this thread asked for.
int last_team();

} // namespace kvpo::cpu
