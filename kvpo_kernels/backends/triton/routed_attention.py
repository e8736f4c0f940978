"""Routed attention in `triton.language`: forward, grad_q over all keys, gradients of live tokens.

Scores live in base 2: `factor = scale * log2(e)` turns `exp` into `exp2`. The three kernels visit
keys or queries in one fixed order and write each element once, so their bits depend on a row alone.
After FlashAttention-2 (Dao, arXiv:2307.08691); the backward is split into two kernels because the
history needs no gradient: 3 matrix products per score for grad_q, 4 more for live keys only.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kvpo_kernels.backends.triton import configs
from kvpo_kernels.backends.triton.configs import Launch

_LOG2_E = math.log2(math.e)
_LN_2: tl.constexpr = tl.constexpr(math.log(2))
_TO_LOG2: tl.constexpr = tl.constexpr(_LOG2_E)


# The interpreter of Triton 3.6 would multiply the bits of bfloat16 as integers.
_WIDEN: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _dot(a, b, acc=None):
    if _WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")  # float32 stays what it is, no TF32


@triton.jit
def _load_tile(data, first, end, stride, D: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Tokens `first ... first + BLOCK` of a `[tokens, D]` matrix, zero past `end` and D."""
    token = first + tl.arange(0, BLOCK)
    column = tl.arange(0, WIDTH)
    at = data + token.to(tl.int64)[:, None] * stride + column[None, :]
    inside = (token < end)[:, None]
    if WIDTH != D:
        inside = inside & (column < D)[None, :]
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def _store_tile(
    data, tile, first, end, stride, D: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr
):
    token = first + tl.arange(0, BLOCK)
    column = tl.arange(0, WIDTH)
    at = data + token.to(tl.int64)[:, None] * stride + column[None, :]
    inside = (token < end)[:, None]
    if WIDTH != D:
        inside = inside & (column < D)[None, :]
    tl.store(at, tile.to(data.dtype.element_ty), mask=inside)


