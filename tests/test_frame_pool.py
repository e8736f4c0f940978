"""The frame pool against a model that copies everything, and its references one by one.

`KVPO_SEQUENCES=5000 pytest tests/test_frame_pool.py` tries as many random histories.
"""

import gc
import os
import threading
import time
import weakref
from collections.abc import Iterable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from kvpo_kernels import (
    FramePool,
    HistoryRouting,
    PreparedSlots,
    RopeTable,
    RouteTable,
    Slots,
    Timeline,
    Window,
    frame_attention_mass,
    plan_history_routing,
    qk_norm_rope_write,
    routed_attention,
)
from kvpo_kernels.errors import DtypeError, FrameError, PoolError, ShapeError

LAYERS, TOKENS = 2, 2


def make_pool(num_slots: int = 12, host_slots: int = 0) -> FramePool:
    sizes = (num_slots, TOKENS, LAYERS, 1, 1)
    return FramePool(*sizes, dtype=torch.float32, host_slots=host_slots)


def write(timeline: Timeline, first: int, values: list[float]) -> None:
    """Frame i of every layer gets value, its keys, and -value, its values."""
    page = torch.tensor(values).repeat_interleave(TOKENS).view(-1, 1, 1)
    for layer in range(LAYERS):
        timeline.write(layer, first, page + 100_000 * layer, -page)


def read(pool: FramePool, slot: int) -> float:
    storage, at = pool._pages.storage, slot
    if slot >= pool.num_slots:  # of an offloaded frame
        storage, at = pool._pages.host[0], slot - pool.num_slots
    value = storage[0, 0, at, 0, 0, 0].item()
    for layer in range(LAYERS):
        assert (storage[0, layer, at] == value + 100_000 * layer).all()
        assert (storage[1, layer, at] == -value).all()
    return value


def filled(pool: FramePool, frames: int) -> Timeline:
    video = pool.timeline()
    video.append(frames)
    write(video, 0, [float(f) for f in range(frames)])
    return video


def test_append_write_slot() -> None:
    pool = make_pool()
    video = pool.timeline()
    assert video.append(3) == 0 and video.append(2) == 3
    write(video, 0, [0.0, 1.0, 2.0])
    assert [read(pool, video.slot(f)) for f in range(3)] == [0.0, 1.0, 2.0]
    assert video.committed_frames == 3 and video.num_frames == 5
    with pytest.raises(FrameError, match="frame 3: frame not resident: layer 0 of 2"):
        video.slot(3)


def test_window_and_routed() -> None:
    pool = make_pool(40)
    video = filled(pool, 4)
    frames = lambda slots: [int(read(pool, s)) for s in slots]
    assert frames(video.window(sink=3, local=6)) == [0, 1, 2, 3]
    video.append(11)
    assert frames(video.window(sink=3, local=6)) == [0, 1, 2, 3]  # not yet written
    write(video, 4, [float(f) for f in range(4, 15)])
    assert frames(video.window(sink=3, local=6)) == [0, 1, 2, 9, 10, 11, 12, 13, 14]
    assert frames(video.routed(sink=3, selected=[5, 9], nearest=1)) == [0, 1, 2, 5, 9, 14]
    assert frames(video.routed(sink=1, selected=[14], nearest=1)) == [0, 14, 14]
    with pytest.raises(ShapeError, match="repeats"):
        pool.routes([video.routed(sink=1, selected=[14], nearest=1)])
    video.evict(keep=[0, 1, 2, *range(9, 15)])
    with pytest.raises(FrameError, match=r"frame 5 was evicted; frames held: \[0, 14\]"):
        video.routed(sink=3, selected=[5], nearest=1)


def test_fork_copies_nothing_and_rewrites_are_private() -> None:
    pool = make_pool()
    video = filled(pool, 3)
    before = pool._pages.storage.clone()
    left, right = video.fork(2)
    assert torch.equal(pool._pages.storage, before) and pool.stats().free_slots == 9
    write(left, 1, [50.0])
    assert read(pool, left.slot(1)) == 50.0
    assert read(pool, right.slot(1)) == read(pool, video.slot(1)) == 1.0
    assert left.slot(0) == right.slot(0) and pool.stats().free_slots == 8


def test_writing_one_layer_of_a_shared_frame_carries_the_others_along() -> None:
    pool = make_pool()
    video = filled(pool, 1)
    (branch,) = video.fork(1)
    branch.write(1, 0, torch.full((TOKENS, 1, 1), 7.0), torch.full((TOKENS, 1, 1), 8.0))
    slot = branch.slot(0)
    assert (pool.k(1)[slot] == 7).all() and (pool.k(0)[slot] == 0).all()
    assert read(pool, video.slot(0)) == 0.0


def test_frames_forked_before_they_are_written_part_ways() -> None:
    pool = make_pool()
    video = pool.timeline()
    video.append(1)
    branches = video.fork(2)
    video.release()
    slots = pool.prepare_write(branches, 0, 1)
    assert slots.tensor.unique().numel() == 2
    for layer in range(LAYERS):
        page = torch.arange(2.0).view(2, 1, 1, 1, 1).expand(2, 1, TOKENS, 1, 1)
        pool.write(layer, slots, page, -page)
    assert [pool.k(0)[b.slot(0), 0, 0, 0].item() for b in branches] == [0.0, 1.0]
    assert pool.stats().free_slots == 10


def test_a_table_keeps_the_frames_it_was_made_with() -> None:
    pool = make_pool()
    video = filled(pool, 2)
    table = pool.routes([video.window(3, 6)])
    old = table.tolist()[0]
    write(video, 0, [90.0, 91.0])
    assert [read(pool, s) for s in old] == [0.0, 1.0]
    video.release()
    assert pool.stats().free_slots == 10  # the rewritten frames are gone, the table's are not
    del table
    gc.collect()
    assert pool.stats().free_slots == 12


