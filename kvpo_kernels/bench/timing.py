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

    median_ms: float
    min_ms: float
    samples_ms: tuple[float, ...]


def ratio(baseline: Timing, ours: Timing) -> float:
    """How many times faster ours is: the median of the rounds' ratios.

    A round's samples lie next to each other in time, so load that comes and goes cancels.
    """
    pairs = zip(baseline.samples_ms, ours.samples_ms, strict=True)
    return statistics.median(b / o for b, o in pairs)


def interleaved(
    candidates: Mapping[str, Callable[[], object]],
    *,
    device: str = "cpu",
    quick: bool = False,
    rounds: int = 11,
    min_sample_ms: float = 5.0,
    min_seconds: float = 8.0,
) -> dict[str, Timing]:
    """Time the candidates in turns; a sample repeats a call until it lasts `min_sample_ms`.

    There are at least `rounds` of turns and, unless `quick`, as many as fit in `min_seconds`: a
    neighbour's burst on a shared machine, some seconds long, is then not all there is to see.

    The first call of each (compilation, page faults, thread start) is not counted, and the order
    is reversed every other round so that none always follows the same neighbour.

    On "cuda", each call is timed by events, and before each its L2 cache is overwritten: a training
    step does not find its inputs there.
    """
    timer = _CudaTimer() if device == "cuda" else _wall_ms
    repeats: dict[str, int] = {}
    for name, call in candidates.items():
        timer(call, 1)
        repeats[name] = max(1, round(min_sample_ms / max(timer(call, 1), 1e-3)))
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    order = list(candidates)
    started = time.perf_counter()
    while len(samples[order[0]]) < rounds or (
        not quick and time.perf_counter() - started < min_seconds
    ):
        for name in order:
            samples[name].append(timer(candidates[name], repeats[name]))
        order.reverse()
    return {name: Timing(statistics.median(ms), min(ms), tuple(ms)) for name, ms in samples.items()}


def _wall_ms(call: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) * 1e3 / repeats


class _CudaTimer:
    def __init__(self) -> None:
        l2_bytes = torch.cuda.get_device_properties("cuda").L2_cache_size
        # So long that the host has launched the call before the device is done with it: else the
        # events would measure Python.
        size = max(2 * l2_bytes, 1 << 29)
        self.other_data = torch.empty(size, dtype=torch.int8, device="cuda")

    def __call__(self, call: Callable[[], object], repeats: int) -> float:
        new = torch.cuda.Event
        events = [(new(enable_timing=True), new(enable_timing=True)) for _ in range(repeats)]  # type: ignore[no-untyped-call]
        for start, end in events:
            self.other_data.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return float(sum(start.elapsed_time(end) for start, end in events) / repeats)