@triton.jit
def _load_head(
    source,
    strides,
    index,
    first,
    head,
    tokens,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """Tokens `first ... first + BLOCK` of one head of frame or row `index`, zero past the last."""
    if DESCRIPTORS:
        # Rank 4, so that the hardware fills a tile past the frame's end with zeros, not with the
        # next frame, which may hold NaN.
        tile = source.load([index, first, head, 0]).reshape(BLOCK, WIDTH)
    else:
        data = source + index.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[2]
        tile = _load_tile(data, first, tokens, strides[1], D, BLOCK, WIDTH)
    return tile


@triton.jit
def _load_page(
    pool,
    strides,
    slot,
    first,
    head,
    tokens,
    like,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """As `_load_head`, in the dtype of `like`; a quantized page's values are exact there."""
    tile = _load_head(pool, strides, slot, first, head, tokens, D, BLOCK, WIDTH, DESCRIPTORS)
    if tile.dtype == tl.uint8:  # float8_e4m3fn where the hardware cannot convert it
        size = (tile & 0x7F).to(tl.uint16)
        # The same bits, four to the left and seen as a half, are the value times 2^-8.
        half = (size << 7) | ((tile & 0x80).to(tl.uint16) << 8)
        wide = half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        tile = tl.where(size == 0x7F, float("nan"), wide)
    elif tile.dtype == tl.int8:
        tile = tile.to(tl.float32)  # the interpreter would take an integer for bfloat16's bits
    return tile.to(like.dtype)


@triton.jit
def _load_routed(
    k_pool, v_pool, route, i, k_strides, v_strides, head, heads, T, like,
    D: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Tile i of a row's history: keys, values, where their scales are, and keys left in the frame.

    The caller loads the scales: a function cannot return those that plain pages do not have.
    """
    tiles = tl.cdiv(T, BLOCK)
    slot = tl.load(route + i // tiles)
    n = i % tiles * BLOCK
    k = _load_page(k_pool, k_strides, slot, n, head, T, like, D, BLOCK, WIDTH, DESCRIPTORS)
    v = _load_page(v_pool, v_strides, slot, n, head, T, like, D, BLOCK, WIDTH, DESCRIPTORS)
    return k, v, slot.to(tl.int64) * heads + head, T - n


@triton.jit
def _count_slots(slots, R, BLOCK_R: tl.constexpr):
    position = tl.arange(0, BLOCK_R)
    return tl.sum((tl.load(slots + position, mask=position < R, other=-1) >= 0).to(tl.int32))


@triton.jit
def _attend(
    q, k, v, k_scales, v_scales, page, left, factor, top, total, acc, BLOCK_N: tl.constexpr
):
    """One step of the online softmax; `left` keys of the tile are there, at least one."""
    if k_scales is not None:
        k_scale, v_scale = tl.load(k_scales + page), tl.load(v_scales + page)
    dot = _dot(q, tl.trans(k))
    if k_scales is not None:
        dot *= k_scale
    dot = tl.where((tl.arange(0, BLOCK_N) < left)[None, :], dot, float("-inf"))
    new_top = tl.maximum(top, tl.max(dot, 1) * factor)
    shift = tl.where(new_top == float("-inf"), 0.0, new_top)
    p = tl.math.exp2(dot * factor - shift[:, None])
    shrink = tl.math.exp2(top - shift)
    total = total * shrink + tl.sum(p, 1)
    if k_scales is not None:
        p *= v_scale
    return new_top, total, _dot(p.to(v.dtype), v, acc * shrink[:, None])


@triton.jit
def _forward_kernel(
    q,
    k_pool,
    v_pool,
    slots,
    k_live,
    v_live,
    k_scales,
    v_scales,
    out,
    lse,
    factor,
    q_strides,
    k_strides,
    v_strides,
    k_live_strides,
    v_live_strides,
    Q,
    T,
    R,
    L,
    GROUP,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    first = tl.program_id(0) * BLOCK_M
    b = tl.program_id(1)
    h = tl.program_id(2)
    H = tl.num_programs(2)
    kv_head = h // GROUP
    row = b.to(tl.int64)
    q_tile = _load_head(q, q_strides, b, first, h, Q, D, BLOCK_M, WIDTH, False)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, WIDTH], tl.float32)

    route = slots + row * R
    for i in tl.range(0, _count_slots(route, R, BLOCK_R) * tl.cdiv(T, BLOCK_N)):
        k, v, page, left = _load_routed(
            k_pool, v_pool, route, i, k_strides, v_strides, kv_head, H // GROUP, T, q_tile,
            D, BLOCK_N, WIDTH, DESCRIPTORS,
        )  # fmt: skip
        top, total, acc = _attend(
            q_tile, k, v, k_scales, v_scales, page, left, factor, top, total, acc, BLOCK_N
        )
    for n in tl.range(0, L, BLOCK_N):
        k = _load_page(
            k_live, k_live_strides, b, n, kv_head, L, q_tile, D, BLOCK_N, WIDTH, DESCRIPTORS
        )
        v = _load_page(
            v_live, v_live_strides, b, n, kv_head, L, q_tile, D, BLOCK_N, WIDTH, DESCRIPTORS
        )
        top, total, acc = _attend(
            q_tile, k, v, None, None, 0, L - n, factor, top, total, acc, BLOCK_N
        )

    # Without keys, or with none above -inf, the sum is 0: out is then 0 and lse -inf.
    total = tl.where(total == 0.0, 1.0, total)
    _store_tile(
        out + (row * Q * H + h) * D, acc / total[:, None], first, Q, H * D, D, BLOCK_M, WIDTH
    )
    token = first + tl.arange(0, BLOCK_M)
    tl.store(lse + (row * H + h) * Q + token, (top + tl.math.log2(total)) * _LN_2, mask=token < Q)


@triton.jit
def _load_lse(lse, token, Q):
    """In base 2. Queries past the end, and those without a key above -inf, get weights 0."""
    value = tl.load(lse + token, mask=token < Q, other=float("-inf")) * _TO_LOG2
    return tl.where(value == float("-inf"), float("inf"), value)


@triton.jit
def _grad_q_step(
    q, grad_out, k, v, k_scales, v_scales, page, left, lse, delta, factor, acc,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    if k_scales is not None:
        k_scale, v_scale = tl.load(k_scales + page), tl.load(v_scales + page)
    dot = _dot(q, tl.trans(k))
    grad_p = _dot(grad_out, tl.trans(v))
    if k_scales is not None:
        dot *= k_scale
        grad_p *= v_scale
    p = tl.math.exp2(dot * factor - lse[:, None])
    p = tl.where((tl.arange(0, BLOCK_N) < left)[None, :], p, 0.0)
    grad_score = p * (grad_p - delta[:, None])
    if k_scales is not None:
        grad_score *= k_scale
    return _dot(grad_score.to(k.dtype), k, acc)


@triton.jit
def _grad_q_kernel(
    grad_out,
    q,
    k_pool,
    v_pool,
    slots,
    k_live,
    v_live,
    k_scales,
    v_scales,
    out,
    lse,
    delta,
    grad_q,
    factor,
    scale,
    grad_strides,
    q_strides,
    k_strides,
    v_strides,
    k_live_strides,
    v_live_strides,
    Q,
    T,
    R,
    L,
    GROUP,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    first = tl.program_id(0) * BLOCK_M
    b = tl.program_id(1)
    h = tl.program_id(2)
    H = tl.num_programs(2)
    kv_head = h // GROUP
    row = b.to(tl.int64)
    own = (row * Q * H + h) * D
    q_tile = _load_head(q, q_strides, b, first, h, Q, D, BLOCK_M, WIDTH, False)
    grad_tile = _load_head(grad_out, grad_strides, b, first, h, Q, D, BLOCK_M, WIDTH, False)
    out_tile = _load_tile(out + own, first, Q, H * D, D, BLOCK_M, WIDTH)
    token = first + tl.arange(0, BLOCK_M)
    scalars = (row * H + h) * Q
    delta_tile = tl.sum(out_tile.to(tl.float32) * grad_tile.to(tl.float32), 1)
    tl.store(delta + scalars + token, delta_tile, mask=token < Q)
    lse_tile = _load_lse(lse + scalars, token, Q)
    acc = tl.zeros([BLOCK_M, WIDTH], tl.float32)

    route = slots + row * R
    for i in tl.range(0, _count_slots(route, R, BLOCK_R) * tl.cdiv(T, BLOCK_N)):
        k, v, page, left = _load_routed(
            k_pool, v_pool, route, i, k_strides, v_strides, kv_head, H // GROUP, T, q_tile,
            D, BLOCK_N, WIDTH, DESCRIPTORS,
        )  # fmt: skip
        acc = _grad_q_step(
            q_tile, grad_tile, k, v, k_scales, v_scales, page, left, lse_tile, delta_tile, factor,
            acc, BLOCK_N,
        )  # fmt: skip
    for n in tl.range(0, L, BLOCK_N):
        k = _load_page(
            k_live, k_live_strides, b, n, kv_head, L, q_tile, D, BLOCK_N, WIDTH, DESCRIPTORS
        )
        v = _load_page(
            v_live, v_live_strides, b, n, kv_head, L, q_tile, D, BLOCK_N, WIDTH, DESCRIPTORS
        )
        acc = _grad_q_step(
            q_tile, grad_tile, k, v, None, None, 0, L - n, lse_tile, delta_tile, factor, acc,
            BLOCK_N,
        )  # fmt: skip

    _store_tile(grad_q + own, acc * scale, first, Q, H * D, D, BLOCK_M, WIDTH)


@triton.jit
def _grad_live_kernel(
    grad_out,
    q,
    k_live,
    v_live,
    lse,
    delta,
    grad_k,
    grad_v,
    factor,
    scale,
    grad_strides,
    q_strides,
    k_live_strides,
    v_live_strides,
    Q,
    L,
    GROUP,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    first = tl.program_id(0) * BLOCK_N
    b = tl.program_id(1)
    kv_head = tl.program_id(2)
    KV_HEADS = tl.num_programs(2)
    row = b.to(tl.int64)
    k = _load_head(k_live, k_live_strides, b, first, kv_head, L, D, BLOCK_N, WIDTH, False)
    v = _load_head(v_live, v_live_strides, b, first, kv_head, L, D, BLOCK_N, WIDTH, False)
    acc_k = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    acc_v = tl.zeros([BLOCK_N, WIDTH], tl.float32)

    tiles = tl.cdiv(Q, BLOCK_M)
    for i in tl.range(0, GROUP * tiles):
        h = kv_head * GROUP + i // tiles
        m = i % tiles * BLOCK_M
        q_tile = _load_head(q, q_strides, b, m, h, Q, D, BLOCK_M, WIDTH, DESCRIPTORS)
        grad_tile = _load_head(grad_out, grad_strides, b, m, h, Q, D, BLOCK_M, WIDTH, DESCRIPTORS)
        token = m + tl.arange(0, BLOCK_M)
        scalars = (row * KV_HEADS * GROUP + h) * Q
        lse_tile = _load_lse(lse + scalars, token, Q)
        delta_tile = tl.load(delta + scalars + token, mask=token < Q, other=0.0)
        # Transposed, keys by queries: the products that follow then take it as it is.
        dot = _dot(k, tl.trans(q_tile))
        p = tl.math.exp2(dot * factor - lse_tile[None, :])
        acc_v = _dot(p.to(grad_tile.dtype), grad_tile, acc_v)
        grad_p = _dot(v, tl.trans(grad_tile))
        grad_score = p * (grad_p - delta_tile[None, :])
        acc_k = _dot(grad_score.to(q_tile.dtype), q_tile, acc_k)

    own = (row * L * KV_HEADS + kv_head) * D
    _store_tile(grad_k + own, acc_k * scale, first, L, KV_HEADS * D, D, BLOCK_N, WIDTH)
    _store_tile(grad_v + own, acc_v, first, L, KV_HEADS * D, D, BLOCK_N, WIDTH)


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
    if scale < 0:  # the kernels compare products before they scale them
        q, scale = -q, -scale
    B, Q, H, D = q.shape
    out = q.new_empty(q.shape)
    lse = q.new_empty(B, H, Q, dtype=torch.float32)
    launch = _launches(q, k_pool).forward
    keys = [_pages(k_pool), _pages(v_pool), _vectors(k_live), _vectors(v_live)]
    sources, described = _sources(keys, launch.block_n, launch)
    q = _vectors(q)
    _run(
        _forward_kernel,
        (triton.cdiv(Q, launch.block_m), B, H),
        launch,
        described,
        q,
        sources[0],
        sources[1],
        slots,
        sources[2],
        sources[3],
        k_scales,
        v_scales,
        out,
        lse,
        _factor(scale),
        *_strides(q, *keys),
        Q,
        k_pool.shape[1],
        slots.shape[1],
        k_live.shape[1],
        H // k_pool.shape[2],
        D=D,
        BLOCK_R=triton.next_power_of_2(max(1, slots.shape[1])),
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
    if scale < 0:
        arguments = k_pool, v_pool, slots, k_live, v_live, k_scales, v_scales, out, lse, -scale
        grad_q, grad_k, grad_v = backward(grad_out, -q, *arguments)
        return grad_q.neg_(), grad_k, grad_v
    B, Q, H, D = q.shape
    L, kv_heads = k_live.shape[1:3]
    grad_q = q.new_empty(q.shape)
    grad_k, grad_v = k_live.new_empty(k_live.shape), v_live.new_empty(v_live.shape)
    delta = torch.empty_like(lse)
    launches = _launches(q, k_pool)
    grad_out, q, k_live, v_live = (_vectors(t) for t in (grad_out, q, k_live, v_live))

    launch = launches.grad_q
    keys = [_pages(k_pool), _pages(v_pool), k_live, v_live]
    sources, described = _sources(keys, launch.block_n, launch)
    _run(
        _grad_q_kernel,
        (triton.cdiv(Q, launch.block_m), B, H),
        launch,
        described,
        grad_out,
        q,
        sources[0],
        sources[1],
        slots,
        sources[2],
        sources[3],
        k_scales,
        v_scales,
        out,
        lse,
        delta,
        grad_q,
        _factor(scale),
        scale,
        *_strides(grad_out, q, *keys),
        Q,
        k_pool.shape[1],
        slots.shape[1],
        L,
        H // kv_heads,
        D=D,
        BLOCK_R=triton.next_power_of_2(max(1, slots.shape[1])),
    )

    launch = launches.grad_live
    queries, described = _sources([q, grad_out], launch.block_m, launch)
    _run(
        _grad_live_kernel,
        (triton.cdiv(L, launch.block_n), B, kv_heads),
        launch,
        described,
        queries[1],
        queries[0],
        k_live,
        v_live,
        lse,
        delta,
        grad_k,
        grad_v,
        _factor(scale),
        scale,
        *_strides(grad_out, q, k_live, v_live),
        Q,
        L,
        H // kv_heads,
        D=D,
    )
    return grad_q, grad_k, grad_v


def _run(
    kernel: Any,
    grid: tuple[int, int, int],
    launch: Launch,
    described: bool,
    *arguments: object,
    D: int,
    **constants: int,
) -> None:
    if 0 in grid:
        return
    device = next(a for a in arguments if isinstance(a, Tensor))
    with torch.cuda.device_of(device):
        kernel[grid](
            *arguments,
            D=D,
            WIDTH=configs.width(D),
            BLOCK_M=launch.block_m,
            BLOCK_N=launch.block_n,
            DESCRIPTORS=described,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
            **constants,
        )


def _launches(q: Tensor, k_pool: Tensor) -> configs.Launches:
    kind = "interpreter"
    if q.is_cuda:
        kind = configs.kind_of(
            None if torch.version.hip else torch.cuda.get_device_capability(q.device)
        )
    quantized = k_pool.dtype is not q.dtype
    return configs.launches(kind, q.shape[3], q.element_size(), quantized)


def _factor(scale: float) -> float:
    """Scale of the products in base 2; never 0, whose product with the -inf of a mask is NaN."""
    return max(scale * _LOG2_E, 1.2e-38)  # the smallest normal float32


def _strides(*tensors: Tensor) -> list[tuple[int, ...]]:
    return [t.stride()[:3] for t in tensors]


def _pages(pool: Tensor) -> Tensor:
    """Float8 as its bits where nothing converts it: before Ada, and on AMD, whose own differs."""
    if pool.dtype is not torch.float8_e4m3fn:
        return pool
    converts = (
        pool.is_cuda
        and torch.version.hip is None
        and torch.cuda.get_device_capability(pool.device) >= (8, 9)
    )
    return pool if converts else pool.view(torch.uint8)


def _vectors(tensor: Tensor) -> Tensor:
    """The tensor with a contiguous last axis; the other strides are the kernel's business."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _sources(tensors: list[Tensor], block: int, launch: Launch) -> tuple[list[Any], bool]:
    """The tensors themselves, or descriptors of them where launch and tensors allow it."""
    full = [t for t in tensors if t.numel()]
    if not launch.descriptors or not full or not all(_describable(t) for t in full):
        return list(tensors), False
    box = [1, block, 1, configs.width(full[0].shape[3])]
    # Nothing is read from an empty tensor, but its argument must be a descriptor as well.
    return [TensorDescriptor.from_tensor(t if t.numel() else full[0], box) for t in tensors], True


def _describable(tensor: Tensor) -> bool:
    """Whether the hardware can address it: whole 16 bytes between vectors, none empty."""
    unit = 16 // tensor.element_size()
    strides = tensor.stride()
    return (
        strides[3] == 1
        and tensor.data_ptr() % 16 == 0
        and all(s % unit == 0 and s > 0 for s in strides[:3])
    )
