"""Routed attention, forward and forward + backward, against what one writes in torch.

Run: `python benchmarks/bench_routed_attention.py [--quick] [--threads N]`.

The baselines copy the routed frames and call scaled_dot_product_attention: per row, or gathered
for all rows at once, or the latter under torch.compile. The best of them is the baseline of a
record. All get gradients for q and the live tokens only. The machine's peak is measured in turns
with the candidates.
"""

import ctypes
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from cases import ROUTED_BENCH
from harness import Record, check, main, record
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvpo_kernels import _native, routed_attention
from kvpo_kernels.bench.timing import interleaved, ratio

# The least accepted ratio over the best baseline, and fraction of the measured peak (forward).
BARS = {
    ("forward", torch.float32): {"ratio": 1.3, "fraction_of_peak": 0.75},
    ("forward", torch.bfloat16): {"ratio": 2.5, "fraction_of_peak": 0.65},
    ("forward+backward", torch.float32): {"ratio": 1.6},
    ("forward+backward", torch.bfloat16): {"ratio": 2.5},
}


class Workload:
    """One case's inputs and the calls that are compared on them."""

    def __init__(self, case: Any, dtype: torch.dtype) -> None:
        self.q, k_pool, v_pool, self.k_live, self.v_live = case.inputs(dtype)
        # No NaN: the baselines read frames of the pool that no row names as little as we do, but
        # a slow NaN path in one of them would not be a fair comparison.
        self.k_pool, self.v_pool = k_pool.nan_to_num(), v_pool.nan_to_num()
        self.table = case.table()
        self.index = self.table.slots.long()
        self.grad_out = torch.randn(self.q.shape, generator=torch.Generator().manual_seed(2))
        self.grad_out = self.grad_out.to(dtype)
        self.leaves = [t.requires_grad_() for t in (self.q, self.k_live, self.v_live)]

    def ours(self) -> Tensor:
        return routed_attention(
            self.q, self.k_pool, self.v_pool, self.table, self.k_live, self.v_live, backend="cpu"
        )

    def ours_with_gradients(self) -> tuple[Tensor, ...]:
        out = self.ours()
        return out, *torch.autograd.grad(out, self.leaves, self.grad_out)

    def loop(self) -> Tensor:
        rows = []
        for b, slots in enumerate(self.index):
            k = torch.cat([self.k_pool[slots].flatten(0, 1), self.k_live[b]])
            v = torch.cat([self.v_pool[slots].flatten(0, 1), self.v_live[b]])
            q, k, v = (t.transpose(0, 1)[None] for t in (self.q[b], k, v))
            rows.append(scaled_dot_product_attention(q, k, v)[0].transpose(0, 1))
        return torch.stack(rows)

    def gather(self) -> Tensor:
        return _gather(self.q, self.k_pool, self.v_pool, self.index, self.k_live, self.v_live)

    def forward_flops(self) -> float:
        B, Q, H, D = self.q.shape
        return 4.0 * B * Q * H * D * (self.index.shape[1] * self.k_pool.shape[1] + self.live)

    def backward_flops(self) -> float:
        """Scores again, their gradient, grad_q; grad_k and grad_v for the live tokens only."""
        B, Q, H, D = self.q.shape
        return 1.5 * self.forward_flops() + 4.0 * B * Q * H * D * self.live

    @property
    def live(self) -> int:
        return self.k_live.shape[1]


def _gather(
    q: Tensor, k_pool: Tensor, v_pool: Tensor, index: Tensor, k_live: Tensor, v_live: Tensor
) -> Tensor:
    k, v = (
        torch.cat([pool[index].flatten(1, 2), live], dim=1).transpose(1, 2)
        for pool, live in ((k_pool, k_live), (v_pool, v_live))
    )
    return scaled_dot_product_attention(q.transpose(1, 2), k, v).transpose(1, 2)


