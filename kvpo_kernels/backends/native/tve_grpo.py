"""Launcher of the fused C++ kernel: energies, branch policy loss and gradient."""

import torch
from torch import Tensor

from kvpo_kernels import _native
from kvpo_kernels.backends.native.dlpack import view


def forward(
    pred: Tensor,
    target: Tensor,
    weights: Tensor,
    grad_weights: Tensor,
    old_scores: Tensor,
    advantages: Tensor,
    ref_scores: Tensor | None,
    *options: float | bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return `(loss, statistics [6], branches [4, G], energies [G], grad)`; grad may be empty."""
    *objective, needs_grad = options
    step_weights = weights.tolist()
    grad = pred.new_empty(pred.shape if needs_grad else 0)
    loss, statistics, branches, energies = _native.tve_grpo(  # type: ignore[call-arg]
        view(pred.contiguous()),
        view(target.contiguous()),
        step_weights,
        step_weights if grad_weights is weights else grad_weights.tolist(),
        old_scores.tolist(),
        advantages.tolist(),
        None if ref_scores is None else ref_scores.tolist(),
        *objective,  # type: ignore[arg-type]
        view(grad) if needs_grad else None,
        torch.get_num_threads(),
    )
    f32 = torch.float32
    return (
        torch.tensor(loss, dtype=f32),
        torch.tensor(statistics, dtype=f32),
        torch.tensor(branches, dtype=f32).view(4, -1),
        torch.tensor(energies, dtype=f32),
        grad,
    )
