"""Launcher of the C++ branch policy loss: a few hundred flops without torch's cost per op."""

import torch
from torch import Tensor

from kvpo_kernels import _native


def forward(
    scores: Tensor,
    old_scores: Tensor,
    advantages: Tensor,
    ref_scores: Tensor | None,
    *options: float | bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `(loss, statistics [6], branches [4, G])`."""
    loss, statistics, branches = _native.branch_policy_loss(
        scores.tolist(),
        old_scores.tolist(),
        advantages.tolist(),
        None if ref_scores is None else ref_scores.tolist(),
        *options,  # type: ignore[arg-type]
    )
    dtype = scores.dtype
    return (
        torch.tensor(loss, dtype=dtype),
        torch.tensor(statistics, dtype=dtype),
        torch.tensor(branches, dtype=dtype).view(4, -1),
    )
