"""The planner: the released code's lists, and what the other selections promise."""

import dataclasses
import itertools
import random
import re
import statistics
import warnings
from pathlib import Path

import pytest
import torch

from kvpo_kernels import ContrastiveObjective, HistoryRouting, plan_history_routing
from kvpo_kernels.errors import ConfigError
from kvpo_kernels.history.planning import eligible_starts

RELEASE = HistoryRouting()
MEMFLOW = HistoryRouting(variant="memflow", nearest_frames=3)


@pytest.mark.parametrize("routing", [RELEASE, MEMFLOW], ids=["longlive", "memflow"])
def test_release_configurations_have_twelve_starts(routing: HistoryRouting) -> None:
    expected = [21, 24, 39, 42, 57, 60, 75, 78, 93, 96, 111, 114]
    assert eligible_starts(routing, 147) == expected
    starts = {plan_history_routing(routing, sample=i).start_frame for i in range(300)}
    assert sorted(starts) == expected  # every eligible start is reached


def test_candidates_of_the_release() -> None:
    for sample in range(50):
        plan = plan_history_routing(RELEASE, sample=sample)
        assert len(plan.candidates) == 14
        assert plan.end_frame == plan.start_frame + 15
        oldest = max(3, plan.start_frame + 12 - 30)
        assert plan.candidates == list(range(oldest, plan.start_frame - 4))
    plan = plan_history_routing(MEMFLOW, sample=1)
    assert plan.candidates == list(range(min(plan.start_frame, 33) - 3))
    assert all(len(branch) == 9 for branch in plan.selected)