def test_a_table_update_moves_its_references() -> None:
    pool = make_pool()
    video = filled(pool, 3)
    row = video.window(0, 3)
    table = pool.routes([row[:2]])
    video.release()
    with pytest.raises(FrameError, match="nothing holds this slot"):
        table.update([row[2:]])
    table.update([row[:1]])
    assert pool.stats().free_slots == 11


def test_a_pending_backward_keeps_the_frames() -> None:
    pool = make_pool()
    video = filled(pool, 1)
    table = pool.routes([[video.slot(0)]])
    y = attend(pool.k(0), pool.v(0), table)
    video.release()
    del table
    gc.collect()
    assert pool.stats().free_slots == 11
    assert saved_slots(y) == [0]
    y.backward()
    del y
    gc.collect()
    assert pool.stats().free_slots == 12


def test_a_forgotten_timeline_is_released() -> None:
    pool = make_pool()
    filled(pool, 4)
    gc.collect()
    assert pool.stats().free_slots == 12


def test_exhaustion_says_who_holds_what_and_changes_nothing() -> None:
    pool = make_pool(4)
    video = filled(pool, 3)
    table = pool.routes([video.window(3, 6)])
    with pytest.raises(PoolError, match="2 slots needed, 1 of 4 free; 3 held by timelines, 0 by"):
        video.append(2)
    with pytest.raises(PoolError, match="3 slots needed"):
        write(video, 0, [9.0, 9.0, 9.0])
    assert [read(pool, video.slot(f)) for f in range(3)] == [0.0, 1.0, 2.0]
    assert video.num_frames == 3 and pool.stats().free_slots == 1
    del table


def test_bad_writes_change_nothing() -> None:
    pool = make_pool()
    video = filled(pool, 1)
    page = torch.zeros(TOKENS, 1, 1)
    with pytest.raises(FrameError, match="frame 1 was never appended"):
        video.write(0, 1, page, page)
    turned = torch.zeros(1, TOKENS, 1)
    with pytest.raises(ShapeError, match=r"k must be \[frames \* 2, 1, 1\]"):
        video.write(0, 0, turned, turned)
    with pytest.raises(ShapeError, match=r"v must be \[frames \* 2, 1, 1\]"):
        video.write(0, 0, page, turned)
    with pytest.raises(DtypeError, match="slots must be of `prepare_write` or `advance`"):
        pool.mark_written(0, torch.tensor([[0]]))  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match=r"k must be \[frames \* 2, 1, 1\]"):
        video.write(0, 0, torch.zeros(3, 1, 1), torch.zeros(3, 1, 1))
    with pytest.raises(ShapeError, match="v must be"):
        video.write(0, 0, page, torch.zeros(2 * TOKENS, 1, 1))
    with pytest.raises(DtypeError, match="float64"):
        video.write(0, 0, page.double(), page)
    with pytest.raises(ShapeError, match=r"layer = 2 not in \[0, 2\)"):
        video.write(2, 0, page, page)
    assert read(pool, video.slot(0)) == 0.0
    video.release()
    with pytest.raises(PoolError, match="has been released"):
        video.append(1)
    with pytest.raises(ShapeError, match="another pool"):
        make_pool().prepare_write([filled(pool, 1)], 0, 1)


def test_fork_of_eight_is_quick_and_allocates_nothing() -> None:
    pool = FramePool(40, 1, 30, 1, 1, dtype=torch.float32)
    video = pool.timeline()
    video.append(33)
    best = float("inf")
    for _ in range(50):
        start = time.perf_counter()
        branches = video.fork(8)
        best = min(best, time.perf_counter() - start)
        del branches
    # 17 us where written; 1 ms would mean that something is copied per layer or per token.
    assert best < 1e-3


def test_fork_append_and_routes_run_no_operator() -> None:
    pool = make_pool()
    video = filled(pool, 3)
    seen = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    with Recorder():
        branches = video.fork(3)
        branches[0].append(2)
        branches[1].evict(keep=[0])
        branches[2].release()
    assert seen == []


def test_a_copy_that_fails_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = make_pool()
    video = filled(pool, 3)
    branches = video.fork(2)
    before = (pool.stats(), [dict(b._frames) for b in branches])

    def fail(self: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("on purpose")

    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "copy_", fail)
        with pytest.raises(torch.OutOfMemoryError):
            pool.prepare_write(branches, 1, 2)
    assert (pool.stats(), [dict(b._frames) for b in branches]) == before
    write(branches[0], 1, [50.0, 51.0])
    assert read(pool, branches[1].slot(1)) == read(pool, video.slot(1)) == 1.0


def test_stats_count_copies_and_the_peak() -> None:
    pool = make_pool()
    video = filled(pool, 3)
    left, right = video.fork(2)
    pool.prepare_write([left, right], 0, 2)
    stats = pool.stats()
    assert (stats.copied_slots, stats.peak_slots, stats.free_slots) == (4, 7, 5)
    assert stats.bytes == 12 * stats.slot_bytes == 12 * 2 * LAYERS * TOKENS * 4
    left.release()
    right.release()
    assert pool.stats().peak_slots == 7 and pool.stats().free_slots == 9
    with pytest.raises(ShapeError, match=r"timelines\[1\] is named twice"):
        pool.prepare_write([video, video], 0, 1)


def test_a_pool_that_does_not_fit() -> None:
    with pytest.raises((torch.OutOfMemoryError, RuntimeError), match=r"allocate|memory"):
        FramePool(1 << 30, 1560, 40, 40, 128)


