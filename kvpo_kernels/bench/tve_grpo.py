"""Cases of energies + policy loss + gradient: against the same in torch, eager and compiled.

The bars are those of an H200 in bfloat16; elsewhere the same cases run smaller and have none.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvpo_kernels import trajectory_velocity_energy, tve_grpo_loss
from kvpo_kernels.bench.comparison import Baselines, Comparison, Record, memory_bound_parts


@dataclass(frozen=True)
class Case:
    """Predictions of G branches over S block-steps of N values."""

    id: str
    variant: str = ""
    branches: int = 8
    steps: int = 1
    values: int = 3 * 16 * 60 * 104

    def smaller(self) -> "Case":
        """The same on a CPU."""
        return replace(self, steps=min(self.steps, 4), values=self.values // 16)


CASES = (
    Case("T1"),
    Case("T2", steps=20),
    Case("T2", "720p", steps=20, values=3 * 16 * 90 * 160),
    Case("T2", "2-branches", branches=2, steps=20),
    Case("T2", "64-branches", branches=64, steps=4),
)
BARS = {"T1": 10.0, "T1/compile": 1.0, "T2": 6.0, "T2/compile": 1.2, "T2/copy": 0.55}


def torch_loss(
    pred: Tensor, target: Tensor, weights: Tensor, old: Tensor, advantages: Tensor
) -> Tensor:
    """The objective as one writes it in torch, with the defaults of `ContrastiveObjective`."""
    mse = (pred.float() - target.float()).square().flatten(2).mean(dim=-1)
    log_pi = torch.log_softmax(-(mse * weights).sum(dim=1), dim=0)
    log_old = torch.log_softmax(old, dim=0)
    ratio = (log_pi - log_old).clamp(-20.0, 20.0).exp()
    gain = torch.minimum(ratio * advantages, ratio.clamp(0.9, 1.2) * advantages)
    pi = log_pi.exp()
    return -gain.mean() + 10.0 * (pi * ((pi + 1e-10).log() - log_old)).sum()


class Bench(Comparison):
    """Measures one case at one precision; yields records."""

    def __init__(
        self, case: Case, dtype: torch.dtype, device: str, backend: str | None, quick: bool
    ) -> None:
        G, S, N = case.branches, case.steps, case.values
        moved = 3 * G * S * N * dtype.itemsize  # pred, target, gradient: once each
        shape = {"branches": G, "steps": S, "values": N}
        sizes = (shape, dtype, device, backend, quick)
        super().__init__("tve_grpo", case.variant, *sizes, bars=BARS, moved=moved)
        self.case = case
        g = torch.Generator(device).manual_seed(0)
        pred = torch.randn(G, S, N, generator=g, device=device)
        target = pred + 0.3 * torch.randn(G, S, N, generator=g, device=device)
        self.pred, self.target = pred.to(dtype).requires_grad_(), target.to(dtype)
        weights = torch.full((S,), 0.5, dtype=torch.float64, device=device)
        old = -trajectory_velocity_energy(self.pred.detach(), self.target, weights)
        old = old + 0.02 * torch.randn(G, generator=g, device=device)
        self.scalars = (weights, old, torch.randn(G, generator=g, device=device))
        self.narrow_weights = weights.float()
        self.backend = backend

    def ours(self) -> Tensor:
        grad = tve_grpo_loss(self.pred, self.target, *self.scalars, backend=self.backend).pred_grad
        assert grad is not None
        return grad

    def in_torch(self, loss: Callable[..., Tensor]) -> Tensor:
        value = loss(self.pred, self.target, self.narrow_weights, *self.scalars[1:])
        return torch.autograd.grad(value, self.pred)[0]

    def run(self, copy_tbps: float) -> Iterator[Record]:
        """The gradient from predictions, and how near it comes to a copy of as many bytes."""
        compiled = torch.compile(torch_loss, dynamic=False)
        id = self.case.id
        others: Baselines = {
            id: ("torch, eager", lambda: functools.partial(self.in_torch, torch_loss)),
            f"{id}/compile": (
                "torch.compile",
                lambda: functools.partial(self.in_torch, compiled),
            ),
        }
        flops = 5.0 * self.pred.numel()
        yield from self.compare_and_copy(id, self.ours, others, flops, copy_tbps)


def parts(
    device: str, quick: bool, backend: str | None, rates: dict[str, float]
) -> Iterator[tuple[str, Callable[[], Iterator[Record]]]]:
    """What is measured, each on its own so that one that fails leaves the others."""
    return memory_bound_parts(CASES, Bench, device, quick, backend, rates["copy_tbps"])
