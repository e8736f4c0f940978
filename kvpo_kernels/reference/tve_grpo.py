"""`tve_grpo` in plain PyTorch: energies, the loss of their Gibbs policy, and the gradient."""

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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return `(loss, statistics, branches, energies, grad_pred)`; grad_pred is empty if unneeded.

    `grad_weights` are the weights of the block-steps that carry gradient, 0 for the others.
    """
    energies = velocity_energy.forward(pred, target, weights)
    loss, statistics, branches = branch_policy_loss.forward(
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
    if not needs_grad:
        return loss, statistics, branches, energies, pred.new_empty(0)
    grad = velocity_energy.backward(pred, target, grad_weights, -branches[0])
    return loss, statistics, branches, energies, grad
