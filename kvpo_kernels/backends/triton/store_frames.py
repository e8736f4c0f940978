"""Rounding of frames to 8 bits into their slots: a program per frame and head."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK_T = 64  # tokens of a tile


@triton.jit
def _bits(frames, first, t, T, H, D: tl.constexpr, WIDTH: tl.constexpr):
    """A tile in float32, and the bits of its magnitudes, which have their order."""
    d = tl.arange(0, WIDTH)
    at = first + t.to(tl.int64)[:, None] * (H * D) + d[None, :]
    inside = (t < T)[:, None] & (d < D)[None, :]
    x = tl.load(frames + at, mask=inside, other=0.0).to(tl.float32)
    return x, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _code(scaled, FLOAT8: tl.constexpr):
    """The low 8 bits of the result are int8's, or float8_e4m3fn's, rounded to nearest even."""
    if FLOAT8:
        bits = scaled.to(tl.int32, bitcast=True)
        size = bits & 0x7FFFFFFF
        # The exponent's bias is 127 here and 7 there; below 2^-6 an addition rounds at 2^-9.
        normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
        small = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True)
        code = tl.where(size < 0x3C800000, small - 0x46800000, normal) | ((bits >> 24) & 0x80)
    else:
        # No value is larger but by a rounding. Without the minimum, the product that made `scaled`
        # would be fused with the addition, which then rounds another number at 1 (1.5 * 2^23).
        code = (tl.minimum(scaled, 127.0) + 12582912.0).to(tl.int32, bitcast=True)
    return code


@triton.jit
def _store_kernel(
    frames, pool, scales, slots, strides, T, H, per_largest, least_scale,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_T: tl.constexpr, FLOAT8: tl.constexpr,
):  # fmt: skip
    """`frames` `[n, T, H, D]` contiguous; `strides` are those of the pool's first three axes."""
    frame = tl.program_id(0)
    head = tl.program_id(1)
    first = (frame.to(tl.int64) * T * H + head) * D
    largest = tl.zeros([BLOCK_T, WIDTH], tl.int32)
    for start in range(0, T, BLOCK_T):
        _, size = _bits(frames, first, start + tl.arange(0, BLOCK_T), T, H, D, WIDTH)
        largest = tl.maximum(largest, size)
    most = tl.max(tl.max(largest, axis=1), axis=0)
    finite = most < 0x7F800000
    scale = tl.maximum(most.to(tl.float32, bitcast=True) * per_largest, least_scale)
    scale = tl.where(most == 0, 1.0, scale)
    slot = tl.load(slots + frame)
    tl.store(scales + slot * H + head, tl.where(finite, scale, float("nan")))
    inverse = tl.where(finite, tl.div_rn(1.0, scale), 0.0)
    to = pool + slot * strides[0] + head.to(tl.int64) * strides[2]
    d = tl.arange(0, WIDTH)
    for start in range(0, T, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        x, _ = _bits(frames, first, t, T, H, D, WIDTH)
        code = tl.where(finite, _code(x * inverse, FLOAT8), 0x7F if FLOAT8 else 0)
        at = t.to(tl.int64)[:, None] * strides[1] + d[None, :]
        inside = (t < T)[:, None] & (d < D)[None, :]
        tl.store(to + at, (code & 0xFF).to(tl.uint8), mask=inside)


def store(frames: Tensor, pool: Tensor, scales: Tensor, slots: Tensor) -> None:
    """Write frames `[n, T, H, D]` and their scales into slots of the pool."""
    n, T, H, D = frames.shape
    float8 = pool.dtype is torch.float8_e4m3fn
    with torch.cuda.device_of(frames):
        _store_kernel[(n, H)](
            frames.contiguous(),
            pool.view(torch.uint8),
            scales,
            slots.contiguous().to(frames.device, non_blocking=True),
            pool.stride()[:3],
            T,
            H,
            1.0 / (448.0 if float8 else 127.0),
            1e-30,
            D=D,
            WIDTH=triton.next_power_of_2(D),
            BLOCK_T=_BLOCK_T,
            FLOAT8=float8,
            num_warps=4,
        )
