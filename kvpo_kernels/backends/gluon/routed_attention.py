"""Routed attention for Hopper: two consumer warpgroups and a producer that feeds them by TMA.

A tile is 128 keys. A frame of T tokens is T // 128 whole tiles and a tail; the tails of a row's
frames are packed, end to end, into tiles of their own, so that frames of 1560 tokens waste 0.5 %
of the products and not 6.7 %. The order of keys is free: there is no mask between them. A row's
live tokens come last. What a tile lacks, the hardware fills with zeros: descriptors have rank 4,
so a box never reaches the next frame, whose values may be NaN, and what belongs nowhere is read
from slot `NOWHERE`, outside every tensor.

Scores live in base 2: `factor = scale * log2(e)` turns `exp` into `exp2`. Tiles are visited in one
fixed order and each element is written once, so bits depend on a row alone.

The forward overlaps the scores of tile i + 1 with the values of tile i, as FlashAttention-3 (Shah
et al., arXiv:2407.08608). The backward is two kernels, because the history needs no gradient:
grad_q over all keys, and the gradients of the live tokens.
"""

import math
from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

NOWHERE = gl.constexpr(1 << 30)
_LN_2 = gl.constexpr(math.log(2))
_TO_LOG2 = gl.constexpr(math.log2(math.e))
_KEYS = 128


