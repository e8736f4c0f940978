"""Slots that are no longer yours, frames written from the pool itself, and what a backward may not
do: run the forward again over timelines that have moved on, or hand the pool to a hook."""

import copy
import gc
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from kvpo_kernels import (
    FramePool,
    KvpoError,
    RopeTable,
    RouteTable,
    Slots,
    Timeline,
    TopScored,
    Window,
    qk_norm_rope,
    qk_norm_rope_write,
    routed_attention,
    text_relevance,
)
from kvpo_kernels.errors import DtypeError, FrameError, GradientError, PoolError, ShapeError

LAYERS, TOKENS, D = 2, 2, 16
PAGES = pytest.mark.parametrize("page_dtype", [None, torch.int8, torch.float8_e4m3fn])
REENTRANT = pytest.mark.parametrize("reentrant", [True, False])


def make_pool(slots: int = 12, page_dtype: torch.dtype | None = None, host: int = 0) -> FramePool:
    sizes = (slots, TOKENS, LAYERS, 1, D)
    return FramePool(*sizes, torch.float32, page_dtype=page_dtype, host_slots=host)


def frames_of(count: int, seed: int) -> Tensor:
    return torch.randn(2, count, TOKENS, 1, D, generator=torch.Generator().manual_seed(seed))


def add(video: Timeline, count: int, seed: int = 0) -> Timeline:
    first = video.append(count)
    for layer in range(LAYERS):
        video.write(layer, first, *frames_of(count, seed))
    return video


def query() -> Tensor:
    q = torch.randn(1, 3, 1, D, generator=torch.Generator().manual_seed(9))
    return q.requires_grad_()


def attend(pool: FramePool, table: RouteTable, q: Tensor, layer: int = 0) -> Tensor:
    scales = {"k_scales": pool.k_scales(layer), "v_scales": pool.v_scales(layer)}
    return routed_attention(q, pool.k(layer), pool.v(layer), table, **scales)


def test_what_slots_are() -> None:
    pool = make_pool()
    video = add(pool.timeline(), 5)
    row = video.window(sink=1, local=2)
    assert isinstance(row, Slots) and len(row) == 3 and row.frames == (0, 3, 4)
    assert row == [0, 3, 4] == row.tolist() and list(map(int, row)) == row.tolist()
    assert row[1] == video.slot(3) == 3 and row[1].frame == 3 and f"{row[1]}" == "3"
    assert torch.equal(pool.k(0)[row[2]], pool.k(0)[4])
    assert torch.equal(pool.k(0)[row], pool.k(0)[[0, 3, 4]])
    assert sorted(row) == [0, 3, 4] == torch.tensor(row).tolist() and 3 in row
    assert row[:1] + row[1:] == row and row + video.window(0, 1) == [0, 3, 4, 4]
    assert RouteTable([row], pool.num_slots).tolist() == [[0, 3, 4]]
    assert RouteTable([[*row, 7]], pool.num_slots).tolist() == [[0, 3, 4, 7]]
    assert row + [7] == [0, 3, 4, 7] == row.tolist() + [7]  # noqa: RUF005
    assert pool.routes([row[1:], []]).tolist() == [[3, 4], []]
    assert pool.routes([[row[2], video.slot(1)]]).tolist() == [[4, 1]]
    with pytest.raises(ShapeError, match="slots of two FramePools"):
        row + add(make_pool().timeline(), 1).window(0, 1)
    branches = video.fork(3)
    slots = pool.prepare_write(branches, 4, 1)
    assert slots.shape == (3, 1) and len(slots) == 3 and slots[0].frames == (4,)
    assert slots.tensor.tolist() == slots.tolist() and slots.tensor.dtype is torch.int64
    pool.prepare_write(branches, 3, 2)
    assert slots[1:].shape == (2, 1) and slots[1:].tolist() == slots.tolist()[1:]
    two = pool.prepare_write(branches, 3, 2)
    for wrong in ((slice(None), 0), (0, 1), (slice(None),)):
        with pytest.raises(DtypeError, match="slices of rows and of frames"):
            two[wrong]  # type: ignore[index]
    assert two[1:, :1].tolist() == [[row[0]] for row in two.tolist()[1:]]
    assert pool.routes([row[:1] + two[0]]).tolist() == [[0, *two.tolist()[0]]]
    assert pool.prepare_write([], 0, 2).shape == (0, 2)
    none = pool.prepare_write(branches, 5, 0)
    assert none.shape == (3, 0) and none.tolist() == [[], [], []] == two[:, :0].tolist()
    pool.write(0, none, *torch.zeros(2, 3, 0, TOKENS, 1, D))
    video.write(0, 5, *torch.zeros(2, 0, TOKENS, 1, D))


