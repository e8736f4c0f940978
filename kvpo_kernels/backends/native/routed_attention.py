"""Launcher of the C++ kernels: allocate outputs, pass borrowed DLPack views."""

import torch
from torch import Tensor

from kvpo_kernels import _native
from kvpo_kernels.backends.native.dlpack import pages, view


def forward(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    slots: Tensor,
    k_live: Tensor,
    v_live: Tensor,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return `(out, lse)`."""
    out = q.new_empty(q.shape)
    lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)
    _native.routed_attention_forward(
        q=view(_vectors(q)),
        k_pool=pages(k_pool),
        v_pool=pages(v_pool),
        slots=view(slots),
        k_live=view(_vectors(k_live)),
        v_live=view(_vectors(v_live)),
        k_scales=None if k_scales is None else view(k_scales),
        v_scales=None if v_scales is None else view(v_scales),
        out=view(out),
        lse=view(lse),
        scale=scale,
        threads=torch.get_num_threads(),
    )
    return out, lse


def backward(
    grad_out: Tensor,
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    slots: Tensor,
    k_live: Tensor,
    v_live: Tensor,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `(grad_q, grad_k_live, grad_v_live)`."""
    grad_q = q.new_empty(q.shape)
    grad_k_live, grad_v_live = k_live.new_empty(k_live.shape), v_live.new_empty(v_live.shape)
    _native.routed_attention_backward(
        grad_out=view(_vectors(grad_out)),
        q=view(_vectors(q)),
        k_pool=pages(k_pool),
        v_pool=pages(v_pool),
        slots=view(slots),
        k_live=view(_vectors(k_live)),
        v_live=view(_vectors(v_live)),
        k_scales=None if k_scales is None else view(k_scales),
        v_scales=None if v_scales is None else view(v_scales),
        out=view(out),
        lse=view(lse),
        grad_q=view(grad_q),
        grad_k_live=view(grad_k_live),
        grad_v_live=view(grad_v_live),
        scale=scale,
        threads=torch.get_num_threads(),
    )
    return grad_q, grad_k_live, grad_v_live


def _vectors(tensor: Tensor) -> Tensor:
    """The tensor with a contiguous last axis; the other strides are the kernel's business."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
