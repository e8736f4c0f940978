"""Causal history routing: which block to perturb and which old frames each branch attends to.

The rules are those of KVPO's released planner (arXiv 2605.14278 and its code), with two selections
that disperse branches better.
"""

import itertools
import warnings
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from kvpo_kernels.checks import integer
from kvpo_kernels.errors import ConfigError, DtypeError

Variant = Literal["longlive", "memflow"]
Selection = Literal["official", "independent", "balanced"]
SlotMapping = Literal["exact", "official"]


@dataclass(frozen=True)
class HistoryRouting:
    """How branches are made to differ. Frames are latent frames.

    Attributes:
        num_branches: G.
        window_frames: W, frames attended per block, sink and current block included.
        sink_frames: S, the first frames of the video, always attended (longlive).
        nearest_frames: m, the latest frames, always attended; counts the current block, as the
            released code does (LongLive 4, MemFlow 3).
        block_frames: frames per autoregressive block.
        perturbed_blocks: P, blocks that use the routed context.
        cache_frames: C, frames the official rolling cache holds; bounds the candidates.
        chunk_frames, min_new_frames: length of the first chunk and of the later ones.
        first_chunks: only chunks before this one are perturbed.
        variant: "longlive" routes absolute frames besides the sink; "memflow" routes cache slots.
        selection: "official" draws as the released planner; "independent" draws each branch
            without replacement on its own; "balanced" uses all candidates equally often, which
            minimises the mean pairwise overlap.
        slot_mapping: "official" reproduces the released code's look-up error: once its cache has
            rolled, frame x is read one block too late, as x + block_frames (longlive).
    """

    num_branches: int = 8
    window_frames: int = 12
    sink_frames: int = 3
    nearest_frames: int = 4
    block_frames: int = 3
    perturbed_blocks: int = 5
    cache_frames: int = 33
    chunk_frames: int = 21
    min_new_frames: int = 18
    first_chunks: int = 7
    variant: Variant = "longlive"
    selection: Selection = "official"
    slot_mapping: SlotMapping = "exact"

    def __post_init__(self) -> None:
        for name in ("num_branches", "window_frames", "block_frames", "perturbed_blocks"):
            self._at_least(name, 1)
        for name in ("cache_frames", "chunk_frames", "min_new_frames"):
            self._at_least(name, self.block_frames)
        for name in ("sink_frames", "nearest_frames", "first_chunks"):
            self._at_least(name, 0)
        for name, kind in (
            ("variant", Variant),
            ("selection", Selection),
            ("slot_mapping", SlotMapping),
        ):
            value = getattr(self, name)
            if value not in get_args(kind):
                raise ConfigError(f"{name} must be one of {get_args(kind)}, got {value!r}")
        if self.slot_mapping == "official" and self.variant == "longlive":
            # One block later than the latest candidate would not have been generated yet.
            self._at_least("nearest_frames", self.block_frames)

    def _at_least(self, name: str, limit: int) -> None:
        object.__setattr__(self, name, integer(name, getattr(self, name), limit, ConfigError))

    @property
    def routed_frames(self) -> int:
        """n, frames that each branch routes to."""
        sink = self.sink_frames if self.variant == "longlive" else 0
        return max(0, self.window_frames - sink - self.nearest_frames)


@dataclass(frozen=True)
class RoutingPlan:
    """One plan: the blocks from `start_frame` up to `end_frame` are perturbed.

    Attributes:
        candidates: absolute frames (longlive) or cache slots (memflow) to choose from.
        selected: G sorted lists out of `candidates`.
        attended: what the branches read: `selected`, or the frames that the official slot mapping
            reads instead.
    """

    start_frame: int
    end_frame: int
    candidates: list[int]
    selected: list[list[int]]
    attended: list[list[int]]

    @property
    def distinct(self) -> int:
        """How many different selections the G branches have; fewer than G repeat each other."""
        return len({tuple(branch) for branch in self.selected})

    def mean_overlap(self) -> float:
        """Frames that two branches have in common, averaged over all pairs."""
        pairs = list(itertools.combinations(map(set, self.selected), 2))
        return sum(len(a & b) for a, b in pairs) / len(pairs) if pairs else 0.0


def eligible_starts(routing: HistoryRouting, video_frames: int) -> list[int]:
    """First frames of the blocks that a plan may start at, ascending."""
    _check_routing(routing)
    video_frames = integer("video_frames", video_frames, None)
    starts = []
    for chunk, (first, frames) in enumerate(_chunks(routing, video_frames)):
        if chunk >= routing.first_chunks:
            break
        blocks = frames // routing.block_frames
        for block in range(blocks):
            start = first + block * routing.block_frames
            if (
                start >= routing.window_frames
                and block + routing.perturbed_blocks <= blocks
                and len(candidate_frames(routing, start)) >= routing.routed_frames
            ):
                starts.append(start)
    return starts


def candidate_frames(routing: HistoryRouting, start: int) -> list[int]:
    """Frames (longlive) or cache slots (memflow) that the branches of a fork at `start` choose
    from, ascending."""
    _check_routing(routing)
    start = integer("start", start, None)
    if routing.variant == "memflow":
        return list(range(max(0, min(start, routing.cache_frames) - routing.nearest_frames)))
    # Frames that are still cached when the last perturbed block is generated.
    last_block = start + (routing.perturbed_blocks - 1) * routing.block_frames
    oldest = last_block - (routing.cache_frames - routing.sink_frames)
    return list(range(max(routing.sink_frames, oldest), start - routing.nearest_frames))


