"""Launcher of the C++ kernel that rounds frames to 8 bits into their slots."""

import torch
from torch import Tensor

from kvpo_kernels import _native
from kvpo_kernels.backends.native.dlpack import view


def store(frames: Tensor, pool: Tensor, scales: Tensor, slots: Tensor) -> None:
    """Write frames `[n, T, H, D]` and their scales into slots of the pool."""
    _native.store_frames(
        frames=view(frames.contiguous()),
        # The bits: DLPack has had a name for float8_e4m3fn only since 1.1.
        pool=view(pool.view(torch.uint8) if pool.dtype is torch.float8_e4m3fn else pool),
        scales=view(scales),
        slots=view(slots.contiguous()),
        threads=torch.get_num_threads(),
    )