@gluon.jit
def _load_keys(
    pool, tails, live, route, tile, bar, i, b, head, whole, packed, frames, L,
    T: gl.constexpr, BLOCK_N: gl.constexpr, BOX: gl.constexpr,
):  # fmt: skip
    """Begin to fetch tile `i` of a row's keys or values: whole, packed of tails, or live."""
    WHOLE: gl.constexpr = T // BLOCK_N
    BOXES: gl.constexpr = (T % BLOCK_N + BOX - 1) // BOX
    D: gl.constexpr = tile.shape[3]
    mbarrier.expect(bar, BLOCK_N * D * 2)
    if i < whole:
        frame = i // WHOLE if WHOLE > 0 else 0
        slot = gl.load(route + frame)
        tma.async_copy_global_to_shared(pool, [slot, (i - frame * WHOLE) * BLOCK_N, head, 0], bar, tile)
    elif i < whole + packed:
        if BOXES > 0:
            for u in gl.static_range(BLOCK_N // BOX):
                box = (i - whole) * (BLOCK_N // BOX) + u
                frame = box // BOXES
                slot = gl.load(route + frame, mask=frame < frames, other=NOWHERE)
                first = WHOLE * BLOCK_N + (box - frame * BOXES) * BOX
                tma.async_copy_global_to_shared(tails, [slot, first, head, 0], bar, tile.slice(u * BOX, BOX, 1))
    else:
        first = (i - whole - packed) * BLOCK_N
        row = gl.where(first < L, b, NOWHERE)  # a row without any key has one tile of none
        tma.async_copy_global_to_shared(live, [row, first, head, 0], bar, tile)


@gluon.jit
def _keys_there(
    i, whole, packed, frames, L, layout: gl.constexpr,
    T: gl.constexpr, BLOCK_N: gl.constexpr, BOX: gl.constexpr,
):  # fmt: skip
    """Which columns of a tile that is not whole hold a key."""
    REST: gl.constexpr = T % BLOCK_N
    BOXES: gl.constexpr = (REST + BOX - 1) // BOX
    column = gl.arange(0, BLOCK_N, layout=layout)
    limit = L - (i - whole - packed) * BLOCK_N
    there = column < limit
    if BOXES > 0:
        if i < whole + packed:
            token = (i - whole) * BLOCK_N + column  # of the tails end to end, in whole boxes
            there = token < frames * (BOXES * BOX)
            if REST % BOX != 0:
                there = there & (token % (BOXES * BOX) < REST)
    return there


@gluon.jit
def _count(slots, R, BLOCK_R: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    position = gl.arange(0, BLOCK_R, layout=layout)
    return gl.sum((gl.load(slots + position, mask=position < R, other=-1) >= 0).to(gl.int32), 0)


@gluon.jit
def _produce(
    k_pool, v_pool, k_tails, v_tails, k_live, v_live, route, k_tiles, v_tiles,
    k_full, k_free, v_full, v_free, b, head, whole, packed, frames, tiles, L,
    T: gl.constexpr, BLOCK_N: gl.constexpr, BOX: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    for i in range(tiles):
        s = i % STAGES
        phase = ((i // STAGES) & 1) ^ 1
        mbarrier.wait(k_free.index(s), phase)
        _load_keys(k_pool, k_tails, k_live, route, k_tiles.index(s), k_full.index(s), i, b, head, whole, packed, frames, L, T, BLOCK_N, BOX)
        mbarrier.wait(v_free.index(s), phase)
        _load_keys(v_pool, v_tails, v_live, route, v_tiles.index(s), v_full.index(s), i, b, head, whole, packed, frames, L, T, BLOCK_N, BOX)


@gluon.jit
def _softmax(dot, top, total, factor, there, masked):
    """The online softmax of a tile: weights, how much the sums so far shrink, and the new sums."""
    if masked:
        dot = gl.where(there[None, :], dot, float("-inf"))
    new_top = gl.maximum(top, gl.max(dot, 1) * factor)
    shift = gl.where(new_top == float("-inf"), 0.0, new_top)
    p = gl.exp2(dot * factor - shift[:, None])
    shrink = gl.exp2(top - shift)
    return p, shrink, new_top, total * shrink + gl.sum(p, 1)


@gluon.jit
def _attend(
    out, lse, q_tiles, q_full, k_tiles, v_tiles, k_full, k_free, v_full, v_free, factor,
    first, b, h, whole, packed, frames, tiles, Q, L, H,
    group: gl.constexpr, T: gl.constexpr, BLOCK_N: gl.constexpr, BOX: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One warpgroup: 64 queries over all tiles."""
    D: gl.constexpr = q_tiles.shape[4]
    DTYPE: gl.constexpr = q_tiles.dtype
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
    COLUMNS: gl.constexpr = gl.SliceLayout(0, SCORES)
    top = gl.full([64], float("-inf"), gl.float32, ROWS)
    total = gl.zeros([64], gl.float32, ROWS)
    acc = gl.zeros([64, D], gl.float32, SUMS)
    q_own = q_tiles.index(group)
    q = q_own.reshape([64, D])
    none = gl.zeros([64, BLOCK_N], gl.float32, SCORES)

    mbarrier.wait(q_full, 0)
    mbarrier.wait(k_full.index(0), 0)
    dot = warpgroup_mma(q, k_tiles.index(0).reshape([BLOCK_N, D]).permute((1, 0)), none, use_acc=False, is_async=True)
    dot = warpgroup_mma_wait(0, deps=(dot,))
    mbarrier.arrive(k_free.index(0), count=1)
    there = _keys_there(0, whole, packed, frames, L, COLUMNS, T, BLOCK_N, BOX)
    p, shrink, top, total = _softmax(dot, top, total, factor, there, 0 >= whole)
    left = gl.convert_layout(p.to(DTYPE), LEFT)
    for i in range(1, tiles):
        s = i % STAGES
        before = (i - 1) % STAGES
        mbarrier.wait(k_full.index(s), (i // STAGES) & 1)
        dot = warpgroup_mma(q, k_tiles.index(s).reshape([BLOCK_N, D]).permute((1, 0)), none, use_acc=False, is_async=True)
        mbarrier.wait(v_full.index(before), ((i - 1) // STAGES) & 1)
        sums = warpgroup_mma(left, v_tiles.index(before).reshape([BLOCK_N, D]), acc, is_async=True)
        dot = warpgroup_mma_wait(1, deps=(dot,))
        mbarrier.arrive(k_free.index(s), count=1)
        there = _keys_there(i, whole, packed, frames, L, COLUMNS, T, BLOCK_N, BOX)
        p, shrink, top, total = _softmax(dot, top, total, factor, there, i >= whole)
        acc = warpgroup_mma_wait(0, deps=(sums,))
        mbarrier.arrive(v_free.index(before), count=1)
        acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, SUMS))[:, None]
        left = gl.convert_layout(p.to(DTYPE), LEFT)
    last = (tiles - 1) % STAGES
    mbarrier.wait(v_full.index(last), ((tiles - 1) // STAGES) & 1)
    sums = warpgroup_mma(left, v_tiles.index(last).reshape([BLOCK_N, D]), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=(sums,))

    # Without keys, or with none above -inf, the sum is 0: out is then 0 and lse -inf.
    total = gl.where(total == 0.0, 1.0, total)
    acc = acc / gl.convert_layout(total, gl.SliceLayout(1, SUMS))[:, None]
    token = first + group * 64 + gl.arange(0, 64, layout=ROWS)
    at = lse + (b.to(gl.int64) * H + h) * Q + token
    gl.store(at, (top + gl.log2(total)) * _LN_2, mask=token < Q)
    q.store(acc.to(DTYPE))
    fence_async_shared()
    tma.async_copy_shared_to_global(out, [b, first + group * 64, h, 0], q_own)
    tma.store_wait(0)


@gluon.jit
def _forward_kernel(
    q, k_pool, v_pool, k_tails, v_tails, k_live, v_live, slots, out, lse, factor, R, L, GROUP,
    T: gl.constexpr, BLOCK_R: gl.constexpr, BOX: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    BLOCK_N: gl.constexpr = k_pool.block_shape[1]
    D: gl.constexpr = q.block_shape[3]
    DTYPE: gl.constexpr = q.dtype
    WHOLE: gl.constexpr = T // BLOCK_N
    BOXES: gl.constexpr = (T % BLOCK_N + BOX - 1) // BOX
    first = gl.program_id(0) * 128
    b = gl.program_id(1)
    h = gl.program_id(2)
    H = gl.num_programs(2)
    Q = q.shape[1]
    head = h // GROUP
    route = slots + b * R
    frames = _count(route, R, BLOCK_R)
    whole = frames * WHOLE
    packed = gl.cdiv(frames * BOXES * BOX, BLOCK_N)
    tiles = gl.maximum(whole + packed + gl.cdiv(L, BLOCK_N), 1)

    q_tiles = gl.allocate_shared_memory(DTYPE, [2, 1, 64, 1, D], q.layout)
    k_tiles = gl.allocate_shared_memory(DTYPE, [STAGES, 1, BLOCK_N, 1, D], k_pool.layout)
    v_tiles = gl.allocate_shared_memory(DTYPE, [STAGES, 1, BLOCK_N, 1, D], v_pool.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    for s in gl.static_range(STAGES):
        mbarrier.init(k_full.index(s), count=1)
        mbarrier.init(v_full.index(s), count=1)
        mbarrier.init(k_free.index(s), count=2)
        mbarrier.init(v_free.index(s), count=2)
    mbarrier.expect(q_full, 2 * 64 * D * 2)
    for g in gl.static_range(2):
        tma.async_copy_global_to_shared(q, [b, first + g * 64, h, 0], q_full, q_tiles.index(g))
    gl.warp_specialize(
        [
            (_attend, (out, lse, q_tiles, q_full, k_tiles, v_tiles, k_full, k_free, v_full, v_free, factor, first, b, h, whole, packed, frames, tiles, Q, L, H, 0, T, BLOCK_N, BOX, STAGES)),
            (_attend, (out, lse, q_tiles, q_full, k_tiles, v_tiles, k_full, k_free, v_full, v_free, factor, first, b, h, whole, packed, frames, tiles, Q, L, H, 1, T, BLOCK_N, BOX, STAGES)),
            (_produce, (k_pool, v_pool, k_tails, v_tails, k_live, v_live, route, k_tiles, v_tiles, k_full, k_free, v_full, v_free, b, head, whole, packed, frames, tiles, L, T, BLOCK_N, BOX, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )


@gluon.jit
def _load_lse(lse, token, Q):
    """In base 2. Queries past the end, and those without a key above -inf, get weights 0."""
    value = gl.load(lse + token, mask=token < Q, other=float("-inf")) * _TO_LOG2
    return gl.where(value == float("-inf"), float("inf"), value)


@gluon.jit
def _grad_score(dot, grad_p, lse, delta, factor, there, masked):
    p = gl.exp2(dot * factor - lse[:, None])
    if masked:
        p = gl.where(there[None, :], p, 0.0)
    return p * (grad_p - delta[:, None])


@gluon.jit
def _sum_grad_q(
    out, lse, delta, grad_q, q_tiles, grad_tiles, q_full, k_tiles, v_tiles, k_full, k_free, v_full, v_free,
    factor, scale, first, b, h, whole, packed, frames, tiles, Q, L, H,
    group: gl.constexpr, T: gl.constexpr, BLOCK_N: gl.constexpr, BOX: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One warpgroup: the gradient of 64 queries, over all tiles."""
    D: gl.constexpr = q_tiles.shape[4]
    DTYPE: gl.constexpr = q_tiles.dtype
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
    COLUMNS: gl.constexpr = gl.SliceLayout(0, SCORES)
    LOADS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    q_own = q_tiles.index(group)
    q = q_own.reshape([64, D])
    grad = grad_tiles.index(group).reshape([64, D])
    own = first + group * 64
    base = (b.to(gl.int64) * H + h) * Q

    # delta = rowsum(out * grad_out): made here, on the way, and left for the live tokens' kernel.
    mbarrier.wait(q_full, 0)
    row = own + gl.arange(0, 64, layout=gl.SliceLayout(1, LOADS))
    column = gl.arange(0, D, layout=gl.SliceLayout(0, LOADS))
    at = out + ((b.to(gl.int64) * Q + row) * H + h)[:, None] * D + column[None, :]
    values = gl.load(at, mask=(row < Q)[:, None], other=0.0).to(gl.float32)
    products = gl.sum(values * grad.load(LOADS).to(gl.float32), 1)
    gl.store(delta + base + row, products, mask=row < Q)
    delta_own = gl.convert_layout(products, ROWS)
    lse_own = _load_lse(lse + base, own + gl.arange(0, 64, layout=ROWS), Q)
    acc = gl.zeros([64, D], gl.float32, SUMS)
    none = gl.zeros([64, BLOCK_N], gl.float32, SCORES)

    mbarrier.wait(k_full.index(0), 0)
    dot = warpgroup_mma(q, k_tiles.index(0).reshape([BLOCK_N, D]).permute((1, 0)), none, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(0), 0)
    grad_p = warpgroup_mma(grad, v_tiles.index(0).reshape([BLOCK_N, D]).permute((1, 0)), none, use_acc=False, is_async=True)
    dot = warpgroup_mma_wait(1, deps=(dot,))
    grad_p = warpgroup_mma_wait(0, deps=(grad_p,))
    mbarrier.arrive(v_free.index(0), count=1)
    there = _keys_there(0, whole, packed, frames, L, COLUMNS, T, BLOCK_N, BOX)
    score = _grad_score(dot, grad_p, lse_own, delta_own, factor, there, 0 >= whole)
    left = gl.convert_layout(score.to(DTYPE), LEFT)
    for i in range(1, tiles):
        s = i % STAGES
        before = (i - 1) % STAGES
        phase = (i // STAGES) & 1
        mbarrier.wait(k_full.index(s), phase)
        dot = warpgroup_mma(q, k_tiles.index(s).reshape([BLOCK_N, D]).permute((1, 0)), none, use_acc=False, is_async=True)
        sums = warpgroup_mma(left, k_tiles.index(before).reshape([BLOCK_N, D]), acc, is_async=True)
        mbarrier.wait(v_full.index(s), phase)
        grad_p = warpgroup_mma(grad, v_tiles.index(s).reshape([BLOCK_N, D]).permute((1, 0)), none, use_acc=False, is_async=True)
        dot = warpgroup_mma_wait(2, deps=(dot,))
        acc = warpgroup_mma_wait(1, deps=(sums,))
        mbarrier.arrive(k_free.index(before), count=1)
        grad_p = warpgroup_mma_wait(0, deps=(grad_p,))
        mbarrier.arrive(v_free.index(s), count=1)
        there = _keys_there(i, whole, packed, frames, L, COLUMNS, T, BLOCK_N, BOX)
        score = _grad_score(dot, grad_p, lse_own, delta_own, factor, there, i >= whole)
        left = gl.convert_layout(score.to(DTYPE), LEFT)
    last = (tiles - 1) % STAGES
    sums = warpgroup_mma(left, k_tiles.index(last).reshape([BLOCK_N, D]), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=(sums,))
    q.store((acc * scale).to(DTYPE))
    fence_async_shared()
    tma.async_copy_shared_to_global(grad_q, [b, own, h, 0], q_own)
    tma.store_wait(0)


@gluon.jit
def _grad_q_kernel(
    grad_out, q, k_pool, v_pool, k_tails, v_tails, k_live, v_live, slots, out, lse, delta, grad_q,
    factor, scale, R, L, GROUP,
    T: gl.constexpr, BLOCK_R: gl.constexpr, BOX: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    BLOCK_N: gl.constexpr = k_pool.block_shape[1]
    D: gl.constexpr = q.block_shape[3]
    DTYPE: gl.constexpr = q.dtype
    WHOLE: gl.constexpr = T // BLOCK_N
    BOXES: gl.constexpr = (T % BLOCK_N + BOX - 1) // BOX
    first = gl.program_id(0) * 128
    b = gl.program_id(1)
    h = gl.program_id(2)
    H = gl.num_programs(2)
    Q = q.shape[1]
    head = h // GROUP
    route = slots + b * R
    frames = _count(route, R, BLOCK_R)
    whole = frames * WHOLE
    packed = gl.cdiv(frames * BOXES * BOX, BLOCK_N)
    tiles = gl.maximum(whole + packed + gl.cdiv(L, BLOCK_N), 1)

    q_tiles = gl.allocate_shared_memory(DTYPE, [2, 1, 64, 1, D], q.layout)
    grad_tiles = gl.allocate_shared_memory(DTYPE, [2, 1, 64, 1, D], q.layout)
    k_tiles = gl.allocate_shared_memory(DTYPE, [STAGES, 1, BLOCK_N, 1, D], k_pool.layout)
    v_tiles = gl.allocate_shared_memory(DTYPE, [STAGES, 1, BLOCK_N, 1, D], v_pool.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    for s in gl.static_range(STAGES):
        mbarrier.init(k_full.index(s), count=1)
        mbarrier.init(v_full.index(s), count=1)
        mbarrier.init(k_free.index(s), count=2)
        mbarrier.init(v_free.index(s), count=2)
    mbarrier.expect(q_full, 4 * 64 * D * 2)
    for g in gl.static_range(2):
        tma.async_copy_global_to_shared(q, [b, first + g * 64, h, 0], q_full, q_tiles.index(g))
        tma.async_copy_global_to_shared(grad_out, [b, first + g * 64, h, 0], q_full, grad_tiles.index(g))
    gl.warp_specialize(
        [
            (_sum_grad_q, (out, lse, delta, grad_q, q_tiles, grad_tiles, q_full, k_tiles, v_tiles, k_full, k_free, v_full, v_free, factor, scale, first, b, h, whole, packed, frames, tiles, Q, L, H, 0, T, BLOCK_N, BOX, STAGES)),
            (_sum_grad_q, (out, lse, delta, grad_q, q_tiles, grad_tiles, q_full, k_tiles, v_tiles, k_full, k_free, v_full, v_free, factor, scale, first, b, h, whole, packed, frames, tiles, Q, L, H, 1, T, BLOCK_N, BOX, STAGES)),
            (_produce, (k_pool, v_pool, k_tails, v_tails, k_live, v_live, route, k_tiles, v_tiles, k_full, k_free, v_full, v_free, b, head, whole, packed, frames, tiles, L, T, BLOCK_N, BOX, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )


@gluon.jit
def _produce_queries(
    q, grad_out, q_tiles, grad_tiles, q_full, q_free, grad_full, grad_free, b, head, GROUP, per_head,
    BLOCK_M: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    for i in range(GROUP * per_head):
        s = i % STAGES
        phase = ((i // STAGES) & 1) ^ 1
        h = head * GROUP + i // per_head
        first = i % per_head * BLOCK_M
        mbarrier.wait(q_free.index(s), phase)
        mbarrier.expect(q_full.index(s), BLOCK_M * D * 2)
        tma.async_copy_global_to_shared(q, [b, first, h, 0], q_full.index(s), q_tiles.index(s))
        mbarrier.wait(grad_free.index(s), phase)
        mbarrier.expect(grad_full.index(s), BLOCK_M * D * 2)
        tma.async_copy_global_to_shared(grad_out, [b, first, h, 0], grad_full.index(s), grad_tiles.index(s))


@gluon.jit
def _sum_grad_live(
    lse, delta, grad_k, grad_v, k_tiles, v_tiles, k_full, q_tiles, grad_tiles, q_full, q_free, grad_full, grad_free,
    factor, scale, first, b, head, GROUP, per_head, Q, H,
    group: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One warpgroup: the gradients of 64 live tokens, over all queries of the heads that read them.

    Everything is transposed, keys by queries, so that the weights are a left operand as they are.
    """
    D: gl.constexpr = k_tiles.shape[4]
    DTYPE: gl.constexpr = k_tiles.dtype
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    COLUMNS: gl.constexpr = gl.SliceLayout(0, SCORES)
    acc_k = gl.zeros([64, D], gl.float32, SUMS)
    acc_v = gl.zeros([64, D], gl.float32, SUMS)
    k_own = k_tiles.index(group)
    v_own = v_tiles.index(group)
    k = k_own.reshape([64, D])
    v = v_own.reshape([64, D])
    none = gl.zeros([64, BLOCK_M], gl.float32, SCORES)
    mbarrier.wait(k_full, 0)
    for i in range(GROUP * per_head):
        s = i % STAGES
        phase = (i // STAGES) & 1
        base = (b.to(gl.int64) * H + head * GROUP + i // per_head) * Q
        token = i % per_head * BLOCK_M + gl.arange(0, BLOCK_M, layout=COLUMNS)
        lse_there = _load_lse(lse + base, token, Q)
        delta_there = gl.load(delta + base + token, mask=token < Q, other=0.0)
        mbarrier.wait(q_full.index(s), phase)
        q = q_tiles.index(s).reshape([BLOCK_M, D])
        dot = warpgroup_mma(k, q.permute((1, 0)), none, use_acc=False, is_async=True)
        mbarrier.wait(grad_full.index(s), phase)
        grad = grad_tiles.index(s).reshape([BLOCK_M, D])
        grad_p = warpgroup_mma(v, grad.permute((1, 0)), none, use_acc=False, is_async=True)
        dot = warpgroup_mma_wait(1, deps=(dot,))
        p = gl.exp2(dot * factor - lse_there[None, :])
        left = gl.convert_layout(p.to(DTYPE), LEFT)
        grad_p = warpgroup_mma_wait(0, deps=(grad_p,))
        sums_v = warpgroup_mma(left, grad, acc_v, is_async=True)
        score = p * (grad_p - delta_there[None, :])
        left = gl.convert_layout(score.to(DTYPE), LEFT)
        sums_k = warpgroup_mma(left, q, acc_k, is_async=True)
        acc_v = warpgroup_mma_wait(1, deps=(sums_v,))
        mbarrier.arrive(grad_free.index(s), count=1)
        acc_k = warpgroup_mma_wait(0, deps=(sums_k,))
        mbarrier.arrive(q_free.index(s), count=1)
    k.store((acc_k * scale).to(DTYPE))
    v.store(acc_v.to(DTYPE))
    fence_async_shared()
    tma.async_copy_shared_to_global(grad_k, [b, first + group * 64, head, 0], k_own)
    tma.async_copy_shared_to_global(grad_v, [b, first + group * 64, head, 0], v_own)
    tma.store_wait(0)


@gluon.jit
def _grad_live_kernel(
    grad_out, q, k_live, v_live, lse, delta, grad_k, grad_v, factor, scale, GROUP, STAGES: gl.constexpr
):  # fmt: skip
    BLOCK_M: gl.constexpr = q.block_shape[1]
    D: gl.constexpr = q.block_shape[3]
    DTYPE: gl.constexpr = q.dtype
    first = gl.program_id(0) * 128
    b = gl.program_id(1)
    head = gl.program_id(2)
    Q = q.shape[1]
    H = q.shape[2]
    per_head = gl.cdiv(Q, BLOCK_M)

    k_tiles = gl.allocate_shared_memory(DTYPE, [2, 1, 64, 1, D], k_live.layout)
    v_tiles = gl.allocate_shared_memory(DTYPE, [2, 1, 64, 1, D], v_live.layout)
    q_tiles = gl.allocate_shared_memory(DTYPE, [STAGES, 1, BLOCK_M, 1, D], q.layout)
    grad_tiles = gl.allocate_shared_memory(DTYPE, [STAGES, 1, BLOCK_M, 1, D], q.layout)
    k_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    q_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    grad_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    grad_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(k_full, count=1)
    for s in gl.static_range(STAGES):
        mbarrier.init(q_full.index(s), count=1)
        mbarrier.init(grad_full.index(s), count=1)
        mbarrier.init(q_free.index(s), count=2)
        mbarrier.init(grad_free.index(s), count=2)
    mbarrier.expect(k_full, 4 * 64 * D * 2)
    for g in gl.static_range(2):
        tma.async_copy_global_to_shared(k_live, [b, first + g * 64, head, 0], k_full, k_tiles.index(g))
        tma.async_copy_global_to_shared(v_live, [b, first + g * 64, head, 0], k_full, v_tiles.index(g))
    gl.warp_specialize(
        [
            (_sum_grad_live, (lse, delta, grad_k, grad_v, k_tiles, v_tiles, k_full, q_tiles, grad_tiles, q_full, q_free, grad_full, grad_free, factor, scale, first, b, head, GROUP, per_head, Q, H, 0, BLOCK_M, STAGES)),
            (_sum_grad_live, (lse, delta, grad_k, grad_v, k_tiles, v_tiles, k_full, q_tiles, grad_tiles, q_full, q_free, grad_full, grad_free, factor, scale, first, b, head, GROUP, per_head, Q, H, 1, BLOCK_M, STAGES)),
            (_produce_queries, (q, grad_out, q_tiles, grad_tiles, q_full, q_free, grad_full, grad_free, b, head, GROUP, per_head, BLOCK_M, D, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )


def forward(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    slots: Tensor,
    k_live: Tensor,
    v_live: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return `(out, lse)`."""
    if scale < 0:  # the kernels compare products before they scale them
        q, scale = -q, -scale
    B, Q, H, D = q.shape
    out = q.new_empty(q.shape)
    lse = q.new_empty(B, H, Q, dtype=torch.float32)
    if out.numel():
        T = k_pool.shape[1]
        box = _box(T)
        with torch.cuda.device_of(q):
            _forward_kernel[(triton.cdiv(Q, 128), B, H)](
                _described(q, 64),
                _described(k_pool, _KEYS),
                _described(v_pool, _KEYS),
                _described(k_pool, box),
                _described(v_pool, box),
                _described(k_live if k_live.numel() else k_pool, _KEYS),
                _described(v_live if v_live.numel() else v_pool, _KEYS),
                slots,
                _described(out, 64),
                lse,
                _factor(scale),
                slots.shape[1],
                k_live.shape[1],
                H // k_pool.shape[2],
                T=T,
                BLOCK_R=triton.next_power_of_2(max(1, slots.shape[1])),
                BOX=box,
                STAGES=2,
                num_warps=4,
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
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `(grad_q, grad_k_live, grad_v_live)`."""
    if scale < 0:
        arguments = k_pool, v_pool, slots, k_live, v_live, out, lse, -scale
        grad_q, grad_k, grad_v = backward(grad_out, -q, *arguments)
        return grad_q.neg_(), grad_k, grad_v
    B, Q, H, _D = q.shape
    L, kv_heads = k_live.shape[1:3]
    grad_q = q.new_empty(q.shape)
    grad_k, grad_v = k_live.new_empty(k_live.shape), v_live.new_empty(v_live.shape)
    delta = torch.empty_like(lse)
    if q.numel():
        T = k_pool.shape[1]
        box = _box(T)
        with torch.cuda.device_of(q):
            _grad_q_kernel[(triton.cdiv(Q, 128), B, H)](
                _described(grad_out, 64),
                _described(q, 64),
                _described(k_pool, _KEYS),
                _described(v_pool, _KEYS),
                _described(k_pool, box),
                _described(v_pool, box),
                _described(k_live if L else k_pool, _KEYS),
                _described(v_live if L else v_pool, _KEYS),
                slots,
                out,
                lse,
                delta,
                _described(grad_q, 64),
                _factor(scale),
                scale,
                slots.shape[1],
                L,
                H // kv_heads,
                T=T,
                BLOCK_R=triton.next_power_of_2(max(1, slots.shape[1])),
                BOX=box,
                STAGES=2,
                num_warps=4,
            )
            if L:
                _grad_live_kernel[(triton.cdiv(L, 128), B, kv_heads)](
                    _described(grad_out, 64),
                    _described(q, 64),
                    _described(k_live, 64),
                    _described(v_live, 64),
                    lse,
                    delta,
                    _described(grad_k, 64),
                    _described(grad_v, 64),
                    _factor(scale),
                    scale,
                    H // kv_heads,
                    STAGES=2,
                    num_warps=4,
                )
    return grad_q, grad_k, grad_v


def _box(T: int) -> int:
    """Tokens per piece of a packed tail: the largest power of two that divides it, at least 8.

    8 rows are what the swizzle of shared memory repeats after.
    """
    rest = triton.cdiv(T % _KEYS, 8) * 8
    return rest & -rest if rest else 8


def _described(tensor: Tensor, tokens: int) -> Any:
    """A descriptor of `[rows, tokens, heads, D]` with boxes of some tokens of one head."""
    bits = 8 * tensor.element_size()
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=bits, rank=4)
    return TensorDescriptor.from_tensor(tensor, [1, tokens, 1, tensor.shape[3]], layout)


def _factor(scale: float) -> float:
    """Scale of the products in base 2; never 0, whose product with the -inf of a mask is NaN."""
    return max(scale * math.log2(math.e), 1.2e-38)  # the smallest normal float32
