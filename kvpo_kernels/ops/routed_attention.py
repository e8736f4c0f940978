"""Attention of many rows over the frames of one shared pool, read where they are, never copied.

Shape letters: B rows (a row is one branch of one prompt), Q query tokens, H heads, Hkv key heads,
D head size, F frames (slots) of the pool, T tokens per frame, R routed frames per row, L live
tokens.
"""

import math
import warnings
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kvpo_kernels import registry
from kvpo_kernels.checks import number, tensors
from kvpo_kernels.errors import (
    BackendUnavailable,
    ConfigError,
    ConstantError,
    DtypeError,
    GradientError,
    ShapeError,
)
from kvpo_kernels.history.route_table import RouteTable, has_no_memory
from kvpo_kernels.ops.store_frames import check_scales, why_not_page
from kvpo_kernels.registry import Backend

OP = "routed_attention"
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Problem:
    """What a backend needs to know to accept or refuse a call."""

    device: str
    dtype: torch.dtype
    head_size: int
    needs_grad: bool
    capability: tuple[int, int] | None = None
    """CUDA compute capability of the device; None for the CPU and for AMD."""
    aligned: bool = True
    """Whether vectors of q, pools and live tokens begin at whole 16 bytes, and none is empty."""
    page_dtype: torch.dtype | None = None
    """Of a quantized pool; None where the pool has the dtype of q."""


def _why_not_cpu(p: Problem) -> str | None:
    if why := registry.why_not_native(p.device):
        return why
    if p.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"takes float32, bfloat16 and float16, got {p.dtype}"
    if p.head_size % 16 or not 16 <= p.head_size <= 256:
        return f"takes head sizes that are multiples of 16 up to 256, got {p.head_size}"
    return None


def _why_not_triton(p: Problem) -> str | None:
    if p.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"takes float32, bfloat16 and float16, got {p.dtype}"
    if p.head_size > 256:
        return f"takes head sizes up to 256, got {p.head_size}"
    return registry.why_not_triton(p.device)


def _why_not_gluon(p: Problem) -> str | None:
    if not registry.TRITON_VERSION.startswith("3.6."):
        return (
            f"is written for triton 3.6, whose interface is not stable: {registry.TRITON_VERSION}"
        )
    if p.device != "cuda" or p.capability != (9, 0):
        what = p.device if p.capability is None else f"compute capability {p.capability}"
        return f"takes tensors on a GPU of compute capability (9, 0), got {what}"
    if p.dtype not in (torch.bfloat16, torch.float16):
        return f"takes bfloat16 and float16, got {p.dtype}"
    if p.page_dtype is not None:
        return f"takes pools in the dtype of q, got {p.page_dtype}"
    if p.head_size not in (64, 128):
        return f"takes head sizes 64 and 128, got {p.head_size}"
    if not p.aligned:
        return "takes pools that are not empty and vectors that begin at whole 16 bytes"
    return None


def _why_not_flash(p: Problem) -> str | None:
    if not registry.HAS_FLASH_ATTN:
        return "flash-attn is not installed: pip install kvpo_kernels[flash]"
    if p.device != "cuda" or p.capability is None or p.capability < (8, 0):
        what = p.device if p.capability is None else f"compute capability {p.capability}"
        return f"takes tensors on a GPU of compute capability (8, 0) or later, got {what}"
    if p.dtype not in (torch.bfloat16, torch.float16):
        return f"takes bfloat16 and float16, got {p.dtype}"
    if p.page_dtype is not None:
        return f"takes pools in the dtype of q, got {p.page_dtype}"
    if p.head_size % 8 or p.head_size > 256:
        return f"takes head sizes that are multiples of 8 up to 256, got {p.head_size}"
    return None


# "gluon" comes after "triton" until it has been measured on a GPU.
BACKENDS: tuple[Backend[Problem], ...] = (
    Backend("cpu", "kvpo_kernels.backends.native.routed_attention", _why_not_cpu),
    Backend("triton", "kvpo_kernels.backends.triton.routed_attention", _why_not_triton),
    Backend("gluon", "kvpo_kernels.backends.gluon.routed_attention", _why_not_gluon),
    Backend("flash_attn", "kvpo_kernels.backends.flash.routed_attention", _why_not_flash),
    Backend("reference", "kvpo_kernels.reference.routed_attention", lambda p: None),
)


