"""Cases of RMSNorm + rotation + slot write: against the same in torch, as Wan has it and compiled.

The op is `qk_norm_rope_write`, the context pass of a block.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvpo_kernels import RopeTable, qk_norm_rope_write
from kvpo_kernels.bench import machine
from kvpo_kernels.bench.case import Baseline, Call, Case, compiled
from kvpo_kernels.reference.store_frames import quantized

EPS = 1e-6
FIRST_FRAME = 21


@dataclass(frozen=True)
class Sizes:
    """One block of B branches, written into the pool."""

    name: str
    about: str
    branches: int = 8
    grid: tuple[int, int, int] = (3, 30, 52)
    heads: int = 12
    head_size: int = 128
    page: str = ""
    """dtype of the pool where it is quantized"""

    def small(self) -> "Sizes":
        """Where only results matter."""
        return replace(self, branches=2, grid=(3, 4, 4), heads=2)


_TRAINER = Sizes("trainer", "8 branches, 3 frames of 256 tokens", 8, (3, 16, 16), 6, 64)
SIZES = {
    "cpu": (
        _TRAINER,
        Sizes("wan-1.3b", "2 branches, 3 frames of 1,560 tokens, 12 heads of 128", branches=2),
        replace(_TRAINER, name="int8", about="trainer, into a pool of int8", page="int8"),
    ),
    "cuda": (
        Sizes("wan-1.3b", "8 branches, 3 frames of 1,560 tokens, 12 heads of 128"),
        Sizes("wan-14b", "40 heads of 128", heads=40),
        Sizes("one-branch", "wan-1.3b, one branch", branches=1),
        Sizes("int8", "wan-1.3b, into a pool of int8", page="int8"),
    ),
}


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


class ContextPass:
    """The inputs of a case; a call returns q' and the pools of keys and values."""

    def __init__(self, sizes: Sizes, dtype: torch.dtype, device: str) -> None:
        B, H, D = sizes.branches, sizes.heads, sizes.head_size
        frames, T = sizes.grid[0], sizes.grid[1] * sizes.grid[2]
        page = getattr(torch, sizes.page) if sizes.page else dtype
        self.sizes = sizes
        self.backend: str | None = None
        g = torch.Generator(device).manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, device=device).to(dtype)

        self.q, self.k, self.v = (draw(B, frames * T, H, D) for _ in range(3))
        self.weights = [1 + 0.1 * draw(H * D) for _ in range(2)]
        order = torch.Generator().manual_seed(1)
        self.slots = torch.randperm(B * frames, generator=order).view(B, frames)
        self.index = self.slots.flatten().to(device)
        self.pools = torch.zeros(2, B * frames, T, H, D, dtype=page, device=device)
        self.scales = torch.ones(2, B * frames, H, device=device) if sizes.page else (None, None)
        self.rope = RopeTable(D, device=device)
        self.angles = self.rope.tokens(FIRST_FRAME, sizes.grid)
        self.rotation = torch.complex(*self.rope.tokens(FIRST_FRAME, sizes.grid, wide=True))
        # q, k, v: each read and written once
        self.bytes = self.q.numel() * (4 * dtype.itemsize + 2 * page.itemsize)
        self.flops = 13.0 * self.q.numel()

    def clear(self) -> None:
        """Of the pools."""
        self.pools.zero_()

    def ours(self, backend: str) -> Call:
        """The op."""

        @torch.no_grad()
        def run() -> tuple[Tensor, Tensor]:
            q = qk_norm_rope_write(
                self.q,
                self.k,
                self.v,
                self.weights[0],
                self.weights[1],
                self.rope,
                FIRST_FRAME,
                grid=self.sizes.grid,
                k_pool=self.pools[0],
                v_pool=self.pools[1],
                slots=self.slots,
                k_scales=self.scales[0],
                v_scales=self.scales[1],
                backend=backend,
            )
            return q, self.pools

        return run

    def expected(self) -> tuple[Tensor, Tensor]:
        """By the reference."""
        q, pools = self.ours("reference")()
        return q, pools

    def in_torch(
        self, block: Callable[..., Tensor], turn: Callable[..., Tensor], *angles: Tensor
    ) -> Call:
        inputs = (self.q, self.k, self.v, *self.weights, *self.pools, *self.scales, self.index)

        @torch.no_grad()
        def run() -> tuple[Tensor, Tensor]:
            return block(turn, angles, *inputs), self.pools

        return run


def cases(device: str, small: bool) -> Iterator[Case]:
    """Every case of the device; the first is the main one."""
    baselines = (
        Baseline(
            "compile",
            "float32 and real arithmetic in torch, under torch.compile",
            lambda work: work.in_torch(compiled(block_in_torch, small), fused, *work.angles),
        ),
        Baseline(
            "original",
            "as Wan has it: a complex product in float64, in torch",
            lambda work: work.in_torch(block_in_torch, original, work.rotation),
        ),
    )
    for sizes in SIZES[device]:
        given = sizes.small() if small else sizes
        both = device == "cpu" and not sizes.page
        for dtype in (torch.float32, torch.bfloat16) if both else (torch.bfloat16,):
            yield Case(
                "norm_rope",
                "write",
                sizes.name,
                f"RMSNorm and rotation of q and k, k and v into slots; {sizes.about}",
                dtype,
                device,
                {k: v for k, v in vars(given).items() if k not in ("name", "about")},
                functools.partial(ContextPass, given, dtype, device),
                baselines,
                (machine.of_copy(device),),
                {"head_size": given.head_size},
                small=small,
                tolerance=3e-2 if dtype is torch.bfloat16 or sizes.page else 1e-4,
            )