def test_counts_survive_threads() -> None:
    pool = make_pool(64)
    video = filled(pool, 4)

    def churn() -> None:
        for _ in range(100):
            branches = video.fork(3)
            table = pool.routes([b.window(3, 6) for b in branches])
            branches[0].append(1)
            del table, branches

    threads = [threading.Thread(target=churn) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gc.collect()
    assert pool.stats().free_slots == 60 and pool.stats().shared_slots == 0


def test_advance_holds_no_more_than_the_window() -> None:
    """Eight branches stream in as many frames as their windows have, and read them all the time."""
    branches_of, local, blocks = 8, 6, 9
    pool = make_pool(21 + branches_of * local)
    prefix = filled(pool, 21)
    branches = prefix.fork(branches_of)
    for block in range(blocks):
        table = pool.routes([b.window(3, local) for b in branches])
        rows = table.tolist()
        before = [[read(pool, s) for s in row] for row in rows]
        first, slots = pool.advance(branches, 3, Window(3, local - 3), table)
        assert first == 21 + 3 * block and slots.tensor.unique().numel() == 24
        values = first + 100.0 * torch.arange(branches_of)[:, None] + torch.arange(3.0)
        page = values[:, :, None, None, None].expand(-1, -1, TOKENS, 1, 1)
        for layer in range(LAYERS):
            seen = pool.k(layer)[:, 0, 0, 0] - 100_000 * layer
            assert [[seen[s].item() for s in row] for row in rows] == before
            pool.write(layer, slots, page + 100_000 * layer, -page)
        for g, branch in enumerate(branches):
            assert branch.resident_frames == [*range(3), *range(first - 3, first + 3)]
            own = [read(pool, branch.slot(f)) for f in range(max(21, first - 3), first + 3)]
            assert own == [100.0 * g + f for f in range(max(21, first - 3), first + 3)]
    assert pool.stats().peak_slots == 21 + branches_of * local
    assert [read(pool, prefix.slot(f)) for f in range(21)] == [float(f) for f in range(21)]


def test_advance_leaves_what_others_read() -> None:
    pool = make_pool(6)
    video = filled(pool, 3)
    other = pool.routes([[video.slot(0)]])
    table = pool.routes([[video.slot(0), video.slot(1)]])
    (branch,) = video.fork(1)  # and holds frame 1
    branch.evict([1])
    taken = [video.slot(f) for f in range(3)]
    _, slots = pool.advance([video], 1, [], table)
    assert slots.tolist() == [[taken[2]]]  # nobody reads frame 2; the table did not need it
    assert [read(pool, s) for s in taken[:2]] == [0.0, 1.0]
    with pytest.raises(PoolError, match="5 slots needed, 3 of 6 free"):
        pool.advance([video], 5, [3], pool.routes([[]]))
    assert video.num_frames == 4
    del other, table


def test_advance_does_not_count_on_frames_that_a_branch_holds() -> None:
    pool = make_pool(4)
    video = filled(pool, 4)
    (branch,) = video.fork(1)
    table = pool.routes([video.window(3, 6)])
    before = pool.stats()
    with pytest.raises(PoolError, match="1 slots needed, 0 of 4 free"):
        pool.advance([video], 1, [], table)
    assert pool.stats() == before and video.resident_frames == branch.resident_frames
    branch.evict([0, 1, 2])
    first, slots = pool.advance([video], 1, [0, 1, 2], table)
    assert first == 4 and slots[0][0] not in [branch.slot(f) for f in range(3)]
    with pytest.raises(PoolError):
        branch.append(1)


def test_advance_refuses_what_it_cannot_mean() -> None:
    pool, other = make_pool(), make_pool()
    video, table = filled(pool, 2), pool.routes([[]])
    (branch,) = video.fork(1)
    branch.append(1)
    for call, message in (
        (lambda: pool.advance([video, branch], 1, [], table), r"timelines\[1\] has 3 frames"),
        (lambda: pool.advance([video, video], 1, [], table), "named twice"),
        (lambda: pool.advance([video], -1, [], table), "num_frames must be at least 0"),
        (lambda: pool.advance([video], 1, [], other.routes([[]])), "table was not made by"),
        (lambda: pool.advance([video], 1, [], RouteTable([[]], 12)), "table was not made by"),
        (lambda: other.advance([video], 1, [], other.routes([[]])), "another pool"),
    ):
        with pytest.raises(ShapeError, match=message):
            call()
    assert video.num_frames == 2 and video.resident_frames == [0, 1]


def test_offloaded_frames_come_back() -> None:
    pool = make_pool(6, host_slots=5)
    video = filled(pool, 6)
    left, right = video.fork(2)
    table = pool.routes([[video.slot(1), video.slot(5)]])
    held = table.tolist()[0]
    video.offload([0, 1, 2, 3])
    # Moved once, for all that share them; the table keeps the slot that it reads.
    for timeline in (video, left, right):
        assert timeline.offloaded_frames == [0, 1, 2, 3]
        assert timeline.resident_frames == list(range(6)) and timeline.committed_frames == 6
    stats = pool.stats()
    assert (stats.free_slots, stats.host_slots, stats.free_host_slots) == (3, 5, 1)
    assert [read(pool, s) for s in held] == [1.0, 5.0]
    with pytest.raises(FrameError, match="frame 1 is offloaded: fetch it first"):
        left.routed(sink=0, selected=[1], nearest=0)
    with pytest.raises(FrameError, match="frame 0 is offloaded"):
        write(left, 0, [9.0])
    left.append(2)
    write(left, 6, [60.0, 70.0])
    left.fetch([1, 5])
    assert right.offloaded_frames == [0, 2, 3] and read(pool, right.slot(1)) == 1.0
    assert pool.stats().free_slots == 0
    with pytest.raises(PoolError, match="1 slots needed, 0 of 6 free"):
        left.fetch([2])
    del table
    gc.collect()
    left.fetch([2])
    assert [read(pool, right.slot(f)) for f in (1, 2, 4, 5)] == [1.0, 2.0, 4.0, 5.0]
    for timeline in (video, left, right):
        timeline.release()
    assert pool.stats().free_slots == 6 and pool.stats().free_host_slots == 5


def test_advance_does_not_count_on_offloaded_frames() -> None:
    pool = make_pool(3, host_slots=1)
    video = filled(pool, 3)
    video.offload([0])
    table = pool.routes([[]])
    with pytest.raises(PoolError, match="2 slots needed, 1 of 3 free"):
        pool.advance([video], 2, [1, 2], table)
    assert video.resident_frames == [0, 1, 2]
    pool.advance([video], 1, [1, 2], table)
    assert pool.stats().free_host_slots == 1 and pool.stats().free_slots == 0


def test_offloading_is_all_or_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = make_pool(6, host_slots=2)
    video = filled(pool, 4)
    video.append(1)
    before = (pool.stats(), dict(video._frames))
    for frames, message in (
        ([0, 1, 2], "3 host slots needed, 2 of 2 free"),
        ([0, 4], "frame 4: frame not resident: layer 0"),
        ([0, 9], "frame 9 was never appended"),
    ):
        with pytest.raises((PoolError, ShapeError), match=message):
            video.offload(frames)

    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("on purpose")

    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "copy_", fail)
        with pytest.raises(torch.OutOfMemoryError):
            video.offload([0])
    assert (pool.stats(), dict(video._frames)) == before
    video.offload([0, 0, 1])
    video.offload([1])
    assert video.offloaded_frames == [0, 1]
    video.evict([1, 2])
    assert pool.stats().free_host_slots == 1 and pool.stats().free_slots == 5
    with pytest.raises(ShapeError, match="host_slots must be at least 0"):
        make_pool(1, -1)