@overload
def routed_attention(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    table: RouteTable,
    k_live: Tensor | None = None,
    v_live: Tensor | None = None,
    *,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    scale: float | None = None,
    return_lse: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...
@overload
def routed_attention(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    table: RouteTable,
    k_live: Tensor | None = None,
    v_live: Tensor | None = None,
    *,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    scale: float | None = None,
    return_lse: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...
def routed_attention(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    table: RouteTable,
    k_live: Tensor | None = None,
    v_live: Tensor | None = None,
    *,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Softmax attention of each row over the frames that its route names and its own block.

    For row `b` the keys are the frames `k_pool[table.slots[b]]` and then `k_live[b]`, end to end,
    without a copy and without a mask:

        out[b] = softmax(scale * q[b] @ keys[b]^T) @ values[b]
        lse[b] = logsumexp(scale * q[b] @ keys[b]^T)

    Args:
        q: `[B, Q, H, D]`, float32, float64, bfloat16 or float16.
        k_pool: `[F, T, Hkv, D]`, dtype and device of `q`; any strides but a contiguous last axis.
            A constant: never differentiated, copied or made contiguous. H is a multiple of Hkv.
            Also int8 or float8_e4m3fn, with `k_scales`: a page is widened where it is read,
            exactly, and its scale multiplies scores or weights: only `quantize_frames` rounds.
        v_pool: as `k_pool`, with strides of its own.
        table: which slots each row attends to, in order; made for F slots and B rows, on the device
            of `q`. Slot values were checked when it was made and are not read here.
        k_live: `[B, L, Hkv, D]`, the row's own tokens, attended after the routed ones; None for
            none. Differentiable.
        v_live: as `k_live`; both or neither.
        k_scales: `[F, Hkv]` float32, contiguous, on the device of `q`: the keys of frame f and head
            h are `k_pool[f, :, h] * k_scales[f, h]`. With quantized pools both, else none.
        v_scales: as `k_scales`, of the values.
        scale: multiplies the scores; finite, of any sign; `D ** -0.5` if None.
        return_lse: also return `lse`.
        backend: a name in `BACKENDS`; None takes the first that can run. A named one never falls
            back to another.

    Returns:
        `out [B, Q, H, D]` contiguous, in the dtype of `q`; with `return_lse` also `lse [B, H, Q]`,
        natural log, float32 (float64 for float64 input), not differentiable. A row with neither
        routed frames nor live tokens has `out = 0`, `lse = -inf` and zero gradients.

        Gradients flow to `q`, `k_live` and `v_live`, once: there is no second derivative. Forward
        and backward are deterministic, and the bits of a row do not depend on the other rows, nor,
        on the cpu backend, on the number of threads. A NaN in a frame reaches the rows routed to
        it and no other.

    Raises:
        ShapeError: a rank, shape or stride does not fit, the table was made for another pool or
            batch, the pool requires grad, or live tokens that need a gradient lie in the pool's
            memory; where a gradient is needed, a table whose slots `FramePool.advance` handed on.
        DtypeError: a dtype or device differs from that of `q`, or is not supported.
        ConfigError: `scale` is not finite.
        FrameError: a table whose frames `FramePool.advance` handed on, once this layer of the new
            ones is written.
        GradientError: from a backward: pool, scales or table have been written to since. From a
            forward that needs one: they were made in inference mode, which counts no writes.
        BackendUnavailable: no backend, or not the named one, can run the call; says why for each.

    Source: the routed local window of KVPO (arXiv:2605.14278); online softmax as in Milakov and
    Gimelshein (arXiv:1805.02867); quantized history: the adaptive cache that KVPO leaves to future
    work, with scales per frame and head as FlashAttention-3 has them (arXiv:2407.08608).
    """
    tensors(q=q, k_pool=k_pool, v_pool=v_pool)
    no_live = k_live is None and v_live is None
    if no_live and q.ndim == k_pool.ndim == v_pool.ndim == 4:
        k_live = v_live = q.new_zeros(q.shape[0], 0, *k_pool.shape[2:])
    if no_live and (k_live is None or v_live is None):
        _check_shapes(q, k_pool, v_pool, table)  # one of them has not four axes
    if k_live is None or v_live is None:
        raise ShapeError("k_live and v_live must be given both or neither")
    _check(q, k_pool, v_pool, table, k_live, v_live, k_scales, v_scales)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    elif not abs(number("scale", scale)) < math.inf:  # NaN is not less either
        raise ConfigError(f"scale must be finite, got {scale}")
    needs_grad = torch.is_grad_enabled() and (
        q.requires_grad or k_live.requires_grad or v_live.requires_grad
    )
    problem = _problem(q, k_pool, v_pool, k_live, v_live, needs_grad)
    chosen = registry.select(OP, BACKENDS, problem, backend).name
    if needs_grad:
        if table.spent:
            raise ShapeError(
                "table: `FramePool.advance` has given its frames' slots to new ones, so no backward"
                " can run over it; call this under torch.no_grad()"
            )
        _check_not_in_pool(k_pool, v_pool, k_live, v_live, table.memory)
        out, lse = _RoutedAttention.apply(  # type: ignore[no-untyped-call]
            *registry.each_once(q, k_pool, v_pool, table.slots, k_live, v_live, k_scales, v_scales),
            scale,
            chosen,
        )
    else:
        out, lse = _forward(
            q, k_pool, v_pool, table.slots, k_live, v_live, k_scales, v_scales, scale, chosen
        )
    return (out, lse) if return_lse else out


def _problem(q: Tensor, *keys_and_grad: Any) -> Problem:
    *keys, needs_grad = keys_and_grad
    pages = None if keys[0].dtype is q.dtype else keys[0].dtype
    if not q.is_cuda:
        return Problem(q.device.type, q.dtype, q.shape[-1], needs_grad, page_dtype=pages)
    capability = None
    if torch.version.hip is None:
        properties = torch.cuda.get_device_properties(q.device)
        capability = (properties.major, properties.minor)
    aligned = keys[0].numel() > 0 and all(_in_whole_units(t) for t in (q, *keys))
    return Problem(q.device.type, q.dtype, q.shape[-1], needs_grad, capability, aligned, pages)


def _in_whole_units(tensor: Tensor) -> bool:
    """Of 16 bytes, as far as metadata tell; allocations begin at more than that."""
    unit = 16 // tensor.element_size()
    *outer, last = tensor.stride()
    return (
        last == 1
        # A compiler cannot trace the offset; it takes views of a layer, which begin at whole units.
        and (torch.compiler.is_compiling() or tensor.storage_offset() % unit == 0)
        and all(s > 0 and s % unit == 0 for s in outer)
    )


def _check(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    table: RouteTable,
    k_live: Tensor,
    v_live: Tensor,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
) -> None:
    tensors(k_live=k_live, v_live=v_live)
    _check_shapes(q, k_pool, v_pool, table, k_live)
    if v_live.shape != k_live.shape:
        raise ShapeError(
            f"v_live must be {list(k_live.shape)} like k_live, got {list(v_live.shape)}"
        )
    others = (("k_pool", k_pool), ("v_pool", v_pool), ("k_live", k_live), ("v_live", v_live))
    for name, t in others[:2]:
        if why := why_not_page(name, t):
            raise BackendUnavailable(OP, {b.name: why for b in BACKENDS})
    if q.dtype not in _DTYPES:
        raise DtypeError(f"q must be float32, float64, bfloat16 or float16, got {q.dtype}")
    quantized = check_scales(k_pool, v_pool, k_scales, v_scales, q.device)
    for name, t in others:
        if t.dtype is not q.dtype and not (quantized and name.endswith("pool")):
            odd = "; or else q, as all others are" if _agree("dtype", others) else ""
            raise DtypeError(f"{name} must be {q.dtype} like q, got {t.dtype}{odd}")
        if t.device != q.device:
            odd = "; or else q, as all others are" if _agree("device", others) else ""
            raise DtypeError(f"{name} must be on {q.device} like q, got {t.device}{odd}")
    for name, t in others[:2]:
        if t.requires_grad:
            raise ConstantError(f"{name} requires grad, but a pool is a constant: detach it")
        if t.stride(3) != 1 and t.shape[3] > 1:
            raise ShapeError(f"{name}: last axis must be contiguous, got strides {t.stride()}")
    if not isinstance(table, RouteTable):
        raise DtypeError(f"table must be a RouteTable, got {type(table).__name__}")
    if table.num_rows != q.shape[0]:
        raise ShapeError(f"table has {table.num_rows} rows, but q has {q.shape[0]}")
    if not table.fits(k_pool):
        raise ShapeError(
            f"table was made for a pool of {table.num_slots} slots,"
            f" but k_pool has {k_pool.shape[0]}"
        )
    if table.slots.device != q.device:
        raise DtypeError(f"table is on {table.slots.device}, but q is on {q.device}")
    for name, t in others[:2]:
        table.check_memory(name, t)


def _check_shapes(
    q: Tensor, k_pool: Tensor, v_pool: Tensor, table: RouteTable, k_live: Tensor | None = None
) -> None:
    """Of two that do not fit, the one that the others do not fit either is named."""
    if q.ndim != 4:
        raise ShapeError(f"q must be [B, Q, H, D], got {list(q.shape)}")
    B, Q, heads, D = q.shape
    if k_pool.ndim != 4 or k_pool.shape[3] != D:
        same = k_pool.ndim == 4 and v_pool.shape == k_pool.shape
        if same and (k_live is None or k_live.shape[-1] == k_pool.shape[3]):
            size = k_pool.shape[3]
            raise ShapeError(f"q must be [B, Q, H, {size}] like the pools, got {list(q.shape)}")
        raise ShapeError(f"k_pool must be [F, T, Hkv, {D}], got {list(k_pool.shape)}")
    kv_heads = k_pool.shape[2]
    if kv_heads == 0 or heads % kv_heads:
        hint = ""
        if kv_heads and Q % kv_heads == 0:
            hint = f"; q, {list(q.shape)}, looks like [B, H, Q, D]: transpose(1, 2)"
        elif k_pool.shape[1] and heads % k_pool.shape[1] == 0:
            hint = f"; k_pool, {list(k_pool.shape)}, looks like [F, H, T, D] and is [F, T, Hkv, D]"
        raise ShapeError(
            f"the {heads} heads of q must be a multiple of the {kv_heads} of k_pool{hint}"
        )
    if v_pool.shape != k_pool.shape:
        slots = table.num_slots if isinstance(table, RouteTable) else None
        if v_pool.shape[1:] == k_pool.shape[1:] and v_pool.shape[0] == slots:
            raise ShapeError(
                f"k_pool must be {list(v_pool.shape)} like v_pool, got {list(k_pool.shape)}"
            )
        raise ShapeError(
            f"v_pool must be {list(k_pool.shape)} like k_pool, got {list(v_pool.shape)}"
        )
    if k_live is None:
        return
    fits = k_live.ndim == 4 and k_live.shape[2] == kv_heads and k_live.shape[3] == D
    if fits and k_live.shape[0] == B:
        # Legal, but then queries and live tokens are not of one block.
        swapped = heads != Q and Q % kv_heads == 0 and k_live.shape[1] == heads
        if swapped and not torch.compiler.is_compiling():
            warnings.warn(
                f"q {list(q.shape)} is read as [B, Q, H, D]; beside k_live {list(k_live.shape)} it"
                " looks like [B, H, Q, D]",
                stacklevel=4,
            )
        return
    live = list(k_live.shape)
    if fits and isinstance(table, RouteTable) and table.num_rows == k_live.shape[0]:
        raise ShapeError(
            f"q must be [{live[0]}, Q, H, D] like table and k_live, got {list(q.shape)}"
        )
    hint = ""
    if k_live.ndim == 4 and k_live.shape[1] == kv_heads and k_live.shape[3] == D:
        if k_live.shape[2] == heads and Q % kv_heads == 0:
            raise ShapeError(
                f"q must be [B, Q, H, D], got {list(q.shape)}: like k_live {live} it looks like"
                " [B, H, L, D], transpose(1, 2) both"
            )
        hint = "; it looks like [B, H, L, D]: transpose(1, 2)"
    raise ShapeError(f"k_live must be [{B}, L, {kv_heads}, {D}], got {live}{hint}")


def _agree(what: str, arguments: tuple[tuple[str, Tensor], ...]) -> bool:
    return len({getattr(t, what) for _, t in arguments}) == 1


def _check_not_in_pool(
    k_pool: Tensor,
    v_pool: Tensor,
    k_live: Tensor,
    v_live: Tensor,
    memory: tuple[int, int] | None,
) -> None:
    """The backward pass reads the live tokens again; the pool may be rewritten before that."""
    for live_name, live in (("k_live", k_live), ("v_live", v_live)):
        if has_no_memory(live):
            continue
        live_first, live_end = _memory_range(live)
        for pool_name, pool in (("k_pool", k_pool), ("v_pool", v_pool)):
            if has_no_memory(pool):
                continue
            first, end = memory or _memory_range(pool)  # of a FramePool the other layers as well
            if live_first < end and first < live_end:
                raise ShapeError(f"{live_name} lies in the memory of {pool_name}: clone it")


def _memory_range(tensor: Tensor) -> tuple[int, int]:
    """Addresses of the first byte and past the last byte; strides are not negative in PyTorch."""
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return start, start + (last + 1) * tensor.element_size()


# The two registered operators. They exist for torch.compile, fake tensors and checkpoint policies;
# the schema is the contract every backend launcher meets. Autograd stays outside, in
# _RoutedAttention. Without live tokens, k_live and v_live are empty.
torch.library.define(
    "kvpo::routed_attention_forward",
    "(Tensor q, Tensor k_pool, Tensor v_pool, Tensor slots, Tensor k_live, Tensor v_live,"
    " Tensor? k_scales, Tensor? v_scales, float scale, str backend) -> (Tensor, Tensor)",
)
torch.library.define(
    "kvpo::routed_attention_backward",
    "(Tensor grad_out, Tensor q, Tensor k_pool, Tensor v_pool, Tensor slots, Tensor k_live,"
    " Tensor v_live, Tensor? k_scales, Tensor? v_scales, Tensor out, Tensor lse, float scale,"
    " str backend) -> (Tensor, Tensor, Tensor)",
)
_MODULES = {b.name: b for b in BACKENDS}


def _forward_impl(*args: Any) -> tuple[Tensor, Tensor]:
    *inputs, backend = args
    if (hold := getattr(inputs[3], "kvpo_hold", None)) is not None:
        hold.check(*inputs[1:3])  # here, so that a compiled graph checks as well
    return _MODULES[str(backend)].load().forward(*inputs)  # type: ignore[no-any-return]


def _backward_impl(*args: object) -> tuple[Tensor, Tensor, Tensor]:
    *inputs, backend = args
    return _MODULES[str(backend)].load().backward(*inputs)  # type: ignore[no-any-return]


def _forward_fake(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    B, Q, H, _D = q.shape
    lse_dtype = torch.float64 if q.dtype is torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty(B, H, Q, dtype=lse_dtype)


def _backward_fake(
    grad_out: Tensor,
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    slots: Tensor,
    k_live: Tensor,
    v_live: Tensor,
    *_: object,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k_live.new_empty(k_live.shape), v_live.new_empty(v_live.shape)


_forward = registry.register("kvpo::routed_attention_forward", _forward_impl, _forward_fake)
_backward = registry.register("kvpo::routed_attention_backward", _backward_impl, _backward_fake)


class _RoutedAttention(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, q, k_pool, v_pool, slots, k_live, v_live, k_scales, v_scales, scale, backend
    ):
        inputs = (q, k_pool, v_pool, slots, k_live, v_live, k_scales, v_scales)
        out, lse = _forward(*inputs, scale, backend)
        ctx.scale, ctx.backend = scale, backend
        ctx.mark_non_differentiable(lse)
        if torch.compiler.is_compiling():  # what a graph saves is the compiler's choice
            ctx.constants = None
            ctx.save_for_backward(*inputs, out, lse)
            return out, lse
        # A saved-tensor hook is for activations: it must not take a whole pool for one, and what it
        # hands back for `slots` would not hold the table's frames, as the tensor itself does.
        ctx.constants = (k_pool, v_pool, slots, k_scales, v_scales)
        ctx.versions = _versions(ctx.constants)
        ctx.save_for_backward(q, k_live, v_live, out, lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, _grad_lse):  # type: ignore[no-untyped-def]
        if ctx.constants is None:
            saved = ctx.saved_tensors
        else:
            q, k_live, v_live, out, lse = ctx.saved_tensors
            k_pool, v_pool, slots, k_scales, v_scales = ctx.constants
            _check_versions(ctx.constants, ctx.versions)
            saved = (q, k_pool, v_pool, slots, k_live, v_live, k_scales, v_scales, out, lse)
            if not (torch.compiler.is_compiling() or _graph_is_kept()):
                ctx.constants = ()  # with what was saved: the frames are free from now on
        grad_q, grad_k, grad_v = _backward(grad_out, *saved, ctx.scale, ctx.backend)
        return grad_q, None, None, None, grad_k, grad_v, None, None, None, None


_graph_is_kept = torch._C._autograd._get_current_graph_task_keep_graph
_CONSTANTS = ("k_pool", "v_pool", "table.slots", "k_scales", "v_scales")


def _versions(constants: tuple[Tensor | None, ...]) -> list[int | None]:
    for name, tensor in zip(_CONSTANTS, constants, strict=True):
        if tensor is not None and tensor.is_inference():
            raise GradientError(
                f"{name} was made in inference mode, which counts no writes: a backward could not"
                " tell whether it has changed. Make it outside, or clone it there"
            )
    return [None if t is None else t._version for t in constants]


def _check_versions(constants: tuple[Tensor | None, ...], versions: list[int | None]) -> None:
    """As autograd does for what it saves."""
    for name, tensor, version in zip(_CONSTANTS, constants, versions, strict=True):
        if tensor is not None and tensor._version != version:
            raise GradientError(
                f"{name} has been modified by an inplace operation since the forward (version"
                f" {tensor._version}, was {version}): no backward can run over it"
            )
