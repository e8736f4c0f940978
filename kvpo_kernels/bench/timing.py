"""Interleaved timing of candidates that do the same work, in one process.

A shared machine swings by a factor of two; candidates that take turns swing together, so only
their ratio is reported as a result.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one candidate over the rounds."""

    samples_ms: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        return statistics.median(self.samples_ms)

    @property
    def min_ms(self) -> float:
        return min(self.samples_ms)

    def times(self, factor: float) -> "Timing":
        """Of that much more work at the same rate."""
        return Timing(tuple(factor * ms for ms in self.samples_ms))


def ratio(baseline: Timing, ours: Timing) -> float:
    """How many times faster ours is: its median against the baseline's, over the same rounds.

    The one definition of a ratio here: it is what one gets from the two times that stand beside it.
    """
    assert len(baseline.samples_ms) == len(ours.samples_ms), "not of the same rounds"
    return baseline.median_ms / ours.median_ms


def interleaved(
    candidates: Mapping[str, Callable[[], object]],
    *,
    device: str = "cpu",
    quick: bool = False,
    rounds: int = 11,
    min_sample_ms: float = 5.0,
    min_seconds: float = 8.0,
    max_seconds: float = 30.0,
) -> dict[str, Timing]:
    """Time the candidates in turns; a sample repeats a call until it lasts `min_sample_ms`.

    There are at least `rounds` of turns and, unless `quick`, as many as fit in `min_seconds`: a
    neighbour's burst on a shared machine, some seconds long, is then not all there is to see. Where
    calls take seconds, the rounds end after `max_seconds`, but never before the third.

    The first call of each (compilation, page faults, thread start) is not counted, and the order
    is reversed every other round so that none always follows the same neighbour.

    On "cuda", each call is timed by events, and before each its L2 cache is overwritten: a training
    step does not find its inputs there.
    """
    timer = CudaTimer() if device == "cuda" else _wall_ms
    repeats: dict[str, int] = {}
    for name, call in candidates.items():
        timer(call, 1)
        repeats[name] = max(1, round(min_sample_ms / max(timer(call, 1), 1e-3)))
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    order = list(candidates)
    started = time.perf_counter()
    done = 0
    while True:
        passed = time.perf_counter() - started
        enough = done >= rounds and (quick or passed >= min_seconds)
        if enough or (done >= min(rounds, 3) and passed >= max_seconds):
            return {name: Timing(tuple(ms)) for name, ms in samples.items()}
        for name in order:
            samples[name].append(timer(candidates[name], repeats[name]))
        order.reverse()
        done += 1


def _wall_ms(call: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) * 1e3 / repeats


class CudaTimer:
    """Milliseconds of a call on the device, its L2 cache overwritten before."""

    def __init__(self) -> None:
        l2_bytes = torch.cuda.get_device_properties("cuda").L2_cache_size
        # So long that the host has launched the call before the device is done with it: else the
        # events would measure Python.
        size = max(2 * l2_bytes, 1 << 29)
        self._other_data = torch.empty(size, dtype=torch.int8, device="cuda")

    def flush(self) -> None:
        """Overwrite the cache; does not wait for it."""
        self._other_data.zero_()

    def __call__(self, call: Callable[[], object], repeats: int) -> float:
        new = torch.cuda.Event
        events = [(new(enable_timing=True), new(enable_timing=True)) for _ in range(repeats)]  # type: ignore[no-untyped-call]
        for start, end in events:
            self.flush()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return float(sum(start.elapsed_time(end) for start, end in events) / repeats)
