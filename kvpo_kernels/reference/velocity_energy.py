"""`velocity_energy` in plain PyTorch: the weighted mean squared residual, and its gradient."""

import torch
from torch import Tensor


def forward(pred: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Return `energy_G`; see `kvpo_kernels.trajectory_velocity_energy` for the contract."""
    dtype = torch.promote_types(pred.dtype, torch.float32)  # bf16 residuals lose half their bits
    diff_GSN = (pred.to(dtype) - target.to(dtype)).reshape(*pred.shape[:2], -1)
    mse_GS = diff_GSN.square().mean(dim=-1)
    return (mse_GS.double() * weights.double()).sum(dim=1).to(dtype)


def backward(pred: Tensor, target: Tensor, weights: Tensor, grad_energy: Tensor) -> Tensor:
    """Return `d(sum_g grad_energy[g] * energy[g]) / d(pred)`, contiguous, in pred's dtype.

    A coefficient of zero gives zeros whatever the residual is, so that a branch that was dropped
    for a NaN does not bring the NaN back.
    """
    dtype = torch.promote_types(pred.dtype, torch.float32)
    numel = pred.shape[2:].numel()
    coef_GS = 2 * grad_energy.double()[:, None] * weights.double() / numel
    coef_GS1 = coef_GS.to(dtype)[:, :, None]
    diff_GSN = (pred.to(dtype) - target.to(dtype)).reshape(*pred.shape[:2], -1)
    grad_GSN = torch.where(coef_GS1 == 0, 0.0, diff_GSN * coef_GS1)
    return grad_GSN.to(pred.dtype).reshape(pred.shape).contiguous()
