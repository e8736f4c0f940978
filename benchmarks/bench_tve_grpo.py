"""Energies + loss + gradient (`tve_grpo_loss`) against the same in torch.

Run: `pytest benchmarks/bench_tve_grpo.py --benchmark-only`; the cases are in
`kvpo_kernels/bench/tve_grpo.py`.
"""

from collections.abc import Callable


def test_tve_grpo(timed: Callable[[], None]) -> None:
    timed()