def evict(pool: FramePool, video: Timeline) -> None:
    video.evict([0])


def release(pool: FramePool, video: Timeline) -> None:
    video.release()


def offload(pool: FramePool, video: Timeline) -> None:
    video.offload([1, 2])


def advance(pool: FramePool, video: Timeline) -> None:
    pool.advance([video], 2, [0], pool.routes([video.window(0, 2)]))


def part(pool: FramePool, video: Timeline) -> None:
    """A branch keeps the frames and rewrites them where they lie."""
    branch = video.fork(1)[0]
    pool.prepare_write([video], 1, 2)
    pool.write(0, pool.prepare_write([branch], 1, 2), *frames_of(2, 8)[:, None])
    KEPT.append(branch)


def forget_but_branch(pool: FramePool, video: Timeline) -> None:
    branch = video.fork(1)[0]
    video.release()
    pool.write(0, pool.prepare_write([branch], 1, 2), *frames_of(2, 8)[:, None])
    KEPT.append(branch)


KEPT: list[Timeline] = []
WAYS = (evict, release, offload, advance, part, forget_but_branch)


@pytest.mark.parametrize("taken", [False, True], ids=("free", "taken"))
@pytest.mark.parametrize("way", WAYS)
@PAGES
def test_slots_whose_frames_have_left(
    way: Callable[[FramePool, Timeline], None], taken: bool, page_dtype: torch.dtype | None
) -> None:
    """Neither read nor written, whether or not another video has come to have them."""
    pool = make_pool(6, page_dtype, host=2)
    video = add(pool.timeline(), 3)
    prepared = pool.prepare_write([video], 1, 2)
    row = video.window(0, 2)
    singly = [[video.slot(1)], [video.slot(2)]]
    table = pool.routes([[]])
    way(pool, video)
    other = pool.timeline()
    if taken:
        other.append(pool.stats().free_slots)
        for layer in range(LAYERS):
            other.write(layer, 0, *frames_of(other.num_frames, 5))
    before = pool._pages.storage.clone()
    page = torch.zeros(1, 2, TOKENS, 1, D)
    stale = r"\[branch=0, \w+=0\] = 1( is stale: |: frame not .* holds this slot; )frame 1"
    for call in (
        lambda: pool.write(0, prepared, page, page),
        lambda: pool.mark_written(0, prepared),
        lambda: pool.write(0, prepared[:, :1], page[:, :1], page[:, :1]),
        lambda: qk_norm_rope_write(
            *(page.view(1, -1, 1, D),) * 3, torch.ones(D), torch.ones(D), RopeTable(D), 0,
            grid=(2, 1, TOKENS), k_pool=pool.k(0), v_pool=pool.v(0), slots=prepared,
            k_scales=pool.k_scales(0), v_scales=pool.v_scales(0),
        ),
        lambda: pool.routes([row]),
        lambda: pool.routes(singly),
        lambda: table.update([row]),
    ):  # fmt: skip
        with pytest.raises(FrameError, match=stale):
            call()
    with pytest.raises(FrameError, match=r"slots\[0\] = 1"):
        text_relevance(torch.zeros(1, 1, D), pool.k(0), row, k_scales=pool.k_scales(0))
    assert torch.equal(pool._pages.storage.view(torch.uint8), before.view(torch.uint8))
    assert table.tolist() == [[]]
    KEPT.clear()


def test_slots_that_are_still_right() -> None:
    """Of frames that others hold, that were rewritten by their own timeline, or came back."""
    pool = make_pool(12, host=2)
    video = add(pool.timeline(), 3)
    row, prepared = video.window(0, 3), pool.prepare_write([video], 2, 1)
    video.write(0, 2, *frames_of(1, 3))
    again = pool.prepare_write([video], 2, 1)
    for slots in (prepared, again):
        pool.write(1, slots, *frames_of(1, 3)[:, None])
    assert pool.routes([row]).tolist() == [row.tolist()]
    row = video.window(0, 3)
    branch = video.fork(1)[0]
    table = pool.routes([row[:1]])
    video.evict([])
    assert pool.routes([row]).tolist() == [row.tolist()]  # the branch's
    branch.release()
    table.update([row[:1]])  # nothing but the table holds it
    assert pool.stats().free_slots == 11


