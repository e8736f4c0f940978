"""One op's call against its baselines, on the same inputs and in turns."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from kvpo_kernels.bench.timing import Timing, interleaved, ratio

Record = dict[str, Any]
Call = Callable[[], Any]
Baselines = dict[str, tuple[str, Callable[[], Call]]]
"""Id of a bar -> name of the baseline, and what makes its call."""


class Comparison:
    """What the records of one case have in common.

    Args:
        op: name of the op.
        variant: "" for the main case, whose bars count; else what is different.
        shape: sizes, for the record.
        dtype: of the inputs.
        device: "cpu" or "cuda".
        backend: of ours; None for the one a call would take.
        quick: few rounds.
        bars: id -> least ratio accepted on an H200.
        moved: bytes that must at least be read and written.
    """

    def __init__(
        self,
        op: str,
        variant: str,
        shape: Mapping[str, object],
        dtype: torch.dtype,
        device: str,
        backend: str | None,
        quick: bool,
        bars: Mapping[str, float],
        moved: int,
    ) -> None:
        few: dict[str, Any] = {"rounds": 5, "quick": True}
        self.budget = few if quick else {"rounds": 15, "min_seconds": 1.5}
        self.device, self.variant = device, variant
        self.bars = bars if device == "cuda" and not variant else {}
        self.common: Record = {
            "op": op,
            "backend": backend or "default",
            "shape": dict(shape),
            "dtype": str(dtype).removeprefix("torch."),
            "bytes": moved,
            "peak_extra_bytes": None,
        }

    def record(
        self, id: str, ours: Timing, baseline: str, other: Timing, flops: float, **more: Any
    ) -> Record:
        """One bar; `more` replaces what is otherwise computed."""
        return self.common | {
            "case": f"{id}/{self.variant}" if self.variant else id,
            "ours_ms": ours.median_ms,
            "ours_min_ms": ours.min_ms,
            "baseline": baseline,
            "baseline_ms": other.median_ms,
            "ratio": ratio(other, ours),
            "bar": self.bars.get(id),
            "useful_tflops": flops / ours.median_ms / 1e9,
            "tbps": self.common["bytes"] / ours.median_ms / 1e9,
            **more,
        }

    def compare(self, ours: Call, others: Baselines, flops: float) -> Iterator[Record]:
        """Ours against every baseline that can be made here and agrees; the rest are failures."""
        calls = {"ours": ours}
        expected = _copied(ours())  # what a baseline writes may lie where ours did
        for id, (name, make) in others.items():
            try:
                call = make()
                _check(expected, call(), name)
                calls[id] = call
            except Exception as error:  # the other baselines still tell something
                yield {"failed": f"{id}, {name}: {type(error).__name__}: {error}"}
        times = interleaved(calls, device=self.device, **self.budget)
        for id in [id for id in calls if id != "ours"]:
            yield self.record(id, times["ours"], others[id][0], times[id], flops)

    def compare_and_copy(
        self, id: str, ours: Call, others: Baselines, flops: float, copy_tbps: float
    ) -> Iterator[Record]:
        """As `compare`, and how near ours comes to a copy of as many bytes."""
        mine: Any = None
        for record in self.compare(ours, others, flops):
            mine = record if "failed" not in record else mine
            yield record
        if mine is not None:
            time = Timing(mine["ours_ms"], mine["ours_min_ms"], (mine["ours_ms"],))
            floor = self.common["bytes"] / copy_tbps / 1e9
            least = Timing(floor, floor, (floor,))
            yield self.record(f"{id}/copy", time, "a copy of as many bytes", least, flops)


def memory_bound_parts(
    cases: Sequence[Any],
    bench: Callable[..., Any],
    device: str,
    quick: bool,
    backend: str | None,
    copy_tbps: float,
) -> Iterator[tuple[str, Callable[[], Iterator[Record]]]]:
    """What is measured, each on its own so that one that fails leaves the others."""
    for case in cases[:1] if quick else cases:
        sized = case if device == "cuda" else case.smaller()

        def run(sized: Any = sized) -> Iterator[Record]:
            torch.compiler.reset()  # else it gives up after eight shapes and runs eagerly
            records: Iterator[Record] = bench(sized, torch.bfloat16, device, backend, quick).run(
                copy_tbps
            )
            return records

        yield f"{case.id} {case.variant}".strip(), run


def _copied(result: Any) -> Any:
    return tuple(map(_copied, result)) if isinstance(result, tuple) else result.clone()


def _check(ours: Any, other: Any, name: str) -> None:
    """No speed of a wrong answer: both round to 16 bits somewhere, or to float32."""
    pairs = zip(ours, other, strict=True) if isinstance(ours, tuple) else [(ours, other)]
    for a, b in pairs:
        error = (a.float() - b.float()).abs().max() / b.float().abs().max()
        assert error < 3e-2, f"{name} differs by {error:.1e} of the largest value"
