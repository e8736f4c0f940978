"""Cases of RMSNorm + rotation + slot write: against the same in torch, as Wan has it and compiled.

The bars are those of an H200 in bfloat16; elsewhere the same cases run smaller and have none.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvpo_kernels import RopeTable, qk_norm_rope_write
from kvpo_kernels.bench.comparison import Baselines, Comparison, Record, memory_bound_parts
from kvpo_kernels.reference.store_frames import quantized

EPS = 1e-6
FIRST_FRAME = 21


@dataclass(frozen=True)
class Case:
    """One block of G branches, written into the pool."""

    id: str = "R1"
    variant: str = ""
    branches: int = 8
    grid: tuple[int, int, int] = (3, 30, 52)
    heads: int = 12
    head_size: int = 128
    page: str = ""
    """dtype of the pool where it is quantized"""

    def smaller(self) -> "Case":
        """The same on a CPU."""
        return replace(self, branches=1, grid=(3, 8, 8), heads=2)


CASES = (
    Case(),
    Case(variant="h40", heads=40),
    Case(variant="one-branch", branches=1),
    Case(variant="int8", page="int8"),
)
BARS = {"R1": 10.0, "R1/compile": 1.2, "R1/copy": 0.8}


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Over heads and head size, as the model dimension is; in float32, as Wan does."""
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean((-2, -1), keepdim=True) + EPS)
    return (wide * scale).to(x.dtype) * weight.view(x.shape[-2:])


def original(x: Tensor, weight: Tensor, rotation: Tensor) -> Tensor:
    """RMSNorm, then a complex product in float64: what Wan's attention computes."""
    pairs = rms_norm(x, weight).double().unflatten(-1, (-1, 2))  # type: ignore[no-untyped-call]
    turned = torch.view_as_complex(pairs) * rotation[:, None]
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


def fused(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The best one writes for torch.compile: float32, real arithmetic, all rows at once."""
    wide = x.float()
    y = wide * torch.rsqrt(wide.square().mean((-2, -1), keepdim=True) + EPS)
    y = y * weight.view(x.shape[-2:])
    even, odd = y[..., 0::2], y[..., 1::2]
    c, s = cos[:, None], sin[:, None]
    return torch.stack([even * c - odd * s, even * s + odd * c], dim=-1).flatten(-2).to(x.dtype)


def block_in_torch(
    turn: Callable[..., Tensor],
    angles: tuple[Tensor, ...],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    index: Tensor,
) -> Tensor:
    """The whole of it, so that a compiler may join what it can; returns q'."""
    page = (len(index), *k_pool.shape[1:])
    new_k = turn(k, k_weight, *angles).view(page)
    for pool, scales, x in ((k_pool, k_scales, new_k), (v_pool, v_scales, v.view(page))):
        if scales is None:
            pool[index] = x
        else:
            pool[index], scales[index] = quantized(x, pool.dtype)
    return turn(q, q_weight, *angles)


class Bench(Comparison):
    """Measures one case at one precision; yields records."""

    def __init__(
        self, case: Case, dtype: torch.dtype, device: str, backend: str | None, quick: bool
    ) -> None:
        B, H, D = case.branches, case.heads, case.head_size
        frames, T = case.grid[0], case.grid[1] * case.grid[2]
        page = getattr(torch, case.page) if case.page else dtype
        # q, k, v: each read and written once
        moved = B * frames * T * H * D * (4 * dtype.itemsize + 2 * page.itemsize)
        shape = {"branches": B, "grid": list(case.grid), "heads": H, "head_size": D}
        sizes = (shape, dtype, device, backend, quick)
        super().__init__("norm_rope", case.variant, *sizes, bars=BARS, moved=moved)
        self.case, self.backend = case, backend
        g = torch.Generator(device).manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, device=device).to(dtype)

        self.q, self.k, self.v = (draw(B, frames * T, H, D) for _ in range(3))
        self.weights = [1 + 0.1 * draw(H * D) for _ in range(2)]
        order = torch.Generator().manual_seed(1)
        self.slots = torch.randperm(B * frames, generator=order).view(B, frames)
        self.index = self.slots.flatten().to(device)
        self.pools = torch.zeros(2, B * frames, T, H, D, dtype=page, device=device)
        self.scales = torch.ones(2, B * frames, H, device=device) if case.page else (None, None)
        self.rope = RopeTable(D, device=device)
        self.cos, self.sin = self.rope.tokens(FIRST_FRAME, case.grid)
        self.rotation = torch.complex(*self.rope.tokens(FIRST_FRAME, case.grid, wide=True))

    def ours(self) -> tuple[Tensor, Tensor]:
        q = qk_norm_rope_write(
            self.q,
            self.k,
            self.v,
            self.weights[0],
            self.weights[1],
            self.rope,
            FIRST_FRAME,
            grid=self.case.grid,
            k_pool=self.pools[0],
            v_pool=self.pools[1],
            slots=self.slots,
            k_scales=self.scales[0],
            v_scales=self.scales[1],
            backend=self.backend,
        )
        return q, self.pools

    def in_torch(
        self, block: Callable[..., Tensor], turn: Callable[..., Tensor], *angles: Tensor
    ) -> Callable[[], tuple[Tensor, Tensor]]:
        self.pools.zero_()  # what it does not write shows
        inputs = (self.q, self.k, self.v, *self.weights, *self.pools, *self.scales, self.index)
        return lambda: (block(turn, angles, *inputs), self.pools)

    @torch.no_grad()
    def run(self, copy_tbps: float) -> Iterator[Record]:
        """q, and k and v in their slots, and how near it comes to a copy of as many bytes."""
        compiled = torch.compile(block_in_torch, dynamic=False)
        angles = (self.cos, self.sin)
        others: Baselines = {
            "R1": (
                "torch, float64 rotation",
                lambda: self.in_torch(block_in_torch, original, self.rotation),
            ),
            "R1/compile": ("torch.compile", lambda: self.in_torch(compiled, fused, *angles)),
        }
        flops = 13.0 * (self.q.numel() + self.k.numel()) / 2
        yield from self.compare_and_copy("R1", self.ours, others, flops, copy_tbps)


def parts(
    device: str, quick: bool, backend: str | None, rates: dict[str, float]
) -> Iterator[tuple[str, Callable[[], Iterator[Record]]]]:
    """What is measured, each on its own so that one that fails leaves the others."""
    return memory_bound_parts(CASES, Bench, device, quick, backend, rates["copy_tbps"])