def test_slots_and_frames_are_not_each_other() -> None:
    pool = make_pool()
    video = add(pool.timeline(), 12)
    video.evict([0, 1, 2, 9, 10, 11])
    plan = [0, 1, 2, 9, 10, 11]
    with pytest.raises(DtypeError, match=r"route\[branch=0, slot=0\] must be a slot"):
        pool.routes([plan])  # type: ignore[list-item]
    row, rope, grid = video.window(0, 2), RopeTable(D), (1, 1, TOKENS)
    table = pool.routes([row])
    for call in (
        lambda: video.evict(row),
        lambda: video.slot(row[0]),
        lambda: video.routed(0, row, 0),
        lambda: video.offload(row),
        lambda: video.fetch(row),
        lambda: pool.advance([video], 1, row, table),
        lambda: video.evict(Window(1, 1, row)),
        lambda: video.write(0, row[0], *frames_of(1, 1)),
        lambda: pool.prepare_write([video], row[0], 1),
        lambda: qk_norm_rope(*[frames_of(1, 1)[0]] * 2, *torch.ones(2, D), rope, row[0], grid=grid),
    ):
        with pytest.raises(DtypeError, match="a place in the pool: a frame is an absolute index"):
            call()
    assert video.resident_frames == plan


def test_slots_of_another_pool() -> None:
    pool, other = make_pool(), make_pool()
    video, foreign = add(pool.timeline(), 2), add(other.timeline(), 2)
    prepared, page = other.prepare_write([foreign], 0, 1), frames_of(1, 1)[:, None]
    for call in (
        lambda: pool.routes([foreign.window(0, 2)]),
        lambda: pool.routes([[video.slot(0), foreign.slot(1)]]),
        lambda: pool.write(0, prepared, *page),
        lambda: pool.mark_written(0, prepared),
        lambda: text_relevance(torch.zeros(1, 1, D), pool.k(0), foreign.window(0, 1)),
    ):
        with pytest.raises(ShapeError, match="another FramePool"):
            call()
    with pytest.raises(DtypeError, match=r"slots\[0\] must be a slot"):
        text_relevance(torch.zeros(1, 1, D), pool.k(0), [0])
    with pytest.raises(DtypeError, match=r"timelines\[0\] must be a Timeline"):
        pool.prepare_write([[video]], 0, 1)  # type: ignore[list-item]


def test_a_table_that_advance_used_up_reads_no_new_frame() -> None:
    pool = make_pool(4)
    video = add(pool.timeline(), 4)
    table, q = pool.routes([video.window(1, 3)]), query().detach()
    before = [attend(pool, table, q, layer) for layer in range(LAYERS)]
    _, slots = pool.advance([video], 2, [0], table)
    for layer in range(LAYERS):
        assert torch.equal(attend(pool, table, q, layer), before[layer])
        pool.write(layer, slots, *frames_of(2, 7)[:, None])
        with pytest.raises(FrameError, match="has given to another frame that is written by now"):
            attend(pool, table, q, layer)
    table.update([video.window(1, 1)])
    attend(pool, table, q)


