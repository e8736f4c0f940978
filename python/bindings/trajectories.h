// Views of predictions, targets and their gradient, for the CPU and the CUDA module.
#pragma once

#include <string>

#include "dlpack.h"
#include "kvpo/tve_grpo.h"

namespace kvpo {

// `[G, S, ...]` predictions and targets.
inline Trajectories trajectories(const dlpack::View& pred, const dlpack::View& target,
                                 int threads) {
  using dlpack::kBfloat, dlpack::kFloat;
  KVPO_CHECK(pred.rank() >= 2 && target.rank() == pred.rank(), "pred must be [G, S, ...]");
  int64_t numel = 1;
  for (int i = 0; i < pred.rank(); ++i) {
    KVPO_CHECK(target.size(i) == pred.size(i), "target must have the shape of pred");
    numel *= i < 2 ? 1 : pred.size(i);
  }
  const bool bfloat16 = pred.is(kBfloat, 16);
  KVPO_CHECK(bfloat16 || pred.is(kFloat, 32), "pred must be float32 or bfloat16");
  KVPO_CHECK(target.is(bfloat16 ? kBfloat : kFloat, bfloat16 ? 16 : 32),
             "target must have the dtype of pred");
  return {pred.size(0),
          pred.size(1),
          numel,
          bfloat16,
          pred.contiguous().data(),
          target.contiguous().data(),
          threads};
}

// From branch to branch, of `size` weights that are [S], or [G, S].
inline int64_t weights_stride(const Trajectories& x, int64_t size, const char* name) {
  KVPO_CHECK(size == x.steps || size == x.branches * x.steps,
             std::string(name) + " has wrong size");
  return size == x.steps ? 0 : x.steps;
}

// Of the shape and dtype of the predictions.
inline void* gradient_data(const dlpack::View& grad, const dlpack::View& pred) {
  using dlpack::kBfloat, dlpack::kFloat;
  KVPO_CHECK(grad.rank() == pred.rank(), "grad must have the shape of pred");
  for (int i = 0; i < pred.rank(); ++i)
    KVPO_CHECK(grad.size(i) == pred.size(i), "grad must have the shape of pred");
  KVPO_CHECK(grad.is(pred.is(kBfloat, 16) ? kBfloat : kFloat, pred.is(kBfloat, 16) ? 16 : 32),
             "grad must have the dtype of pred");
  return grad.contiguous().data();
}

} // namespace kvpo
