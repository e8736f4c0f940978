#include "kvpo/peak_flops.h"

#include "tile_product.h"

namespace kvpo::cpu::KVPO_ISA {
namespace {

// As many independent sums as a tile of the products has, so the latency is hidden the same way.
template <Element kElement> KVPO_INLINE float run(int64_t iterations) {
  constexpr int kSums = kTileRows * kTileVecs;
  Vec sums[kSums];
  for (int i = 0; i < kSums; ++i)
    sums[i] = broadcast(static_cast<float>(i));
  const Vec a = broadcast(0.999f), b = broadcast(1e-3f);
  for (int64_t n = 0; n < iterations; ++n)
#pragma GCC unroll 32
    for (int i = 0; i < kSums; ++i)
      sums[i] = multiply_add<kElement>(a, b, sums[i]);
  Vec total = zero();
  for (int i = 0; i < kSums; ++i)
    total = add(total, sums[i]);
  return sum_lanes(total);
}

} // namespace

void peak_flops(const PeakFlops& args) {
  float used = 0; // keeps the loop from being removed
#pragma omp parallel for num_threads(args.threads) reduction(+ : used)
  for (int t = 0; t < args.threads; ++t)
    used += args.pairs ? run<Element::kBf16Pair>(args.iterations)
                       : run<Element::kFloat>(args.iterations);
  const bool real_pairs = args.pairs && KVPO_ISA_LEVEL >= 3;
  const double per_sum = (real_pairs ? 4.0 : 2.0) * kWidth;
  *args.operations = used == 12345.0f ? 0.0
                                      : per_sum * kTileRows * kTileVecs *
                                            static_cast<double>(args.iterations) * args.threads;
}

} // namespace kvpo::cpu::KVPO_ISA
