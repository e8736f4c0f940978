"""Branches of one noise that differ only in the history they attend to, and their replay.

All rows of a step, prompts x (branches + anchor), are one batch: a prefix is generated once per
prompt, its timeline is forked without a copy, and each forward serves every branch and the anchor.

Shape letters: n prompts, G branches, A = G + 1 rows per prompt with the anchor last, K blocks from
the fork to the end of its chunk, s denoise steps, N tokens of a block, P values of a token.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvpo_kernels import (
    FramePool,
    HistoryRouting,
    RouteTable,
    RoutingPlan,
    Timeline,
    TrajectoryEnergies,
    eligible_starts,
    plan_history_routing,
    velocity_gradient,
    velocity_step_weights,
)
from kvpo_kernels.errors import ConfigError
from kvpo_trainer.data import DataConfig, Prompt, tokenize, unpatchify
from kvpo_trainer.generator import Generator
from kvpo_trainer.sampling import (
    LOCAL_FRAMES,
    NOISES,
    SIGMAS,
    SINK_FRAMES,
    BlockTrace,
    advance_block,
    commit_block,
    draw_noise,
    normal_routes,
)


@dataclass(frozen=True)
class Rollout:
    """What one rollout hands to the reward and to the replay."""

    prompts: list[Prompt]
    plans: list[RoutingPlan]
    """One per prompt, all with the same start."""
    nearest: int
    """Frames before the block that the branches see besides sink and routed frames."""
    pool: FramePool
    prefixes: list[Timeline]
    """The n shared prefixes, as they were at the fork."""
    noisy: Tensor
    """`[n * G, K, s, N, P]`, inputs of the branches' denoise steps, prompt-major."""
    x0: Tensor
    """`[n * G, K, s, N, P]`, their predictions."""
    context_noise: Tensor
    """`[n * G, K, N, P]`."""
    chunk: Tensor
    """`[n, A, frames, canvas, canvas]`: the fork's chunk of every row, prefix included."""
    chunk_first_frame: int
    videos: Tensor | None
    """`[n, A, frames, canvas, canvas]`: whole videos, where they were asked for."""

    @property
    def start_frame(self) -> int:
        """Absolute index of the first frame that branches differ in."""
        return self.plans[0].start_frame

    @property
    def new_frames(self) -> int:
        """Frames from the fork to the end of its chunk."""
        return self.chunk.shape[2] - (self.start_frame - self.chunk_first_frame)


@dataclass
class Replay:
    """The branches of a rollout under the unperturbed context of one policy."""

    energies: TrajectoryEnergies
    tables: list[RouteTable]
    """The context of each block; a table keeps its frames in the pool."""


def chunk_bounds(routing: HistoryRouting, frame: int, video_frames: int) -> tuple[int, int]:
    """First and past-the-last frame of the chunk that a frame lies in."""
    first, end = 0, routing.chunk_frames
    while frame >= end:
        first, end = end, end + routing.min_new_frames
    return first, min(end, video_frames)