def test_typed_slots_in_a_compiled_write() -> None:
    pool, weight, rope = make_pool(14), torch.ones(D), RopeTable(D)
    rope.tokens(0, (2, 1, TOKENS))
    graphs = []

    def backend(module: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(module)
        return module.forward

    @torch.compile(backend=backend, fullgraph=True)
    def write(x: Tensor, slots: object) -> Tensor:
        where = {"k_pool": pool.k(1), "v_pool": pool.v(1), "slots": slots}
        norm = {"grid": (2, 1, TOKENS)}
        return qk_norm_rope_write(x, x, x, weight, weight, rope, 0, **norm, **where)

    video = pool.timeline()
    with torch.no_grad():
        for block in range(4):
            slots = pool.prepare_write([video], video.append(2), 2)
            x = frames_of(2, block)[0].view(1, -1, 1, D)
            write(x, slots)
            pool.mark_written(1, slots)
            assert torch.equal(pool.v(1)[slots.tensor[0]].view_as(x), x)
        assert len(graphs) == 1
        video.evict([])
        other = add(pool.timeline(), 14)
        before = pool.v(1)[other.slot(13)].clone()
        for refused in (lambda: write(x, slots), lambda: pool.mark_written(1, slots)):
            with pytest.raises(FrameError, match="frame 6 was evicted"):
                refused()
        assert torch.equal(pool.v(1)[other.slot(13)], before)


@PAGES
@pytest.mark.parametrize("through", ["pool", "timeline"])
def test_frames_written_from_the_pool_itself(through: str, page_dtype: torch.dtype | None) -> None:
    """As they were before the call, whatever their strides and whether or not they overlap."""
    for source in (
        lambda x: x[1:3],
        lambda x: x[0:2],
        lambda x: x[0:4:2],
        lambda x: x[2:6],
        lambda x: x[0].expand(2, -1, -1, -1),
        lambda x: x[[3, 0]],
    ):
        pool = make_pool(8, page_dtype)
        video = add(pool.timeline(), 6)
        views = [pool.v(0), pool.k(0)]  # keys from values, values from keys
        if page_dtype is not None:  # as float32 no frame of 8 bits, but in the pool all the same
            views = [t.view(torch.float32).repeat(1, 1, 1, 1) for t in views]
            own = pool._pages.storage.view(torch.float32).flatten()
            views = [own.as_strided((8, TOKENS, 1, D), (8, 4, 4, 1), at) for at in (0, 8)]
        k, v = map(source, views)
        expected = make_pool(8, page_dtype)
        copy_of = add(expected.timeline(), 6)
        copy_of.write(0, 0, k.clone(), v.clone())
        if through == "timeline":
            video.write(0, 0, k, v)
        else:
            pool.write(0, pool.prepare_write([video], 0, len(k)), k[None], v[None])
        for ours, theirs in ((pool.k(0), expected.k(0)), (pool.v(0), expected.v(0))):
            assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))
        if page_dtype is not None:
            assert torch.equal(pool.k_scales(0), expected.k_scales(0))


def test_a_fused_write_whose_queries_lie_in_the_pool() -> None:
    """They would be overwritten before they are read: an error, as for keys and values."""
    pool = make_pool()
    video = add(pool.timeline(), 2)
    slots, weight = pool.prepare_write([video], 0, 1), torch.ones(D)
    q, x = pool.k(0)[:1], torch.ones(1, TOKENS, 1, D)
    where = {"k_pool": pool.k(0), "v_pool": pool.v(0), "slots": slots, "grid": (1, 1, TOKENS)}
    with pytest.raises(ShapeError, match="q lies in k_pool"):
        qk_norm_rope_write(q, x, x, weight, weight, RopeTable(D), 0, **where)


@REENTRANT
def test_what_a_recompute_may_not_do(reentrant: bool) -> None:
    """A checkpointed body runs again in the backward, when the timeline may have moved on."""
    page = frames_of(1, 4)

    def bodies(pool: FramePool, video: Timeline) -> dict[str, Callable[[], object]]:
        table = pool.routes([video.window(1, 1)])
        row, slots = video.window(0, 2), pool.prepare_write([video], video.append(1), 1)
        x, weight = page[0][None, 0], torch.ones(D)
        norm = {"grid": (1, 1, TOKENS), "k_pool": pool.k(0), "v_pool": pool.v(0), "slots": slots}
        return {
            "routes": lambda: pool.routes([video.window(1, 2)]),
            "routes ": lambda: pool.routes([row]),
            "update": lambda: table.update([row]),
            "window": lambda: RouteTable([video.window(1, 2)], pool.num_slots),
            "routed": lambda: video.routed(0, [1], 1),
            "slot": lambda: video.slot(0),
            "append": lambda: video.append(1),
            "write": lambda: video.write(0, 0, *page),
            "pool.write": lambda: pool.write(0, slots, *page[:, None]),
            "mark": lambda: pool.mark_written(0, slots),
            "prepare": lambda: pool.prepare_write([video], 0, 1),
            "advance": lambda: pool.advance([video], 1, [], table),
            "fork": lambda: video.fork(1)[0].append(1),
            "fused": lambda: qk_norm_rope_write(x, x, x, weight, weight, RopeTable(D), 0, **norm),
        }

    for name in bodies(pool := make_pool(), add(pool.timeline(), 4)):
        pool = make_pool(16)
        video = add(pool.timeline(), 4)
        table, body = pool.routes([video.window(1, 2)]), bodies(pool, video)[name]

        def inside(q: Tensor, pool=pool, table=table, body=body) -> Tensor:
            with torch.no_grad():
                body()
            return attend(pool, table, q)

        out = checkpoint(inside, query(), use_reentrant=reentrant)
        if name != "advance":  # after which no backward runs
            video.append(1)
        state = (video.num_frames, pool.stats().free_slots, pool._pages.storage.clone())
        with pytest.raises(GradientError, match="outside the checkpointed function"):
            out.sum().backward()
        assert video.num_frames == state[0] and pool.stats().free_slots >= state[1], name
        assert torch.equal(pool._pages.storage, state[2]), name


