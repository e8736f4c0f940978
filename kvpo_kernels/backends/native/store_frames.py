"""Launcher of the C++ kernel that rounds frames to 8 bits into their slots."""

import torch
from torch import Tensor

from kvpo_kernels import _native
from kvpo_kernels.backends.native.dlpack import pages, view


def store(frames: Tensor, pool: Tensor, scales: Tensor, slots: Tensor) -> None:
    """Write frames `[n, T, H, D]` and their scales into slots of the pool."""
    _native.store_frames(
        frames=view(frames.contiguous()),
        pool=pages(pool),
        scales=view(scales),
        slots=view(slots.contiguous()),
        threads=torch.get_num_threads(),
    )
