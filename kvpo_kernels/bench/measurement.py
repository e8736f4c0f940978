"""A case measured: ours and whatever it is held against, checked, then timed in turns."""

import functools
from collections.abc import Callable, Collection
from typing import Any

import torch

from kvpo_kernels.bench import bars, machine
from kvpo_kernels.bench.case import Call, Case, Work, tensors
from kvpo_kernels.bench.timing import Timing, interleaved, ratio

Record = dict[str, Any]


class WrongResult(Exception):
    """No speed of a wrong answer."""


class Measurement:
    """The inputs of one case and the calls that are compared on them.

    Args:
        case: what is measured.
        backend: ours; None for the one that a call would take.
        rows: names, of `case.rows()`, of what is compared with it; None for all but the other
            backends.
        quick: few rounds.

    `failures` says by row why it is not timed: it cannot be made, or its result is not that of the
    reference. The others still tell something.
    """

    def __init__(
        self,
        case: Case,
        backend: str | None = None,
        rows: Collection[str] | None = None,
        quick: bool = False,
    ) -> None:
        self.case, self.quick = case, quick
        self.backend = backend or case.backends()[0]
        makers = {row.name: row.make for row in case.baselines}
        sticks = {row.name: row.make for row in case.yardsticks}
        wanted = {*makers, *sticks} if rows is None else set(rows)
        self.work = case.make()
        self.work.backend = self.backend
        self._expected: tuple[torch.Tensor, ...] = ()
        self._factors: dict[str, float] = {}
        self.calls: dict[str, Call] = {}
        self.failures: dict[str, str] = {}
        self.times: dict[str, Timing] = {}
        self.peaks: dict[str, int | None] = {}
        self._try(self.backend, lambda: self._checked(functools.partial(_ours, self.backend)))
        for name in case.rows():
            if name == self.backend or name not in wanted:
                continue
            if name in sticks:
                self._try(name, functools.partial(self._scaled, name, sticks[name]))
            else:
                make = makers.get(name, functools.partial(_ours, name))
                self._try(name, functools.partial(self._checked, make))

    def _try(self, name: str, make: Callable[[], Call]) -> None:
        try:
            self.calls[name] = make()
        except Exception as error:  # of another library, of a compiler: said, not raised
            self.failures[name] = f"{type(error).__name__}: {error}"

    def _scaled(self, name: str, make: Callable[[Work], tuple[Call, float]]) -> Call:
        call, self._factors[name] = make(self.work)
        return call

    def _checked(self, make: Callable[[Work], Call]) -> Call:
        call = make(self.work)
        if not self._expected:
            self.work.clear()
            # What a call writes lies where the next one writes as well.
            self._expected = tuple(t.clone() for t in tensors(self.work.expected()))
        self.work.clear()
        for found, expected in zip(tensors(call()), self._expected, strict=True):
            check(found, expected, self.case.tolerance)
        return call

    def time(self) -> "Measurement":
        """Take the times, in turns, and the peaks of memory where the case wants them."""
        if self.backend in self.calls and not self.times:
            if self.case.with_memory:
                for name, call in self.calls.items():
                    if name not in self._factors:
                        self.peaks[name] = machine.peak_extra_bytes(call, self.case.device)
            budget: dict[str, Any] = {"rounds": 11, "min_seconds": 4.0}
            if self.case.device == "cuda":  # nobody else is on it
                budget = {"rounds": 15, "min_seconds": 1.5}
            if self.quick:
                budget = {"rounds": 5, "quick": True}
            times = interleaved(self.calls, device=self.case.device, **budget)
            self.times = {n: t.times(self._factors.get(n, 1.0)) for n, t in times.items()}
        return self

    def ratio(self, row: str) -> float:
        """How many times faster ours is than the row: median against median."""
        return ratio(self.times[row], self.times[self.backend])

    def values(self) -> dict[str, float]:
        """Everything that may have a bar."""
        found = {row: self.ratio(row) for row in self.times if row != self.backend}
        ours = self.peaks.get(self.backend)
        if ours is not None:
            found["MiB of memory below 32"] = 32 - ours / 2**20
            for row, peak in self.peaks.items():
                if peak is not None and row != self.backend:
                    found[f"memory/{row}"] = peak / max(ours, 1)
        return found | self._kernels()

    def _kernels(self) -> dict[str, float]:
        """Shares of the peak that each kernel of attention has by itself, by the profiler."""
        flops = getattr(self.work, "kernel_flops", None)
        if self.case.device != "cuda" or flops is None or not self.times:
            return {}
        rate = machine.rates("cuda", self.case.dtype)["gemm_tflops"]
        call = self.calls[self.backend]
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(5):
                call()
            torch.cuda.synchronize()
        return {
            f"kernel/{e.key}": flops[e.key] / (e.device_time_total / e.count / 1e3) / 1e9 / rate
            for e in profile.key_averages()
            if e.key in flops
        }

    def records(self) -> list[Record]:
        """One for each row that ours was held against; see `kvpo_kernels.bench.main`."""
        if not self.times:
            return []
        case, ours = self.case, self.times[self.backend]
        facts = machine.facts(case.device) | machine.rates(case.device, case.dtype)
        values = self.values()
        kernels = {k[7:]: v for k, v in values.items() if k.startswith("kernel/")}
        checks = [] if case.small else bars.check(facts["instructions"], case, values)
        about = case.rows()
        yardstick = next((y.name for y in case.yardsticks if y.name in self.times), None)
        found: list[Record] = []
        for row in self.times:
            if row == self.backend and len(self.times) > 1:
                continue
            own = [c for c in checks if c["what"].rpartition("/")[2] == row]
            if not found:  # what is of no row goes with the first
                own += [c for c in checks if c["what"].rpartition("/")[2] not in self.times]
            found.append(
                {
                    "op": case.op,
                    "part": case.part,
                    "case": case.name,
                    "about": case.about,
                    "dtype": case.dtype_name,
                    "shape": dict(case.shape),
                    "backend": self.backend,
                    "ours_ms": ours.median_ms,
                    "ours_min_ms": ours.min_ms,
                    "baseline": row,
                    "baseline_about": about[row],
                    "baseline_ms": self.times[row].median_ms,
                    "baseline_min_ms": self.times[row].min_ms,
                    "yardstick": row in self._factors,
                    "ratio": self.ratio(row),
                    "ratio_is": "median of the baseline's times / median of ours, same rounds",
                    "rounds": len(ours.samples_ms),
                    "checks": own,
                    "flops": self.work.flops,
                    "bytes": self.work.bytes,
                    "useful_tflops": self.work.flops / ours.median_ms / 1e9,
                    "tbps": self.work.bytes / ours.median_ms / 1e9,
                    "fraction": None if yardstick is None else self.ratio(yardstick),
                    "fraction_of": yardstick,
                    "kernels": kernels,
                    "peak_extra_bytes": self.peaks.get(self.backend),
                    "baseline_peak_extra_bytes": self.peaks.get(row),
                }
                | facts
            )
        return found


def _ours(backend: str, work: Work) -> Call:
    return work.ours(backend)


def check(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Raise `WrongResult` where they differ by more than a part of the largest value."""
    if found.shape != expected.shape:
        raise WrongResult(f"has shape {list(found.shape)}, not {list(expected.shape)}")
    wide = expected.double()
    error = (found.double() - wide).abs().max() / wide.abs().max().clamp_min(1e-30)
    if not error <= tolerance:
        raise WrongResult(f"differs from the reference by {error:.1e} of the largest value")
