"""One KVPO iteration as today's trainers run it and over this library, phase by phase.

    python benchmarks/iteration.py [--size tiny|wan-1.3b|wan-14b] [--layers N] [--branches G]
                                   [--device cpu|cuda] [--rounds N] [--backend NAME]
                                   [--out FILE] [--plot FILE]

Both ways (`todays_trainer.py`, `pooled_trainer.py`) take turns in this process, on the same
weights, noise, routes and advantages, after a check that their scores and gradients agree. One
sample is a window of two iterations, as the release has two rollouts per old policy; times are per
iteration, medians. The first window, in which ours captures its graphs, is not timed: its peak of
memory is, on a GPU all that the allocator took, the graphs' included.
Copies, operations and host synchronizations are counted in a window of their own, without graphs:
an op of this library counts as one operation. Bytes between host and device are those of the state
and the trajectories; where the device is the CPU they are what a GPU would move.

The exit status is 1 if a bar is missed.
"""

import argparse
import contextlib
import dataclasses
import gc
import itertools
import json
import statistics
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import figures
import numpy as np
import torch
from denoise_graph import CudaGraphs
from figures import PHASES
from pooled_trainer import Pooled
from todays_trainer import Today
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from trainers import Problem, Trainer, make_problem

from kvpo_kernels.bench.machine import environment
from kvpo_kernels.cost.sizes import SIZES

BARS = {"cuda": {"time": 2.5, "memory": 1 / 0.35}, "cpu": {"time": 2.0}}
Seconds = dict[str, float]
Array = np.ndarray[Any, np.dtype[np.float32]]
Way = Callable[[Problem], Trainer]


def pooled(problem: Problem) -> Pooled:
    """Denoise steps are replayed where there are CUDA graphs."""
    return Pooled(problem, CudaGraphs() if problem.device.type == "cuda" else None)


WAYS: dict[str, Way] = {"today": Today, "ours": pooled}
COUNTED: dict[str, Way] = {"today": Today, "ours": Pooled}  # what a replay does goes unseen


class Stopwatch:
    """Seconds by phase."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: Seconds = defaultdict(float)

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self._wait()
        start = time.perf_counter()
        yield
        self._wait()
        self.seconds[phase] += time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class Counter(TorchDispatchMode):
    """Counts operations, the bytes that copies read and write, and waits for the device."""

    COPIES = ("clone", "copy_", "_to_copy", "cat", "stack", "index", "index_put_", "index_put")

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.copied_bytes = self.syncs = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        views = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        if name == "_local_scalar_dense":
            self.syncs += 1
        elif not views and not name.startswith(("empty", "new_empty", "detach")):
            self.operations += 1
        if name in self.COPIES:
            moved = args[1] if name == "copy_" else args[2] if name == "index_put_" else result
            self.copied_bytes += 2 * moved.nbytes
        return result


def window(trainer: Trainer, watch: Stopwatch, between: Callable[[], None] = lambda: None) -> None:
    """Two iterations, of which the first has the old policy as its current one."""
    weights = trainer.old.state_dict()
    trainer.policy.load_state_dict(weights)
    trainer.optimizer.state.clear()
    trainer.iteration(watch, True)
    between()
    trainer.iteration(watch, False)


@dataclass
class FirstWindow:
    """What an untimed window tells of a way, and the trainer it has warmed."""

    trainer: Trainer
    scores: Array
    gradients: list[Array]
    """Of the first iteration."""
    peak_bytes: int
    """The most memory held beyond the problem, the trainer's weights included."""


def first_window(problem: Problem, way: Way) -> FirstWindow:
    """Graphs are captured and kernels compiled in it."""
    found: list[Any] = []

    def run() -> None:
        trainer = way(problem)

        def keep() -> None:  # out of torch's memory, which is being watched
            grads = [p.grad for p in trainer.policy.parameters() if p.grad is not None]
            found.extend([trainer, _away(trainer.scores), [_away(g) for g in grads]])

        window(trainer, Stopwatch(problem.device), keep)

    gc.collect()
    if problem.device.type == "cuda":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        torch.cuda.reset_peak_memory_stats()
        run()
        return FirstWindow(*found, torch.cuda.max_memory_reserved() - before)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    events = seen.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    return FirstWindow(*found, max(itertools.accumulate(n for _, n in sorted(changes))))


def _away(tensor: Tensor) -> Array:
    array: Array = tensor.detach().cpu().float().numpy().copy()
    return array


def differences(ours: FirstWindow, today: FirstWindow) -> dict[str, float]:
    """Of scores and gradients, relative to the norm."""
    whole = lambda w: np.concatenate([g.ravel() for g in w.gradients])
    pairs = {"scores": (ours.scores, today.scores), "gradients": (whole(ours), whole(today))}
    norm = np.linalg.norm
    return {what: float(norm(a - b) / norm(b)) for what, (a, b) in pairs.items()}


def agree(device: str, backend: str | None = None) -> None:
    """No speed of a wrong answer: both ways at a small size, in float32."""
    small = make_problem(SIZES["tiny"], 4, 3, True, device, torch.float32, backend)
    found = differences(*(first_window(small, WAYS[name]) for name in ("ours", "today")))
    # Sums in another order, through layers, steps and blocks.
    assert max(found.values()) < 1e-3, found


