"""Frames rounded to 8 bits into their slots (`store_frames`) against the same in torch.

Run: `python benchmarks/bench_store_frames.py [--quick] [--threads N]`.

"eager" is the reference, "compile" its arithmetic under torch.compile and the same two copies into
the pool. The context pass of a quantized history makes two of these calls a layer.
"""

from collections.abc import Callable

import torch
from harness import Record, check, main, record

from kvpo_kernels.bench.timing import interleaved, ratio
from kvpo_kernels.ops.store_frames import PAGE_DTYPES, store_frames
from kvpo_kernels.reference import store_frames as reference

# n, T, H, D: the trainer's scale, and two blocks of a 1.3B model
SHAPES = ((24, 256, 6, 64), (6, 1560, 12, 128))
BAR_COMPILE = 2.0


def candidates(
    shape: tuple[int, int, int, int], dtype: torch.dtype, page: torch.dtype
) -> dict[str, Callable[[], object]]:
    """Return name -> call that fills the pool; the candidates are checked to give the same bits."""
    n, T, H, D = shape
    g = torch.Generator().manual_seed(0)
    frames = torch.randn(shape, generator=g).to(dtype)
    pool, scales = torch.zeros(n, T, H, D, dtype=page), torch.ones(n, H)
    slots = torch.randperm(n, generator=g)
    torch.compiler.reset()
    compiled = torch.compile(reference.quantized, dynamic=False)

    def compile_() -> None:
        pages, own = compiled(frames, page)
        scales[slots] = own
        pool.view(torch.uint8)[slots] = pages.view(torch.uint8)

    calls = {
        "ours": lambda: store_frames(pool, scales, slots, frames, "cpu"),
        "eager": lambda: reference.store(frames, pool, scales, slots),
        "compile": compile_,
    }
    results = {}
    for name, call in calls.items():
        pool.zero_()
        call()
        results[name] = pool.float(), scales.clone()
    for name, result in results.items():  # no speed of a wrong answer
        for actual, expected in zip(result, results["eager"], strict=True):
            assert torch.equal(actual, expected), f"{name} differs from eager"
    return calls


def measure(quick: bool, threads: int) -> list[Record]:
    """Measure in this process, whatever its allocator does."""
    rows = []
    for shape in SHAPES[:1] if quick else SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            for page in PAGE_DTYPES:
                with torch.no_grad():
                    timings = interleaved(candidates(shape, dtype, page), quick=quick)
                ours = timings.pop("ours")
                moved = torch.Size(shape).numel() * (dtype.itemsize + page.itemsize)
                names = [str(d).removeprefix("torch.") for d in (dtype, page)]
                case = f"{'x'.join(map(str, shape))} {names[0]} to {names[1]}"
                checks = [check("x compile", ratio(timings["compile"], ours), BAR_COMPILE)]
                sizes = ("store_frames", case, list(shape), threads)
                gbps = moved / ours.median_ms / 1e6
                rows.append(record(*sizes, ours, timings, checks, gbps=gbps))
    return rows


if __name__ == "__main__":
    main(__file__, __doc__ or "", measure)
