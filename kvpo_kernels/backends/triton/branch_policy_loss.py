"""The branch policy loss in one program: a few hundred flops, in float64, without a launch each."""

import ctypes
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_KL_EPSILON: tl.constexpr = tl.constexpr(1e-10)  # of the official KL: pi * (log(pi + eps) - ...)


@triton.jit
def _wide(halves):
    """A float64 option: arguments of kernels are rounded to float32, so it comes in two."""
    return tl.cast(halves[0], tl.float64) + tl.cast(halves[1], tl.float64)


@triton.jit
def _sum(terms):
    """A sum that does not depend on the order of the branches, to the bit, nor on absent ones.

    Next to a number some hundred times the largest term, terms round to multiples of one unit, and
    sums of such are exact in any order; what was rounded off is summed the same way. After Demmel
    and Nguyen, Fast Reproducible Floating-Point Summation (ARITH 2013).
    """
    large = tl.max(tl.abs(terms)) * (6 * terms.shape[0])
    high = (terms + large) - large
    rest = terms - high
    large = tl.max(tl.abs(rest)) * (6 * terms.shape[0])
    return tl.sum(high) + tl.sum((rest + large) - large)


@triton.jit
def _log_softmax(x, kept):
    """Over the kept entries; 0 for the others, which no sum uses."""
    peak = tl.max(tl.where(kept, x, float("-inf")))
    shifted = tl.where(kept, x - peak, float("-inf"))
    return tl.where(kept, shifted - tl.log(_sum(tl.exp(shifted))), 0.0)


@triton.jit
def store_policy(
    numbers, scores, old_scores, advantages, ref_scores, objective, G, DROP: tl.constexpr,
    BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Write the numbers `[7 + 4 G]` of `scores` (float64) and return the scores' gradient.

    As the reference computes them; see `kvpo_kernels.ops.branch_policy_loss`.
    """
    g = tl.arange(0, BLOCK_G)
    there = g < G
    s = scores
    old = tl.load(old_scores + g, mask=there, other=0.0).to(tl.float64)
    A = tl.load(advantages + g, mask=there, other=0.0).to(tl.float64)
    ref = tl.load(ref_scores + g, mask=there, other=0.0).to(tl.float64)
    clip_low = _wide(objective[0])
    clip_high = _wide(objective[1])
    kl_coef = _wide(objective[2])
    log_ratio_clamp = _wide(objective[3])
    min_entropy_ratio = _wide(objective[4])
    scale = _wide(objective[5])
    branch_mass = _wide(objective[6])

    # x - x is 0 for what is finite and NaN for what is not.
    finite = there & (s - s == 0.0) & (old - old == 0.0) & (A - A == 0.0) & (ref - ref == 0.0)
    if DROP:
        kept = finite
    else:
        kept = there
    count = tl.sum(kept.to(tl.int32))
    n = tl.maximum(count, 1).to(tl.float64)
    log_pi = _log_softmax(s, kept)
    log_old = _log_softmax(old, kept)
    log_ref = _log_softmax(ref, kept)
    pi = tl.where(kept, tl.exp(log_pi), 0.0)
    A = tl.where(kept, A, 0.0)
    log_ratio = log_pi - log_old
    clamped = tl.minimum(tl.maximum(log_ratio, -log_ratio_clamp), log_ratio_clamp)
    ratio = tl.exp(clamped)
    low = 1.0 - clip_low
    high = 1.0 + clip_high
    clipped = tl.minimum(tl.maximum(ratio, low), high)
    grpo = -_sum(tl.minimum(ratio * A, clipped * A)) / n
    divergence = tl.where(kept, tl.log(pi + _KL_EPSILON) - log_ref, 0.0)
    kl = _sum(pi * divergence)
    loss = scale * (grpo + kl_coef * kl)

    beyond = ((A > 0) & (ratio > high)) | ((A < 0) & (ratio < low))
    active = kept & (beyond == 0) & (tl.abs(log_ratio) <= log_ratio_clamp)
    a = tl.where(active, -A * ratio / n, 0.0)
    c = divergence + pi / (pi + _KL_EPSILON)
    grad = scale * (a - pi * _sum(a) + kl_coef * pi * (c - _sum(pi * c)))

    outside = tl.sum((((ratio < low) | (ratio > high)) & kept).to(tl.int32))
    entropy = -branch_mass * (_sum(pi * log_pi) + tl.log(branch_mass) * _sum(pi))
    skip = (min_entropy_ratio > 0) & (entropy > tl.log(n) * (1.0 - min_entropy_ratio))
    all_finite = tl.sum(finite.to(tl.int32)) == G
    nan = float("nan")
    poison = tl.where(all_finite | DROP, 0.0, nan).to(tl.float64)

    tl.store(numbers, loss + poison)
    tl.store(numbers + 1, grpo + poison)
    tl.store(numbers + 2, kl + poison)
    tl.store(numbers + 3, entropy + poison)
    tl.store(numbers + 4, outside.to(tl.float64) / n + poison)
    tl.store(numbers + 5, skip.to(tl.float64) + poison)
    tl.store(numbers + 6, (G - count).to(tl.float64) + poison)
    rows = numbers + 7 + g
    tl.store(rows, grad + poison, mask=there)
    tl.store(rows + G, tl.where(kept, ratio + poison, nan), mask=there)
    tl.store(rows + 2 * G, tl.where(kept, log_ratio + poison, nan), mask=there)
    tl.store(rows + 3 * G, finite.to(tl.float64), mask=there)
    return grad + poison


@triton.jit
def _policy_kernel(
    scores, old_scores, advantages, ref_scores, numbers, objective, G, DROP: tl.constexpr,
    BLOCK_G: tl.constexpr,
):  # fmt: skip
    g = tl.arange(0, BLOCK_G)
    s = tl.load(scores + g, mask=g < G, other=0.0).to(tl.float64)
    store_policy(numbers, s, old_scores, advantages, ref_scores, objective, G, DROP, BLOCK_G)


def forward(
    scores: Tensor,
    old_scores: Tensor,
    advantages: Tensor,
    ref_scores: Tensor | None,
    *options: Any,
) -> Tensor:
    """Return the numbers `[7 + 4 G]`."""
    *objective, drop = options
    numbers = scores.new_empty(7 + 4 * len(scores))
    with torch.cuda.device_of(scores):
        _policy_kernel[(1,)](
            scores.contiguous(),
            old_scores.contiguous(),
            advantages.contiguous(),
            (old_scores if ref_scores is None else ref_scores).contiguous(),
            numbers,
            halves(objective),
            len(scores),
            DROP=drop,
            BLOCK_G=triton.next_power_of_2(max(2, len(scores))),
            num_warps=1,
        )
    return numbers


def halves(options: list[float]) -> tuple[tuple[float, float], ...]:
    """Each option as a float32 and what that leaves, for `_wide`."""
    rounded = [ctypes.c_float(x).value for x in options]
    return tuple((r, x - r) for r, x in zip(rounded, options, strict=True))
