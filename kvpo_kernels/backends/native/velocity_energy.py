"""Launcher of the C++ kernels of the velocity energies."""

import torch
from torch import Tensor

from kvpo_kernels import _native
from kvpo_kernels.backends.native.dlpack import view


def forward(pred: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Return `energy [G]`, float32."""
    energies = _native.velocity_energy(
        view(pred.contiguous()),
        view(target.contiguous()),
        weights.flatten().tolist(),
        torch.get_num_threads(),
    )
    return torch.tensor(energies, dtype=torch.float32)


def backward(pred: Tensor, target: Tensor, weights: Tensor, grad_energy: Tensor) -> Tensor:
    """Return the gradient for pred, contiguous."""
    coefficients = 2 * grad_energy.double()[:, None] * weights / pred.shape[2:].numel()
    grad = pred.new_empty(pred.shape)
    _native.velocity_gradient(
        view(pred.contiguous()),
        view(target.contiguous()),
        coefficients.flatten().tolist(),
        view(grad),
        torch.get_num_threads(),
    )
    return grad
