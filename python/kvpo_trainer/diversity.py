"""How different the branches of one prompt are, beside branches that differ in noise instead.

A policy gradient learns from differences between branches only. What a routing gives is compared
with what as many branches show that go on from the same prefix, unrouted, under other noise.
"""

import datetime
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvpo_kernels import HistoryRouting
from kvpo_trainer.config import RunConfig, routing_text, to_mapping
from kvpo_trainer.data import Prompt, tokenize, unpatchify
from kvpo_trainer.evaluation import standard_error
from kvpo_trainer.generator import Generator
from kvpo_trainer.rewards import HEADS, RewardConfig, RewardModel
from kvpo_trainer.rollout import Rollout, roll_out
from kvpo_trainer.sampling import advance_block, draw_noise

MEASURES = (*HEADS, "reward", "pixels")


@dataclass
class Diversity:
    """Per measure, a value for every prompt of every rollout."""

    routed: dict[str, list[float]] = field(default_factory=lambda: {m: [] for m in MEASURES})
    """Standard deviation over the branches; of pixels, its mean over those of the new frames."""
    noise: dict[str, list[float]] = field(default_factory=lambda: {m: [] for m in MEASURES})
    """The same over branches in the normal context that differ in their noise."""
    cost: dict[str, list[float]] = field(default_factory=lambda: {m: [] for m in MEASURES[:-1]})
    """What the anchor has more than the mean branch."""


def measure(
    policy: Generator,
    reward_model: RewardModel,
    rewards: RewardConfig,
    routing: HistoryRouting,
    prompts: Sequence[Prompt],
    prompts_per_step: int,
    rollouts: int,
    seed: int,
) -> Diversity:
    """Roll out so often, each time with other prompts, a fork and a noise of its own."""
    found = Diversity()
    weights = torch.tensor(rewards.weights)[:, None, None]

    def scored(videos: Tensor, rollout: Rollout) -> dict[str, Tensor]:
        """`[n, rows]` by head, and their sum."""
        n, rows = videos.shape[:2]
        of_rows = [prompt for prompt in rollout.prompts for _ in range(rows)]
        first = rollout.chunk_first_frame
        scores = reward_model(videos.flatten(0, 1), of_rows, first, policy.data).stack()
        by_head = scores.view(len(HEADS), n, rows)
        named = dict(zip(HEADS, by_head, strict=True))
        return named | {"reward": (weights * by_head).sum(0)}

    for i in range(rollouts):
        rng = torch.Generator().manual_seed(seed * 1_000_003 + i)
        context = (i + 1) * 1_000_003
        at = [(i * prompts_per_step + j) % len(prompts) for j in range(prompts_per_step)]
        some = [prompts[j] for j in at]
        rollout = roll_out(policy, some, routing, seed=seed, seed_context=context, rng=rng)
        scores = scored(rollout.chunk, rollout)
        for name, values in scores.items():
            gap = values[:, -1] - values[:, :-1].mean(1)
            found.cost[name] += gap.tolist()
        branches = {name: values[:, :-1] for name, values in scores.items()}
        _add(found.routed, branches, rollout.chunk[:, :-1], rollout)
        other = other_noise(policy, rollout, rng)
        _add(found.noise, scored(other, rollout), other, rollout)
    return found


@torch.no_grad()
def other_noise(policy: Generator, rollout: Rollout, rng: torch.Generator) -> Tensor:
    """The fork's chunk in the normal context, every branch with new noise from the fork on.

    Returns:
        `[n, G, frames, canvas, canvas]`, the shared prefix included.
    """
    n, frames = len(rollout.prompts), policy.data.block_frames
    rows, K = rollout.noisy.shape[:2]
    timelines = [branch for prefix in rollout.prefixes for branch in prefix.fork(rows // n)]
    text = policy.encode_text(tokenize(rollout.prompts)).repeat_interleave(rows // n, dim=0)
    noise = draw_noise(rows, K, policy, rng)
    blocks = []
    for k in range(K):
        first = rollout.start_frame + k * frames
        trace = advance_block(policy, text, rollout.pool, timelines, first, noise[:, k])
        blocks.append(trace.x0[:, -1])
    for timeline in timelines:
        timeline.release()
    new = unpatchify(torch.stack(blocks, 1).flatten(1, 2), policy.data).unflatten(0, (n, rows // n))
    return torch.cat([rollout.chunk[:, :-1, : -rollout.new_frames], new], dim=2)


def summarise(found: Diversity, config: RunConfig, weights: str) -> dict[str, Any]:
    """Means with their standard errors, and what was measured: weights by checksum or path."""

    def mean(values: list[float]) -> dict[str, float]:
        return {"mean": statistics.fmean(values), "error": standard_error(values)}

    parts = {"routed": found.routed, "noise": found.noise, "cost": found.cost}
    return {
        **{part: {m: mean(v) for m, v in values.items()} for part, values in parts.items()},
        "groups": len(found.routed["pixels"]),
        "config": to_mapping(config),
        "weights": weights,
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def table(summary: dict[str, Any]) -> str:
    """The means as text."""
    routing = summary["config"]["kvpo"]["routing"]
    of = f"{summary['groups']} groups of {routing['num_branches']} branches"
    lines = [
        f"{of}: {routing_text(routing)}",
        "standard deviation over the branches of a prompt, and what the anchor has more than they",
        f"{'':10}{'routed':>18}{'other noise':>18}{'anchor - mean':>18}",
    ]
    for measure in MEASURES:
        parts = [summary[part].get(measure) for part in ("routed", "noise", "cost")]
        cells = [f"{p['mean']:.4f} ± {p['error']:.4f}" if p else "" for p in parts]
        lines.append(f"{measure:10}" + "".join(f"{cell:>18}" for cell in cells))
    lines.append("mean ± standard error over the groups")
    return "\n".join(lines)


def _add(
    to: dict[str, list[float]], scores: dict[str, Tensor], videos: Tensor, rollout: Rollout
) -> None:
    for name, values in scores.items():
        to[name] += values.std(1).tolist()
    to["pixels"] += videos[:, :, -rollout.new_frames :].std(1).flatten(1).mean(1).tolist()
