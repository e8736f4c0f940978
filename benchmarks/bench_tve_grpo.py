"""Energies + loss + gradient (`tve_grpo_loss`) against the same in torch.

Ours is the call and its `pred_grad`; torch gets its gradient from autograd. `ours_autograd_ms` in
the record is ours with the gradient fetched through the loss by autograd as well.

Run: `python benchmarks/bench_tve_grpo.py [--quick] [--threads N]`.
"""

from collections.abc import Callable

import torch
from harness import Record, check, main, record
from torch import Tensor

from kvpo_kernels import trajectory_velocity_energy, tve_grpo_loss
from kvpo_kernels.bench.timing import interleaved, ratio

BRANCHES, STEPS = 8, 4
# N, dtype, and the least ratios over torch.compile and eager that are accepted
CASES = (
    (24_576, torch.float32, 2.5, 10.0),
    (24_576, torch.bfloat16, 2.5, 10.0),
    (299_520, torch.float32, 1.4, 3.5),
    (299_520, torch.bfloat16, 1.4, 3.5),
)
BAR_READ = 0.85  # of the time that a sum over as many bytes takes


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


def candidates(numel: int, dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
    """Return name -> call that makes the gradient; they are checked to agree."""
    g = torch.Generator().manual_seed(0)
    pred = torch.randn(BRANCHES, STEPS, numel, generator=g)
    target = (pred + 0.3 * torch.randn(pred.shape, generator=g)).to(dtype)
    pred = pred.to(dtype)
    weights = torch.full((STEPS,), 0.5)
    wide = weights.double()  # as velocity_step_weights returns them
    old = -trajectory_velocity_energy(pred, target, wide)
    old, ref = (old + 0.02 * torch.randn(BRANCHES, generator=g) for _ in range(2))
    advantages = torch.randn(BRANCHES, generator=g)
    pred.requires_grad_()
    torch.compiler.reset()
    compiled = torch.compile(torch_loss, dynamic=False)

    def ours() -> Tensor:
        grad = tve_grpo_loss(pred, target, wide, old, advantages, ref).pred_grad
        assert grad is not None
        return grad

    def autograd() -> Tensor:
        r = tve_grpo_loss(pred, target, wide, old, advantages, ref)
        return torch.autograd.grad(r.loss, pred)[0]

    def eager() -> Tensor:
        loss = torch_loss(pred, target, weights, old, advantages, ref)
        return torch.autograd.grad(loss, pred)[0]

    def compile_() -> Tensor:
        loss = compiled(pred, target, weights, old, advantages, ref)
        return torch.autograd.grad(loss, pred)[0]

    calls = {"ours": ours, "ours_autograd": autograd, "eager": eager, "compile": compile_}
    expected = eager().float()
    for name, call in calls.items():  # no speed of a wrong answer
        error = (call().float() - expected).abs().max() / expected.abs().max()
        assert error < 1e-2, f"{name} differs from eager by {error}"
    return calls


def measure(quick: bool, threads: int) -> list[Record]:
    """Measure in this process, whatever its allocator does."""
    rows = []
    for numel, dtype, bar_compile, bar_eager in CASES:
        calls: dict[str, Callable[[], object]] = dict(candidates(numel, dtype))
        # Two reads of both and a write: the gradient needs all of the loss, and both do not fit
        # into the cache.
        moved = 5 * BRANCHES * STEPS * numel * dtype.itemsize
        as_many = torch.randn(moved // 4)
        calls["read"] = as_many.sum
        timings = interleaved(calls, quick=quick)
        ours, autograd = timings.pop("ours"), timings.pop("ours_autograd")
        ratios = {n: ratio(t, ours) for n, t in timings.items()}
        read = timings.pop("read")
        checks = [
            check("x compile", ratios["compile"], bar_compile),
            check("x eager", ratios["eager"], bar_eager),
        ]
        if numel > 100_000:  # at the memory's roofline
            checks.append(check("of read bandwidth", ratios["read"], BAR_READ))
        case = f"N {numel} {str(dtype).removeprefix('torch.')}"
        sizes = ("tve_grpo loss + gradient", case, [BRANCHES, STEPS, numel], threads)
        own = {
            "ours_autograd_ms": autograd.median_ms,
            "gbps": moved / ours.median_ms / 1e6,
            "read_gbps": moved / read.median_ms / 1e6,
        }
        rows.append(record(*sizes, ours, timings, checks, **own))
    return rows


if __name__ == "__main__":
    main(__file__, __doc__ or "", measure)