def check_routing(routing: HistoryRouting, data: DataConfig) -> None:
    """Refuse routings that the generator's context, fixed when it was pretrained, does not have.

    Raises:
        ConfigError: naming the key; branches would be the same as others; or no block of such
            videos can be perturbed.
    """
    window = SINK_FRAMES + LOCAL_FRAMES + data.block_frames
    for name, wanted in (
        ("variant", "longlive"),
        ("block_frames", data.block_frames),
        ("sink_frames", SINK_FRAMES),
        ("window_frames", window),
    ):
        if getattr(routing, name) != wanted:
            raise ConfigError(
                f"routing.{name} must be {wanted} as in the generator's context, got"
                f" {getattr(routing, name)}"
            )
    if not routing.nearest_frames < window - SINK_FRAMES:
        raise ConfigError(
            f"routing.nearest_frames must be below {window - SINK_FRAMES}, or nothing is routed;"
            f" got {routing.nearest_frames}"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is an error here, or is told where it happens
        plan_history_routing(routing, data.frames)
        _check_distinct(routing, data.frames)


def _check_distinct(routing: HistoryRouting, video_frames: int) -> None:
    """Refuse branches that repeat each other wherever they fork; at some forks is a warning's."""
    G, n, most, at = routing.num_branches, routing.routed_frames, 0, ""
    for start in eligible_starts(routing, video_frames):
        plan = plan_history_routing(routing, video_frames, start_frame=start)
        distinct, pool = plan.distinct, len(plan.candidates)
        if routing.selection == "independent":  # repeats by chance, and certainly beyond this
            distinct = min(G, math.comb(pool, n))
        if distinct > most:
            most, at = distinct, f"at frame {start}, {n} frames of {pool} candidates"
    if most < G:
        raise ConfigError(
            f"routing.num_branches = {G}, but no more than {most} branches are different with"
            f" routing.selection = {routing.selection!r} ({at})"
        )


@torch.no_grad()
def roll_out(
    policy: Generator,
    prompts: Sequence[Prompt],
    routing: HistoryRouting,
    *,
    seed: int,
    seed_context: int,
    rng: torch.Generator,
    whole_video: bool = False,
) -> Rollout:
    """Generate prefix, branches and anchor of every prompt.

    Args:
        policy: the old policy.
        routing: the branches; their number, the planner's options.
        seed, seed_context: of the planner; the fork is the first prompt's.
        rng: noise, one set per prompt, shared by its branches and anchor.
        whole_video: go on, in the normal context, to the end of the video for the global reward.
    """
    data, n, A = policy.data, len(prompts), routing.num_branches + 1
    frames, G = data.block_frames, routing.num_branches
    plans: list[RoutingPlan] = []
    for i in range(n):
        start = plans[0].start_frame if plans else None
        plans.append(
            plan_history_routing(routing, data.frames, seed, i, seed_context, start_frame=start)
        )
    fork, end = plans[0].start_frame, plans[0].end_frame
    chunk_first, chunk_end = chunk_bounds(routing, fork, data.frames)
    last = data.frames if whole_video else chunk_end
    text = policy.encode_text(tokenize(prompts))
    noise = draw_noise(n, last // frames, policy, rng)

    held = chunk_end - fork + 2 * frames
    pool = policy.new_pool(n * (fork + (A + G) * held))
    prefixes = [pool.timeline() for _ in range(n)]
    prefix = [
        advance_block(policy, text, pool, prefixes, first, noise[:, first // frames]).x0[:, -1]
        for first in range(0, fork, frames)
    ]

    rows = [branch for timeline in prefixes for branch in timeline.fork(A)]
    row_text = text.repeat_interleave(A, dim=0)
    traces: list[BlockTrace] = []
    nearest = max(0, routing.nearest_frames - frames)
    for first in range(fork, last, frames):
        block_noise = noise[:, first // frames].repeat_interleave(A, dim=0)
        table = None
        if first < end:
            lists = [
                row.window(SINK_FRAMES, LOCAL_FRAMES)
                if r % A == G
                else row.routed(SINK_FRAMES, plans[r // A].attended[r % A], nearest)
                for r, row in enumerate(rows)
            ]
            table = pool.routes(lists)
        traces.append(advance_block(policy, row_text, pool, rows, first, block_noise, table))
        if first + frames > end:  # what neither a route nor a window will ask for again
            done = first + frames
            for row in rows:
                row.evict([*range(SINK_FRAMES), *range(done - LOCAL_FRAMES, done)])
    for row in rows:
        row.release()

    K = (chunk_end - fork) // frames
    shared = torch.stack(prefix, 1).flatten(1, 2)[:, None].expand(-1, A, -1, -1)
    own = torch.stack([t.x0[:, -1] for t in traces], 1).flatten(1, 2).unflatten(0, (n, A))
    videos = unpatchify(torch.cat([shared, own], dim=2), data)
    branch_rows = torch.arange(n * A).view(n, A)[:, :G].flatten()
    context = noise[:, fork // frames : chunk_end // frames, NOISES - 1]
    return Rollout(
        prompts=list(prompts),
        plans=plans,
        nearest=nearest,
        pool=pool,
        prefixes=prefixes,
        noisy=torch.stack([t.noisy for t in traces[:K]], 1)[branch_rows],
        x0=torch.stack([t.x0 for t in traces[:K]], 1)[branch_rows],
        context_noise=context.repeat_interleave(G, dim=0),
        chunk=videos[:, :, chunk_first:chunk_end],
        chunk_first_frame=chunk_first,
        videos=videos if whole_video else None,
    )


@torch.no_grad()
def replay(policy: Generator, rollout: Rollout, sigma_floor: float) -> Replay:
    """Pass 1: the energies of all branches, and the contexts that pass 2 needs.

    Each block's recorded inputs go through the policy in the normal context; its own prediction
    then becomes history (KVPO_SPEC 5: the replay's predictions, not the rollout's). The prefix is
    the rollout's for every policy, as is the context noise, so that equal policies have equal
    energies, bit for bit.
    """
    rows = rollout.noisy.shape[0]
    G = rows // len(rollout.prompts)
    frames = policy.data.block_frames
    timelines = [branch for prefix in rollout.prefixes for branch in prefix.fork(G)]
    text = _branch_text(policy, rollout)
    weights = _weights(sigma_floor)
    result = Replay(TrajectoryEnergies(rows), [])
    blocks = rollout.noisy.shape[1]
    for k in range(blocks):
        first = rollout.start_frame + k * frames
        table = normal_routes(rollout.pool, timelines)
        result.tables.append(table)
        for step, sigma in enumerate(SIGMAS):
            x = rollout.noisy[:, k, step]
            x0 = x - sigma * policy.stream(x, sigma, text, first, rollout.pool, table)
            result.energies.add(x0, rollout.x0[:, k, step], weights[step])
        if k + 1 < blocks:
            noise = rollout.context_noise[:, k]
            commit_block(policy, text, timelines, first, rollout.pool, table, x0, noise)
    for timeline in timelines:
        timeline.release()
    return result


def accumulate_gradient(
    policy: Generator,
    rollout: Rollout,
    replayed: Replay,
    score_grad: Tensor,
    *,
    gradient_steps: int,
    sigma_floor: float,
) -> None:
    """Pass 2: add d(loss)/d(weights), one block-step at a time, nothing kept between them.

    Exact, because the loss depends on the weights through the scores only, and each block-step adds
    its own term to a score (its history is a constant, as in the released code).

    Args:
        score_grad: `[n * G]`, d(loss)/d(score).
        gradient_steps: the first so many denoise steps of each block carry gradient.
    """
    weights = _weights(sigma_floor)
    for k, table in enumerate(replayed.tables):
        first = rollout.start_frame + k * policy.data.block_frames
        for step, sigma in enumerate(SIGMAS[:gradient_steps]):
            x = rollout.noisy[:, k, step]
            text = _branch_text(policy, rollout)
            x0 = x - sigma * policy.stream(x, sigma, text, first, rollout.pool, table)
            target = rollout.x0[:, k, step]
            x0.backward(velocity_gradient(x0.detach(), target, weights[step], score_grad))


def _branch_text(policy: Generator, rollout: Rollout) -> Tensor:
    G = rollout.noisy.shape[0] // len(rollout.prompts)
    return policy.encode_text(tokenize(rollout.prompts)).repeat_interleave(G, dim=0)


def _weights(sigma_floor: float) -> list[float]:
    weights: list[float] = velocity_step_weights(SIGMAS, "x0", sigma_floor).tolist()
    return weights
