"""Bad routes and bad use of the pool: the stated error, and nothing has changed."""

from collections.abc import Callable
from dataclasses import asdict

import pytest
import torch

from kvpo_kernels import FramePool, RouteTable, Timeline, qk_norm_rope_write, routed_attention
from kvpo_kernels import RopeTable as Rope
from kvpo_kernels.errors import DtypeError, PoolError, ShapeError

LAYERS, TOKENS, HEADS, D = 2, 4, 2, 16


def make_pool(num_slots: int = 12, frames: int = 6) -> tuple[FramePool, Timeline]:
    pool = FramePool(num_slots, TOKENS, LAYERS, HEADS, D, dtype=torch.float32)
    video = pool.timeline()
    video.append(frames)
    page = torch.arange(frames, dtype=torch.float32).view(-1, 1, 1, 1)
    page = page.expand(-1, TOKENS, HEADS, D).contiguous()
    for layer in range(LAYERS):
        video.write(layer, 0, page, -page)
    return pool, video


def unchanged(pool: FramePool, video: Timeline, call: Callable[[], object], error, match) -> None:
    before = (pool.stats(), pool._pages.storage.clone(), video.resident_frames, video.num_frames)
    with pytest.raises(error, match=match):
        call()
    assert asdict(pool.stats()) == asdict(before[0])
    assert torch.equal(pool._pages.storage, before[1])
    assert (video.resident_frames, video.num_frames) == before[2:]


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ([[0], [1, 12]], r"route\[branch=1, slot=1\] = 12 not in \[0, 12\)"),
        ([[-2]], r"route\[branch=0, slot=0\] = -2 not in \[0, 12\)"),
        ([[-1]], r"route\[branch=0, slot=0\] = -1 not in \[0, 12\)"),
        ([[3, 3]], r"route\[branch=0, slot=1\] = 3 repeats slot=0"),
        ([[0], [2, 9]], r"route\[branch=1, slot=1\] = 9: frame not resident: nothing holds"),
    ],
)
def test_routes_that_name_no_frame(rows: list[list[int]], match: str) -> None:
    pool, video = make_pool()
    unchanged(pool, video, lambda: pool.routes(rows), ShapeError, match)


def test_a_route_to_a_frame_still_being_written() -> None:
    pool, video = make_pool()
    video.append(1)
    page = torch.ones(1, TOKENS, HEADS, D)
    video.write(0, 6, page, page)
    slot = video._frames[6]
    match = rf"route\[branch=0, slot=1\] = {slot}: frame not resident: layer 1 of 2"
    unchanged(pool, video, lambda: pool.routes([[video.slot(0), slot]]), ShapeError, match)


def test_an_evicted_frame_names_what_is_resident() -> None:
    pool, video = make_pool()
    video.evict(keep=[0, 4, 5])
    match = r"frame 2 was evicted; frames held: \[0, 5\] \(3 of them\)"
    unchanged(pool, video, lambda: video.slot(2), ShapeError, match)
    call = lambda: video.routed(sink=1, selected=[2], nearest=1)
    unchanged(pool, video, call, ShapeError, match)


@pytest.mark.parametrize("wrong", [[[0.0]], [[True]], torch.tensor([[0.5]])])
def test_routes_must_be_integers(wrong: object) -> None:
    with pytest.raises(DtypeError):
        RouteTable(wrong, num_slots=4)  # type: ignore[arg-type]


def test_a_table_of_another_pool_is_refused_by_the_call() -> None:
    pool, video = make_pool(num_slots=12)
    small, _ = make_pool(num_slots=8)
    table = pool.routes([video.window(sink=3, local=3)])
    q = torch.zeros(1, 4, HEADS, D)
    call = lambda: routed_attention(q, small.k(0), small.v(0), table)
    unchanged(pool, video, call, ShapeError, r"12.*8|8.*12")


def test_no_room_left() -> None:
    pool, video = make_pool(num_slots=8, frames=6)
    match = "3 slots needed, 2 of 8 free; 6 held by timelines"
    unchanged(pool, video, lambda: video.append(3), PoolError, match)
    branches = video.fork(3)
    # Three private copies of each of two frames, and the parent keeps the old ones.
    match = "6 slots needed, 2 of 8 free"
    unchanged(pool, video, lambda: pool.prepare_write(branches, 4, 2), PoolError, match)


