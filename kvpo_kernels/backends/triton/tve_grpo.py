"""Energies, policy loss and gradient in two launches, the policy at the end of the first."""

from typing import Any

import torch
from torch import Tensor

from kvpo_kernels.backends.triton.branch_policy_loss import halves
from kvpo_kernels.backends.triton.velocity_energy import launch_energies, launch_gradient


def forward(
    pred: Tensor,
    target: Tensor,
    weights: Tensor,
    grad_weights: Tensor,
    old_scores: Tensor,
    advantages: Tensor,
    ref_scores: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    """Return `(numbers [7 + 5 G], grad)`; grad is empty if not needed."""
    *objective, drop, needs_grad = options
    G = pred.shape[0]
    numbers = old_scores.new_empty(7 + 5 * G)
    coefficients = pred.new_empty(pred.shape[:2], dtype=torch.float32)
    policy = (
        numbers,
        old_scores.contiguous(),
        advantages.contiguous(),
        (old_scores if ref_scores is None else ref_scores).contiguous(),
        grad_weights.contiguous(),
        coefficients,
        halves(objective),
    )
    launch_energies(pred, target, weights, numbers[7 + 4 * G :], policy, drop)
    if not needs_grad:
        return numbers, pred.new_empty(0)
    return numbers, launch_gradient(pred, target, coefficients)
