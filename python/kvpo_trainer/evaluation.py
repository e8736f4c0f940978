"""What a generator is worth: rewards and the judge's measures on given prompts and noise."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvpo_trainer.data import Prompt, tokenize, unpatchify
from kvpo_trainer.generator import Generator
from kvpo_trainer.rewards import HEADS, Judge, RewardConfig, RewardModel
from kvpo_trainer.sampling import draw_noise, sample_videos


@dataclass(frozen=True)
class Evaluation:
    """Per prompt, in order: paired with another evaluation of the same prompts and seed."""

    videos: Tensor
    """`[B, frames, canvas, canvas]`."""
    scores: dict[str, Tensor]
    """`[B]` by name: vq, mq, ta, reward (their weighted sum), judge_digit, judge_motion."""


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences with its 95 % interval."""

    mean: float
    half_width: float


def evaluate(
    generator: Generator,
    reward_model: RewardModel,
    judge: Judge,
    rewards: RewardConfig,
    prompts: Sequence[Prompt],
    seed: int,
    batch: int = 20,
) -> Evaluation:
    """Sample each prompt once, in the normal context, and score the whole videos.

    The noise of a prompt depends on the seed and its position only.
    """
    data = generator.data
    blocks = data.frames // data.block_frames
    rng = torch.Generator().manual_seed(seed)
    noise = draw_noise(len(prompts), blocks, generator, rng)
    with torch.no_grad():
        text = generator.encode_text(tokenize(prompts))
    tokens = torch.cat(
        [
            sample_videos(generator, text[i : i + batch], noise[i : i + batch])
            for i in range(0, len(prompts), batch)
        ]
    )
    videos = unpatchify(tokens.flatten(1, 2), data)
    by_head = reward_model(videos, prompts, 0, data).stack()
    scores = dict(zip(HEADS, by_head, strict=True))
    scores["reward"] = (torch.tensor(rewards.weights)[:, None] * by_head).sum(0)
    return Evaluation(videos, scores | judge(videos, prompts, 0, data))


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of independent values; NaN for one."""
    n = len(values)
    return statistics.stdev(values) / math.sqrt(n) if n > 1 else math.nan


def paired_difference(after: Tensor, before: Tensor) -> Difference:
    """`after - before` over the same prompts and noise, with a normal 95 % interval."""
    difference = (after - before).double()
    error = float(difference.std()) / math.sqrt(difference.numel())
    return Difference(float(difference.mean()), 1.96 * error)
