"""Energies + loss + gradient (`tve_grpo_loss` and its backward) against the same in torch.

Run: `python benchmarks/bench_tve_grpo.py [--quick] [--threads N]`.

An output above 32 MiB comes from mmap in every allocation, and the page faults of its first touch
then outweigh the arithmetic of all candidates. A training step reuses its memory, so the
measurement runs in a process where malloc neither maps nor returns memory (`ALLOCATOR`), for all
candidates alike.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
BRANCHES, STEPS = 8, 4
# N, dtype, and the least ratios over torch.compile and eager that are accepted
CASES = (
    (24_576, torch.float32, 2.5, 10.0),
    (24_576, torch.bfloat16, 2.5, 10.0),
    (299_520, torch.float32, 1.4, 3.5),
    (299_520, torch.bfloat16, 1.4, 3.5),
)


def torch_loss(
    pred: Tensor, target: Tensor, weights: Tensor, old: Tensor, advantages: Tensor, ref: Tensor
) -> Tensor:
    """The objective as one writes it in torch, with the defaults of `ContrastiveObjective`."""
    mse = (pred.float() - target.float()).square().flatten(2).mean(dim=-1)
    log_pi = torch.log_softmax(-(mse * weights).sum(dim=1), dim=0)
    log_ref = torch.log_softmax(ref, dim=0)
    ratio = (log_pi - torch.log_softmax(old, dim=0)).clamp(-20.0, 20.0).exp()
    gain = torch.minimum(ratio * advantages, ratio.clamp(0.9, 1.2) * advantages)
    pi = log_pi.exp()
    return -gain.mean() + 10.0 * (pi * ((pi + 1e-10).log() - log_ref)).sum()


def candidates(numel: int, dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
    """Return name -> call that makes the gradient; they are checked to agree."""
    from kvpo_kernels import trajectory_velocity_energy, tve_grpo_loss

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
    compiled = torch.compile(torch_loss, dynamic=False)

    def ours() -> Tensor:
        r = tve_grpo_loss(pred, target, wide, old, advantages, ref)
        return torch.autograd.grad(r.loss, pred)[0]

    def eager() -> Tensor:
        loss = torch_loss(pred, target, weights, old, advantages, ref)
        return torch.autograd.grad(loss, pred)[0]

    def compile_() -> Tensor:
        loss = compiled(pred, target, weights, old, advantages, ref)
        return torch.autograd.grad(loss, pred)[0]

    calls = {"ours": ours, "eager": eager, "compile": compile_}
    expected = eager().float()
    for name, call in calls.items():  # no speed of a wrong answer
        error = (call().float() - expected).abs().max() / expected.abs().max()
        assert error < 1e-2, f"{name} differs from eager by {error}"
    return calls


def measure(quick: bool, threads: int) -> list[dict[str, Any]]:
    """Measure in this process, whatever its allocator does."""
    from timing import interleaved

    torch.set_num_threads(threads)
    rows = []
    for numel, dtype, bar_compile, bar_eager in CASES:
        timings = interleaved(candidates(numel, dtype), rounds=10 if quick else 25)
        ours = timings["ours"]
        ratios = {n: timings[n].median_ms / ours.median_ms for n in ("eager", "compile")}
        best = min(ratios, key=lambda n: ratios[n])
        moved = 5 * BRANCHES * STEPS * numel * dtype.itemsize  # two reads of both, one write
        rows.append(
            {
                "case": f"N {numel} {str(dtype).removeprefix('torch.')}",
                "op": "tve_grpo",
                "shape": [BRANCHES, STEPS, numel],
                "dtype": str(dtype).removeprefix("torch."),
                "threads": threads,
                "ours_ms": ours.median_ms,
                "ours_min_ms": ours.min_ms,
                "baseline": best,
                "baseline_ms": timings[best].median_ms,
                "ratio": ratios[best],
                "baselines": {n: timings[n].median_ms for n in ratios},
                "ratios": ratios,
                "bytes": moved,
                "gbps": moved / ours.median_ms / 1e6,
                "bar": {"compile": bar_compile, "eager": bar_eager},
                "allocator": " ".join(f"{k}={os.environ.get(k, 'unset')}" for k in ALLOCATOR),
            }
        )
    return rows


def records(quick: bool, threads: int) -> list[dict[str, Any]]:
    """Measure in a fresh process with `ALLOCATOR`, which malloc reads when a process starts."""
    here = Path(__file__).resolve()
    paths = [str(here.parent), str(here.parent.parent), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, **ALLOCATOR, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, str(here), "--here", "--threads", str(threads)]
    done = subprocess.run(
        command + ["--quick"] * quick, env=env, check=True, stdout=subprocess.PIPE, text=True
    )
    rows: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--here", action="store_true", help="measure in this process, print JSON")
    args = parser.parse_args()
    if args.here:
        print(json.dumps(measure(args.quick, args.threads)))
        return
    rows = records(args.quick, args.threads)
    print(f"tve_grpo, {args.threads} threads, {rows[0]['allocator']}")
    print(f"{'case':24} {'ours ms':>8} {'GB/s':>6}  {'compile':>16}  {'eager':>16}")
    for r in rows:
        cells = [f"{r['ratios'][n]:5.2f}x (bar {r['bar'][n]:4.1f})" for n in ("compile", "eager")]
        print(f"{r['case']:24} {r['ours_ms']:8.3f} {r['gbps']:6.1f}  {cells[0]}  {cells[1]}")


if __name__ == "__main__":
    main()
