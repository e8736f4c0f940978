"""RMSNorm and 3-D rotary embedding of queries and keys, and their way into the frame pool.

Shape letters: B rows, N tokens of a block (frames * height * width), H heads, Hkv key heads, D head
size, F slots of the pool, T tokens per frame (height * width).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kvpo_kernels import registry
from kvpo_kernels.checks import integer, number, tensors
from kvpo_kernels.errors import (
    BackendUnavailable,
    ConfigError,
    DtypeError,
    GradientError,
    ShapeError,
)
from kvpo_kernels.history.slots import PreparedSlots, for_kernels, frame_index
from kvpo_kernels.ops.rope_table import RopeTable
from kvpo_kernels.ops.store_frames import (
    check_offsets,
    check_scales,
    check_slots,
    note_written,
    store_frames,
    why_not_page,
)
from kvpo_kernels.registry import Backend

OP = "norm_rope"
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Problem:
    """What a backend needs to know to accept or refuse a call."""

    device: str
    dtype: torch.dtype
    head_size: int


def _why_not_cpu(p: Problem) -> str | None:
    if why := registry.why_not_native(p.device):
        return why
    if p.dtype not in (torch.float32, torch.bfloat16):
        return f"takes float32 and bfloat16, got {p.dtype}"
    if p.head_size % 16 or p.head_size > 1024:
        return f"takes head sizes that are multiples of 16 up to 1024, got {p.head_size}"
    return None


def _why_not_triton(p: Problem) -> str | None:
    if p.dtype is torch.float64:
        return "takes float32, bfloat16 and float16, got torch.float64"
    return registry.why_not_triton(p.device)


BACKENDS: tuple[Backend[Problem], ...] = (
    Backend("cpu", "kvpo_kernels.backends.native.norm_rope", _why_not_cpu),
    Backend("triton", "kvpo_kernels.backends.triton.norm_rope", _why_not_triton),
    Backend("reference", "kvpo_kernels.reference.norm_rope", lambda p: None),
)


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rope: RopeTable,
    first_frame: int | Tensor,
    *,
    grid: tuple[int, int, int],
    eps: float = 1e-6,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """RMSNorm over the full model dimension, then 3-D RoPE, of queries and keys.

        y = x / sqrt(mean(x^2 over H and D) + eps) * weight;  x' = rotate(y, angles of the token)

    Args:
        q: `[B, N, H, D]`, N = frames * height * width tokens in that order; float32, float64,
            bfloat16 or float16.
        k: `[B, N, Hkv, D]`, as q.
        q_weight: `[H * D]`, in any float dtype.
        k_weight: `[Hkv * D]`.
        rope: the angles; `RopeTable(D)`.
        first_frame: absolute index of the block's first frame; or an int64 tensor of that one
            value, so that a captured or compiled step serves every block.
        grid: (frames, height, width).
        eps: added to the mean square.
        backend: a name in `BACKENDS`; None takes the first that can run.

    Returns:
        `(q', k')`, contiguous, in the dtype of q; computed in float32 (float64 for float64) and
        rounded once. Differentiable, once, towards q, k and the weights. Deterministic; the bits of
        a row do not depend on the other rows.

    Raises:
        ShapeError: a shape does not fit, or a frame lies outside the table.
        DtypeError: a dtype or device differs from that of q.
        BackendUnavailable: no backend, or not the named one, can run the call.

    Source: the attention of Wan (arXiv:2503.20314), whose float64 rotation this matches to one
    rounding of the result.
    """
    cos, sin, name = _prepare(q, k, q_weight, k_weight, rope, first_frame, grid, eps, backend)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, q_weight, k_weight)):
        out: tuple[Tensor, Tensor] = _NormRope.apply(  # type: ignore[no-untyped-call]
            *registry.each_once(q, k, q_weight, k_weight, cos, sin), eps, name
        )
        return out
    return _forward(q, k, q_weight, k_weight, cos, sin, eps, name)  # type: ignore[no-any-return]


def qk_norm_rope_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rope: RopeTable,
    first_frame: int | Tensor,
    *,
    grid: tuple[int, int, int],
    k_pool: Tensor,
    v_pool: Tensor,
    slots: PreparedSlots | Tensor,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    eps: float = 1e-6,
    backend: str | None = None,
) -> Tensor:
    """The context pass: as `qk_norm_rope`, but k' and v go straight into slots of the pool.

    Args:
        q, k, q_weight, k_weight, rope, first_frame, grid, eps, backend: as `qk_norm_rope`.
        v: `[B, N, Hkv, D]`, as k; written as it is.
        k_pool, v_pool: `[F, T, Hkv, D]`, T = height * width, with a contiguous last axis. Where
            they are quantized, k' and v are rounded as by `quantize_frames`.
        k_scales, v_scales: `[F, Hkv]` float32, of quantized pools, written as well.
        slots: `[B, frames]` of `FramePool.prepare_write` or `advance`, for views of that pool: they
            are checked as by `FramePool.write`, and the caller then records the write with
            `FramePool.mark_written`. For pools that are no FramePool's, int64 `[B, frames]` on the
            host, all different.

    Returns:
        q' `[B, N, H, D]`.

    Raises:
        As `qk_norm_rope`; ShapeError also for a slot outside the pool or named twice, and for
        queries, keys or values that lie in the pool.
        DtypeError: plain numbers for slots of a FramePool.
        PoolError: a slot that is no longer its timeline's alone, or another frame's.
        GradientError: in grad mode an input requires grad; this op has no backward.
        Nothing is written then.
    """
    cos, sin, name = _prepare(q, k, q_weight, k_weight, rope, first_frame, grid, eps, backend)
    named = slots.tensor if isinstance(slots, PreparedSlots) else slots
    _check_write(q, k, v, k_pool, v_pool, named, grid, k_scales, v_scales)
    slots = for_kernels(slots, k_pool=k_pool, v_pool=v_pool, k_scales=k_scales, v_scales=v_scales)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v, q_weight, k_weight)):
        raise GradientError("qk_norm_rope_write has no backward: call it under torch.no_grad()")
    if k_scales is not None:  # a scale needs the whole frame first
        new_q, new_k = _forward(q, k, q_weight, k_weight, cos, sin, eps, name)
        page, flat = (slots.numel(), *k_pool.shape[1:]), slots.reshape(-1)
        store_frames(k_pool, k_scales, flat, new_k.reshape(page), name)
        store_frames(v_pool, v_scales, flat, v.reshape(page), name)
        return new_q  # type: ignore[no-any-return]
    new_q = _write(q, k, v, q_weight, k_weight, cos, sin, k_pool, v_pool, slots, eps, name)
    note_written(k_pool, v_pool)
    return new_q  # type: ignore[no-any-return]


def _prepare(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rope: RopeTable,
    first_frame: int | Tensor,
    grid: tuple[int, int, int],
    eps: float,
    backend: str | None,
) -> tuple[Tensor, Tensor, str]:
    tensors(q=q, k=k, q_weight=q_weight, k_weight=k_weight)
    if not isinstance(rope, RopeTable):
        raise DtypeError(f"rope must be a RopeTable, got {type(rope).__name__}")
    if not isinstance(grid, (tuple, list)):
        raise DtypeError(f"grid must be (frames, height, width), got {grid!r}")
    for axis, size in enumerate(grid):
        if type(size) is not int:
            integer(f"grid[{axis}]", size, None)
    if not isinstance(first_frame, Tensor):
        frame_index("first_frame", first_frame)
    if q.ndim != 4:
        raise ShapeError(f"q must be [B, N, H, D], got {list(q.shape)}")
    B, N, _, D = q.shape
    tokens = math.prod(grid)
    if len(grid) == 3 and tokens != N and q.shape[2] == tokens:
        raise ShapeError(
            f"q must be [B, N, H, D], got {list(q.shape)}: with the {tokens} tokens of the grid it"
            " looks like [B, H, N, D], transpose(1, 2)"
        )
    others_fit = k.ndim == 4 and k.shape[1] == tokens and k.shape[3] == rope.head_dim
    if others_fit and (tokens != N or rope.head_dim != D):
        raise ShapeError(
            f"q must be [B, {tokens}, H, {rope.head_dim}] like k, grid and rope table, got"
            f" {list(q.shape)}"
        )
    if k.ndim != 4 or (k.shape[0], k.shape[1], k.shape[3]) != (B, N, D):
        raise ShapeError(f"k must be [{B}, {N}, Hkv, {D}], got {list(k.shape)}")
    if len(grid) != 3 or tokens != N:
        raise ShapeError(f"grid {tuple(grid)} has not the {N} tokens of q")
    if rope.head_dim != D:
        raise ShapeError(f"rope table is for head size {rope.head_dim}, q has {D}")
    for name, weight, x in (("q_weight", q_weight, q), ("k_weight", k_weight, k)):
        if weight.shape != (x.shape[2] * D,):
            raise ShapeError(
                f"{name} must be [{x.shape[2] * D}], got {list(weight.shape)}: {name[0]} has"
                f" {x.shape[2]} heads of {D}"
            )
        if not weight.is_floating_point() or weight.device != q.device:
            raise DtypeError(
                f"{name} must be a float tensor on {q.device} like q, got {weight.dtype} on"
                f" {weight.device}"
            )
    if q.dtype not in _DTYPES:
        raise DtypeError(f"q must be float32, float64, bfloat16 or float16, got {q.dtype}")
    if k.dtype is not q.dtype or k.device != q.device:
        raise DtypeError(f"k must be {q.dtype} on {q.device} like q, got {k.dtype} on {k.device}")
    if not number("eps", eps) >= 0:
        raise ConfigError(f"eps must be at least 0, got {eps}")
    cos, sin = rope.tokens(first_frame, grid, wide=q.dtype is torch.float64)
    if cos.device != q.device:
        raise DtypeError(f"rope table is on {cos.device}, q is on {q.device}")
    name = registry.select(OP, BACKENDS, Problem(q.device.type, q.dtype, D), backend).name
    return cos, sin, name


def _check_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    slots: Tensor,
    grid: tuple[int, int, int],
    k_scales: Tensor | None,
    v_scales: Tensor | None,
) -> None:
    tensors(v=v, k_pool=k_pool, v_pool=v_pool)
    if v.shape != k.shape:
        raise ShapeError(f"v must be {list(k.shape)} like k, got {list(v.shape)}")
    page = (grid[1] * grid[2], *k.shape[2:])
    for name, pool in (("k_pool", k_pool), ("v_pool", v_pool)):
        if pool.ndim != 4 or tuple(pool.shape[1:]) != page:
            raise ShapeError(
                f"{name} must be [F, {', '.join(map(str, page))}], got {list(pool.shape)}"
            )
        if why := why_not_page(name, pool):
            raise BackendUnavailable(OP, {b.name: why for b in BACKENDS})
        if pool.stride(3) != 1:
            raise ShapeError(f"{name}: last axis must be contiguous, got strides {pool.stride()}")
        if any(n > 1 and s == 0 for n, s in zip(pool.shape, pool.stride(), strict=True)):
            raise ShapeError(f"{name}: slots overlap, got strides {pool.stride()}")
    quantized = check_scales(k_pool, v_pool, k_scales, v_scales, q.device)
    for name, tensor in (("v", v), ("k_pool", k_pool), ("v_pool", v_pool)):
        foreign = tensor.dtype is not q.dtype and not (quantized and name != "v")
        if foreign or tensor.device != q.device:
            raise DtypeError(
                f"{name} must be {q.dtype} on {q.device} like q, got {tensor.dtype} on"
                f" {tensor.device}"
            )
    if v_pool.shape != k_pool.shape:
        raise ShapeError(
            f"v_pool must be {list(k_pool.shape)} like k_pool, got {list(v_pool.shape)}"
        )
    if not torch.compiler.is_compiling():  # a compiled graph reads before it writes
        for name, tensor in (("q", q), ("k", k), ("v", v)):
            for pool_name, pool in (("k_pool", k_pool), ("v_pool", v_pool)):
                if _meet(tensor, pool):
                    raise ShapeError(f"{name} lies in {pool_name}, which is written to: clone it")
    check_slots(slots, [q.shape[0], grid[0]], k_pool.shape[0])


def _meet(a: Tensor, b: Tensor) -> bool:
    """Whether the stretches of memory from first to last element have a byte in common."""
    if a.untyped_storage()._cdata != b.untyped_storage()._cdata or not a.numel() or not b.numel():
        return False
    (first_a, last_a), (first_b, last_b) = _stretch(a), _stretch(b)
    return first_a < last_b and first_b < last_a


def _stretch(t: Tensor) -> tuple[int, int]:
    first = int(t.storage_offset()) * t.element_size()
    elements = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    return first, first + int(elements) * t.element_size()


torch.library.define(
    "kvpo::norm_rope_forward",
    "(Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin, float eps,"
    " str backend) -> (Tensor, Tensor)",
)
torch.library.define(
    "kvpo::norm_rope_backward",
    "(Tensor grad_q, Tensor grad_k, Tensor q, Tensor k, Tensor q_weight, Tensor k_weight,"
    " Tensor cos, Tensor sin, float eps, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "kvpo::norm_rope_write",
    "(Tensor q, Tensor k, Tensor v, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin,"
    " Tensor(a!) k_pool, Tensor(b!) v_pool, Tensor slots, float eps, str backend) -> Tensor",
)
_MODULES = {b.name: b for b in BACKENDS}


def _forward_impl(*args: object) -> tuple[Tensor, Tensor]:
    *inputs, backend = args
    return _MODULES[str(backend)].load().forward(*inputs)  # type: ignore[no-any-return]


def _backward_impl(*args: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *inputs, backend = args
    return _MODULES[str(backend)].load().backward(*inputs)  # type: ignore[no-any-return]


def _write_impl(*args: object) -> Tensor:
    *inputs, backend = args
    return _MODULES[str(backend)].load().write(*inputs)  # type: ignore[no-any-return]


def _forward_fake(q: Tensor, k: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _backward_fake(
    grad_q: Tensor,
    grad_k: Tensor,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    *_: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        q_weight.new_empty(q_weight.shape),
        k_weight.new_empty(k_weight.shape),
    )


def _write_fake(q: Tensor, *others: Tensor) -> Tensor:
    check_offsets({"k_pool": others[6], "v_pool": others[7]})
    return q.new_empty(q.shape)


_forward = registry.register("kvpo::norm_rope_forward", _forward_impl, _forward_fake)
_backward = registry.register("kvpo::norm_rope_backward", _backward_impl, _backward_fake)
_write = registry.register("kvpo::norm_rope_write", _write_impl, _write_fake)


class _NormRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, q_weight, k_weight, cos, sin, eps, backend):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(q, k, q_weight, k_weight, cos, sin)
        ctx.eps, ctx.backend = eps, backend
        return _forward(q, k, q_weight, k_weight, cos, sin, eps, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_q, grad_k):  # type: ignore[no-untyped-def]
        grads = _backward(grad_q, grad_k, *ctx.saved_tensors, ctx.eps, ctx.backend)
        return *grads, None, None, None, None
