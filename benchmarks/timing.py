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


def synced_clock() -> float:
    """Seconds, read when the device has finished what was enqueued."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def interleaved(
    candidates: Mapping[str, Callable[[], object]],
    *,
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
    """
    repeats: dict[str, int] = {}
    for name, call in candidates.items():
        call()
        start = synced_clock()
        call()
        once_ms = (synced_clock() - start) * 1e3
        repeats[name] = max(1, round(min_sample_ms / max(once_ms, 1e-3)))
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    order = list(candidates)
    started = synced_clock()
    while len(samples[order[0]]) < rounds or (not quick and synced_clock() - started < min_seconds):
        for name in order:
            call, n = candidates[name], repeats[name]
            start = synced_clock()
            for _ in range(n):
                call()
            samples[name].append((synced_clock() - start) * 1e3 / n)
        order.reverse()
    return {name: Timing(statistics.median(ms), min(ms), tuple(ms)) for name, ms in samples.items()}
