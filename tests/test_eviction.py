"""Policies keep what they say, within their budget, however long the video."""

import math

import pytest
import torch

from kvpo_kernels import (
    FramePool,
    RouteTable,
    Timeline,
    TopScored,
    Window,
    frame_attention_mass,
    quantize_frames,
    routed_attention,
    text_relevance,
)
from kvpo_kernels.errors import ConfigError, DtypeError, PoolError, ShapeError

T, H, D = 4, 2, 16


def add_block(pool: FramePool, video: Timeline, frames: int = 3) -> None:
    first = video.append(frames)
    page = torch.randn(frames, T, H, D, generator=torch.Generator().manual_seed(first))
    video.write(0, first, page, -page)


def make(num_slots: int = 24) -> tuple[FramePool, Timeline]:
    pool = FramePool(num_slots, T, 1, H, D, dtype=torch.float32)
    return pool, pool.timeline()


def test_window_keeps_sink_candidates_and_the_latest() -> None:
    pool, video = make(40)
    for _ in range(10):
        add_block(pool, video)
    video.evict(Window(sink=3, local=6, candidates=[7, 11, 99]))
    assert video.resident_frames == [0, 1, 2, 7, 11, *range(24, 30)]
    assert pool.stats().free_slots == 40 - 11
    video.evict(Window(sink=1, local=0))
    assert video.resident_frames == [0]


@pytest.mark.parametrize(
    ("policy", "most"),
    [
        (Window(3, 6), 9),
        (TopScored(3, 6, 4, decay=0.5), 13),
        (TopScored(3, 3, 2, record_every=9), 8),
    ],
    ids=["window", "top", "bank"],
)
def test_three_hundred_blocks_stay_within_the_budget(policy: object, most: int) -> None:
    pool, video = make(most + 3)
    for block in range(300):
        add_block(pool, video)
        if isinstance(policy, TopScored):
            policy.observe({f: math.sin(f + block) for f in video.resident_frames})
        video.evict(policy)  # type: ignore[arg-type]
        assert len(video.resident_frames) == min(most, 3 * (block + 1)) or block < 20
    assert len(video.resident_frames) == most == pool.num_slots - pool.stats().free_slots


def test_the_highest_scores_stay_and_new_frames_come_in() -> None:
    pool, video = make()
    for _ in range(4):
        add_block(pool, video)
    policy = TopScored(sink=1, local=2, budget=3)
    policy.observe({1: 0.1, 2: 0.9, 3: 0.2, 4: 0.3, 5: 0.0, 6: 0.0, 7: 0.8})
    video.evict(policy)  # 8 and 9 have no score yet: they come before those that have one
    assert video.resident_frames == [0, 2, 8, 9, 10, 11]
    policy.observe({2: 0.9, 8: 0.1, 9: 0.5, 10: 0.7})
    policy.always = Window(1, 1)
    policy.budget = 2
    video.evict(policy)
    assert video.resident_frames == [0, 2, 10, 11]


def test_decay_averages_and_a_bank_records_every_ninth() -> None:
    policy = TopScored(0, 0, 1, decay=0.75)
    policy.observe({5: 1.0})
    policy.observe({5: 0.0})
    assert policy.scores == {5: 0.75}
    pool, video = make(40)
    for _ in range(10):
        add_block(pool, video)
    video.evict(TopScored(3, 3, budget=3, record_every=9))
    assert video.resident_frames == [0, 1, 2, 9, 18, 27, 28, 29]


def test_attention_mass_is_the_share_of_a_dense_softmax() -> None:
    pool, video = make()
    for _ in range(3):
        add_block(pool, video)
    g = torch.Generator().manual_seed(7)
    q = torch.randn(2, 5, 2 * H, D, generator=g)  # two query heads per key head
    live = torch.randn(2, 6, H, D, generator=g)
    rows = [[video.slot(f) for f in row] for row in ([0, 4, 8], [2, 1])]
    table = pool.routes(rows)
    keys = pool.k(0)
    _, lse = routed_attention(q, keys, pool.v(0), table, live, live, return_lse=True)
    mass = frame_attention_mass(q, keys, table, lse)
    for b, row in enumerate(rows):
        k = torch.cat([keys[row].flatten(0, 1), live[b]]).repeat_interleave(2, dim=1)
        p = (torch.einsum("qhd,khd->hqk", q[b].double(), k.double()) / D**0.5).softmax(-1)
        expected = p.mean((0, 1))[: len(row) * T].view(len(row), T).sum(1)
        # Float32 logits of size 10, and their exponents.
        torch.testing.assert_close(mass[b, : len(row)].double(), expected, rtol=1e-5, atol=1e-7)
    assert mass[1, 2] == 0 and (mass.sum(1) < 1).all()
    some = frame_attention_mass(q, keys, table, lse, queries=2)  # the first and the last
    ends = frame_attention_mass(q[:, [0, 4]], keys, table, lse[:, :, [0, 4]])
    assert torch.equal(some, ends)


