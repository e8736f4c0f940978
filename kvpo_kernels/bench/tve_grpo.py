"""Cases of energies + policy loss + gradient: against the same in torch, eager and compiled."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvpo_kernels import trajectory_velocity_energy, tve_grpo_loss
from kvpo_kernels.bench import machine
from kvpo_kernels.bench.case import Baseline, Call, Case, Yardstick, compiled


@dataclass(frozen=True)
class Sizes:
    """Predictions of G branches over S block-steps of N values."""

    name: str
    about: str
    branches: int = 8
    steps: int = 4
    values: int = 3 * 16 * 60 * 104

    def small(self) -> "Sizes":
        """Where only results matter."""
        return replace(self, branches=min(self.branches, 8), steps=2, values=768)


SIZES = {
    "cpu": (
        Sizes(
            "trainer", "8 branches, 4 block-steps of 24,576 values: fits in cache", values=24_576
        ),
        Sizes("wan-1.3b", "8 branches, 4 block-steps of a block of 480p"),
    ),
    "cuda": (
        Sizes("one-step", "8 branches, one block-step of a block of 480p", steps=1),
        Sizes("wan-1.3b", "8 branches, 20 block-steps of a block of 480p", steps=20),
        Sizes("720p", "8 branches, 20 block-steps of a block of 720p", 8, 20, 3 * 16 * 90 * 160),
        Sizes("2-branches", "2 branches, 20 block-steps of 480p", 2, 20),
        Sizes("64-branches", "64 branches, 4 block-steps of 480p", 64, 4),
    ),
}


def torch_loss(
    pred: Tensor, target: Tensor, weights: Tensor, old: Tensor, advantages: Tensor, ref: Tensor
) -> Tensor:
    """From predictions to the loss."""
    mse = (pred.float() - target.float()).square().flatten(2).mean(dim=-1)
    return policy_loss(-(mse * weights).sum(dim=1), old, advantages, ref)


def policy_loss(scores: Tensor, old: Tensor, advantages: Tensor, ref: Tensor) -> Tensor:
    """The objective as one writes it in torch, with the defaults of `ContrastiveObjective`."""
    log_pi, log_old, log_ref = (torch.log_softmax(s, dim=0) for s in (scores, old, ref))
    ratio = (log_pi - log_old).clamp(-20.0, 20.0).exp()
    gain = torch.minimum(ratio * advantages, ratio.clamp(0.9, 1.2) * advantages)
    pi = log_pi.exp()
    return -gain.mean() + 10.0 * (pi * ((pi + 1e-10).log() - log_ref)).sum()


class Loss:
    """The inputs of a case, and the ways to the gradient of its predictions."""

    def __init__(self, sizes: Sizes, dtype: torch.dtype, device: str) -> None:
        G, S, N = sizes.branches, sizes.steps, sizes.values
        self.device = device
        self.backend: str | None = None
        g = torch.Generator(device).manual_seed(0)
        pred = torch.randn(G, S, N, generator=g, device=device)
        target = pred + 0.3 * torch.randn(G, S, N, generator=g, device=device)
        self.pred, self.target = pred.to(dtype).requires_grad_(), target.to(dtype)
        weights = torch.full((S,), 0.5, dtype=torch.float64, device=device)
        old = -trajectory_velocity_energy(self.pred.detach(), self.target, weights)
        old, ref = (old + 0.02 * torch.randn(G, generator=g, device=device) for _ in range(2))
        self.scalars = (weights, old, torch.randn(G, generator=g, device=device), ref)
        self.narrow_weights = weights.float()
        self.flops = 5.0 * self.pred.numel()
        self.bytes = 3 * self.pred.nbytes  # pred, target, gradient: once each

    def clear(self) -> None:
        """Nothing is written but results."""

    def ours(self, backend: str) -> Call:
        """The call, which makes the gradient as well."""

        def run() -> Tensor:
            grad = tve_grpo_loss(self.pred, self.target, *self.scalars, backend=backend).pred_grad
            assert grad is not None
            return grad

        return run

    def expected(self) -> Tensor:
        """By the reference."""
        grad: Tensor = self.ours("reference")()
        return grad

    def autograd(self) -> Call:
        def run() -> Tensor:
            inputs = (self.pred, self.target, *self.scalars)
            loss = tve_grpo_loss(*inputs, backend=self.backend).loss
            return torch.autograd.grad(loss, self.pred)[0]

        return run

    def in_torch(self, loss: Callable[..., Tensor]) -> Call:
        def run() -> Tensor:
            value = loss(self.pred, self.target, self.narrow_weights, *self.scalars[1:])
            return torch.autograd.grad(value, self.pred)[0]

        return run

    def read(self) -> tuple[Call, float]:
        """Two reads of both and a write: the gradient needs all of the loss."""
        return torch.ones(5 * self.pred.nbytes // 4, device=self.device).sum, 1.0


def cases(device: str, small: bool) -> Iterator[Case]:
    """Every case of the device; the first is the main one."""
    baselines = (
        Baseline(
            "compile",
            "the same in torch, under torch.compile",
            lambda work: work.in_torch(compiled(torch_loss, small)),
        ),
        Baseline("eager", "the same in torch", lambda work: work.in_torch(torch_loss)),
        Baseline("autograd", "ours, its gradient fetched through the loss", Loss.autograd),
    )
    read = Yardstick("read", "a sum over what is read and written in two passes", Loss.read)
    dtypes = (torch.float32, torch.bfloat16) if device == "cpu" else (torch.bfloat16,)
    for sizes in SIZES[device]:
        given = sizes.small() if small else sizes
        for dtype in dtypes:
            yield Case(
                "tve_grpo",
                "loss+gradient",
                sizes.name,
                f"energies, loss and its gradient; {sizes.about}",
                dtype,
                device,
                {k: v for k, v in vars(given).items() if k not in ("name", "about")},
                functools.partial(Loss, given, dtype, device),
                baselines,
                (machine.of_copy(device), read),
                small=small,
                tolerance=1e-2 if dtype is torch.bfloat16 else 1e-4,
            )
