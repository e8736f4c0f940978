"""The few-step sampler: four denoise steps with fresh noise between them, then a context pass.

Flow matching: x_t = (1 - sigma) x0 + sigma eps, the generator predicts v = eps - x0, hence
x0 = x_t - sigma v. Between steps the prediction is noised again,
x_{s+1} = (1 - sigma_{s+1}) x0 + sigma_{s+1} eps_fresh, as the distilled generators KVPO is for do
(KVPO's released code; not an Euler step). Given the noise it is deterministic.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvpo_kernels import FramePool, RouteTable, Timeline
from kvpo_trainer.generator import Generator

SINK_FRAMES = 3
LOCAL_FRAMES = 6  # with the sink and the current block the 12 frames of the release
CONTEXT_SIGMA = 0.00498  # of the released schedule's last entry
NOISES = 5  # per block: the initial noise, three fresh ones, the context pass's


def warped_sigmas(
    shift: float = 5.0, times: Sequence[float] = (1.0, 0.75, 0.5, 0.25)
) -> list[float]:
    """Noise levels of the denoise steps: `shift * t / (1 + (shift - 1) * t)`."""
    return [shift * t / (1 + (shift - 1) * t) for t in times]


SIGMAS = warped_sigmas()


@dataclass(frozen=True)
class BlockTrace:
    """What a rollout keeps of one block, for the replay."""

    noisy: Tensor
    """`[B, steps, N, P]`, the inputs of the denoise steps."""
    x0: Tensor
    """`[B, steps, N, P]`, their predictions; the last one is the block."""


def draw_noise(rows: int, blocks: int, generator: Generator, rng: torch.Generator) -> Tensor:
    """All noise of `blocks` blocks, `[rows, blocks, 5, N, P]`."""
    shape = (rows, blocks, NOISES, generator.block_tokens, generator.data.patch_values)
    return torch.randn(shape, generator=rng)


def denoise_block(
    generator: Generator,
    text: Tensor,
    first_frame: int,
    pool: FramePool,
    table: RouteTable,
    noise: Tensor,
) -> BlockTrace:
    """Sample one block of every row.

    Args:
        text: `[B, 8, M]`.
        table: the rows' contexts.
        noise: `[B, 5, N, P]`.
    """
    noisy, predictions = [], []
    x = noise[:, 0]
    for step, sigma in enumerate(SIGMAS):
        x0 = x - sigma * generator.stream(x, sigma, text, first_frame, pool, table)
        noisy.append(x)
        predictions.append(x0)
        if step + 1 < len(SIGMAS):
            following = SIGMAS[step + 1]
            x = (1 - following) * x0 + following * noise[:, step + 1]
    return BlockTrace(torch.stack(noisy, 1), torch.stack(predictions, 1))


def commit_block(
    generator: Generator,
    text: Tensor,
    timelines: Sequence[Timeline],
    first_frame: int,
    pool: FramePool,
    table: RouteTable,
    x0: Tensor,
    noise: Tensor,
    keep: Iterable[int] | None = None,
) -> None:
    """The context pass: append the block to every row's timeline.

    Args:
        table: the rows' contexts.
        x0: `[B, N, P]`, the finished block.
        noise: `[B, N, P]`, mixed in at the context level.
        keep: frames that stay; the others leave, and with this pass the table is used up. None
            keeps all.
    """
    frames = generator.data.block_frames
    if keep is None:
        for timeline in timelines:
            timeline.append(frames)
        slots = pool.prepare_write(timelines, first_frame, frames)
    else:
        _, slots = pool.advance(timelines, frames, keep, table)
    x = (1 - CONTEXT_SIGMA) * x0 + CONTEXT_SIGMA * noise
    generator.stream(x, 0.0, text, first_frame, pool, table, write_slots=slots)


def normal_routes(pool: FramePool, timelines: Sequence[Timeline]) -> RouteTable:
    """The deployment context: sink and the last committed frames."""
    return pool.routes([t.window(SINK_FRAMES, LOCAL_FRAMES) for t in timelines])


def advance_block(
    generator: Generator,
    text: Tensor,
    pool: FramePool,
    timelines: Sequence[Timeline],
    first_frame: int,
    noise: Tensor,
    table: RouteTable | None = None,
    keep: Iterable[int] | None = None,
) -> BlockTrace:
    """Sample one block of every row and commit it; in the normal context without a table.

    Args:
        text: `[B, 8, M]`.
        noise: `[B, 5, N, P]`.
        keep: as in `commit_block`.
    """
    table = normal_routes(pool, timelines) if table is None else table
    trace = denoise_block(generator, text, first_frame, pool, table, noise)
    x0, last = trace.x0[:, -1], noise[:, NOISES - 1]
    commit_block(generator, text, timelines, first_frame, pool, table, x0, last, keep)
    return trace


@torch.no_grad()
def sample_videos(generator: Generator, text: Tensor, noise: Tensor) -> Tensor:
    """Whole videos as tokens `[B, K, N, P]`, one per row of text, in constant memory.

    Args:
        text: `[B, 8, M]`.
        noise: `[B, K, 5, N, P]`.
    """
    frames = generator.data.block_frames
    held = SINK_FRAMES + LOCAL_FRAMES
    pool = generator.new_pool(text.shape[0] * held)
    timelines = [pool.timeline() for _ in range(text.shape[0])]
    blocks = []
    for k in range(noise.shape[1]):
        first = k * frames
        keep = [*range(SINK_FRAMES), *range(first + frames - LOCAL_FRAMES, first)]
        trace = advance_block(generator, text, pool, timelines, first, noise[:, k], keep=keep)
        blocks.append(trace.x0[:, -1])
    return torch.stack(blocks, 1)
