"""Routed attention against dense attention on keys that are copied together.

Run: `pytest benchmarks/bench_routed_attention.py --benchmark-only`; the cases are in
`kvpo_kernels/bench/routed_attention.py`.
"""

from collections.abc import Callable


def test_routed_attention(timed: Callable[[], None]) -> None:
    timed()
