"""Where a second thread begins to pay: each CPU kernel with one thread and with `--threads`.

Run: `python benchmarks/threads.py [--threads N] [--seconds S] [--op NAME]`, on a quiet machine,
and again with `OMP_WAIT_POLICY=passive`. The two take turns; a line per size gives the fastest and
the median sample of each, in microseconds, and their ratio: above 1, the team pays. The thresholds
of `csrc/cpu/team.cpp` are the smallest work whose team pays in both, rounded up to a power of two.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator

import torch

from kvpo_kernels import _native
from kvpo_kernels.backends.native import norm_rope, routed_attention, store_frames, velocity_energy

Call = Callable[[], object]
HEADS, HEAD = 4, 64


def normed(tokens: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    x = torch.randn(2, tokens, HEADS, HEAD, dtype=dtype)
    return x, torch.ones(HEADS * HEAD), *torch.randn(2, tokens, HEAD // 2)


def rope_calls(dtype: torch.dtype) -> Iterator[tuple[int, Call]]:
    for tokens in (2**n for n in range(3, 12)):
        x, weight, cos, sin = normed(tokens, dtype)
        yield x.numel(), lambda: norm_rope._forward(x, weight, cos, sin, 1e-6)  # noqa: B023


def rope_backward_calls(dtype: torch.dtype) -> Iterator[tuple[int, Call]]:
    for tokens in (2**n for n in range(2, 11)):
        x, weight, cos, sin = normed(tokens, dtype)
        yield x.numel(), lambda: norm_rope._backward(x, x, weight, cos, sin, 1e-6)  # noqa: B023


def store_calls(dtype: torch.dtype) -> Iterator[tuple[int, Call]]:
    for tokens in (2**n for n in range(3, 12)):
        frames = torch.randn(2, tokens, HEADS, HEAD, dtype=dtype)
        pool, scales = torch.zeros(frames.shape, dtype=torch.int8), torch.zeros(2, HEADS)
        slots = torch.arange(2)
        yield frames.numel(), lambda: store_frames.store(frames, pool, scales, slots)  # noqa: B023


def velocity_calls(dtype: torch.dtype) -> Iterator[tuple[int, Call]]:
    weights = torch.ones(4, dtype=torch.float64)
    for size in (2**n for n in range(8, 17)):
        pred, target = torch.randn(2, 8, 4, size, dtype=torch.float32).to(dtype)
        yield pred.numel(), lambda: velocity_energy.forward(pred, target, weights)  # noqa: B023


def attended(n: int, dtype: torch.dtype) -> tuple[tuple[torch.Tensor, ...], int]:
    """Two rows of `n` queries over 2 frames of `n` tokens and as many live ones."""
    q, k, v = torch.randn(3, 2, n, HEADS, HEAD, dtype=dtype)
    k_pool, v_pool = torch.randn(2, 3, n, HEADS, HEAD, dtype=dtype)
    slots = torch.tensor([[0, 1], [2, 1]], dtype=torch.int32)
    return (q, k_pool, v_pool, slots, k, v, None, None), q.numel() * 3 * n * 2  # type: ignore[return-value]


def attention_calls(dtype: torch.dtype) -> Iterator[tuple[int, Call]]:
    for n in (8, 12, 16, 24, 32, 48, 64, 96, 128, 192):
        inputs, amount = attended(n, dtype)
        yield amount, lambda: routed_attention.forward(*inputs, 0.1)  # noqa: B023


def attention_backward_calls(dtype: torch.dtype) -> Iterator[tuple[int, Call]]:
    for n in (8, 12, 16, 24, 32, 48, 64, 96, 128):
        inputs, amount = attended(n, dtype)
        out, lse = routed_attention.forward(*inputs, 0.1)
        yield amount, lambda: routed_attention.backward(out, *inputs, out, lse, 0.1)  # noqa: B023


CALLS = {
    "attention": attention_calls,
    "attention_backward": attention_backward_calls,
    "norm_rope": rope_calls,
    "norm_rope_backward": rope_backward_calls,
    "store_frames": store_calls,
    "velocities": velocity_calls,
}


def in_turns(call: Call, threads: int, seconds: float) -> dict[int, list[float]]:
    """Microseconds of a call with 1 and with `threads` threads: samples of some calls each."""
    samples: dict[int, list[float]] = {1: [], threads: []}
    repeats, until = 1, time.perf_counter() + seconds
    while time.perf_counter() < until or len(samples[1]) < 5:
        for n in samples:
            torch.set_num_threads(n)
            call()  # its threads are awake
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            samples[n].append((time.perf_counter() - start) / repeats * 1e6)
        repeats = max(1, min(50, round(300 / min(samples[1]))))
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--threads", type=int, default=max(2, torch.get_num_threads()))
    parser.add_argument("--seconds", type=float, default=1.0, help="for each size")
    parser.add_argument("--op", choices=CALLS, action="append")
    args = parser.parse_args()
    if args.threads < 2:
        parser.error(f"--threads must be at least 2, got {args.threads}")
    policy = os.environ.get("OMP_WAIT_POLICY", "the default's")
    print(f"{_native.isa()}, load {os.getloadavg()[0]:.1f}, waiting {policy}")
    _native.set_all_threads(True)
    for op in args.op or CALLS:
        for dtype in (torch.float32, torch.bfloat16):
            for amount, call in CALLS[op](dtype):
                one, team = in_turns(call, args.threads, args.seconds).values()
                least, median = min(one) / min(team), statistics.median(one)
                print(
                    f"{op:19} {str(dtype)[6:]:9} {amount:10} 1 thread {min(one):8.1f}"
                    f" ({median:8.1f}) {args.threads} threads {min(team):8.1f}"
                    f" ({statistics.median(team):8.1f}) us, x{least:5.2f}"
                    f" (x{median / statistics.median(team):5.2f})"
                    + (" below" if amount < _native.LEAST_WORK[op] else ""),
                    flush=True,
                )


if __name__ == "__main__":
    main()
