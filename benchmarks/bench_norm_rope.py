"""RMSNorm + 3-D RoPE + slot write (`qk_norm_rope_write`) against the same in torch.

Run: `python benchmarks/bench_norm_rope.py [--quick] [--threads N]`.

"original" does what Wan's attention does (`wan.py`): RMSNorm in float32, then, row by row, a
complex product in float64, the padding (none here) joined, the rows stacked and rounded. "compile"
is the best one writes without our op: float32, real arithmetic, all rows at once, under
torch.compile. Both end with the copy of k and v into the pool.
"""

from collections.abc import Callable

import torch
from harness import Record, check, main, record
from torch import Tensor
from wan import axis_tables, rope_float64

from kvpo_kernels import RopeTable, qk_norm_rope_write
from kvpo_kernels.bench.norm_rope import fused, rms_norm
from kvpo_kernels.bench.timing import interleaved, ratio

# B, (frames, height, width), H, D: the trainer's scale, and one block of a 1.3B model
SHAPES = ((8, (3, 16, 16), 6, 64), (2, (3, 30, 52), 12, 128))
BAR_ORIGINAL, BAR_COMPILE = 8.0, 2.5


def fused_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: tuple[Tensor, Tensor],
    cos: Tensor,
    sin: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    index: Tensor,
) -> Tensor:
    page = (index.shape[0], *k_pool.shape[1:])
    k_pool[index] = fused(k, weights[1], cos, sin).view(page)
    v_pool[index] = v.view(page)
    return fused(q, weights[0], cos, sin)


def candidates(
    B: int, grid: tuple[int, int, int], H: int, D: int, dtype: torch.dtype
) -> dict[str, Callable[[], Tensor]]:
    """Return name -> call that returns q'; the candidates are checked to agree."""
    g = torch.Generator().manual_seed(0)
    frames, tokens = grid[0], grid[1] * grid[2]
    q, k, v = torch.randn(3, B, frames * tokens, H, D, generator=g).to(dtype)
    weights = tuple((1 + 0.1 * torch.randn(H * D, generator=g)).to(dtype) for _ in range(2))
    slots = torch.randperm(B * frames, generator=g).view(B, frames)
    pools = torch.zeros(2, B * frames, tokens, H, D, dtype=dtype)
    rope = RopeTable(D)
    cos, sin = rope.tokens(21, grid)
    tables = axis_tables(rope, 21, grid)
    index = slots.flatten()
    page = (index.shape[0], tokens, H, D)
    torch.compiler.reset()
    compiled = torch.compile(fused_write, dynamic=False)

    def ours() -> Tensor:
        return qk_norm_rope_write(
            q, k, v, *weights, rope, 21, grid=grid, k_pool=pools[0], v_pool=pools[1], slots=slots
        )

    def original() -> Tensor:
        pools[0, index] = rope_float64(rms_norm(k, weights[1]), grid, tables).view(page)
        pools[1, index] = v.view(page)
        return rope_float64(rms_norm(q, weights[0]), grid, tables)

    def compile_() -> Tensor:
        return compiled(q, k, v, weights, cos, sin, pools[0], pools[1], index)

    calls = {"ours": ours, "original": original, "compile": compile_}
    results = {}
    for name, call in calls.items():
        pools.zero_()
        results[name] = (call().float(), pools.float())
    limit = 1e-4 if dtype is torch.float32 else 0.1  # of bfloat16: some roundings at values of 4
    for name, result in results.items():  # no speed of a wrong answer
        for actual, expected in zip(result, results["original"], strict=True):
            error = (actual - expected).abs().max()
            assert error < limit, f"{name} differs from original by {error}"
    return calls


def measure(quick: bool, threads: int) -> list[Record]:
    """Measure in this process, whatever its allocator does."""
    rows = []
    for B, grid, H, D in SHAPES[:1] if quick else SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            with torch.no_grad():
                timings = interleaved(candidates(B, grid, H, D, dtype), quick=quick)
            ours = timings.pop("ours")
            tokens = B * grid[0] * grid[1] * grid[2]
            moved = 6 * tokens * H * D * dtype.itemsize  # q, k, v, each read and written once
            ratios = {n: ratio(t, ours) for n, t in timings.items()}
            checks = [
                check("x compile", ratios["compile"], BAR_COMPILE),
                check("x original", ratios["original"], BAR_ORIGINAL),
            ]
            case = f"{B}x{tokens // B}x{H}x{D} {str(dtype).removeprefix('torch.')}"
            sizes = ("norm_rope + slot write", case, [B, tokens // B, H, D], threads)
            gbps = moved / ours.median_ms / 1e6
            rows.append(record(*sizes, ours, timings, checks, gbps=gbps))
    return rows


if __name__ == "__main__":
    main(__file__, __doc__ or "", measure)