@REENTRANT
def test_what_a_recompute_may_do(reentrant: bool) -> None:
    """A table handed in, and a video that is made from scratch there, in a pool of any age."""
    pool = make_pool(12, host=2)
    video = add(pool.timeline(), 4)
    table = pool.routes([video.window(1, 2)])

    def inside(q: Tensor) -> Tensor:
        own = add(make_pool().timeline(), 3, seed=2)
        new = add(pool.timeline(), 2, seed=3)
        out = attend(pool, table, q) + attend(own._pool, own._pool.routes([own.window(0, 2)]), q)
        return out + attend(pool, pool.routes([new.window(0, 2)]), q)

    expected = torch.autograd.grad(inside(q := query()).sum(), q)[0]
    out = checkpoint(inside, q, use_reentrant=reentrant)
    other = add(pool.timeline(), 1)
    video.evict([3])
    add(video, 2, seed=6)

    def hook(_: Tensor) -> None:
        other.release()
        video.evict(Window(0, 1))
        video.fork(1)

    q.register_hook(hook)
    out.sum().backward()
    assert torch.equal(q.grad, expected)
    assert video.resident_frames == [5]


def test_an_update_is_noticed_by_a_checkpoint_that_saves() -> None:
    pool = make_pool()
    video = add(pool.timeline(), 4)
    table = pool.routes([video.window(1, 2)])
    out = checkpoint(lambda q: attend(pool, table, q), query(), use_reentrant=False)
    table.update([video.window(0, 2)])
    with pytest.raises(GradientError, match=r"table.slots has been modified by an inplace operat"):
        out.sum().backward()


@PAGES
def test_hooks_see_activations_only(page_dtype: torch.dtype | None) -> None:
    pool = make_pool(12, page_dtype)
    video = add(pool.timeline(), 4)
    table, q = pool.routes([video.window(1, 2)]), query()
    expected = torch.autograd.grad(attend(pool, table, q).sum(), q)[0]
    packed: list[Tensor] = []
    with saved_tensors_hooks(lambda t: packed.append(t) or t.clone(), lambda t: t):
        out = attend(pool, table, q)
    # q, out, lse; and live tokens, of which there are none.
    assert sorted(t.numel() for t in packed) == [0, 0, 3, 3 * D, 3 * D]
    del table, packed[:]
    video.release()
    gc.collect()
    assert pool.stats().table_slots == 3
    others = add(pool.timeline(), 9, seed=7)
    with pytest.raises(PoolError, match="by route tables or pending backwards only"):
        pool.timeline().append(1)
    assert torch.equal(torch.autograd.grad(out.sum(), q)[0], expected)
    others.release()
    with save_on_cpu():
        attend(pool, pool.routes([[]]), q).sum().backward()


def test_frames_are_free_when_a_backward_has_run() -> None:
    pool = make_pool()
    video, q = add(pool.timeline(), 4), query()
    out = attend(pool, pool.routes([video.window(1, 2)]), q)
    video.release()
    first = torch.autograd.grad(out.sum(), q, retain_graph=True)[0]
    assert pool.stats().table_slots == 3
    assert torch.equal(torch.autograd.grad(out.sum(), q)[0], first)
    assert pool.stats().free_slots == 12  # while `out` lives
    with pytest.raises(RuntimeError, match="a second time"):
        out.sum().backward()
    gc.disable()
    try:  # without a cycle that only the collector would find
        video = add(pool.timeline(), 4)
        out = attend(pool, pool.routes([video.window(1, 2)]), q)
        video.release()
        del out
        assert pool.stats().free_slots == 12
    finally:
        gc.enable()


