"""Cases of frames that are rounded to 8 bits into their slots: against the same in torch.

The context pass of a quantized history makes two of these calls a layer.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvpo_kernels.bench import machine
from kvpo_kernels.bench.case import Baseline, Call, Case, compiled
from kvpo_kernels.ops.store_frames import PAGE_DTYPES, store_frames
from kvpo_kernels.reference.store_frames import quantized


@dataclass(frozen=True)
class Sizes:
    """n frames of T tokens."""

    name: str
    about: str
    frames: int
    frame_tokens: int
    heads: int
    head_size: int

    def small(self) -> "Sizes":
        """Where only results matter."""
        return replace(self, frames=3, frame_tokens=8, heads=2)


SIZES = {
    "cpu": (
        Sizes("trainer", "24 frames of 256 tokens, 6 heads of 64", 24, 256, 6, 64),
        Sizes("wan-1.3b", "6 frames of 1,560 tokens, 12 heads of 128", 6, 1560, 12, 128),
    ),
    "cuda": (
        Sizes("wan-1.3b", "24 frames of 1,560 tokens, 12 heads of 128", 24, 1560, 12, 128),
        Sizes("wan-14b", "24 frames of 1,560 tokens, 40 heads of 128", 24, 1560, 40, 128),
    ),
}


class Rounding:
    """The inputs of a case; a call returns the pool and its scales."""

    def __init__(self, sizes: Sizes, dtype: torch.dtype, page: torch.dtype, device: str) -> None:
        shape = (sizes.frames, sizes.frame_tokens, sizes.heads, sizes.head_size)
        g = torch.Generator(device).manual_seed(0)
        self.page = page
        self.backend: str | None = None
        self.frames = torch.randn(*shape, generator=g, device=device).to(dtype)
        self.pool = torch.zeros(*shape, dtype=page, device=device)
        self.scales = torch.ones(sizes.frames, sizes.heads, device=device)
        order = torch.Generator().manual_seed(1)
        self.slots = torch.randperm(sizes.frames, generator=order)
        self.index = self.slots.to(device)
        self.bytes = self.frames.nbytes + self.pool.nbytes
        self.flops = 3.0 * self.frames.numel()  # magnitude, largest, product

    def clear(self) -> None:
        """Of the pool and its scales."""
        self.pool.zero_()
        self.scales.fill_(1.0)

    def ours(self, backend: str) -> Call:
        """The op."""

        @torch.no_grad()
        def run() -> tuple[Tensor, Tensor]:
            store_frames(self.pool, self.scales, self.slots, self.frames, backend)
            return self.pool, self.scales

        return run

    def expected(self) -> tuple[Tensor, Tensor]:
        """By the reference."""
        pool, scales = self.ours("reference")()
        return pool, scales

    def compile(self, small: bool) -> Call:
        """The arithmetic compiled, and the same copies into the pool as the reference has."""
        rounded = compiled(quantized, small)

        @torch.no_grad()
        def run() -> tuple[Tensor, Tensor]:
            pages, own = rounded(self.frames, self.page)
            self.scales[self.index] = own
            self.pool.view(torch.uint8)[self.index] = pages.view(torch.uint8)
            return self.pool, self.scales

        return run


def cases(device: str, small: bool) -> Iterator[Case]:
    """Every case of the device; the first is the main one."""
    baselines = (
        Baseline(
            "compile",
            "torch.compile of the rounding, torch's copies into the slots",
            lambda work: work.compile(small),
        ),
        Baseline("eager", "the same in torch: the reference", lambda work: work.ours("reference")),
    )
    dtypes = (torch.float32, torch.bfloat16) if device == "cpu" else (torch.bfloat16,)
    for sizes in SIZES[device]:
        given = sizes.small() if small else sizes
        for page in PAGE_DTYPES:
            for dtype in dtypes:
                name = str(page).removeprefix("torch.")
                yield Case(
                    "store_frames",
                    f"to-{name.partition('_')[0]}",
                    sizes.name,
                    f"rounded to {name} into slots; {sizes.about}",
                    dtype,
                    device,
                    {k: v for k, v in vars(given).items() if k not in ("name", "about")}
                    | {"page": name},
                    functools.partial(Rounding, given, dtype, page, device),
                    baselines,
                    (machine.of_copy(device),),
                    small=small,
                    tolerance=0.0,  # the same bits on every backend
                    reference_row=False,  # it is "eager"
                )
