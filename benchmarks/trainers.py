"""One KVPO iteration in two ways: as today's trainers run it, and over this library.

Both run the same weights on the same noise, routes and advantages, and both are checked to make the
same scores and gradients. Rewards and the VAE are no part of it. All weights are trained (the
release trains LoRA's), text keys and values are cached constants, as in the release.

`todays_trainer.py` and `pooled_trainer.py` are the two; here is what they share.
"""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from wan import PATCH, Transformer

from kvpo_kernels import HistoryRouting, RopeTable, RoutingPlan, plan_history_routing
from kvpo_kernels.cost.sizes import GeneratorSize

SIGMAS = (1.0, 0.9375, 5 / 6, 0.625)
WEIGHTS = tuple(0.5 for _ in SIGMAS)  # x0 space, floor 1: 1 / (2 sigma_floor^2)
CONTEXT_SIGMA = 0.00498
GRADIENT_STEPS = 2

Clock = Callable[[str], AbstractContextManager[None]]


@dataclass
class Problem:
    """What both ways are given."""

    size: GeneratorSize
    routing: HistoryRouting
    plan: RoutingPlan
    old: Transformer
    initial: Transformer
    text: list[tuple[Tensor, Tensor]]
    noise: Tensor
    """`[blocks, 5, N, P]`: of the first step, of the three between steps, of the context pass."""
    advantages: Tensor
    rope: RopeTable
    micro_batch: int
    """Branches whose activations one backward of `Pooled` holds."""
    checkpoint_layers: bool
    """Whether `Pooled` recomputes each layer in the backward, as `Today` does the whole forward."""
    backend: str | None = None
    """Of routed attention; None for the one a call would take."""

    @property
    def dtype(self) -> torch.dtype:
        return self.noise.dtype

    @property
    def device(self) -> torch.device:
        return self.noise.device

    def tokens(self, frames: int) -> int:
        return frames * self.size.frame_tokens

    def blocks(self) -> range:
        """First frames of the blocks from the fork to the end of its chunk."""
        return range(self.plan.start_frame, self.noise.shape[0] * self.size.block_frames, 3)

    def noise_of(self, first_frame: int) -> Tensor:
        return self.noise[first_frame // self.size.block_frames]


def make_problem(
    size: GeneratorSize,
    branches: int,
    micro_batch: int,
    checkpoint_layers: bool,
    device: str,
    dtype: torch.dtype,
    backend: str | None = None,
) -> Problem:
    """Random weights and noise; the fork at frame 21, its chunk ends at 39: six blocks."""
    torch.manual_seed(0)
    rng = torch.Generator().manual_seed(1)
    with torch.device(device):
        old = Transformer(size).to(dtype)
    initial = copy.deepcopy(old)
    with torch.no_grad():
        for weight in initial.parameters():
            weight.add_(1e-3 * torch.randn_like(weight))
    old.requires_grad_(False), initial.requires_grad_(False)
    routing = HistoryRouting(num_branches=branches)
    plan = plan_history_routing(routing, video_frames=57, start_frame=21)
    N, P = 3 * size.frame_tokens, PATCH * size.latent_channels
    return Problem(
        size,
        routing,
        plan,
        old,
        initial,
        old.text(rng),
        torch.randn(13, 5, N, P, generator=rng).to(device, dtype),
        torch.randn(branches, generator=rng).to(device),
        RopeTable(size.head_dim, device=device),
        micro_batch,
        checkpoint_layers,
        backend,
    )


class Trainer:
    """A policy and its optimizer; `iteration` is one rollout and one update."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.old = problem.old
        self.policy = copy.deepcopy(problem.old).requires_grad_(True)
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=1e-5, fused=False)
        self.scores = torch.empty(0)
        """Of the last iteration, for the check."""

    def iteration(self, clock: Clock, synced: bool) -> None:
        """`synced`: the old policy is still the current one."""
        raise NotImplementedError

    def _denoise(
        self, first: int, rows: int, predict: Callable[[Tensor, float], Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Inputs and predictions `[rows, N, P]` of a block's denoise steps."""
        noise = self.problem.noise_of(first)
        x, inputs, predictions = noise[:1].expand(rows, -1, -1), [], []
        for step, sigma in enumerate(SIGMAS):
            inputs.append(x)
            predictions.append(predict(x, sigma))
            if step + 1 < len(SIGMAS):
                following = SIGMAS[step + 1]
                x = (1 - following) * predictions[-1] + following * noise[step + 1]
        return inputs, predictions

    def _context_input(self, first: int, x0: Tensor) -> Tensor:
        return (1 - CONTEXT_SIGMA) * x0 + CONTEXT_SIGMA * self.problem.noise_of(first)[4]

    def _update(self) -> None:
        nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
        self.optimizer.step()
