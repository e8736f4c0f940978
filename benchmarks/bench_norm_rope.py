"""RMSNorm + rotation + slot write (`qk_norm_rope_write`) against the same in torch.

Run: `pytest benchmarks/bench_norm_rope.py --benchmark-only`; the cases are in
`kvpo_kernels/bench/norm_rope.py`.
"""

from collections.abc import Callable


def test_norm_rope(timed: Callable[[], None]) -> None:
    timed()
