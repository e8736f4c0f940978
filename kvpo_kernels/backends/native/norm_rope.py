"""Launcher of the C++ kernels: allocate outputs, pass borrowed DLPack views."""

import torch
from torch import Tensor

from kvpo_kernels import _native
from kvpo_kernels.backends.native.dlpack import view


def forward(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return `(q', k')`."""
    return _forward(q, q_weight, cos, sin, eps), _forward(k, k_weight, cos, sin, eps)


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
    new_q, weight_q = _backward(grad_q, q, q_weight, cos, sin, eps)
    new_k, weight_k = _backward(grad_k, k, k_weight, cos, sin, eps)
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
    _native.norm_rope_write(
        x=view(k.contiguous()),
        weight=view(k_weight.float().contiguous()),
        cos=view(cos),
        sin=view(sin),
        v=view(v.contiguous()),
        k_pool=view(k_pool),
        v_pool=view(v_pool),
        slots=view(slots.contiguous()),
        eps=eps,
        threads=torch.get_num_threads(),
    )
    return _forward(q, q_weight, cos, sin, eps)


def _forward(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    out = x.new_empty(x.shape)
    _native.norm_rope_forward(
        x=view(x.contiguous()),
        weight=view(weight.float().contiguous()),
        cos=view(cos),
        sin=view(sin),
        out=view(out),
        eps=eps,
        threads=torch.get_num_threads(),
    )
    return out


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    grad_x = x.new_empty(x.shape)
    grad_weight = torch.empty(weight.shape, dtype=torch.float32)
    _native.norm_rope_backward(
        grad=view(grad.contiguous()),
        x=view(x.contiguous()),
        weight=view(weight.float().contiguous()),
        cos=view(cos),
        sin=view(sin),
        grad_x=view(grad_x),
        grad_weight=view(grad_weight),
        eps=eps,
        threads=torch.get_num_threads(),
    )
    return grad_x, grad_weight.to(weight.dtype)