def test_quantized_frames_are_offloaded_with_their_scales() -> None:
    pool = FramePool(2, 4, 2, 3, 16, page_dtype=torch.int8, dtype=torch.float32, host_slots=2)
    video = pool.timeline()
    video.append(2)
    for layer in range(2):
        video.write(layer, 0, *(torch.randn(2, 8, 3, 16) * (1 + layer)))
    before = [(pool.v(1)[s].clone(), pool.k_scales(1)[s].clone()) for s in map(video.slot, (0, 1))]
    video.offload([0, 1])
    pool._pages.storage.zero_()
    pool._pages.scales.zero_()
    video.fetch([1])
    video.fetch([0])
    for frame, (values, scales) in enumerate(before):
        slot = video.slot(frame)
        assert torch.equal(pool.v(1)[slot], values)
        assert torch.equal(pool.k_scales(1)[slot], scales)


def attend(k_pool: torch.Tensor, v_pool: torch.Tensor, table: RouteTable) -> torch.Tensor:
    """An output that needs a gradient, of one query; weights that do not all fall on one frame."""
    q = torch.ones(1, 1, 1, k_pool.shape[3], requires_grad=True)
    return routed_attention(q, k_pool, v_pool, table, scale=1e-3).sum()


def gradient(out: torch.Tensor) -> torch.Tensor:
    (query,) = (f for f, _ in out.grad_fn.next_functions[0][0].next_functions if f is not None)
    return torch.autograd.grad(out, query.variable)[0]


def saved_slots(out: torch.Tensor) -> list[int]:
    slots = out.grad_fn.next_functions[0][0].constants[2]
    return [s for s in slots.tolist()[0] if s >= 0]


def expected_gradient(pool: FramePool, table: RouteTable) -> torch.Tensor:
    """From copies of the frames as they are now."""
    copies = (pool.k(0).clone(), pool.v(0).clone())
    return gradient(attend(*copies, RouteTable(table.slots.clone(), pool.num_slots)))


def kernel_pool(dtype: torch.dtype, page_dtype: torch.dtype | None = None) -> FramePool:
    """With heads that the kernels take, and room."""
    return FramePool(16, TOKENS, LAYERS, 1, 16, dtype, host_slots=6, page_dtype=page_dtype)


def write_random(timeline: Timeline, first: int, frames: int, seed: int) -> None:
    dtype = timeline._pool.dtype
    k, v = torch.randn(2, frames, TOKENS, 1, 16, generator=torch.Generator().manual_seed(seed))
    for layer in range(LAYERS):
        timeline.write(layer, first, k.to(dtype), v.to(dtype))


