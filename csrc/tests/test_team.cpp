// A call takes all threads or one, by its work, whatever its size.
#include "team.h"

#include <cstdio>
#include <initializer_list>
#include <limits>

#include "kvpo/tve_grpo.h"

namespace {

int failures = 0;

void expect(bool condition, const char* what, const char* kind) {
  if (condition)
    return;
  std::printf("FAILED: %s (%s)\n", what, kind);
  ++failures;
}

} // namespace

int main() {
  using namespace kvpo::cpu;
  for (int i = 0; i < kWorks; ++i) {
    const auto kind = static_cast<Work>(i);
    const int64_t least = least_work(kind);
    expect(threads_for(kind, 0, 8) == 1, "threads for nothing", name(kind));
    expect(threads_for(kind, least - 1, 8) == 1, "threads for little", name(kind));
    for (int threads : {2, 3, 64}) {
      expect(threads_for(kind, least, threads) == threads, "not all threads", name(kind));
      expect(last_team() == threads, "the last team", name(kind));
    }
    expect(threads_for(kind, std::numeric_limits<int64_t>::max(), 2) == 2, "much", name(kind));
    for (int threads : {1, 0, -1})
      expect(threads_for(kind, least, threads) == 1, "less than a thread", name(kind));
    set_all_threads(true);
    expect(threads_for(kind, 1, 8) == 8, "the threshold is not lifted", name(kind));
    set_all_threads(false);
  }
  // A kernel asks, with its own work.
  const int64_t numel = least_work(Work::kVelocities) / 2;
  float* const values = new float[static_cast<size_t>(2 * numel)]();
  double partials[128], energies[2];
  const double weight = 1.0;
  for (int64_t less : {0, 1}) {
    velocity_energy(
        {{2, 1, numel - less, false, values, values, 3}, &weight, 0, partials, energies});
    expect(last_team() == (less ? 1 : 3), "the team of a call", "velocities");
  }
  delete[] values;
  std::printf(failures ? "%d failures\n" : "ok\n", failures);
  return failures != 0;
}
