"""Frames of 8 bits in plain PyTorch, written to be checked against the formula by eye."""

import torch
from torch import Tensor

_LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
_LEAST_SCALE = 1e-30  # products with it stay normal numbers in float32


def quantized(frames: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return `(pages, scales)`; see `kvpo_kernels.ops.store_frames` for the contract."""
    wide = frames.float()
    largest = wide.abs().amax((-3, -1))
    # A product, not a quotient: torch divides by a number in one way on a CPU, in another on a GPU.
    scales = (largest * (1.0 / _LARGEST[dtype])).clamp_min(_LEAST_SCALE)
    scales = torch.where(largest == 0, 1.0, scales)
    scales = torch.where(largest.isfinite(), scales, torch.nan)
    scaled = wide * (1.0 / scales)[..., None, :, None]
    if dtype is torch.int8:
        scaled = scaled.nan_to_num_().round_()
    return scaled.to(dtype), scales


def store(frames: Tensor, pool: Tensor, scales: Tensor, slots: Tensor) -> None:
    """Write frames `[n, T, H, D]` and their scales into slots `[n]` of `[F, T, H, D]`, `[F, H]`."""
    pages, own = quantized(frames, pool.dtype)
    index = slots.to(pool.device, non_blocking=True)
    scales[index] = own
    pool.view(torch.uint8)[index] = pages.view(torch.uint8)  # float8 has no indexing