def candidates(work: Workload, quick: bool) -> dict[str, dict[str, Callable[[], object]]]:
    """Return op -> name -> call; the candidates are checked to agree."""
    calls = {"ours": work.ours, "loop": work.loop, "gather": work.gather}
    if not quick:
        torch.compiler.reset()  # else it gives up after eight shapes and runs eagerly
        compiled = torch.compile(_gather, dynamic=False)
        calls["compile"] = lambda: compiled(
            work.q, work.k_pool, work.v_pool, work.index, work.k_live, work.v_live
        )

    def without_grad(call: Callable[[], Tensor]) -> Callable[[], object]:
        def run() -> Tensor:
            with torch.no_grad():
                return call()

        return run

    def with_backward(call: Callable[[], Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: torch.autograd.grad(call(), work.leaves, work.grad_out)

    expected = with_backward(work.gather)()
    for name, call in calls.items():  # no speed of a wrong answer
        for actual, wanted in zip(with_backward(call)(), expected, strict=True):
            error = (actual.float() - wanted.float()).abs().max() / wanted.float().abs().max()
            assert error < 3e-2, f"{name} differs from gather by {error}"
    return {
        "forward": {name: without_grad(call) for name, call in calls.items()},
        "forward+backward": {name: with_backward(call) for name, call in calls.items()},
    }


def peak_call(dtype: torch.dtype, threads: int) -> tuple[Callable[[], object], float]:
    """Return a call that only multiplies and adds, about 20 ms of it, and its operations."""
    options = {"pairs": dtype is torch.bfloat16, "threads": threads, "iterations": 3_000_000}
    return lambda: _native.peak_flops(**options), _native.peak_flops(**options)


def peak_extra_bytes(call: Callable[[], Any]) -> int:
    """The most memory that `call` holds beyond what was there and what it returns (Linux).

    Freed memory goes back to the system, and the kernel's high-water mark of this process is reset
    first.
    """
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_bytes("VmRSS")
    result = call()
    peak = _status_bytes("VmHWM")
    tensors = result if isinstance(result, tuple) else (result,)
    returned = sum(t.numel() * t.element_size() for t in tensors)
    return max(0, peak - before - returned)


def _status_bytes(field: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if field in x)
    return int(line.split()[1]) * 1024


def measure(quick: bool, threads: int) -> list[Record]:
    """Measure in this process, whatever its allocator does."""
    tiny = replace(ROUTED_BENCH[0], B=1, Q=1, L=1)  # threads and libraries are there after it
    Workload(tiny, torch.float32).ours_with_gradients()
    rows = []
    for case in ROUTED_BENCH[:1] if quick else ROUTED_BENCH:
        for dtype in (torch.float32, torch.bfloat16):
            work = Workload(case, dtype)
            extra = peak_extra_bytes(work.ours_with_gradients)
            peak, peak_operations = peak_call(dtype, threads)
            for op, calls in candidates(work, quick).items():
                timings = interleaved({**calls, "peak": peak}, quick=quick)
                ours = timings.pop("ours")
                peak_gflops = peak_operations / timings.pop("peak").min_ms / 1e6
                flops = work.forward_flops()
                if op != "forward":
                    flops += work.backward_flops()
                ratios = {name: ratio(t, ours) for name, t in timings.items()}
                best = min(ratios, key=lambda name: ratios[name])
                # Of the best sample: the peak is one as well, and load of others is not our loss.
                fraction = flops / ours.min_ms / 1e6 / peak_gflops
                bars = BARS[op, dtype]
                checks = [check(f"x {best}", ratios[best], bars["ratio"])]
                if "fraction_of_peak" in bars:
                    checks.append(check("of peak", fraction, bars["fraction_of_peak"]))
                checks.append(check("MiB left of 32", 32 - extra / 2**20, 0))
                name = f"{case.name} {str(dtype).removeprefix('torch.')}"
                shape = {k: getattr(case, k) for k in "BQHDFTRL"}
                own = {
                    "useful_gflops": flops / ours.median_ms / 1e6,
                    "peak_gflops": peak_gflops,
                    "fraction_of_peak": fraction,
                    "peak_extra_bytes": extra,
                }
                sizes = (f"routed_attention {op}", name, shape, threads)
                rows.append(record(*sizes, ours, timings, checks, **own))
    return rows


if __name__ == "__main__":
    main(__file__, __doc__ or "", measure)
