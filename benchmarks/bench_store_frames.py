"""Frames rounded to 8 bits into their slots against the same in torch.

Run: `pytest benchmarks/bench_store_frames.py --benchmark-only`; the cases are in
`kvpo_kernels/bench/store_frames.py`.
"""

from collections.abc import Callable


def test_store_frames(timed: Callable[[], None]) -> None:
    timed()
