"""`routed_attention` in plain PyTorch, written to be checked against the formula by eye.

One row at a time, it copies the routed frames, which the kernels exist to avoid, and
differentiates by autograd. 16-bit inputs are computed in float32, float64 in float64.
"""

import torch
from torch import Tensor


def forward(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    slots: Tensor,
    k_live: Tensor,
    v_live: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return `(out, lse)`; see `kvpo_kernels.ops.routed_attention` for the contract."""
    wide = [_widened(t) for t in (q, k_live, v_live)]
    out, lse = _attend(wide[0], wide[1], wide[2], k_pool, v_pool, slots, scale)
    return out.to(q.dtype), lse


def backward(
    grad_out: Tensor,
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    slots: Tensor,
    k_live: Tensor,
    v_live: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `(grad_q, grad_k_live, grad_v_live)`, by autograd through a second forward."""
    with torch.enable_grad():
        inputs = [_widened(t).detach().requires_grad_() for t in (q, k_live, v_live)]
        again, _ = _attend(inputs[0], inputs[1], inputs[2], k_pool, v_pool, slots, scale)
    grads = torch.autograd.grad(
        again, inputs, grad_out.to(again.dtype), allow_unused=True, materialize_grads=True
    )
    grad_q, grad_k_live, grad_v_live = (g.to(q.dtype).contiguous() for g in grads)
    return grad_q, grad_k_live, grad_v_live


def _widened(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _attend(
    q_BQHD: Tensor,
    k_live_BLHD: Tensor,
    v_live_BLHD: Tensor,
    k_FTHD: Tensor,
    v_FTHD: Tensor,
    slots_BR: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    B, Q, H, _ = q_BQHD.shape
    out_BQHD, lse_BHQ = torch.zeros_like(q_BQHD), q_BQHD.new_zeros(B, H, Q)
    rows = [
        _attend_row(
            q_BQHD[b],
            torch.cat([k_FTHD[used].flatten(0, 1).to(q_BQHD.dtype), k_live_BLHD[b]]),
            torch.cat([v_FTHD[used].flatten(0, 1).to(q_BQHD.dtype), v_live_BLHD[b]]),
            scale,
        )
        for b in range(B)
        for used in [slots_BR[b][slots_BR[b] >= 0].long()]
    ]
    if rows:
        out_BQHD, lse_BHQ = (torch.stack(parts) for parts in zip(*rows, strict=True))
    return out_BQHD, lse_BHQ.detach()


def _attend_row(q_QHD: Tensor, k_KHD: Tensor, v_KHD: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    group = q_QHD.shape[1] // k_KHD.shape[1]  # query heads per key head
    k_KHD, v_KHD = (t.repeat_interleave(group, dim=1) for t in (k_KHD, v_KHD))
    score_HQK = torch.einsum("qhd,khd->hqk", q_QHD, k_KHD) * scale
    lse_HQ = score_HQK.logsumexp(dim=-1)
    # Without keys, or with none above -inf, lse is -inf; the weights are then 0, not exp(nan).
    finite_HQ = lse_HQ.masked_fill(lse_HQ == float("-inf"), 0.0)
    weight_HQK = (score_HQK - finite_HQ[..., None]).exp()
    return torch.einsum("hqk,khd->qhd", weight_HQK, v_KHD), lse_HQ
