"""`routed_attention` in plain PyTorch, written to be checked against the formula by eye.

One row at a time, it copies the routed frames, which the kernels exist to avoid. 16-bit inputs are
computed in float32, float64 in float64. On a GPU it synchronizes once per row.
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
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return `(out, lse)`; see `kvpo_kernels.ops.routed_attention` for the contract."""
    B, Q, H, _D = q.shape
    out = q.new_empty(q.shape)
    lse = q.new_empty(B, H, Q, dtype=_widened(q).dtype)
    for b in range(B):
        k_KHD = _keys_of_row(k_pool, k_scales, slots[b], k_live[b], H)
        v_KHD = _keys_of_row(v_pool, v_scales, slots[b], v_live[b], H)
        weight_HQK, lse[b] = _weights(_widened(q[b]), k_KHD, scale)
        out[b] = torch.einsum("hqk,khd->qhd", weight_HQK, v_KHD)
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
    B, _Q, H, D = q.shape
    L, kv_heads = k_live.shape[1:3]
    grad_q, grad_k, grad_v = (t.new_empty(t.shape) for t in (q, k_live, v_live))
    for b in range(B):
        q_QHD, grad_out_QHD = _widened(q[b]), _widened(grad_out[b])
        k_KHD = _keys_of_row(k_pool, k_scales, slots[b], k_live[b], H)
        v_KHD = _keys_of_row(v_pool, v_scales, slots[b], v_live[b], H)
        weight_HQK, _ = _weights(q_QHD, k_KHD, scale)
        grad_weight_HQK = torch.einsum("qhd,khd->hqk", grad_out_QHD, v_KHD)
        mean_HQ1 = (weight_HQK * grad_weight_HQK).sum(dim=-1, keepdim=True)
        grad_score_HQK = scale * weight_HQK * (grad_weight_HQK - mean_HQ1)  # of q . k

        grad_q[b] = torch.einsum("hqk,khd->qhd", grad_score_HQK, k_KHD)
        live = slice(k_KHD.shape[0] - L, None)  # the last keys of the row
        grad_k_LHD = torch.einsum("hqk,qhd->khd", grad_score_HQK[..., live], q_QHD)
        grad_v_LHD = torch.einsum("hqk,qhd->khd", weight_HQK[..., live], grad_out_QHD)
        grad_k[b] = grad_k_LHD.reshape(L, kv_heads, H // kv_heads, D).sum(dim=2)
        grad_v[b] = grad_v_LHD.reshape(L, kv_heads, H // kv_heads, D).sum(dim=2)
    return grad_q, grad_k, grad_v


def _widened(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _keys_of_row(
    pool_FTHD: Tensor, scales_FH: Tensor | None, slots_R: Tensor, live_LHD: Tensor, heads: int
) -> Tensor:
    """Lay the routed frames and the live tokens of a row end to end, one head per query head."""
    used = slots_R[slots_R >= 0].long()
    live_LHD = _widened(live_LHD)
    if scales_FH is None:
        frames_RTHD = pool_FTHD[used].to(live_LHD.dtype)
    else:  # float8 has no index
        pages_RTHD = pool_FTHD.view(torch.uint8)[used].view(pool_FTHD.dtype)
        frames_RTHD = pages_RTHD.to(live_LHD.dtype) * scales_FH[used][:, None, :, None]
    x_KHD = torch.cat([frames_RTHD.flatten(0, 1), live_LHD])
    return x_KHD.repeat_interleave(heads // x_KHD.shape[1], dim=1)


def _weights(q_QHD: Tensor, k_KHD: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    score_HQK = torch.einsum("qhd,khd->hqk", q_QHD, k_KHD) * scale
    lse_HQ = score_HQK.logsumexp(dim=-1)
    # Without keys, or with none above -inf, lse is -inf; the weights are then 0, not exp(nan).
    finite_HQ = lse_HQ.masked_fill(lse_HQ == float("-inf"), 0.0)
    return (score_HQK - finite_HQ[..., None]).exp(), lse_HQ