def counts(problem: Problem, way: Way) -> dict[str, float]:
    """Per iteration."""
    trainer = way(problem)
    on_gpu = problem.device.type == "cuda"
    with warnings.catch_warnings(record=True) as seen, Counter() as counter:
        warnings.simplefilter("always")
        if on_gpu:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            window(trainer, Stopwatch(problem.device))
        finally:
            if on_gpu:
                torch.cuda.set_sync_debug_mode("default")
    waits = sum("synchronizing" in str(w.message) for w in seen)
    host = trainer.ledger.host_bytes if isinstance(trainer, Today) else 0
    found = {
        "operations": counter.operations,
        "copied_bytes": counter.copied_bytes,
        "host_bytes": host,
        "syncs": waits if on_gpu else counter.syncs,
    }
    return {name: n / 2 for name, n in found.items()}


def measure(
    problem: Problem, rounds: int, save: Callable[[dict[str, Any]], None] = lambda result: None
) -> dict[str, Any]:
    """Both ways in turns. `save` is called with what there is, after each step."""
    agree(problem.device.type, problem.backend)
    first = {name: first_window(problem, way) for name, way in WAYS.items()}
    peaks = {name: f.peak_bytes for name, f in first.items()}
    # At this size and precision: a 16-bit policy is chaotic enough for some per cent.
    result: dict[str, Any] = {"differences": differences(first["ours"], first["today"])}
    trainers = {name: f.trainer for name, f in first.items()}
    del first
    samples: dict[str, list[Seconds]] = {name: [] for name in WAYS}
    order = list(WAYS)
    for _ in range(rounds):
        for name in order:
            watch = Stopwatch(problem.device)
            window(trainers[name], watch)
            samples[name].append({phase: s / 2 for phase, s in watch.seconds.items()})
        order.reverse()
        for name in WAYS:
            result[name] = {
                "seconds": statistics.median(sum(s.values()) for s in samples[name]),
                "phases": {p: statistics.median(s[p] for s in samples[name]) for p in PHASES},
                "samples": samples[name],
                "peak_bytes": peaks[name],
            }
        result["ratios"] = {  # median against median, of the same rounds
            "time": result["today"]["seconds"] / result["ours"]["seconds"],
            "memory": peaks["today"] / peaks["ours"],
        }
        save(result)
    trainers.clear()
    for name, way in COUNTED.items():
        result[name] |= counts(problem, way)
        save(result)
    return result


def table(result: dict[str, Any]) -> str:
    """What was measured, as text."""
    today, ours = result["today"], result["ours"]
    rows = [("seconds: " + p, today["phases"][p], ours["phases"][p]) for p in PHASES]
    rows.append(("seconds: iteration", today["seconds"], ours["seconds"]))
    for key, label, unit in (
        ("peak_bytes", "peak memory, GiB", 2**30),
        ("copied_bytes", "copied, read + written, GiB", 2**30),
        ("host_bytes", "host <-> device, GiB", 2**30),
        ("operations", "operations", 1),
        ("syncs", "host syncs", 1),
    ):
        rows.append((label, today[key] / unit, ours[key] / unit))
    lines = [f"{'':30}{'today':>12}{'ours':>12}{'ratio':>9}"]
    for label, a, b in rows:
        share = f"{a / b:9.2f}" if b else f"{'-':>9}"
        lines.append(f"{label:30}{a:12.4g}{b:12.4g}{share}")
    return "\n".join(lines)


def main() -> int:
    """Measure, print, write; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    parser.add_argument("--branches", type=int, default=8)
    parser.add_argument("--micro-batch", type=int, help="default: all branches; 1 where large")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--backend", help="of routed attention; default: what a call would take")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    size = SIZES[args.size]
    size = dataclasses.replace(size, layers=args.layers or size.layers)
    large = args.size != "tiny"
    problem = make_problem(
        size,
        args.branches,
        args.micro_batch or (1 if large else args.branches),
        checkpoint_layers=large,
        device=args.device,
        dtype=torch.bfloat16 if args.device == "cuda" else torch.float32,
        backend=args.backend,
    )
    about = {
        "size": {"name": args.size, "branches": args.branches, **dataclasses.asdict(size)},
        "environment": environment(args.threads),
    }

    def save(result: dict[str, Any]) -> None:
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(result | about, indent=1) + "\n")

    result = measure(problem, args.rounds, save)
    result["checks"] = [
        {"what": what, "value": result["ratios"][what], "bar": bar}
        for what, bar in BARS[args.device].items()
    ]
    save(result)
    print(
        f"{args.size}, {size.layers} layers, {args.branches} branches, {args.device}, per iteration"
    )
    print(table(result))
    for c in result["checks"]:
        verdict = "ok" if c["value"] >= c["bar"] else "MISSED"
        print(f"{c['what']}: x{c['value']:.2f} (bar {c['bar']:.2f}) {verdict}")
    if args.plot:
        figures.iteration(result | about, args.out.name if args.out else "", args.plot)
    return int(any(c["value"] < c["bar"] for c in result["checks"]))


if __name__ == "__main__":
    sys.exit(main())
