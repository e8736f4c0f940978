"""RMSNorm, rotation and slot write in one pass over a token; float32, rounded once at the end."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_CHUNKS = 1024  # partial sums of a weight's gradient; fixed, so that the order of sums is


@triton.jit
def _load(data, column, C):
    return tl.load(data + column, mask=column < C, other=0.0).to(tl.float32)


@triton.jit
def _turned(y, cos, sin, n, C, D, BLOCK_C: tl.constexpr, BACK: tl.constexpr):
    """A token's columns, each pair (2i, 2i+1) of a head turned by its angle, or turned back."""
    pair = tl.arange(0, BLOCK_C // 2)
    at = n.to(tl.int64) * (D // 2) + pair % (D // 2)
    c = tl.load(cos + at, mask=pair < C // 2, other=0.0)
    s = tl.load(sin + at, mask=pair < C // 2, other=0.0)
    if BACK:
        s = -s
    y0, y1 = tl.split(tl.reshape(y, [BLOCK_C // 2, 2]))
    return tl.reshape(tl.join(y0 * c - y1 * s, y1 * c + y0 * s), [BLOCK_C])


@triton.jit
def _forward_kernel(
    x, weight, cos, sin, v, slots, out, v_out, out_strides, v_strides, eps, N, T, C, D,
    POOL: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One token: into row b of `out`, or with POOL, with its values, into the frame's slot."""
    n = tl.program_id(0)
    b = tl.program_id(1)
    column = tl.arange(0, BLOCK_C)
    own = (b.to(tl.int64) * N + n) * C
    value = _load(x + own, column, C)
    r = tl.rsqrt(tl.sum(value * value) / C + eps)
    result = _turned(value * r * _load(weight, column, C), cos, sin, n, C, D, BLOCK_C, False)
    if POOL:
        index = tl.load(slots + b * (N // T) + n // T)
        t = n % T
    else:
        index = b.to(tl.int64)
        t = n
    h = column // D
    d = column % D
    to = index * out_strides[0] + t.to(tl.int64) * out_strides[1] + h * out_strides[2] + d
    tl.store(out + to, result.to(out.dtype.element_ty), mask=column < C)
    if POOL:
        to = index * v_strides[0] + t.to(tl.int64) * v_strides[1] + h * v_strides[2] + d
        tl.store(v_out + to, tl.load(v + own + column, mask=column < C), mask=column < C)


@triton.jit
def _backward_kernel(
    grad, x, weight, cos, sin, grad_x, partial, eps, B, N, C, D, CHUNKS, BLOCK_C: tl.constexpr
):  # fmt: skip
    """With y = x r w and g the gradient of y, rotated back:

    grad_w = sum over tokens of g x r,   grad_x = r (g w - x r^2 mean(g w x))
    """
    chunk = tl.program_id(0)
    column = tl.arange(0, BLOCK_C)
    w = _load(weight, column, C)
    grad_w = tl.zeros([BLOCK_C], tl.float32)
    for n in range(chunk, N, CHUNKS):
        for b in range(0, B):
            own = (tl.cast(b, tl.int64) * N + n) * C
            value = _load(x + own, column, C)
            g = _load(grad + own, column, C)
            g = _turned(g, cos, sin, chunk + (n - chunk), C, D, BLOCK_C, True)
            r = tl.rsqrt(tl.sum(value * value) / C + eps)
            grad_w += g * (value * r)
            g = g * w
            mean = tl.sum(g * value) / C
            result = r * (g - value * (r * r * mean))
            to = grad_x + own + column
            tl.store(to, result.to(grad_x.dtype.element_ty), mask=column < C)
    tl.store(partial + chunk.to(tl.int64) * C + column, grad_w, mask=column < C)


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
    slots = slots.to(k.device, non_blocking=True)
    _launch(k, k_weight, cos, sin, eps, k_pool, v.contiguous(), v_pool, slots)
    return _forward(q, q_weight, cos, sin, eps)


def _forward(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    out = x.new_empty(x.shape)
    _launch(x, weight, cos, sin, eps, out)
    return out


def _launch(
    x: Tensor,
    weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    out: Tensor,
    v: Tensor | None = None,
    v_out: Tensor | None = None,
    slots: Tensor | None = None,
) -> None:
    B, N, H, D = x.shape
    if x.numel() == 0:
        return
    with torch.cuda.device_of(x):
        _forward_kernel[(N, B)](
            x.contiguous(),
            weight.contiguous(),
            cos.contiguous(),
            sin.contiguous(),
            x if v is None else v,
            cos if slots is None else slots.contiguous(),
            out,
            out if v_out is None else v_out,
            out.stride()[:3],
            (out if v_out is None else v_out).stride()[:3],
            eps,
            N,
            N if slots is None else out.shape[1],
            H * D,
            D,
            POOL=slots is not None,
            BLOCK_C=triton.next_power_of_2(H * D),
            num_warps=4,
        )


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    B, N, H, D = x.shape
    grad_x = x.new_empty(x.shape)
    chunks = min(N, _CHUNKS)
    partial = x.new_zeros(chunks, H * D, dtype=torch.float32)
    if x.numel():
        with torch.cuda.device_of(x):
            _backward_kernel[(chunks,)](
                grad.contiguous(),
                x.contiguous(),
                weight.contiguous(),
                cos.contiguous(),
                sin.contiguous(),
                grad_x,
                partial,
                eps,
                B,
                N,
                H * D,
                D,
                chunks,
                BLOCK_C=triton.next_power_of_2(H * D),
                num_warps=4,
            )
    return grad_x, partial.sum(0).to(weight.dtype)
