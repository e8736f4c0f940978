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

_NOWHERE = gl.constexpr(1 << 30)
_LN_2 = gl.constexpr(math.log(2))
_TO_LOG2 = gl.constexpr(math.log2(math.e))
_CONSUMERS = gl.constexpr(2)
_ROWS = gl.constexpr(64)  # of a consumer: of queries, or of live tokens
_KEYS = 128


# Kernels pass on tuples:
#   sources  (pool, tails, live): descriptors of keys or of values
#   ring     (tiles, full, free): buffers of shared memory in turns, and their barriers
#   walk     (frames, whole, packed, tiles, L): how many frames a row has, and tiles of each kind


@gluon.jit
def _ring(source, STAGES: gl.constexpr):
    shape: gl.constexpr = source.block_shape
    tiles = gl.allocate_shared_memory(
        source.dtype, [STAGES, 1, shape[1], 1, shape[3]], source.layout
    )
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=1)
        mbarrier.init(free.index(s), count=_CONSUMERS)
    return tiles, full, free


@gluon.jit
def _load_own(one, other, b, first, head):
    """A program's rows of two tensors, 64 for each consumer, and the barrier of their arrival."""
    shape: gl.constexpr = one.block_shape
    one_tiles = gl.allocate_shared_memory(
        one.dtype, [_CONSUMERS, 1, _ROWS, 1, shape[3]], one.layout
    )
    other_tiles = gl.allocate_shared_memory(
        one.dtype, [_CONSUMERS, 1, _ROWS, 1, shape[3]], one.layout
    )
    full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(full, count=1)
    mbarrier.expect(full, 2 * _CONSUMERS * _ROWS * shape[3] * 2)
    for g in gl.static_range(_CONSUMERS):
        at = [b, first + g * _ROWS, head, 0]
        tma.async_copy_global_to_shared(one, at, full, one_tiles.index(g))
        tma.async_copy_global_to_shared(other, at, full, other_tiles.index(g))
    return one_tiles, other_tiles, full