@pytest.mark.parametrize("page_dtype", [None, torch.int8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_pending_backward_outlives_every_other_write(
    dtype: torch.dtype, page_dtype: torch.dtype | None
) -> None:
    pool = kernel_pool(dtype, page_dtype)
    video = pool.timeline()
    video.append(6)
    write_random(video, 0, 6, seed=1)
    table = pool.routes([video.window(1, 3)])

    def graph(table: RouteTable) -> torch.Tensor:
        q = torch.ones(1, 2, 1, 16, dtype=dtype, requires_grad=True)
        scales = {"k_scales": pool.k_scales(0), "v_scales": pool.v_scales(0)}
        return routed_attention(q, pool.k(0), pool.v(0), table, **scales).sum()

    expected, pending = gradient(graph(table)), [graph(table) for _ in range(6)]

    def still_runs() -> None:
        assert torch.equal(gradient(pending.pop()), expected)

    video.append(1)
    write_random(video, 6, 1, seed=2)
    still_runs()
    fork = video.fork(1)[0]
    write_random(fork, 0, 1, seed=3)
    assert pool.stats().copied_slots == 1
    still_runs()
    video.offload([0, 4])
    still_runs()
    video.fetch([0, 4])
    still_runs()
    fork.release()
    video.evict([6])  # only the table holds its frames now
    video.append(7)
    write_random(video, 7, 7, seed=4)
    still_runs()
    with pytest.raises(PoolError, match="by route tables or pending backwards only"):
        video.append(8)
    del table
    still_runs()
    assert not pending
    gc.collect()
    assert video.append(8) == 14


def test_a_pending_backward_of_a_compiled_graph_outlives_them_too() -> None:
    pool = kernel_pool(torch.float32)
    video = pool.timeline()
    video.append(6)
    write_random(video, 0, 6, seed=1)
    table = pool.routes([video.window(1, 3)])
    q = torch.ones(1, 2, 1, 16, requires_grad=True)

    def inside(q: torch.Tensor) -> torch.Tensor:
        return routed_attention(q, pool.k(0), pool.v(0), table).sum()

    expected = torch.autograd.grad(inside(q), q)[0]
    out = torch.compile(inside, backend="aot_eager", fullgraph=True)(q)
    video.append(1)
    write_random(video, 6, 1, seed=2)
    assert torch.equal(torch.autograd.grad(out, q)[0], expected)


def test_a_backward_that_advance_takes_the_frames_of_raises() -> None:
    pool = make_pool(4)
    video = filled(pool, 4)
    table = pool.routes([video.window(1, 3)])
    out = attend(pool.k(0), pool.v(0), table)
    q = torch.ones(1, 1, 1, 1, requires_grad=True)
    again = checkpoint(
        lambda q: routed_attention(q, pool.k(0), pool.v(0), table), q, use_reentrant=False
    )
    _, slots = pool.advance([video], 2, [0], table)
    with torch.no_grad():  # the context pass
        routed_attention(q, pool.k(0), pool.v(0), table)
    page = torch.zeros(1, 2, TOKENS, 1, 1)
    for layer in range(LAYERS):
        pool.write(layer, slots, page, page)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradient(out)
    with pytest.raises(ShapeError, match="no backward can run over it"):
        again.sum().backward()
    with pytest.raises(ShapeError, match="no backward can run over it"):
        attend(pool.k(0), pool.v(0), table)
    table.update([video.window(1, 1)])  # which names other slots
    expected = expected_gradient(pool, table)
    assert torch.equal(gradient(attend(pool.k(0), pool.v(0), table)), expected)


def test_frames_of_a_pending_backward_whose_table_was_garbage() -> None:
    """Garbage of a cycle loses its weak references first; before torch 2.10 a tensor's too, while
    autograd still has it."""
    pool = make_pool(4)
    video = filled(pool, 2)

    def forward() -> torch.Tensor:
        table = pool.routes([video.window(0, 2)])
        table.itself = table  # type: ignore[attr-defined]
        return attend(pool.k(0), pool.v(0), table)

    out = forward()
    gc.collect()
    video.release()
    assert pool.stats().table_slots == 2 and pool.stats().free_slots == 2
    gradient(out)
    del out
    gc.collect()
    assert pool.stats().free_slots == 4


def test_a_release_from_the_garbage_collector_waits_for_the_method_it_interrupts() -> None:
    pool = make_pool(8)
    video, other = filled(pool, 2), filled(pool, 2)
    branch = video.fork(1)[0]
    copy = pool._pages.copy

    def interrupted(moves: list[tuple[int, int]]) -> None:
        other.release()  # as an object's __del__ does, at any allocation
        copy(moves)

    pool._pages.copy = interrupted  # type: ignore[method-assign]
    slots = pool.prepare_write([branch], 0, 2)
    assert pool.stats().free_slots == 4
    video.append(4)
    taken = [*slots.tensor.flatten().tolist(), *video._frames.values()]
    assert sorted(taken) == list(range(8))


def test_a_table_is_for_the_frames_of_its_pool() -> None:
    pool, other = kernel_pool(torch.float32), kernel_pool(torch.float32)
    video = pool.timeline()
    video.append(2)
    write_random(video, 0, 2, seed=1)
    table = pool.routes([video.window(0, 2)])
    q = torch.ones(1, 2, 1, 16)
    for k_pool, v_pool, name in (
        (other.k(0), other.v(0), "k_pool"),
        (pool.k(0).clone(), pool.v(0), "k_pool"),
        (pool.k(0), pool.v(0) + 0, "v_pool"),
    ):
        with pytest.raises(ShapeError, match=f"{name} is not of the FramePool whose `routes`"):
            routed_attention(q, k_pool, v_pool, table)
    live = pool.k(1)[:1]  # of another layer, which is written to as well
    with pytest.raises(ShapeError, match="k_live lies in the memory of k_pool"):
        routed_attention(q.requires_grad_(), pool.k(0), pool.v(0), table, live, live.clone())


def test_a_kernels_write_over_shared_frames_is_noticed() -> None:
    pool = make_pool()
    video = filled(pool, 1)
    slots = pool.prepare_write([video], 0, 1)
    branch = video.fork(1)[0]
    with pytest.raises(PoolError, match=r"slots\[branch=0, frame=0\] = 0 is held by 2 timelines"):
        pool.mark_written(0, slots)
    branch.release()
    pool.mark_written(0, slots)
    video.release()
    with pytest.raises(PoolError, match="frame 0 went with its timeline, which was released"):
        pool.mark_written(0, slots)


def test_numbers_of_any_integer_type_and_no_others() -> None:
    pool = make_pool()
    video = filled(pool, 4)
    two = torch.tensor(2)
    table = pool.routes([[video.slot(np.int64(0)), video.slot(torch.tensor(1))]])
    for number in (1.0, True, "1", torch.tensor(1.5), None):
        for call in (
            lambda n: make_pool(n),
            lambda n: video.append(n),
            lambda n: video.fork(n),
            lambda n: pool.advance([video], n, [0], table),
            lambda n: pool.prepare_write([video], 0, n),
            lambda n: video.slot(n),
            lambda n: RouteTable([[n]], 4),
            lambda n: video.evict([n]),
            lambda n: video.window(n, 1),
        ):
            with pytest.raises(DtypeError, match="must be an int, got"):
                call(number)
    assert pool.stats().timeline_slots == 4 and video.num_frames == 4
    assert video.slot(two) == video.slot(2)
    video.evict(Window(1, 1, torch.tensor([1])))
    assert video.resident_frames == [0, 1, 3]
    video.evict(torch.tensor([0, 1]))
    assert video.resident_frames == [0, 1]
    pool.advance([video], two, np.array([1]), table)
    assert list(video._frames) == [1, 4, 5]


@pytest.fixture
def other_defaults() -> Iterator[None]:
    """As a program has them whose models are made on a GPU in bfloat16."""
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("other_defaults")
def test_the_defaults_of_a_program_are_not_ours() -> None:
    plan = plan_history_routing(HistoryRouting())
    for page_dtype in (None, torch.int8):
        pool = kernel_pool(torch.float32, page_dtype)
        video = pool.timeline()
        video.append(6)
        frames = torch.ones(6 * TOKENS, 1, 16, dtype=torch.float32, device="cpu")
        for layer in range(LAYERS):
            video.write(layer, 0, frames, frames)
        table = pool.routes([video.window(1, 3)])
        _, slots = pool.advance([video], 1, [0], table)
        x = frames[None, :TOKENS]
        weight = torch.ones(16, dtype=torch.float32, device="cpu")
        scales = {"k_scales": pool.k_scales(0), "v_scales": pool.v_scales(0)}
        where = {"k_pool": pool.k(0), "v_pool": pool.v(0), "slots": slots, **scales}
        rope, grid = RopeTable(16), (1, 1, TOKENS)
        q = qk_norm_rope_write(x, x, x, weight, weight, rope, 6, grid=grid, **where)
        out, lse = routed_attention(q, pool.k(0), pool.v(0), table, return_lse=True, **scales)
        mass = frame_attention_mass(q, pool.k(0), table, lse, k_scales=scales["k_scales"])
        assert out.device.type == mass.device.type == "cpu" and mass.sum().item() > 0.9
    assert len(plan.selected) == 8


def test_a_backward_over_a_plain_table_notices_a_kernels_write() -> None:
    weight, rope = torch.ones(16), RopeTable(16)
    x = torch.ones(1, TOKENS, 1, 16)
    for backend in ("cpu", "reference"):
        k_pool, v_pool = torch.zeros(2, 4, TOKENS, 1, 16)
        out = attend(k_pool, v_pool, RouteTable([[1]], 4))
        pools = {"k_pool": k_pool, "v_pool": v_pool, "slots": torch.tensor([[1]])}
        norm = {"grid": (1, 1, TOKENS), "backend": backend}
        qk_norm_rope_write(x, x, x, weight, weight, rope, 0, **norm, **pools)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            gradient(out)


def test_what_inference_mode_made_serves_gradients_later() -> None:
    with torch.inference_mode():
        pool = make_pool()
        video = filled(pool, 4)
        table = pool.routes([video.window(1, 2)])
    expected = expected_gradient(pool, table)
    assert torch.equal(gradient(attend(pool.k(0), pool.v(0), table)), expected)
    table.update([video.window(1, 1)])
    assert table.tolist() == [video.window(1, 1)]
    with torch.inference_mode():
        write(video, 0, [9.0])
    assert pool.k(0)[video.slot(0)].eq(9).all()


def test_a_table_holds_what_it_was_given_whatever_it_came_as() -> None:
    for given in (
        lambda slots: ([s for s in row] for row in [slots]),
        lambda slots: [iter(slots)],
        lambda slots: (list(slots),),
        lambda slots: [slots[:1] + slots[1:]],
        lambda slots: [[slots[0], *slots[1:]]],
    ):
        pool = make_pool(4)
        video = filled(pool, 3)
        slots = video.window(0, 2)
        table = pool.routes(given(slots))
        assert table.tolist() == [slots] and pool.stats().table_slots == 2
        video.evict([])
        assert pool.stats().free_slots == 2
        del table
        assert pool.stats().free_slots == 4


def test_evicting_the_newest_frames_does_not_move_the_window() -> None:
    pool = make_pool()
    video = filled(pool, 6)
    video.evict(range(4))
    assert video.committed_frames == 6 and video.fork(1)[0].committed_frames == 6
    with pytest.raises(FrameError, match="frame 4 was evicted"):
        video.window(1, 2)
    with pytest.raises(FrameError, match="frame 5 was evicted"):
        video.routed(1, [2], 1)
    with pytest.raises(ShapeError, match="local must be at least 0, got -1"):
        video.window(1, -1)
    with pytest.raises(ShapeError, match="nearest must be at least 0, got -2"):
        video.routed(1, [2], -2)
    first, slots = pool.advance([video], 1, range(3), pool.routes([[]]))
    assert first == 6 and video.committed_frames == 6 and video.resident_frames == [0, 1, 2]
    page = torch.zeros(1, TOKENS, 1, 1)
    for layer in range(LAYERS):
        pool.write(layer, slots, page, page)
    assert video.committed_frames == 7


def test_frames_move_with_a_timeline_that_is_about_to_be_forgotten() -> None:
    """Its weak references are gone and its finalizer has not run yet: from a callback of another
    reference, which runs between the two, the pool moves the frames."""
    pool = make_pool(6, host_slots=6)
    video = filled(pool, 3)
    dying = video.fork(1)[0]
    moved = []

    def move(_: object) -> None:
        video.offload([0, 1])
        moved.append(True)

    reference = weakref.ref(dying, move)  # the latest reference is called first
    del dying
    gc.collect()
    assert moved and reference() is None
    stats = pool.stats()
    assert (stats.free_slots, stats.free_host_slots, stats.shared_slots) == (5, 4, 0)
    video.fetch([0, 1])
    assert [read(pool, video.slot(f)) for f in range(3)] == [0.0, 1.0, 2.0]
    video.release()
    assert pool.stats().free_slots == 6 and pool.stats().free_host_slots == 6


Model = dict[int, float | None]


class PoolMachine(RuleBasedStateMachine):
    """Random histories; the model keeps a private copy of every frame of every timeline."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = make_pool(16, host_slots=4)
        self.live: list[tuple[Timeline, Model]] = [(self.pool.timeline(), {})]
        self.tables: list[tuple[RouteTable, Slots, list[float]]] = []
        self.graphs: list[tuple[torch.Tensor, list[float], torch.Tensor]] = []
        self.rows: list[tuple[Slots, Model, list[float]]] = []
        self.prepared: list[tuple[PreparedSlots, Model, int]] = []
        self.next_value = 1.0

    def pick(self, data: st.DataObject) -> tuple[Timeline, Model]:
        return self.live[data.draw(st.integers(0, len(self.live) - 1))]

    def offloaded(self, timeline: Timeline, frames: Iterable[int]) -> bool:
        """Whether some of the frames are, which then cannot be read or written."""
        for frame in set(frames) & set(timeline.offloaded_frames):
            with pytest.raises(FrameError, match=f"frame {frame} is offloaded"):
                timeline.slot(frame)
            return True
        return False

    @rule(data=st.data())
    def offload(self, data: st.DataObject) -> None:
        timeline, model = self.pick(data)
        frames = [f for f, value in model.items() if value is not None and data.draw(st.booleans())]
        try:
            timeline.offload(frames)
        except PoolError:
            return
        assert set(frames) <= set(timeline.offloaded_frames)

    @rule(data=st.data())
    def fetch(self, data: st.DataObject) -> None:
        timeline, model = self.pick(data)
        frames = [f for f in model if data.draw(st.booleans())]
        try:
            timeline.fetch(frames)
        except PoolError:
            return
        assert not set(frames) & set(timeline.offloaded_frames)

    @rule(data=st.data(), frames=st.integers(0, 3))
    def append(self, data: st.DataObject, frames: int) -> None:
        timeline, model = self.pick(data)
        before = timeline.num_frames
        try:
            first = timeline.append(frames)
        except PoolError:
            assert self.pool.stats().free_slots < frames and timeline.num_frames == before
            return
        model.update({first + i: None for i in range(frames)})

    @rule(data=st.data(), frames=st.integers(1, 2))
    def write(self, data: st.DataObject, frames: int) -> None:
        timeline, model = self.pick(data)
        starts = [f for f in model if all(f + i in model for i in range(frames))]
        if not starts:
            return
        first = data.draw(st.sampled_from(starts))
        values = [self.next_value + i for i in range(frames)]
        self.next_value += frames
        if self.offloaded(timeline, range(first, first + frames)):
            return
        try:
            write(timeline, first, values)
        except PoolError:
            return
        model.update(dict(zip(range(first, first + frames), values, strict=True)))

    @precondition(lambda self: len(self.live) < 5)
    @rule(data=st.data(), branches=st.integers(1, 2))
    def fork(self, data: st.DataObject, branches: int) -> None:
        timeline, model = self.pick(data)
        self.live += [(branch, dict(model)) for branch in timeline.fork(branches)]

    @rule(data=st.data(), keep=st.sets(st.integers(0, 8)))
    def evict(self, data: st.DataObject, keep: set[int]) -> None:
        timeline, model = self.pick(data)
        timeline.evict(keep)
        for frame in [f for f in model if f not in keep]:
            del model[frame]

    @rule(data=st.data())
    def routes(self, data: st.DataObject) -> None:
        timeline, model = self.pick(data)
        frames = [f for f in model if data.draw(st.booleans())]
        if self.offloaded(timeline, frames):
            return
        if any(model[f] is None for f in frames):
            with pytest.raises(FrameError, match="not resident"):
                [timeline.slot(f) for f in frames]
            return
        row = timeline.routed(0, frames, 0)
        self.tables.append((self.pool.routes([row]), row, [model[f] for f in frames]))  # type: ignore[misc]

    @rule(data=st.data())
    def remember(self, data: st.DataObject) -> None:
        """Slots to be used later, when their frames may have left them."""
        timeline, model = self.pick(data)
        here = [f for f in model if f not in timeline.offloaded_frames]
        frames = [f for f in here if model[f] is not None and data.draw(st.booleans())]
        self.rows.append((timeline.routed(0, frames, 0), model, [model[f] for f in frames]))  # type: ignore[misc]
        if here:
            frame = data.draw(st.sampled_from(here))
            try:
                slots = self.pool.prepare_write([timeline], frame, 1)
            except PoolError:
                return
            self.prepared.append((slots, model, frame))

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def read_what_was_remembered(self, data: st.DataObject) -> None:
        """An error, or the frames that were meant: as they were then, or their timeline's now."""
        row, model, values = self.rows[data.draw(st.integers(0, len(self.rows) - 1))]
        try:
            self.pool.routes([row])
        except FrameError:
            return
        for slot, frame, value in zip(row, row.frames, values, strict=True):
            assert read(self.pool, slot) in (value, model.get(frame))

    @precondition(lambda self: self.prepared)
    @rule(data=st.data())
    def write_what_was_remembered(self, data: st.DataObject) -> None:
        """An error, or only the frame that was meant is written: the invariants see the others."""
        slots, model, frame = self.prepared.pop(data.draw(st.integers(0, len(self.prepared) - 1)))
        value, page = self.next_value, torch.full((1, 1, TOKENS, 1, 1), self.next_value)
        self.next_value += 1
        try:
            for layer in range(LAYERS):
                self.pool.write(layer, slots, page + 100_000 * layer, -page)
        except PoolError:
            return
        assert frame in model
        model[frame] = value

    @rule(data=st.data())
    def write_together(self, data: st.DataObject) -> None:
        """One layer after the other, of the same frame of several timelines, in one batch."""
        frame = data.draw(st.integers(0, 8))
        here = [x for x in self.live if frame in x[1] and not self.offloaded(x[0], [frame])]
        rows = [x for x in here if data.draw(st.booleans())]
        if not rows:
            return
        try:
            slots = self.pool.prepare_write([timeline for timeline, _ in rows], frame, 1)
        except PoolError:
            return
        values = torch.arange(len(rows), dtype=torch.float32) + self.next_value
        self.next_value += len(rows)
        page = values.view(-1, 1, 1, 1, 1).expand(-1, 1, TOKENS, 1, 1)
        for layer in range(LAYERS):
            self.pool.write(layer, slots, page + 100_000 * layer, -page)
        for (_, model), value in zip(rows, values.tolist(), strict=True):
            model[frame] = value

    @rule(data=st.data(), frames=st.integers(1, 2), keep=st.sets(st.integers(0, 8)))
    def advance(self, data: st.DataObject, frames: int, keep: set[int]) -> None:
        """A context pass: in every layer, the table's frames are read and then written over."""
        first = self.pick(data)[0].num_frames
        rows = [x for x in self.live if x[0].num_frames == first and data.draw(st.booleans())]
        written = lambda model: [f for f, value in model.items() if value is not None]
        chosen = lambda model: [f for f in written(model) if data.draw(st.booleans())]
        here = lambda row: [f for f in chosen(row[1]) if f not in row[0].offloaded_frames]
        seen = [here(row) for row in rows]
        lists = [[t.slot(f) for f in own] for (t, _), own in zip(rows, seen, strict=True)]
        expected = [m[f] for (_, m), own in zip(rows, seen, strict=True) for f in own]
        table = self.pool.routes(lists)
        try:
            at, slots = self.pool.advance([t for t, _ in rows], frames, keep, table)
        except PoolError:
            return
        assert at == first or not rows
        values = torch.arange(slots.tensor.numel(), dtype=torch.float32) + self.next_value
        self.next_value += slots.tensor.numel()
        page = values.view(len(rows), frames, 1, 1, 1).expand(-1, -1, TOKENS, 1, 1)
        for layer in range(LAYERS):
            for slot, value in zip([s for row in lists for s in row], expected, strict=True):
                assert (self.pool.k(layer)[slot] == value + 100_000 * layer).all()
                assert (self.pool.v(layer)[slot] == -value).all()
            self.pool.write(layer, slots, page + 100_000 * layer, -page)
        for (_, model), own in zip(rows, values.view(len(rows), frames).tolist(), strict=True):
            for frame in [f for f in model if f not in keep]:
                del model[frame]
            model.update({first + i: value for i, value in enumerate(own)})

    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        """Calls that are refused: the invariants say that nothing has changed."""
        timeline, _ = self.pick(data)
        page = torch.zeros(TOKENS, 1, 1)
        for call in (
            lambda: timeline.append(17),
            lambda: timeline.append(-1),
            lambda: timeline.write(0, timeline.num_frames, page, page),
            lambda: timeline.write(LAYERS, 0, page, page),
            lambda: timeline.write(0, 0, page, page[1:]),
            lambda: timeline.slot(99),
            lambda: timeline.fork(-1),
            lambda: self.pool.routes([[0, 1]]),  # type: ignore[list-item]
            lambda: self.pool.prepare_write([timeline, timeline], 0, 1),
            lambda: make_pool(1).prepare_write([timeline], 0, 1),
        ):
            with pytest.raises((ShapeError, DtypeError, PoolError)):
                call()

    @rule(data=st.data(), sink=st.integers(0, 2), local=st.integers(0, 3))
    def evict_by_policy(self, data: st.DataObject, sink: int, local: int) -> None:
        timeline, model = self.pick(data)
        end = timeline.committed_frames  # of frames that may have been evicted since
        timeline.evict(Window(sink, local))
        for frame in [f for f in model if not (f < sink or end - local <= f < end)]:
            del model[frame]

    @precondition(lambda self: self.tables)
    @rule()
    def drop_table(self) -> None:
        self.tables.pop(0)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def update_table(self, data: st.DataObject) -> None:
        """To some of its own frames: a table may name what nothing else holds any more."""
        at = data.draw(st.integers(0, len(self.tables) - 1))
        table, row, values = self.tables[at]
        kept = [data.draw(st.booleans()) for _ in values]
        row = Slots.of([s for s, k in zip(row, kept, strict=True) if k], "")
        table.update([row])
        self.tables[at] = (table, row, [v for v, k in zip(values, kept, strict=True) if k])

    @precondition(lambda self: self.tables)
    @rule()
    def pending_backward(self) -> None:
        """A graph holds the slots when the table is gone, and lets go of them."""
        table, _, values = self.tables.pop(0)
        expected = expected_gradient(self.pool, table)
        out = attend(self.pool.k(0), self.pool.v(0), table)
        self.graphs.append((out, values, expected))

    @precondition(lambda self: self.graphs)
    @rule()
    def run_backward(self) -> None:
        out, _, expected = self.graphs.pop(0)
        assert torch.equal(gradient(out), expected)

    @precondition(lambda self: len(self.live) > 1)
    @rule(explicit=st.booleans())
    def release(self, explicit: bool) -> None:
        timeline, model = self.live.pop()
        model.clear()
        if explicit:
            timeline.release()

    @invariant()
    def every_timeline_and_table_reads_its_own_frames(self) -> None:
        used = set()
        for timeline, model in self.live:
            done = [f for f, value in model.items() if value is not None]
            assert max(done, default=-1) < timeline.committed_frames <= timeline.num_frames
            for frame, value in model.items():
                used.add(timeline._frames[frame])
                if value is not None:
                    assert read(self.pool, timeline._frames[frame]) == value
        for table, _, values in self.tables:
            slots = table.tolist()[0]
            used |= set(slots)
            assert [read(self.pool, s) for s in slots] == values
        for output, values, _ in self.graphs:
            slots = saved_slots(output)
            used |= set(slots)
            assert [read(self.pool, s) for s in slots] == values
        here = sum(slot < 16 for slot in used)
        stats = self.pool.stats()
        assert stats.free_slots == 16 - here  # no slot leaked
        assert stats.free_host_slots == 4 - (len(used) - here)


PoolMachine.TestCase.settings = settings(
    max_examples=int(os.environ.get("KVPO_SEQUENCES", "60")),
    stateful_step_count=30,
    deadline=None,  # the machine is shared
    suppress_health_check=[HealthCheck.too_slow],
)
test_random_histories = PoolMachine.TestCase
