// The probe counts the work of all its threads.
#include "kvpo/peak_flops.h"

#include <cstdio>

int main() {
  double one = 0, two = 0;
  kvpo::cpu::peak_flops({false, 1, 100, &one});
  kvpo::cpu::peak_flops({true, 2, 100, &two});
  const bool ok = one > 0 && two >= 2 * one;
  std::printf("%s\n", ok ? "passed" : "FAILED: operations are not counted");
  return ok ? 0 : 1;
}