def test_writes_that_do_not_fit() -> None:
    pool, video = make_pool()
    slots = pool.prepare_write([video], 0, 2)
    page = torch.zeros(1, 2 * TOKENS, HEADS, D)
    for k, v, layer, error, match in (
        (page[:, 1:], page, 0, ShapeError, "k must be"),
        (page, page[..., 1:], 0, ShapeError, "v must be"),
        (page.double(), page, 0, DtypeError, "k must be torch.float32"),
        (page, page, LAYERS, ShapeError, r"layer = 2 not in \[0, 2\)"),
        (page, page, -1, ShapeError, r"layer = -1 not in \[0, 2\)"),
    ):
        call = lambda k=k, v=v, layer=layer: pool.write(layer, slots, k, v)
        unchanged(pool, video, call, error, match)
    unchanged(pool, video, lambda: pool.prepare_write([video], 5, 2), ShapeError, "frame 6")
    unchanged(pool, video, lambda: pool.prepare_write([video], 0, -1), ShapeError, "num_frames")
    _, other = make_pool()
    unchanged(
        pool, video, lambda: pool.prepare_write([video, other], 0, 1), ShapeError, r"timelines\[1\]"
    )


@pytest.mark.parametrize("page_dtype", [None, torch.int8])
def test_slots_that_nobody_may_write_to(page_dtype: torch.dtype | None) -> None:
    pool = FramePool(6, TOKENS, 1, HEADS, D, dtype=torch.float32, page_dtype=page_dtype)
    video = pool.timeline()
    page = torch.ones(1, 2 * TOKENS, HEADS, D)
    pool.write(0, slots := pool.prepare_write([video], video.append(2), 2), page, page)

    def refused(slots: torch.Tensor, error: type[Exception], match: str) -> None:
        unchanged(pool, video, lambda: pool.write(0, slots, 2 * page, 2 * page), error, match)

    refused(slots + 5, ShapeError, r"slots\[branch=0, frame=1\] = 6 not in \[0, 6\)")
    refused(slots - 1, ShapeError, r"slots\[branch=0, frame=0\] = -1 not in \[0, 6\)")
    refused(slots * 0, ShapeError, r"slots\[branch=0, frame=1\] = 0 is named twice")
    refused(slots[0], ShapeError, r"slots must be \[B, frames\], got \[2\]")
    refused(slots.int(), DtypeError, r"slots must be int64 on the cpu, got torch\.int32")
    refused(slots + 1, PoolError, r"frame=1\] = 2 is held by 0 timelines and 0 route tables")
    table = pool.routes([[1]])
    refused(slots, PoolError, r"frame=1\] = 1 is held by 1 timelines and 1 route tables")
    del table
    branch = video.fork(1)[0]
    refused(slots, PoolError, r"frame=0\] = 0 is held by 2 timelines and 0 route tables")
    branch.release()
    pool.write(0, slots, 2 * page, 2 * page)


def test_a_released_timeline_is_of_no_use() -> None:
    pool, video = make_pool()
    branch = video.fork(1)[0]
    branch.release()
    for call in (
        lambda: branch.append(1),
        lambda: branch.slot(0),
        lambda: branch.window(sink=3, local=3),
        lambda: branch.fork(2),
        lambda: pool.prepare_write([branch], 0, 1),
    ):
        unchanged(pool, video, call, PoolError, "released")


@pytest.mark.parametrize("field", ["num_slots", "frame_tokens", "num_layers", "head_dim"])
def test_an_empty_pool_is_refused(field: str) -> None:
    sizes = dict(num_slots=4, frame_tokens=4, num_layers=1, num_heads=1, head_dim=16)
    with pytest.raises(ShapeError, match=f"{field} must be at least 1, got 0"):
        FramePool(**{**sizes, field: 0})


def test_a_written_slot_that_is_not_there() -> None:
    """The fused write takes slots of the caller: they are checked before anything is written."""
    pool, video = make_pool()
    q = k = v = torch.ones(1, TOKENS, HEADS, D)
    weight = torch.ones(HEADS * D)
    for slots, match in (
        ([[12]], r"slots\[branch=0, frame=0\] = 12 not in \[0, 12\)"),
        ([[-1]], r"= -1 not in"),
    ):
        call = lambda slots=slots: qk_norm_rope_write(
            q,
            k,
            v,
            weight,
            weight,
            Rope(D),
            0,
            grid=(1, 2, 2),
            k_pool=pool.k(0),
            v_pool=pool.v(0),
            slots=torch.tensor(slots),
        )
        unchanged(pool, video, call, ShapeError, match)