def test_text_relevance_is_the_mean_product() -> None:
    pool, video = make()
    add_block(pool, video)
    text = torch.randn(7, H, D, generator=torch.Generator().manual_seed(1))
    slots = [video.slot(f) for f in (2, 0)]
    expected = torch.einsum("lhd,nthd->nlht", text, pool.k(0)[slots]).mean((1, 2, 3)) / D**0.5
    # Sums of 7 * 4 * 32 products in another order.
    torch.testing.assert_close(text_relevance(text, pool.k(0), slots), expected, rtol=0, atol=1e-5)


def test_policies_that_cannot_be_meant() -> None:
    for call, match in (
        (lambda: Window(-1, 3), "sink must be at least 0, got -1"),
        (lambda: TopScored(0, 0, -1), "budget must be at least 0, got -1"),
        (lambda: TopScored(0, 0, 1, decay=1.0), r"decay must be in \[0, 1\), got 1.0"),
        (lambda: TopScored(0, 0, 1, record_every=0), "record_every must be at least 1, got 0"),
    ):
        with pytest.raises(ConfigError, match=match):
            call()
    for call, match in (
        (lambda: Window(3, 2.5), "local must be an int, got 2.5"),
        (lambda: TopScored(0, 0, 1.0), "budget must be an int, got 1.0"),
    ):
        with pytest.raises(DtypeError, match=match):
            call()
    policy = TopScored(0, 0, 1)
    for bad in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(ShapeError, match=rf"scores must be finite, got {{4: {bad}}}"):
            policy.observe({3: 1.0, 4: bad})
    assert policy.scores == {}
    pool, video = make()
    add_block(pool, video)
    q, table = torch.zeros(1, 3, H, D), pool.routes([[video.slot(0)]])
    with pytest.raises(ShapeError, match="needs a table of 1 rows"):
        frame_attention_mass(q, pool.k(0), table, torch.zeros(1, H, 4))
    with pytest.raises(ShapeError, match="does not fit"):
        frame_attention_mass(q, pool.k(0)[..., :8], table, torch.zeros(1, H, 3))
    with pytest.raises(ShapeError, match="does not fit"):
        text_relevance(torch.zeros(3, H, 8), pool.k(0), [0])


def make_branches() -> tuple[FramePool, list[Timeline]]:
    """Two, of nine common frames."""
    pool, video = make(16)
    for _ in range(3):
        add_block(pool, video)
    branches = video.fork(2)
    video.release()
    return pool, branches


def test_asking_a_policy_changes_nothing() -> None:
    """So several timelines may ask one, and a call that was refused may ask again."""
    pool, branches = make_branches()
    policy = TopScored(sink=1, local=2, budget=1)
    policy.observe({f: float(f == 3) for f in range(1, 9)})
    table = pool.routes([b.window(1, 2) for b in branches])
    with pytest.raises(PoolError, match="slots needed"):
        pool.advance(branches, 9, policy, table)
    assert policy.keep(branches[0]) == policy.keep(branches[1]) == {0, 3, 7, 8}
    pool.advance(branches, 1, policy, table)
    assert [b.resident_frames for b in branches] == [[0, 3, 7, 8]] * 2


def test_advance_asks_each_branch_its_own_policy() -> None:
    pool, branches = make_branches()
    policies = [TopScored(sink=1, local=1, budget=1) for _ in branches]
    for policy, best in zip(policies, (2, 5), strict=True):
        policy.observe({f: float(f == best) for f in range(1, 9)})
    table = pool.routes([b.window(1, 1) for b in branches])
    with pytest.raises(ShapeError, match="keep has 1 policies for 2 timelines"):
        pool.advance(branches, 1, policies[:1], table)
    pool.advance(branches, 1, policies, table)
    assert [b.resident_frames for b in branches] == [[0, 2, 8], [0, 5, 8]]


def test_scores_of_frames_that_cannot_be_meant() -> None:
    pool, video = make()
    add_block(pool, video)
    q, lse, table = torch.zeros(1, 3, H, D), torch.zeros(1, H, 3), RouteTable([[0]], 24)
    text, keys = torch.zeros(2, H, D), pool.k(0)
    pages, scales = quantize_frames(keys, torch.int8)
    held = pool.routes([[video.slot(0)]])
    for call, match in (
        (lambda: frame_attention_mass(q, keys[1:], table, lse), "a pool of 24 slots, but k_pool"),
        (lambda: frame_attention_mass(q, keys + 0, held, lse), "k_pool is not of the FramePool"),
        (lambda: frame_attention_mass(q[:, :0], keys, table, lse[..., :0]), "has no queries"),
        (lambda: frame_attention_mass(q[0], keys, table, lse), r"q must be \[B, Q, H, D\]"),
        (lambda: frame_attention_mass(q, pages, table, lse), "k_scales must be given"),
        (lambda: frame_attention_mass(q, keys, table, lse, k_scales=scales), "go with quantized"),
        (lambda: text_relevance(text, pages, [0]), "k_scales must be given"),
        (lambda: text_relevance(text, keys, [0], k_scales=scales), "go with quantized"),
        (lambda: text_relevance(text, keys, [0, -1]), r"slots\[1\] = -1 not in \[0, 24\)"),
        (lambda: text_relevance(text, keys, [24]), r"slots\[0\] = 24 not in \[0, 24\)"),
        (lambda: text_relevance(text[:0], keys, [0]), "has no tokens"),
    ):
        with pytest.raises(ShapeError, match=match):
            call()