def released_plan(
    r: HistoryRouting, frames: int, seed: int
) -> tuple[list[int], int, list[list[int]]] | None:
    """The released planner, restated from KVPO_SPEC 3.1 in its own order: starts, start, branches;
    None where there is none."""

    def pool_of(start: int) -> range:
        if r.variant == "memflow":
            return range(max(0, min(start, r.cache_frames) - r.nearest_frames))
        last = start + (r.perturbed_blocks - 1) * r.block_frames
        oldest = last - (r.cache_frames - r.sink_frames)
        return range(max(r.sink_frames, oldest), start - r.nearest_frames)

    fixed = r.nearest_frames + (r.sink_frames if r.variant == "longlive" else 0)
    n = max(0, r.window_frames - fixed)
    starts, chunk, position = [], 0, 0
    while position < frames and chunk < r.first_chunks:
        length = min(r.min_new_frames if chunk else r.chunk_frames, frames - position)
        blocks = length // r.block_frames
        starts += [
            position + b * r.block_frames
            for b in range(blocks - r.perturbed_blocks + 1)
            if position + b * r.block_frames >= r.window_frames
            and len(pool_of(position + b * r.block_frames)) >= n
        ]
        position, chunk = position + length, chunk + 1
    if not starts:
        return None
    draw = torch.Generator().manual_seed(seed)
    start = starts[int(torch.randint(0, len(starts), (1,), generator=draw))]
    pool = pool_of(start)
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed + 1)).tolist()
    step = max(1, len(pool) // r.num_branches)
    rows = [[order[(g * step + i) % len(pool)] for i in range(n)] for g in range(r.num_branches)]
    return starts, start, [sorted(pool[i] for i in row) for row in rows]


@pytest.mark.filterwarnings("ignore:routing explores nothing", "ignore:only .* branches")
def test_plans_of_any_configuration_are_those_of_the_released_planner() -> None:
    draw, planned = random.Random(0), 0
    for _ in range(1500):
        pick = draw.choice
        r = HistoryRouting(
            num_branches=pick([1, 2, 3, 8, 11]),
            window_frames=pick([7, 9, 12, 15, 20]),
            sink_frames=pick([0, 1, 3]),
            nearest_frames=pick([3, 4, 5, 6]),
            perturbed_blocks=pick([1, 3, 5, 6]),
            cache_frames=pick([12, 18, 33]),
            chunk_frames=pick([12, 18, 21]),
            min_new_frames=pick([9, 15, 18]),
            first_chunks=pick([1, 3, 7]),
            variant=pick(["longlive", "memflow"]),
        )
        frames, sample = pick([40, 57, 58, 60, 147]), draw.randrange(50)
        expected = released_plan(r, frames, 5 + 97 * sample)
        if expected is None:
            with pytest.raises(ConfigError, match="no eligible start"):
                plan_history_routing(r, frames, seed=5, sample=sample)
            continue
        plan = plan_history_routing(r, frames, seed=5, sample=sample)
        assert (eligible_starts(r, frames), plan.start_frame, plan.selected) == expected
        assert plan.end_frame == plan.start_frame + 3 * r.perturbed_blocks
        planned += 1
    assert 300 < planned < 1200


def test_the_released_defaults() -> None:
    """Of KVPO_SPEC: a change of one is a change of the method."""
    assert dataclasses.asdict(HistoryRouting()) == {
        "num_branches": 8,
        "window_frames": 12,
        "sink_frames": 3,
        "nearest_frames": 4,
        "block_frames": 3,
        "perturbed_blocks": 5,
        "cache_frames": 33,
        "chunk_frames": 21,
        "min_new_frames": 18,
        "first_chunks": 7,
        "variant": "longlive",
        "selection": "official",
        "slot_mapping": "exact",
    }
    assert dataclasses.asdict(ContrastiveObjective()) == {
        "clip_range_low": 0.1,
        "clip_range_high": 0.2,
        "kl_coef": 10.0,
        "protect": "mechanism_2",
        "log_ratio_clamp": 20.0,
        "min_update_entropy_ratio": 0.0,
    }


def test_memflow_routes_slots_whatever_the_mapping() -> None:
    for sample in range(40):
        plan, exact = (
            plan_history_routing(dataclasses.replace(MEMFLOW, slot_mapping=m), sample=sample)
            for m in ("official", "exact")
        )
        assert plan == exact and plan.attended == plan.selected


def test_official_draws_are_those_of_the_released_planner() -> None:
    # KVPO_SPEC 3.1 restated: two CPU generators, one permutation, windows shifted by pool // G.
    for sample, context in itertools.product(range(20), (0, 1_000_003)):
        seed = 42 + 97 * sample + context
        starts = eligible_starts(RELEASE, 147)
        at = torch.randint(0, 12, (1,), generator=torch.Generator().manual_seed(seed)).item()
        order = torch.randperm(14, generator=torch.Generator().manual_seed(seed + 1)).tolist()
        plan = plan_history_routing(RELEASE, seed=42, sample=sample, seed_context=context)
        assert plan.start_frame == starts[at]
        low = plan.candidates[0]
        for g, branch in enumerate(plan.selected):
            assert branch == sorted(low + order[(g + i) % 14] for i in range(5))


def test_slot_mapping_reads_one_block_late_once_the_cache_has_rolled() -> None:
    official = HistoryRouting(slot_mapping="official")
    for sample in range(60):
        exact = plan_history_routing(RELEASE, sample=sample)
        plan = plan_history_routing(official, sample=sample)
        assert plan.selected == exact.selected == exact.attended
        shift = 3 if plan.start_frame >= 39 else 0
        assert plan.attended == [[x + shift for x in branch] for branch in plan.selected]


def test_overlaps_of_the_three_selections() -> None:
    overlap = {
        s: statistics.mean(
            plan_history_routing(HistoryRouting(selection=s), sample=i).mean_overlap()
            for i in range(200)
        )
        for s in ("official", "independent", "balanced")
    }
    assert overlap["official"] == pytest.approx(60 / 28)  # adjacent windows share 4 of 5
    # 25/14 expected; 200 plans leave a standard error of about 0.01
    assert overlap["independent"] == pytest.approx(25 / 14, abs=0.04)
    assert overlap["balanced"] == pytest.approx(38 / 28)  # the least that is possible


@pytest.mark.filterwarnings("ignore:routing explores nothing", "ignore:only .* branches")
def test_balanced_is_never_worse_than_official_and_evenly_used() -> None:
    for window, branches, seed in itertools.product(range(8, 22), (1, 2, 3, 8, 11), (0, 1)):
        plans = {
            s: plan_history_routing(
                HistoryRouting(window_frames=window, num_branches=branches, selection=s), seed=seed
            )
            for s in ("official", "balanced")
        }
        assert plans["balanced"].mean_overlap() <= plans["official"].mean_overlap() + 1e-12
        uses = [
            sum(c in b for b in plans["balanced"].selected) for c in plans["balanced"].candidates
        ]
        assert max(uses) - min(uses) <= 1


def test_balanced_keeps_the_largest_overlap_small() -> None:
    for sample in range(30):
        plan = plan_history_routing(HistoryRouting(selection="balanced"), sample=sample)
        pairs = itertools.combinations(map(set, plan.selected), 2)
        assert max(len(a & b) for a, b in pairs) <= 2


def test_no_room_for_routed_frames_gives_empty_lists() -> None:
    with pytest.warns(UserWarning, match="window_frames = 7, so all 8 branches are the same"):
        plan = plan_history_routing(HistoryRouting(window_frames=7))
    assert plan.selected == [[]] * 8 and plan.mean_overlap() == 0.0 and plan.distinct == 1


@pytest.mark.parametrize("selection", ["official", "independent", "balanced"])
@pytest.mark.parametrize(
    ("options", "distinct", "match"),
    [
        ({}, 8, None),
        ({"num_branches": 1}, 1, None),
        ({"nearest_frames": 9}, 1, "nearest_frames = 9 and sink_frames = 3 leave no frame of"),
        ({"nearest_frames": 30, "num_branches": 1}, 1, "explores nothing"),
        ({"variant": "memflow", "nearest_frames": 12}, 1, "nearest_frames = 12 leave no frame"),
        # What is still cached at the last block: as many as are to be routed.
        ({"cache_frames": 24}, 1, "selects 5 frames of 5 candidates, so all 8 branches"),
        ({"nearest_frames": 8, "num_branches": 40}, 10, r"only \d+ of 40 branches are different"),
    ],
)
def test_routings_that_do_not_explore_are_told(
    options: dict,
    distinct: int,
    match: str | None,
    selection: str,
    recwarn: pytest.WarningsRecorder,
) -> None:
    routing = HistoryRouting(selection=selection, **options)  # type: ignore[arg-type]
    plan = plan_history_routing(routing)
    assert plan.distinct == len({str(branch) for branch in plan.selected}) <= distinct
    told = [str(w.message) for w in recwarn]
    if match is None:
        assert plan.distinct == distinct and not told
    else:
        assert len(told) == 1 and re.search(match, told[0]), told
        assert Path(recwarn[0].filename) == Path(__file__)


def test_branches_beyond_the_windows_of_a_permutation_repeat() -> None:
    for branches in (14, 15, 40):
        routing = HistoryRouting(num_branches=branches)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("default")  # as a user has it
            plans = [plan_history_routing(routing, sample=i) for i in range(20)]
        assert {plan.distinct for plan in plans} == {14}
        assert [str(w.message) for w in told] == [
            f"only 14 of {branches} branches are different: selection 'official' of 5 frames of 14"
            " candidates repeats the others"
        ][: branches > 14]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window_frames": 0}, "window_frames must be at least 1, got 0"),
        ({"num_branches": 0}, "num_branches"),
        ({"selection": "random"}, "selection must be one of"),
        ({"variant": "wan"}, "variant"),
        (
            {"slot_mapping": "official", "nearest_frames": 2},
            "nearest_frames must be at least 3, got 2",
        ),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        HistoryRouting(**options)


def test_no_eligible_start() -> None:
    with pytest.raises(ConfigError, match="no eligible start: 20 frames"):
        plan_history_routing(RELEASE, video_frames=20)


def test_start_can_be_fixed() -> None:
    plans = [plan_history_routing(RELEASE, sample=i, start_frame=42) for i in range(4)]
    assert {plan.start_frame for plan in plans} == {42}
    assert len({str(plan.selected) for plan in plans}) > 1
    with pytest.raises(ConfigError, match="start_frame = 22 is not one of the eligible"):
        plan_history_routing(RELEASE, start_frame=22)
