"""`norm_rope` in plain PyTorch, written to be checked against the formula by eye."""

import torch
from torch import Tensor


def norm_rope(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """RMSNorm over the model dimension, then rotation of the pairs (2i, 2i+1) of each head.

    Args:
        x: `[B, N, H, D]`.
        weight: `[H * D]`.
        cos, sin: `[N, D / 2]`, of each token's angles.

    Computes in float32, in float64 for float64 input; rounds once, at the end.
    """
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    y = _normalized(x.to(wide), eps)[0] * weight.to(wide).view(x.shape[-2:])
    return _rotated(y, cos.to(wide), sin.to(wide)).to(x.dtype)


def _normalized(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    inverse_rms = torch.rsqrt(x.square().mean((-2, -1), keepdim=True) + eps)
    return x * inverse_rms, inverse_rms


def _rotated(y: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = y[..., 0::2], y[..., 1::2]
    c, s = cos[:, None], sin[:, None]
    return torch.stack([even * c - odd * s, even * s + odd * c], dim=-1).flatten(-2)


def norm_rope_backward(
    grad: Tensor, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight: rotate back, then through y = n * weight, n = x / rms(x)."""
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    n, inverse_rms = _normalized(x.to(wide), eps)
    grad_y = _rotated(grad.to(wide), cos.to(wide), -sin.to(wide))
    grad_n = grad_y * weight.to(wide).view(x.shape[-2:])
    grad_x = inverse_rms * (grad_n - n * (grad_n * n).mean((-2, -1), keepdim=True))
    return grad_x.to(x.dtype), (grad_y * n).sum((0, 1)).flatten().to(weight.dtype)


def forward(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Return `(q', k')`; see `kvpo_kernels.ops.norm_rope` for the contract."""
    return norm_rope(q, q_weight, cos, sin, eps), norm_rope(k, k_weight, cos, sin, eps)


def backward(
    grad_q: Tensor,
    grad_k: Tensor,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and the two weights."""
    new_q, weight_q = norm_rope_backward(grad_q, q, q_weight, cos, sin, eps)
    new_k, weight_k = norm_rope_backward(grad_k, k, k_weight, cos, sin, eps)
    return new_q, new_k, weight_q, weight_k


def write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    slots: Tensor,
    eps: float,
) -> Tensor:
    """Return q'; k' and v go into the slots of the pool."""
    new_q, new_k = forward(q, k, q_weight, k_weight, cos, sin, eps)
    index = slots.reshape(-1).to(k_pool.device)
    page = (index.numel(), *k_pool.shape[1:])
    k_pool[index] = new_k.reshape(page)
    v_pool[index] = v.reshape(page)
    return new_q