def test_constants_are_watched_as_what_is_saved() -> None:
    raw = [torch.randn(3, TOKENS, 1, D) for _ in range(2)]
    for at, name in enumerate(("k_pool", "v_pool")):
        out = routed_attention(query(), *raw, RouteTable([[0, 1]], 3))
        raw[at][2] = 0
        with pytest.raises(GradientError, match=f"{name} has been modified by an inplace operat"):
            out.sum().backward()
    pages = [torch.ones(3, TOKENS, 1, D, dtype=torch.int8) for _ in range(2)]
    scales = {"k_scales": torch.ones(3, 1), "v_scales": torch.ones(3, 1)}
    for name, of in scales.items():
        out = routed_attention(query(), *pages, RouteTable([[0, 1]], 3), **scales)
        of.mul_(2)
        with pytest.raises(GradientError, match=f"{name} has been modified by an inplace operat"):
            out.sum().backward()
    with torch.inference_mode():
        made = [t.clone() for t in raw]
    with pytest.raises(GradientError, match="k_pool was made in inference mode"):
        routed_attention(query(), *made, RouteTable([[0, 1]], 3))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_graph_keeps_the_frames(backend: str) -> None:
    pool = make_pool()
    video, q = add(pool.timeline(), 4), query()
    table = pool.routes([video.window(1, 2)])
    expected = torch.autograd.grad(attend(pool, table, q).sum(), q)[0]
    call = torch.compile(lambda table, q: attend(pool, table, q), backend=backend, fullgraph=True)
    out = call(table, q)
    video.release()
    del table
    gc.collect()
    assert pool.stats().table_slots == 3
    others = add(pool.timeline(), 9, seed=7)
    assert torch.equal(torch.autograd.grad(out.sum(), q)[0], expected)
    del out
    gc.collect()
    assert pool.stats().table_slots == 0 and others.num_frames == 9


class Streaming(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.pool = nn.Linear(2, 2), make_pool()


def test_what_can_be_done_about_copies() -> None:
    module = Streaming()
    pool = module.pool
    for call in (copy.deepcopy, copy.copy, pickle.dumps):
        with pytest.raises(PoolError, match=r"hand it to `forward`, or share it"):
            call(module if call is not copy.copy else pool)
    twin = copy.deepcopy(module, {id(pool): pool})
    assert twin.pool is pool and twin.linear is not module.linear
    video = add(pool.timeline(), 2)
    for call in (copy.deepcopy, copy.copy, pickle.dumps):
        with pytest.raises(PoolError, match="not copied but forked"):
            call(video)
        with pytest.raises(PoolError, match="Make another by `routes`"):
            call(pool.routes([video.window(0, 1)]))
    assert copy.deepcopy(video.window(0, 2)) == video.window(0, 2)
    with pytest.raises(PoolError, match="a FramePool is neither copied nor pickled"):
        pickle.dumps(video.window(0, 2))
    assert copy.deepcopy(RouteTable([[1]], 2)).tolist() == [[1]]


def test_errors_name_the_layer_and_the_frame() -> None:
    pool = make_pool(page_dtype=torch.int8)
    for layer in (LAYERS, -1):
        for view in (pool.k, pool.v, pool.k_scales, pool.v_scales):
            with pytest.raises(ShapeError, match=rf"layer = {layer} not in \[0, 2\)"):
                view(layer)
    for layer in (1.0, "1", None, True):
        with pytest.raises(DtypeError, match="layer must be an int"):
            pool.k(layer)  # type: ignore[arg-type]
    video = add(pool.timeline(), 2)
    for call in (lambda: video.slot(7), lambda: video.routed(0, [7], 0), lambda: video.fetch([7])):
        with pytest.raises(FrameError, match="frame 7 was never appended") as caught:
            call()
        assert isinstance(caught.value, ValueError | KvpoError)
        assert not isinstance(caught.value, ShapeError)
    policy = TopScored(1, 1, 1)
    policy.observe(dict(zip(video.window(0, 2).frames, (0.5, 1.0), strict=True)))
    assert policy.keep(video) == {0, 1}
