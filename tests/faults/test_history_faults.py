"""Bad routes and bad use of the pool: the stated error, and nothing has changed."""

from collections.abc import Callable
from dataclasses import asdict

import pytest
import torch

from kvpo_kernels import FramePool, RouteTable, Timeline, qk_norm_rope_write, routed_attention
from kvpo_kernels import RopeTable as Rope
from kvpo_kernels.errors import DtypeError, FrameError, PoolError, ShapeError

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
        (lambda row: [[0, 1, 2]], r"route\[branch=0, slot=0\] must be a slot of `window`"),
        (lambda row: [row, [row[0], 5]], r"route\[branch=1, slot=1\] must be a slot of `window`"),
        (lambda row: [[row[0] + 1]], r"route\[branch=0, slot=0\] must be a slot of `window`"),
        (lambda row: [row.tolist()], r"route\[branch=0, slot=0\] must be a slot of `window`"),
        (lambda row: [[row]], r"route\[branch=0, slot=0\] must be a slot of `window`"),
        (lambda row: torch.tensor([[0, 1]]), "routes takes a list of rows"),
        (lambda row: row, "routes takes a list of rows"),
        (lambda row: 3, "routes takes a list of rows"),
        (lambda row: [torch.tensor([0, 1])], r"route\[branch=0\] must be a row of slots"),
        (lambda row: [row, row[0]], r"route\[branch=1\] must be a row of slots"),
    ],
)
def test_routes_take_slots_that_know_whose_they_are(rows: Callable, match: str) -> None:
    """Frames, and slots as plain numbers, are no rows: another video's frame could be meant."""
    pool, video = make_pool()
    given = rows(video.window(sink=0, local=3))
    unchanged(pool, video, lambda: pool.routes(given), DtypeError, match)
    table = pool.routes([video.window(0, 3)] * 2)
    unchanged(pool, video, lambda: table.update(given), DtypeError, match)


def test_a_route_that_names_a_slot_twice() -> None:
    pool, video = make_pool()
    row = [video.window(0, 1), video.routed(0, [3, 2, 3], 0)]
    match = r"route\[branch=1, slot=2\] = 3 repeats slot=0"
    unchanged(pool, video, lambda: pool.routes(row), ShapeError, match)


def test_a_route_to_a_frame_still_being_written() -> None:
    pool, video = make_pool()
    video.append(1)
    page = torch.ones(1, TOKENS, HEADS, D)
    video.write(0, 6, page, page)
    slot = pool.prepare_write([video], 6, 1)[0]
    match = rf"route\[branch=0, slot=1\] = {slot[0]}: frame not resident: layer 1 of 2"
    unchanged(pool, video, lambda: pool.routes([[video.slot(0), *slot]]), FrameError, match)


def test_an_evicted_frame_names_what_is_resident() -> None:
    pool, video = make_pool()
    video.evict(keep=[0, 4, 5])
    match = r"frame 2 was evicted; frames held: \[0, 5\] \(3 of them\)"
    unchanged(pool, video, lambda: video.slot(2), FrameError, match)
    call = lambda: video.routed(sink=1, selected=[2], nearest=1)
    unchanged(pool, video, call, FrameError, match)


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
    unchanged(pool, video, lambda: pool.prepare_write([video], 5, 2), FrameError, "frame 6")
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

    def refused(slots: object, error: type[Exception], match: str) -> None:
        unchanged(pool, video, lambda: pool.write(0, slots, 2 * page, 2 * page), error, match)
        unchanged(pool, video, lambda: pool.mark_written(0, slots), error, match)

    plain = "slots must be of `prepare_write` or `advance`, got"
    for given in (slots.tensor, slots.tensor.int(), slots.tolist(), slots[0], video.window(0, 2)):
        refused(given, DtypeError, plain)
    table = pool.routes([video.window(0, 1)])
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


def test_the_fused_write_checks_its_slots_before_anything_is_written() -> None:
    pool, video = make_pool()
    q = k = v = torch.ones(1, TOKENS, HEADS, D)
    weight = torch.ones(HEADS * D)
    other, own = make_pool()[0], pool.prepare_write([video], 5, 1)
    branch = video.fork(1)[0]
    shared = pool.prepare_write([branch], 4, 1)
    gone = branch.fork(1)[0]
    evicted = pool.prepare_write([gone], 3, 1)
    gone.evict([])
    plain = torch.zeros(12, TOKENS, HEADS, D)
    branch_too = branch.fork(1)
    for slots, pages, error, match in (
        (torch.tensor([[12]]), pool, ShapeError, r"frame=0\] = 12 not in \[0, 12\)"),
        (torch.tensor([[-1]]), pool, ShapeError, r"= -1 not in"),
        (own.tensor, pool, DtypeError, "k_pool is of a FramePool: slots must be of its `prepare_w"),
        (own, other, ShapeError, "k_pool is not of the FramePool whose slots these are"),
        (own, None, ShapeError, "k_pool is not of the FramePool whose slots these are"),
        (shared, pool, PoolError, r"slots\[branch=0, frame=0\] = \d+ is held by 2 timelines"),
        (evicted, pool, FrameError, r"frame=0\] = \d+ is stale: frame 3 was evicted"),
    ):
        views = (plain, plain) if pages is None else (pages.k(0), pages.v(0))
        call = lambda slots=slots, views=views: qk_norm_rope_write(
            q,
            k,
            v,
            weight,
            weight,
            Rope(D),
            0,
            grid=(1, 2, 2),
            k_pool=views[0],
            v_pool=views[1],
            slots=slots,
        )
        unchanged(pool, video, call, error, match)
    assert not plain.any() and branch_too


@pytest.mark.parametrize("name", ["timelines", "keep", "k", "k ", "grid", "first_frame"])
def test_what_is_no_such_thing_at_all_is_named(name: str) -> None:
    pool = FramePool(8, 2, 1, 1, 16, dtype=torch.float32)
    video = pool.timeline()
    slots, page = pool.prepare_write([video], video.append(1), 1), torch.ones(1, 1, 2, 1, 16)
    call: Callable[[], object] = {
        "timelines": lambda: pool.prepare_write(video, 0, 1),  # type: ignore[arg-type]
        "keep": lambda: video.evict(0),  # type: ignore[arg-type]
        "k": lambda: video.write(0, 0, page.tolist(), page[0]),  # type: ignore[arg-type]
        "k ": lambda: pool.write(0, slots, page.tolist(), page),  # type: ignore[arg-type]
        "grid": lambda: Rope(16).tokens(0, (1, 2)),  # type: ignore[arg-type]
        "first_frame": lambda: Rope(16).tokens("0", (1, 1, 2)),  # type: ignore[arg-type]
    }[name]
    with pytest.raises((DtypeError, ShapeError), match=rf"^{name.strip()} "):
        call()
    assert not pool.k(0).any() and not video.resident_frames
