"""`branch_policy_loss` in plain PyTorch: the objective and its closed-form gradient, in float64."""

import math

import torch
from torch import Tensor

KL_EPSILON = 1e-10  # of the official KL: pi * (log(pi + eps) - log pi_ref)


def forward(
    scores: Tensor,
    old_scores: Tensor,
    advantages: Tensor,
    ref_scores: Tensor | None,
    clip_low: float,
    clip_high: float,
    kl_coef: float,
    log_ratio_clamp: float,
    min_entropy_ratio: float,
    scale: float,
    branch_mass: float,
    drop: bool,
) -> Tensor:
    """Return the results in one tensor `[7 + 4 G]` of the scores' dtype.

    These are loss, GRPO term, KL, entropy, clip fraction, skip, number of dropped branches; then
    `[G]` each the score gradient, ratio, log-ratio, and 1 where a branch's inputs are finite.
    No value is read on the host. Without `drop`, one non-finite input makes the others NaN.
    """
    s, old, A = scores.double(), old_scores.double(), advantages.double()
    ref = old if ref_scores is None else ref_scores.double()
    finite = s.isfinite() & old.isfinite() & A.isfinite() & ref.isfinite()
    kept = finite if drop else torch.ones_like(finite)
    count = kept.sum()
    n = count.clamp_min(1)

    log_pi, log_old, log_ref = (_log_softmax(x, kept) for x in (s, old, ref))
    pi = torch.where(kept, log_pi.exp(), 0.0)
    A = torch.where(kept, A, 0.0)
    log_ratio = log_pi - log_old
    ratio = log_ratio.clamp(-log_ratio_clamp, log_ratio_clamp).exp()
    low, high = 1 - clip_low, 1 + clip_high
    grpo = -_sum(torch.minimum(ratio * A, ratio.clamp(low, high) * A)) / n
    log_pi_eps = (pi + KL_EPSILON).log()
    kl = _sum(pi * (log_pi_eps - log_ref))
    loss = scale * (grpo + kl_coef * kl)

    clipped = ((A > 0) & (ratio > high)) | ((A < 0) & (ratio < low))
    active = ~clipped & (log_ratio.abs() <= log_ratio_clamp)
    a = torch.where(active, -A * ratio / n, 0.0)
    c = log_pi_eps - log_ref + pi / (pi + KL_EPSILON)
    grad = scale * (a - pi * _sum(a) + kl_coef * pi * (c - _sum(pi * c)))

    outside = ((ratio < low) | (ratio > high)) & kept
    # The entropy of the branches' entries of a distribution that leaves them `branch_mass`.
    entropy = -branch_mass * (_sum(pi * log_pi) + math.log(branch_mass) * _sum(pi))
    skip = entropy > n.double().log() * (1 - min_entropy_ratio)
    skip = skip & (min_entropy_ratio > 0)
    nan = float("nan")
    poison = torch.where(finite.all() | drop, 0.0, nan)
    statistics = torch.stack(
        [loss, grpo, kl, entropy, outside.double().sum() / n, skip.double(), len(s) - count]
    )
    no_ratio = torch.where(kept, 0.0, nan)
    per_branch = (grad, ratio + no_ratio, log_ratio + no_ratio)
    poisoned = torch.cat([statistics, *per_branch]) + poison
    return torch.cat([poisoned, finite.double()]).to(scores.dtype)


def _log_softmax(x: Tensor, kept: Tensor) -> Tensor:
    """Log-softmax over the kept entries; 0 for the others, which no sum uses."""
    peak = torch.where(kept, x, -torch.inf).amax()
    shifted = torch.where(kept, x - peak, -torch.inf)
    return torch.where(kept, shifted - _sum(shifted.exp()).log(), 0.0)


def _sum(terms: Tensor) -> Tensor:
    """A sum that does not depend on the order of the branches, to the bit."""
    return terms.sort().values.sum()