def plan_history_routing(
    routing: HistoryRouting,
    video_frames: int = 147,
    seed: int = 42,
    sample: int = 0,
    seed_context: int = 0,
    start_frame: int | None = None,
) -> RoutingPlan:
    """Choose the fork block and the frames of each branch; a pure function of its arguments.

    Args:
        video_frames: latent frames of the whole video.
        seed: base seed of the run.
        sample: index of the prompt.
        seed_context: what tells rollouts apart; the released trainer uses
            `(step + 1) * 1_000_003`.
        start_frame: fork here instead of at a drawn start, as prompts that run in one batch must.

    Raises:
        ConfigError: no block of the video is eligible, or not the one asked for.

    Warns:
        UserWarning: branches repeat each other (`RoutingPlan.distinct`), or have no choice: nothing
            is routed, or every candidate is.

    Source: the released planner of KVPO; seeds `seed + 97 * sample + seed_context` (start) and one
    more (selection), CPU generators.
    """
    starts = eligible_starts(routing, video_frames)
    if not starts:
        raise ConfigError(
            f"no eligible start: {video_frames} frames in chunks of {routing.chunk_frames} and"
            f" {routing.min_new_frames} hold no block at or after frame {routing.window_frames}"
            f" followed by {routing.perturbed_blocks} blocks of its chunk"
        )
    seed, sample = integer("seed", seed, None), integer("sample", sample, None)
    base = seed + 97 * sample + integer("seed_context", seed_context, None)
    draw = torch.Generator().manual_seed(base)
    at = torch.randint(0, len(starts), (1,), generator=draw, device="cpu")
    start = starts[int(at.item())]
    if start_frame is not None:
        if start_frame not in starts:
            raise ConfigError(f"start_frame = {start_frame} is not one of the eligible {starts}")
        start = start_frame
    candidates = candidate_frames(routing, start)
    picks = _SELECTIONS[routing.selection](
        len(candidates), routing.routed_frames, routing.num_branches, base + 1
    )
    selected = [sorted(candidates[i] for i in branch) for branch in picks]
    rolled = start + routing.block_frames > routing.cache_frames
    shift = routing.block_frames if routing.slot_mapping == "official" and rolled else 0
    if routing.variant == "memflow":
        shift = 0  # memflow routes slots, which need no look-up
    plan = RoutingPlan(
        start_frame=start,
        end_frame=start + routing.block_frames * routing.perturbed_blocks,
        candidates=candidates,
        selected=selected,
        attended=[[frame + shift for frame in branch] for branch in selected],
    )
    if why := _idle(routing, plan):
        warnings.warn(why, stacklevel=2)  # Python shows the same text once
    return plan


def _idle(routing: HistoryRouting, plan: RoutingPlan) -> str | None:
    """Why branches of a plan do not explore."""
    G, n, pool = routing.num_branches, routing.routed_frames, len(plan.candidates)
    same = f"all {G} branches are the same" if G > 1 else "its one branch has no choice"
    if n == 0:
        sink = f" and sink_frames = {routing.sink_frames}" if routing.variant == "longlive" else ""
        return (
            f"routing explores nothing: nearest_frames = {routing.nearest_frames}{sink} leave no"
            f" frame of window_frames = {routing.window_frames}, so {same}"
        )
    if n == pool:
        return (
            f"routing explores nothing at frame {plan.start_frame}: it selects {n} frames of {pool}"
            f" candidates, so {same}"
        )
    if plan.distinct < G:
        return (
            f"only {plan.distinct} of {G} branches are different: selection"
            f" {routing.selection!r} of {n} frames of {pool} candidates repeats the others"
        )
    return None


def _check_routing(routing: HistoryRouting) -> None:
    if not isinstance(routing, HistoryRouting):
        raise DtypeError(f"routing must be a HistoryRouting, got {type(routing).__name__}")


def _chunks(routing: HistoryRouting, video_frames: int) -> list[tuple[int, int]]:
    chunks, first, frames = [], 0, routing.chunk_frames
    while first < video_frames:
        frames = min(frames, video_frames - first)
        chunks.append((first, frames))
        first, frames = first + frames, routing.min_new_frames
    return chunks


def _permutation(pool: int, draw: torch.Generator) -> list[int]:
    return torch.randperm(pool, generator=draw, device="cpu").tolist()


def _official(pool: int, n: int, branches: int, seed: int) -> list[list[int]]:
    """Windows of one permutation, each shifted by pool // branches against the last."""
    order = _permutation(pool, torch.Generator().manual_seed(seed))
    shift = max(1, pool // branches)
    return [[order[(g * shift + i) % pool] for i in range(n)] for g in range(branches)]


def _independent(pool: int, n: int, branches: int, seed: int) -> list[list[int]]:
    draw = torch.Generator().manual_seed(seed)
    return [_permutation(pool, draw)[:n] for _ in range(branches)]


def _balanced(pool: int, n: int, branches: int, seed: int) -> list[list[int]]:
    """Equal use of all candidates, which is optimal: the overlaps sum to sum_f C(uses_f, 2).

    Among equally used candidates, the one least often together with those already picked: that
    keeps the largest overlap of two branches small too.
    """
    order = _permutation(pool, torch.Generator().manual_seed(seed))
    uses = [0] * pool
    together = [[0] * pool for _ in range(pool)]
    plan = []
    for _ in range(branches):
        branch: list[int] = []
        for _ in range(n):
            pick = min(
                (c for c in order if c not in branch),
                key=lambda c: (
                    uses[c],
                    max((together[c][b] for b in branch), default=0),
                    sum(together[c][b] for b in branch),
                ),
            )
            for b in branch:
                together[pick][b] += 1
                together[b][pick] += 1
            uses[pick] += 1
            branch.append(pick)
        plan.append(branch)
    return plan


_SELECTIONS = {"official": _official, "independent": _independent, "balanced": _balanced}
