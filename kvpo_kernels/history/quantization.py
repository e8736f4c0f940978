"""Frames of 8 bits: half of the memory and traffic of a 16-bit history."""

import torch
from torch import Tensor

from kvpo_kernels.errors import DtypeError, ShapeError

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""The value that a frame's largest element is mapped to."""
_LEAST_SCALE = 1e-30  # products with it stay normal numbers in float32


@torch.no_grad()
def quantize_frames(frames: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    r"""Round keys or values to 8 bits with one scale per frame and head.

        scale[f, h]   = max over t, d of |frames[f, t, h, d]| / largest
        pages         = round(frames / scale)                          frames ~ pages * scale

    `largest` is 127 for int8 and 448 for float8_e4m3fn. An int8 page is off by at most scale / 2; a
    float8 page by a sixteenth of each value, and scale / 1024 where that is less. Of values that
    spread evenly over a head int8 keeps more, of those with outliers float8.

    Args:
        frames: `[..., T, H, D]`, any float dtype.
        dtype: torch.int8 or torch.float8_e4m3fn.

    Returns:
        `(pages [..., T, H, D], scales [..., H] float32)`, for `k_scales` and `v_scales` of
        `routed_attention`. A head of a frame with a NaN or an infinity has a scale that makes all
        of it NaN; one of zeros has scale 1.

    Raises:
        DtypeError: another dtype.
        ShapeError: fewer than three axes.
    """
    if dtype not in LARGEST:
        raise DtypeError(f"dtype must be one of {list(LARGEST)}, got {dtype}")
    if not frames.is_floating_point():
        raise DtypeError(f"frames must be a floating-point tensor, got {frames.dtype}")
    if frames.ndim < 3:
        raise ShapeError(f"frames must be [..., T, H, D], got {list(frames.shape)}")
    wide = frames.float()
    largest = wide.abs().amax((-3, -1))
    scales = (largest / LARGEST[dtype]).clamp_min(_LEAST_SCALE)
    scales = torch.where(largest == 0, 1.0, scales)
    scales = torch.where(largest.isfinite(), scales, torch.nan)
    scaled = wide / scales[..., None, :, None]
    if dtype is torch.int8:
        scaled = scaled.nan_to_num_().round_()
    return scaled.to(dtype), scales


def check_scales(
    k_pool: Tensor,
    v_pool: Tensor,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    device: torch.device,
) -> bool:
    """Whether the pools `[F, T, H, D]` are quantized; their scales then fit, else there are none.

    Raises:
        ShapeError, DtypeError: naming the argument; metadata only.
    """
    if k_pool.dtype not in LARGEST:
        if k_scales is None and v_scales is None:
            return False
        raise ShapeError(f"k_scales and v_scales go with quantized pools, k_pool is {k_pool.dtype}")
    if v_pool.dtype is not k_pool.dtype:
        raise DtypeError(f"v_pool must be {k_pool.dtype} like k_pool, got {v_pool.dtype}")
    shape = [k_pool.shape[0], k_pool.shape[2]]
    for name, scales in (("k_scales", k_scales), ("v_scales", v_scales)):
        if not isinstance(scales, Tensor):
            raise ShapeError(f"{name} must be given: k_pool is {k_pool.dtype}")
        if list(scales.shape) != shape:
            raise ShapeError(f"{name} must be {shape}, got {list(scales.shape)}")
        if scales.dtype is not torch.float32 or scales.device != device:
            raise DtypeError(
                f"{name} must be float32 on {device} like q, got {scales.dtype} on {scales.device}"
            )
        if not scales.is_contiguous():
            raise ShapeError(f"{name} must be contiguous, got strides {scales.stride()}")
        if scales.requires_grad:
            raise ShapeError(f"{name} requires grad, but a pool is a constant: detach it")
    return True


@torch.no_grad()
def store_frames(pool: Tensor, scales: Tensor | None, slots: Tensor, frames: Tensor) -> None:
    """Write frames `[n, T, H, D]` into slots `[n]` of a pool `[F, T, H, D]`, quantized or not.

    Scales are given, `[F, H]`, where the pool is quantized. All have been checked.
    """
    if scales is not None:
        frames, own = quantize_frames(frames, pool.dtype)
        scales[slots] = own
        pool, frames = pool.view(torch.uint8), frames.view(torch.uint8)  # float8 has no indexing
    pool[slots] = frames
