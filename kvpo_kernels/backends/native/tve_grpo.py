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
) -> tuple[Tensor, Tensor]:
    """Return `(numbers [7 + 5 G], grad)`; grad is empty if not needed."""
    *objective, needs_grad = options
    pred, target, step_weights = pred.contiguous(), target.contiguous(), weights.flatten().tolist()
    grad = torch.empty_like(pred) if needs_grad else pred.new_empty(0)
    numbers = old_scores.new_empty(7 + 5 * pred.shape[0])
    _native.tve_grpo(  # type: ignore[call-arg]
        view(pred),
        view(target),
        step_weights,
        step_weights if grad_weights is weights else grad_weights.flatten().tolist(),
        old_scores.tolist(),
        advantages.tolist(),
        None if ref_scores is None else ref_scores.tolist(),
        *objective,  # type: ignore[arg-type]
        view(numbers),
        view(grad) if needs_grad else None,
        torch.get_num_threads(),
    )
    return numbers, grad
