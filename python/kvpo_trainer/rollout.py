"""One KVPO rollout: a shared prefix, a fork, and all branches in one batch.

The branches of a prompt share the prefix, the prompt and every noise draw; they differ in which old
frames they attend to inside the perturbed window (causal history routing). The anchor is the same
rollout with the normal context and runs in the same batch, as the last row of its prompt. So a
block costs five forwards, whatever the number of branches.

Shape letters: n prompts, G branches of a prompt, B = n * (G + 1) rows, K recorded blocks, S denoise
steps, N tokens of a block, P values of a token.

Source: KVPO (arXiv:2605.14278), the released code's rollout.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvpo_kernels import FramePool, HistoryRouting, RouteTable, Timeline, plan_history_routing
from kvpo_kernels.history.planning import RoutingPlan
from kvpo_trainer.data import Prompt, tokenize, unpatchify
from kvpo_trainer.generator import Generator
from kvpo_trainer.sampling import (
    LOCAL_FRAMES,
    NOISES,
    SIGMAS,
    SINK_FRAMES,
    commit_block,
    denoise_block,
    normal_routes,
)

EXPLORATION = {
    "official": HistoryRouting(),
    "first_block": HistoryRouting(nearest_frames=3, perturbed_blocks=1),
}
"""Routings by name. "official" is the released one: five blocks that see the sink, five routed
frames and the previous frame. "first_block" takes the previous frame away as well, but from the
first block only: as diverse as other noise, at some cost in continuity. Not in the paper."""


@dataclass(frozen=True)
class Rollout:
    """What a rollout leaves for rewards and replay."""

    prompts: list[Prompt]
    """n of them."""
    plan: RoutingPlan
    chunk: tuple[int, int]
    """First frame of the fork chunk, and the first one after it."""
    videos: Tensor
    """`[n, G + 1, frames, canvas, canvas]` from frame 0 on; the anchor is the last row."""
    pool: FramePool
    prefixes: list[Timeline]
    """Per prompt the history before the fork, as the rollout's policy wrote it."""
    noisy: Tensor
    """`[n * G, K, S, N, P]`, inputs of the denoise steps from the fork to the chunk's end."""
    x0: Tensor
    """`[n * G, K, S, N, P]`, their predictions."""
    context_noise: Tensor
    """`[n * G, K, N, P]`, of the context passes."""

    @property
    def num_branches(self) -> int:
        """G."""
        return self.videos.shape[1] - 1

    @property
    def first_blocks(self) -> list[int]:
        """First frame of each recorded block."""
        first, count = self.plan.start_frame, self.noisy.shape[1]
        step = (self.chunk[1] - first) // count
        return [first + k * step for k in range(count)]


def chunk_of(routing: HistoryRouting, frame: int, video_frames: int) -> tuple[int, int]:
    """First frame of the chunk that holds `frame`, and the first one after it."""
    first, end = 0, routing.chunk_frames
    while frame >= end:
        first, end = end, end + routing.min_new_frames
    return first, min(end, video_frames)


