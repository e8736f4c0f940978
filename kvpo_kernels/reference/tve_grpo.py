"""`tve_grpo` in plain PyTorch: energies, the loss of their Gibbs policy, and the gradient."""

import torch
from torch import Tensor

from . import branch_policy_loss, velocity_energy


def forward(
    pred: Tensor,
    target: Tensor,
    weights: Tensor,
    grad_weights: Tensor,
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
    needs_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Return `(numbers [7 + 5 G], grad_pred)`; grad_pred is empty if not needed.

    The numbers are those of `branch_policy_loss`, then the energies. `grad_weights` are the weights
    of the block-steps that carry gradient, 0 for the others.
    """
    energies = velocity_energy.forward(pred, target, weights)
    numbers = branch_policy_loss.forward(
        -energies,
        old_scores,
        advantages,
        ref_scores,
        clip_low,
        clip_high,
        kl_coef,
        log_ratio_clamp,
        min_entropy_ratio,
        scale,
        branch_mass,
        drop,
    )
    grad = pred.new_empty(0)
    if needs_grad:
        score_grad = numbers[7 : 7 + len(energies)]
        grad = velocity_energy.backward(pred, target, grad_weights, -score_grad)
    return torch.cat([numbers, energies]), grad
