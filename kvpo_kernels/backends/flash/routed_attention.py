"""Routed attention through FlashAttention-2: one call per run of adjacent slots, nothing gathered.

Each call reads a run of frames as it lies in the pool. The parts of the forward are merged by their
LSE; each part of the backward is given the merged output and LSE, so that it sees the weights of
the whole softmax, and grad_q is the sum over parts. FlashAttention has no backward without
gradients for keys: those of history are computed and dropped.

The routes are read on the host: a call waits for the GPU, and cannot be captured in a CUDA graph.
"""

from collections.abc import Iterator
from typing import Any

import torch
from flash_attn.flash_attn_interface import _flash_attn_backward, _flash_attn_forward
from torch import Tensor

_LEAST = 1.2e-38  # the smallest normal float32: 0 times the -inf of a mask is NaN
_PLAIN: dict[str, Any] = {
    "dropout_p": 0.0,
    "causal": False,
    "window_size_left": -1,
    "window_size_right": -1,
    "softcap": 0.0,
    "alibi_slopes": None,
}


def forward(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    slots: Tensor,
    k_live: Tensor,
    v_live: Tensor,
    k_scales: None,
    v_scales: None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return `(out, lse)`."""
    if scale < 0:  # the kernels compare products before they scale them
        q, scale = -q, -scale
    B, Q, H, _D = q.shape
    out = q.new_empty(q.shape)
    lse = q.new_empty(B, H, Q, dtype=torch.float32)
    for b, row in enumerate(slots.tolist() if Q else []):
        total = torch.full_like(lse[b], -torch.inf)
        acc = torch.zeros_like(q[b], dtype=torch.float32)
        for k, v in _runs(row, k_pool, v_pool, k_live[b], v_live[b]):
            part, part_lse, *_ = _flash_attn_forward(
                q[b : b + 1], k, v, softmax_scale=max(scale, _LEAST), return_softmax=False, **_PLAIN
            )
            new_total = torch.logaddexp(total, part_lse[0])
            acc *= _weight(total, new_total)
            acc += part[0] * _weight(part_lse[0], new_total)
            total = new_total
        out[b], lse[b] = acc, total
    return out, lse


def backward(
    grad_out: Tensor,
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    slots: Tensor,
    k_live: Tensor,
    v_live: Tensor,
    k_scales: None,
    v_scales: None,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `(grad_q, grad_k_live, grad_v_live)`."""
    if scale < 0:
        arguments = k_pool, v_pool, slots, k_live, v_live, None, None, out, lse, -scale
        grad_q, grad_k, grad_v = backward(grad_out, -q, *arguments)
        return grad_q.neg_(), grad_k, grad_v
    grad_q = q.new_empty(q.shape)
    grad_k, grad_v = (t.new_empty(t.shape).zero_() for t in (k_live, v_live))
    for b, row in enumerate(slots.tolist() if q.shape[1] else []):
        acc = torch.zeros_like(q[b], dtype=torch.float32)
        part = torch.empty_like(q[b : b + 1])
        for k, v in _runs(row, k_pool, v_pool, k_live[b], v_live[b]):
            live = k.data_ptr() == k_live[b].data_ptr()
            of_k, of_v = (
                (grad_k[b : b + 1], grad_v[b : b + 1])
                if live
                else (torch.empty_like(k), torch.empty_like(v))
            )
            _flash_attn_backward(
                grad_out[b : b + 1].contiguous(),
                *(q[b : b + 1], k, v, out[b : b + 1], lse[b : b + 1], part, of_k, of_v),
                softmax_scale=max(scale, _LEAST),
                deterministic=True,
                **_PLAIN,
            )
            acc += part[0]
        grad_q[b] = acc
    return grad_q, grad_k, grad_v


def _weight(lse: Tensor, total: Tensor) -> Tensor:
    """Share `[Q, H, 1]` of a part in the whole; 0 where there is nothing yet."""
    share = torch.exp(lse - total).where(total > -torch.inf, 0.0)
    return share.transpose(0, 1)[..., None]


def _runs(
    row: list[int], k_pool: Tensor, v_pool: Tensor, k_live: Tensor, v_live: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Keys and values `[1, tokens, Hkv, D]` of adjacent slots in a route, then of live tokens."""
    frames = [slot for slot in row if slot >= 0]
    dense = all(t.stride(0) == t.shape[1] * t.stride(1) for t in (k_pool, v_pool))
    first = 0
    for end in range(1, len(frames) + 1):
        if end == len(frames) or not dense or frames[end] != frames[end - 1] + 1:
            run = slice(frames[first], frames[end - 1] + 1)
            k, v = (pool[run].flatten(0, 1)[None] for pool in (k_pool, v_pool))
            if k.shape[1]:
                yield k, v
            first = end
    if k_live.shape[0]:
        yield k_live[None], v_live[None]