@torch.no_grad()
def roll_out(
    policy: Generator,
    prompts: Sequence[Prompt],
    routing: HistoryRouting,
    noise: Tensor,
    *,
    whole_video: bool = False,
    seed: int = 42,
    sample: int = 0,
    seed_context: int = 0,
) -> Rollout:
    """Roll out all branches and the anchor of every prompt.

    Args:
        policy: the one that samples: KVPO's old policy.
        prompts: n of them; they share the plan, hence the fork.
        routing: how branches differ; its G is the number of branches.
        noise: `[n, blocks of the video, 5, N, P]`, of `draw_noise`; each branch uses its prompt's.
        whole_video: go on to the end of the video, for global rewards; else stop with the chunk.
        seed, sample, seed_context: of the plan; see `plan_history_routing`.
    """
    data, n, G = policy.data, len(prompts), routing.num_branches
    plan = plan_history_routing(routing, data.frames, seed, sample, seed_context)
    fork, step = plan.start_frame, data.block_frames
    chunk = chunk_of(routing, fork, data.frames)
    end = data.frames if whole_video else chunk[1]
    rows = n * (G + 1)
    # The prefixes, the rows' own frames, and as many again for one replay.
    pool = policy.new_pool(n * fork + rows * (end - fork) + n * G * (chunk[1] - fork))
    text = policy.encode_text(tokenize(prompts))

    prefixes = [pool.timeline() for _ in range(n)]
    blocks = []
    for first in range(0, fork, step):
        draws = noise[:, first // step]
        table = normal_routes(pool, prefixes)
        x0 = denoise_block(policy, text, first, pool, table, draws).x0[:, -1]
        commit_block(policy, text, prefixes, first, pool, table, x0, draws[:, NOISES - 1])
        blocks.append(x0.repeat_interleave(G + 1, dim=0))

    branches = [branch for prefix in prefixes for branch in prefix.fork(G + 1)]
    text = text.repeat_interleave(G + 1, dim=0)
    is_branch = torch.arange(rows) % (G + 1) < G
    noisy, predictions, context_noise = [], [], []
    for first in range(fork, end, step):
        draws = noise[:, first // step].repeat_interleave(G + 1, dim=0)
        if first < plan.end_frame:
            table = branch_routes(pool, branches, plan, routing)
        else:
            table = normal_routes(pool, branches)
        trace = denoise_block(policy, text, first, pool, table, draws)
        last = trace.x0[:, -1]
        blocks.append(last)
        if first < chunk[1]:
            noisy.append(trace.noisy[is_branch])
            predictions.append(trace.x0[is_branch])
            context_noise.append(draws[is_branch, NOISES - 1])
        if first + step < end:
            commit_block(policy, text, branches, first, pool, table, last, draws[:, NOISES - 1])
    videos = unpatchify(torch.stack(blocks, 1).flatten(1, 2), data)
    return Rollout(
        prompts=list(prompts),
        plan=plan,
        chunk=chunk,
        videos=videos.unflatten(0, (n, G + 1)),
        pool=pool,
        prefixes=prefixes,
        noisy=torch.stack(noisy, 1),
        x0=torch.stack(predictions, 1),
        context_noise=torch.stack(context_noise, 1),
    )


def branch_routes(
    pool: FramePool, branches: Sequence[Timeline], plan: RoutingPlan, routing: HistoryRouting
) -> RouteTable:
    """Contexts of one perturbed block: routed for the branches, normal for each group's last row."""
    G = routing.num_branches
    nearest = routing.nearest_frames - routing.block_frames
    lists = []
    for row, branch in enumerate(branches):
        g = row % (G + 1)
        if g == G:
            lists.append(branch.window(SINK_FRAMES, LOCAL_FRAMES))
        else:
            lists.append(branch.routed(routing.sink_frames, plan.attended[g], nearest))
    return pool.routes(lists)


@dataclass(frozen=True)
class Replay:
    """Predictions' contexts under a policy that looks at recorded trajectories."""

    tables: list[RouteTable]
    """Per recorded block the normal context of every branch; holds its frames in the pool."""
    residuals: Tensor
    """`[n * G, K, S]`, mean squared difference of the x0 predictions, recorded and replayed."""


@torch.no_grad()
def replay(policy: Generator, rollout: Rollout) -> Replay:
    """Predict the recorded inputs again in the deployment context.

    History before the fork is the rollout's; after it, each branch continues with the replaying
    policy's own last predictions, committed with the rollout's context noise, so that the policy
    that made the rollout scores the same in every replay.
    """
    G = rollout.num_branches
    pool, recorded = rollout.pool, rollout.first_blocks
    words = tokenize(rollout.prompts).repeat_interleave(G, dim=0)
    text = policy.encode_text(words)
    branches = [branch for prefix in rollout.prefixes for branch in prefix.fork(G)]
    tables, residuals = [], []
    for k, first in enumerate(recorded):
        table = normal_routes(pool, branches)
        tables.append(table)
        by_step = []
        for s, sigma in enumerate(SIGMAS):
            x = rollout.noisy[:, k, s]
            x0 = x - sigma * policy.stream(x, sigma, text, first, pool, table)
            by_step.append((x0 - rollout.x0[:, k, s]).square().mean((-2, -1)))
        residuals.append(torch.stack(by_step, 1))
        if k + 1 < len(recorded):
            draws = rollout.context_noise[:, k]
            commit_block(policy, text, branches, first, pool, table, x0, draws)
    return Replay(tables, torch.stack(residuals, 1))