@gluon.jit
def _plan(
    route, R, L, BLOCK_R: gl.constexpr, T: gl.constexpr, BLOCK_N: gl.constexpr, BOX: gl.constexpr
):
    """The walk through a row's keys. Without any key, it has one tile of none."""
    BOXES: gl.constexpr = (T % BLOCK_N + BOX - 1) // BOX
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    position = gl.arange(0, BLOCK_R, layout=layout)
    slots = gl.load(route + position, mask=position < R, other=-1)
    frames = gl.sum((slots >= 0).to(gl.int32), 0)
    whole = frames * (T // BLOCK_N)
    packed = gl.cdiv(frames * (BOXES * BOX), BLOCK_N)
    tiles = gl.maximum(whole + packed + gl.cdiv(L, BLOCK_N), 1)
    return frames, whole, packed, tiles, L


@gluon.jit
def _load_keys(sources, tile, bar, i, route, b, head, walk, T: gl.constexpr, BOX: gl.constexpr):
    """Begin to fetch tile `i` of a row's keys or values: whole, packed of tails, or live."""
    pool, tails, live = sources
    frames, whole, packed, _, L = walk
    BLOCK_N: gl.constexpr = tile.shape[1]
    WHOLE: gl.constexpr = T // BLOCK_N
    BOXES: gl.constexpr = (T % BLOCK_N + BOX - 1) // BOX
    mbarrier.expect(bar, BLOCK_N * tile.shape[3] * 2)
    if i < whole:
        frame = i // WHOLE if WHOLE > 0 else 0
        at = [gl.load(route + frame), (i - frame * WHOLE) * BLOCK_N, head, 0]
        tma.async_copy_global_to_shared(pool, at, bar, tile)
    elif i < whole + packed:
        if BOXES > 0:
            for u in gl.static_range(BLOCK_N // BOX):
                box = (i - whole) * (BLOCK_N // BOX) + u  # of the tails, end to end
                frame = box // BOXES
                slot = gl.load(route + frame, mask=frame < frames, other=_NOWHERE)
                at = [slot, WHOLE * BLOCK_N + (box - frame * BOXES) * BOX, head, 0]
                tma.async_copy_global_to_shared(tails, at, bar, tile.slice(u * BOX, BOX, 1))
    else:
        first = (i - whole - packed) * BLOCK_N
        at = [gl.where(first < L, b, _NOWHERE), first, head, 0]
        tma.async_copy_global_to_shared(live, at, bar, tile)


@gluon.jit
def _mask(values, absent, i, walk, COLUMNS: gl.constexpr, T: gl.constexpr, BOX: gl.constexpr):
    """Columns of tile `i` that hold no key become `absent`; a whole tile is not looked at."""
    frames, whole, packed, _, L = walk
    BLOCK_N: gl.constexpr = values.shape[1]
    REST: gl.constexpr = T % BLOCK_N
    BOXES: gl.constexpr = (REST + BOX - 1) // BOX
    if i >= whole:
        column = gl.arange(0, BLOCK_N, layout=COLUMNS)
        there = column < L - (i - whole - packed) * BLOCK_N
        if BOXES > 0 and i < whole + packed:
            token = (i - whole) * BLOCK_N + column
            there = token < frames * (BOXES * BOX)
            if REST % BOX != 0:
                there = there & (token % (BOXES * BOX) < REST)
        values = gl.where(there[None, :], values, absent)
    return values


@gluon.jit
def _produce(
    keys, route, b, head, walk, T: gl.constexpr, BOX: gl.constexpr
):  # fmt: skip
    k_sources, v_sources, k_ring, v_ring = keys
    k_tiles, k_full, k_free = k_ring
    v_tiles, v_full, v_free = v_ring
    STAGES: gl.constexpr = k_tiles.shape[0]
    for i in range(walk[3]):
        s = i % STAGES
        phase = ((i // STAGES) & 1) ^ 1
        mbarrier.wait(k_free.index(s), phase)
        _load_keys(k_sources, k_tiles.index(s), k_full.index(s), i, route, b, head, walk, T, BOX)
        mbarrier.wait(v_free.index(s), phase)
        _load_keys(v_sources, v_tiles.index(s), v_full.index(s), i, route, b, head, walk, T, BOX)


@gluon.jit
def _matrix(tiles, s):
    """Buffer `s` as a matrix of tokens by D."""
    return tiles.index(s).reshape([tiles.shape[2], tiles.shape[4]])


@gluon.jit
def _begin_scores(rows, tiles, s):
    """Begin `rows @ tile.T`, from zero."""
    BLOCK: gl.constexpr = tiles.shape[2]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    zero = gl.zeros([_ROWS, BLOCK], gl.float32, SCORES)
    columns = _matrix(tiles, s).permute((1, 0))
    return warpgroup_mma(rows, columns, zero, use_acc=False, is_async=True)


@gluon.jit
def _softmax(dot, top, total, factor):
    """The online softmax of a tile: weights, how much the sums so far shrink, and the new sums."""
    new_top = gl.maximum(top, gl.max(dot, 1) * factor)
    shift = gl.where(new_top == float("-inf"), 0.0, new_top)
    p = gl.exp2(dot * factor - shift[:, None])
    shrink = gl.exp2(top - shift)
    return p, shrink, new_top, total * shrink + gl.sum(p, 1)


@gluon.jit
def _attend(
    own, group: gl.constexpr, T: gl.constexpr, BOX: gl.constexpr
):  # fmt: skip
    """One consumer: 64 queries over all tiles."""
    out, lse, q_tiles, q_full, k_ring, v_ring, factor, first, b, h, walk, Q, H = own
    k_tiles, k_full, k_free = k_ring
    v_tiles, v_full, v_free = v_ring
    tiles = walk[3]
    STAGES: gl.constexpr = k_tiles.shape[0]
    BLOCK_N: gl.constexpr = k_tiles.shape[2]
    D: gl.constexpr = q_tiles.shape[4]
    DTYPE: gl.constexpr = q_tiles.dtype
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
    COLUMNS: gl.constexpr = gl.SliceLayout(0, SCORES)
    top = gl.full([_ROWS], float("-inf"), gl.float32, ROWS)
    total = gl.zeros([_ROWS], gl.float32, ROWS)
    acc = gl.zeros([_ROWS, D], gl.float32, SUMS)
    q = _matrix(q_tiles, group)

    mbarrier.wait(q_full, 0)
    mbarrier.wait(k_full.index(0), 0)
    dot = warpgroup_mma_wait(0, deps=(_begin_scores(q, k_tiles, 0),))
    mbarrier.arrive(k_free.index(0), count=1)
    dot = _mask(dot, float("-inf"), 0, walk, COLUMNS, T, BOX)
    p, shrink, top, total = _softmax(dot, top, total, factor)
    left = gl.convert_layout(p.to(DTYPE), LEFT)
    for i in range(1, tiles):
        s = i % STAGES
        before = (i - 1) % STAGES
        mbarrier.wait(k_full.index(s), (i // STAGES) & 1)
        scores = _begin_scores(q, k_tiles, s)
        mbarrier.wait(v_full.index(before), ((i - 1) // STAGES) & 1)
        sums = warpgroup_mma(left, _matrix(v_tiles, before), acc, is_async=True)
        dot = warpgroup_mma_wait(1, deps=(scores,))
        mbarrier.arrive(k_free.index(s), count=1)
        dot = _mask(dot, float("-inf"), i, walk, COLUMNS, T, BOX)
        p, shrink, top, total = _softmax(dot, top, total, factor)
        acc = warpgroup_mma_wait(0, deps=(sums,))
        mbarrier.arrive(v_free.index(before), count=1)
        acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, SUMS))[:, None]
        left = gl.convert_layout(p.to(DTYPE), LEFT)
    last = (tiles - 1) % STAGES
    mbarrier.wait(v_full.index(last), ((tiles - 1) // STAGES) & 1)
    sums = warpgroup_mma(left, _matrix(v_tiles, last), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=(sums,))

    # Without keys, or with none above -inf, the sum is 0: out is then 0 and lse -inf.
    total = gl.where(total == 0.0, 1.0, total)
    acc = acc / gl.convert_layout(total, gl.SliceLayout(1, SUMS))[:, None]
    token = first + group * _ROWS + gl.arange(0, _ROWS, layout=ROWS)
    at = lse + (b.to(gl.int64) * H + h) * Q + token
    gl.store(at, (top + gl.log2(total)) * _LN_2, mask=token < Q)
    q.store(acc.to(DTYPE))
    fence_async_shared()
    tma.async_copy_shared_to_global(out, [b, first + group * _ROWS, h, 0], q_tiles.index(group))
    tma.store_wait(0)


@gluon.jit
def _forward_kernel(
    q, k_pool, v_pool, k_tails, v_tails, k_live, v_live, slots, out, lse, factor, R, L, GROUP,
    T: gl.constexpr, BLOCK_R: gl.constexpr, BOX: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    BLOCK_N: gl.constexpr = k_pool.block_shape[1]
    D: gl.constexpr = q.block_shape[3]
    DTYPE: gl.constexpr = q.dtype
    first = gl.program_id(0) * (_CONSUMERS * _ROWS)
    b = gl.program_id(1)
    h = gl.program_id(2)
    H = gl.num_programs(2)
    Q = q.shape[1]
    route = slots + b * R
    walk = _plan(route, R, L, BLOCK_R, T, BLOCK_N, BOX)
    k_ring = _ring(k_pool, STAGES)
    v_ring = _ring(v_pool, STAGES)
    q_tiles = gl.allocate_shared_memory(DTYPE, [_CONSUMERS, 1, _ROWS, 1, D], q.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    mbarrier.expect(q_full, _CONSUMERS * _ROWS * D * 2)
    for g in gl.static_range(_CONSUMERS):
        at = [b, first + g * _ROWS, h, 0]
        tma.async_copy_global_to_shared(q, at, q_full, q_tiles.index(g))
    keys = ((k_pool, k_tails, k_live), (v_pool, v_tails, v_live), k_ring, v_ring)
    own = (out, lse, q_tiles, q_full, k_ring, v_ring, factor, first, b, h, walk, Q, H)
    gl.warp_specialize(
        [
            (_attend, (own, 0, T, BOX)),
            (_attend, (own, 1, T, BOX)),
            (_produce, (keys, route, b, h // GROUP, walk, T, BOX)),
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
def _sum_grad_q(
    own, group: gl.constexpr, T: gl.constexpr, BOX: gl.constexpr
):  # fmt: skip
    """One consumer: the gradient of 64 queries, over all tiles."""
    out, lse, delta, grad_q, rows, factor, scale, first, b, h, walk, Q, H = own
    q_tiles, grad_tiles, q_full, k_ring, v_ring = rows
    k_tiles, k_full, k_free = k_ring
    v_tiles, v_full, v_free = v_ring
    tiles = walk[3]
    STAGES: gl.constexpr = k_tiles.shape[0]
    BLOCK_N: gl.constexpr = k_tiles.shape[2]
    D: gl.constexpr = q_tiles.shape[4]
    DTYPE: gl.constexpr = q_tiles.dtype
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
    COLUMNS: gl.constexpr = gl.SliceLayout(0, SCORES)
    LOADS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    q = _matrix(q_tiles, group)
    grad = _matrix(grad_tiles, group)
    mine = first + group * _ROWS
    base = (b.to(gl.int64) * H + h) * Q

    # delta = rowsum(out * grad_out): made here, on the way, and left for the live tokens' kernel.
    mbarrier.wait(q_full, 0)
    row = mine + gl.arange(0, _ROWS, layout=gl.SliceLayout(1, LOADS))
    column = gl.arange(0, D, layout=gl.SliceLayout(0, LOADS))
    at = out + ((b.to(gl.int64) * Q + row) * H + h)[:, None] * D + column[None, :]
    values = gl.load(at, mask=(row < Q)[:, None], other=0.0).to(gl.float32)
    products = gl.sum(values * grad.load(LOADS).to(gl.float32), 1)
    gl.store(delta + base + row, products, mask=row < Q)
    delta_own = gl.convert_layout(products, ROWS)
    lse_own = _load_lse(lse + base, mine + gl.arange(0, _ROWS, layout=ROWS), Q)
    acc = gl.zeros([_ROWS, D], gl.float32, SUMS)

    mbarrier.wait(k_full.index(0), 0)
    scores = _begin_scores(q, k_tiles, 0)
    mbarrier.wait(v_full.index(0), 0)
    grads = _begin_scores(grad, v_tiles, 0)
    dot = warpgroup_mma_wait(1, deps=(scores,))
    grad_p = warpgroup_mma_wait(0, deps=(grads,))
    mbarrier.arrive(v_free.index(0), count=1)
    p = gl.exp2(dot * factor - lse_own[:, None])
    p = _mask(p, 0.0, 0, walk, COLUMNS, T, BOX)
    grad_s = p * (grad_p - delta_own[:, None])
    left = gl.convert_layout(grad_s.to(DTYPE), LEFT)
    for i in range(1, tiles):
        s = i % STAGES
        before = (i - 1) % STAGES
        phase = (i // STAGES) & 1
        mbarrier.wait(k_full.index(s), phase)
        scores = _begin_scores(q, k_tiles, s)
        sums = warpgroup_mma(left, _matrix(k_tiles, before), acc, is_async=True)
        mbarrier.wait(v_full.index(s), phase)
        grads = _begin_scores(grad, v_tiles, s)
        dot = warpgroup_mma_wait(2, deps=(scores,))
        acc = warpgroup_mma_wait(1, deps=(sums,))
        mbarrier.arrive(k_free.index(before), count=1)
        grad_p = warpgroup_mma_wait(0, deps=(grads,))
        mbarrier.arrive(v_free.index(s), count=1)
        p = gl.exp2(dot * factor - lse_own[:, None])
        p = _mask(p, 0.0, i, walk, COLUMNS, T, BOX)
        grad_s = p * (grad_p - delta_own[:, None])
        left = gl.convert_layout(grad_s.to(DTYPE), LEFT)
    sums = warpgroup_mma(left, _matrix(k_tiles, (tiles - 1) % STAGES), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=(sums,))
    q.store((acc * scale).to(DTYPE))
    fence_async_shared()
    tma.async_copy_shared_to_global(grad_q, [b, mine, h, 0], q_tiles.index(group))
    tma.store_wait(0)


@gluon.jit
def _grad_q_kernel(
    grad_out, q, k_pool, v_pool, k_tails, v_tails, k_live, v_live, slots, out, lse, delta, grad_q,
    factor, scale, R, L, GROUP,
    T: gl.constexpr, BLOCK_R: gl.constexpr, BOX: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    BLOCK_N: gl.constexpr = k_pool.block_shape[1]
    first = gl.program_id(0) * (_CONSUMERS * _ROWS)
    b = gl.program_id(1)
    h = gl.program_id(2)
    H = gl.num_programs(2)
    Q = q.shape[1]
    route = slots + b * R
    walk = _plan(route, R, L, BLOCK_R, T, BLOCK_N, BOX)
    k_ring = _ring(k_pool, STAGES)
    v_ring = _ring(v_pool, STAGES)
    q_tiles, grad_tiles, q_full = _load_own(q, grad_out, b, first, h)
    keys = ((k_pool, k_tails, k_live), (v_pool, v_tails, v_live), k_ring, v_ring)
    rows = (q_tiles, grad_tiles, q_full, k_ring, v_ring)
    own = (out, lse, delta, grad_q, rows, factor, scale, first, b, h, walk, Q, H)
    gl.warp_specialize(
        [
            (_sum_grad_q, (own, 0, T, BOX)),
            (_sum_grad_q, (own, 1, T, BOX)),
            (_produce, (keys, route, b, h // GROUP, walk, T, BOX)),
        ],
        [4, 1],
        [240, 24],
    )


@gluon.jit
def _produce_queries(q, grad_out, q_ring, grad_ring, b, head, GROUP, per_head):
    q_tiles, q_full, q_free = q_ring
    grad_tiles, grad_full, grad_free = grad_ring
    STAGES: gl.constexpr = q_tiles.shape[0]
    BLOCK_M: gl.constexpr = q_tiles.shape[2]
    D: gl.constexpr = q_tiles.shape[4]
    for i in range(GROUP * per_head):
        s = i % STAGES
        phase = ((i // STAGES) & 1) ^ 1
        at = [b, i % per_head * BLOCK_M, head * GROUP + i // per_head, 0]
        mbarrier.wait(q_free.index(s), phase)
        mbarrier.expect(q_full.index(s), BLOCK_M * D * 2)
        tma.async_copy_global_to_shared(q, at, q_full.index(s), q_tiles.index(s))
        mbarrier.wait(grad_free.index(s), phase)
        mbarrier.expect(grad_full.index(s), BLOCK_M * D * 2)
        tma.async_copy_global_to_shared(grad_out, at, grad_full.index(s), grad_tiles.index(s))


@gluon.jit
def _sum_grad_live(
    own, group: gl.constexpr
):  # fmt: skip
    """One consumer: the gradients of 64 live tokens, over all queries of the heads that read them.

    Everything is transposed, keys by queries, so that the weights are a left operand as they are.
    """
    lse, delta, grad_k, grad_v, rows, factor, scale, first, b, head, GROUP, per_head, Q, H = own
    k_tiles, v_tiles, k_full, q_ring, grad_ring = rows
    q_tiles, q_full, q_free = q_ring
    grad_tiles, grad_full, grad_free = grad_ring
    STAGES: gl.constexpr = q_tiles.shape[0]
    BLOCK_M: gl.constexpr = q_tiles.shape[2]
    D: gl.constexpr = k_tiles.shape[4]
    DTYPE: gl.constexpr = k_tiles.dtype
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    COLUMNS: gl.constexpr = gl.SliceLayout(0, SCORES)
    acc_k = gl.zeros([_ROWS, D], gl.float32, SUMS)
    acc_v = gl.zeros([_ROWS, D], gl.float32, SUMS)
    k = _matrix(k_tiles, group)
    v = _matrix(v_tiles, group)
    mbarrier.wait(k_full, 0)
    for i in range(GROUP * per_head):
        s = i % STAGES
        phase = (i // STAGES) & 1
        base = (b.to(gl.int64) * H + head * GROUP + i // per_head) * Q
        token = i % per_head * BLOCK_M + gl.arange(0, BLOCK_M, layout=COLUMNS)
        lse_there = _load_lse(lse + base, token, Q)
        mbarrier.wait(q_full.index(s), phase)
        scores = _begin_scores(k, q_tiles, s)
        mbarrier.wait(grad_full.index(s), phase)
        grads = _begin_scores(v, grad_tiles, s)
        dot = warpgroup_mma_wait(1, deps=(scores,))
        p = gl.exp2(dot * factor - lse_there[None, :])
        left = gl.convert_layout(p.to(DTYPE), LEFT)
        delta_there = gl.load(delta + base + token, mask=token < Q, other=0.0)  # late: registers
        grad_p = warpgroup_mma_wait(0, deps=(grads,))
        sums_v = warpgroup_mma(left, _matrix(grad_tiles, s), acc_v, is_async=True)
        grad_s = p * (grad_p - delta_there[None, :])
        left = gl.convert_layout(grad_s.to(DTYPE), LEFT)
        sums_k = warpgroup_mma(left, _matrix(q_tiles, s), acc_k, is_async=True)
        acc_v = warpgroup_mma_wait(1, deps=(sums_v,))
        mbarrier.arrive(grad_free.index(s), count=1)
        acc_k = warpgroup_mma_wait(0, deps=(sums_k,))
        mbarrier.arrive(q_free.index(s), count=1)
    k.store((acc_k * scale).to(DTYPE))
    v.store(acc_v.to(DTYPE))
    fence_async_shared()
    at = [b, first + group * _ROWS, head, 0]
    tma.async_copy_shared_to_global(grad_k, at, k_tiles.index(group))
    tma.async_copy_shared_to_global(grad_v, at, v_tiles.index(group))
    tma.store_wait(0)


@gluon.jit
def _grad_live_kernel(
    grad_out, q, k_live, v_live, lse, delta, grad_k, grad_v, factor, scale, GROUP,
    STAGES: gl.constexpr,
):  # fmt: skip
    BLOCK_M: gl.constexpr = q.block_shape[1]
    first = gl.program_id(0) * (_CONSUMERS * _ROWS)
    b = gl.program_id(1)
    head = gl.program_id(2)
    Q = q.shape[1]
    H = q.shape[2]
    per_head = gl.cdiv(Q, BLOCK_M)
    q_ring = _ring(q, STAGES)
    grad_ring = _ring(grad_out, STAGES)
    k_tiles, v_tiles, k_full = _load_own(k_live, v_live, b, first, head)
    rows = (k_tiles, v_tiles, k_full, q_ring, grad_ring)
    own = (lse, delta, grad_k, grad_v, rows, factor, scale, first, b, head, GROUP, per_head, Q, H)
    gl.warp_specialize(
        [
            (_sum_grad_live, (own, 0)),
            (_sum_grad_live, (own, 1)),
            (_produce_queries, (q, grad_out, q_ring, grad_ring, b, head, GROUP, per_head)),
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
    B, Q, H, _D = q.shape
    L, kv_heads = k_live.shape[1:3]
    grad_out = _in_whole_units(grad_out)
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


def _in_whole_units(grad_out: Tensor) -> Tensor:
    """What autograd hands over may be strided or expanded in any way; the forward's inputs not."""
    unit = 16 // grad_out.element_size()
    *outer, last = grad_out.stride()
    if last == 1 and all(s > 0 and s % unit == 0 for s in outer) and grad_out.data_ptr() % 16 == 0:
        return grad_out
    return grad_out.contiguous()


def _factor(scale: float) -> float:
    """Scale of the products in base 2; never 0, whose product with the -inf of a mask is NaN."""
    return max(scale * math.log2(math.e), 1.2e-38)  # the smallest normal float32
