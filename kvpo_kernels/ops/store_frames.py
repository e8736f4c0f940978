"""Frames into the slots of a pool, as they are or rounded to 8 bits.

Shape letters: n frames, F slots, T tokens per frame, H heads, D head size.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.torch_version import TorchVersion

from kvpo_kernels import registry
from kvpo_kernels.checks import tensors
from kvpo_kernels.errors import ConstantError, DtypeError, RangeError, ShapeError
from kvpo_kernels.registry import Backend

OP = "store_frames"
PAGE_DTYPES = (torch.int8, torch.float8_e4m3fn)


class Problem(NamedTuple):
    """What a backend needs to know to accept or refuse a call."""

    device: str
    dtype: torch.dtype


def _why_not_cpu(p: Problem) -> str | None:
    if why := registry.why_not_native(p.device):
        return why
    if p.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"takes float32, bfloat16 and float16, got {p.dtype}"
    return None


def _why_not_triton(p: Problem) -> str | None:
    if p.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"takes float32, bfloat16 and float16, got {p.dtype}"
    return registry.why_not_triton(p.device)


BACKENDS: tuple[Backend[Problem], ...] = (
    Backend("cpu", "kvpo_kernels.backends.native.store_frames", _why_not_cpu),
    Backend("triton", "kvpo_kernels.backends.triton.store_frames", _why_not_triton),
    Backend("reference", "kvpo_kernels.reference.store_frames", lambda p: None),
)


@torch.no_grad()
def quantize_frames(
    frames: Tensor, dtype: torch.dtype, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    r"""Round keys or values to 8 bits with one scale per frame and head.

        scale[f, h]   = max over t, d of |frames[f, t, h, d]| / largest
        pages         = round(frames * (1 / scale))                    frames ~ pages * scale

    `largest` is 127 for int8 and 448 for float8_e4m3fn. An int8 page is off by at most scale / 2; a
    float8 page by a sixteenth of each value, and scale / 1024 where that is less. Of values that
    spread evenly over a head int8 keeps more, of those with outliers float8. The bits are the same
    on every device and backend.

    Args:
        frames: `[..., T, H, D]`, any float dtype.
        dtype: torch.int8 or torch.float8_e4m3fn.
        backend: a name in `BACKENDS`; None takes the first that can run.

    Returns:
        `(pages [..., T, H, D], scales [..., H] float32)`, for `k_scales` and `v_scales` of
        `routed_attention`. A head of a frame with a NaN or an infinity has a scale that makes all
        of it NaN; one of zeros has scale 1.

    Raises:
        DtypeError: another dtype.
        ShapeError: fewer than three axes, or nothing to find the largest of.
        BackendUnavailable: not the named backend can run the call.
    """
    if dtype not in PAGE_DTYPES:
        raise DtypeError(f"dtype must be one of {list(PAGE_DTYPES)}, got {dtype}")
    tensors(frames=frames)
    if not frames.is_floating_point():
        raise DtypeError(f"frames must be a floating-point tensor, got {frames.dtype}")
    if frames.ndim < 3 or 0 in frames.shape[-3:]:
        raise ShapeError(f"frames must be [..., T, H, D] and not empty, got {list(frames.shape)}")
    pages = frames.new_empty(frames.shape, dtype=dtype)
    scales = frames.new_empty(*frames.shape[:-3], frames.shape[-2], dtype=torch.float32)
    flat = pages.view(-1, *frames.shape[-3:])
    slots = torch.arange(len(flat), device="cpu")
    store_frames(
        flat, scales.view(-1, frames.shape[-2]), slots, frames.reshape(flat.shape), backend
    )
    return pages, scales


def why_not_page(name: str, pool: Tensor) -> str | None:
    """Why a pool of this dtype is of no use, where it is one of 8 bits that is not supported."""
    if pool.element_size() > 1 or pool.dtype in PAGE_DTYPES:
        return None
    return (
        f"{name} is {pool.dtype}: of the quantized caches, int8 and float8_e4m3fn are supported,"
        " other formats (LongLive-2 NVFP4) are not"
    )


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
    if k_pool.dtype not in PAGE_DTYPES:
        if k_scales is None and v_scales is None:
            return False
        raise ShapeError(f"k_scales and v_scales go with quantized pools, k_pool is {k_pool.dtype}")
    if v_pool.dtype is not k_pool.dtype:
        raise DtypeError(f"v_pool must be {k_pool.dtype} like k_pool, got {v_pool.dtype}")
    shape = [k_pool.shape[0], k_pool.shape[2]]
    for name, scales in (("k_scales", k_scales), ("v_scales", v_scales)):
        if scales is None:
            raise ShapeError(f"{name} must be given: k_pool is {k_pool.dtype}")
        tensors(**{name: scales})
        if list(scales.shape) != shape:
            raise ShapeError(f"{name} must be {shape}, got {list(scales.shape)}")
        if scales.dtype is not torch.float32 or scales.device != device:
            raise DtypeError(
                f"{name} must be float32 on {device} like q, got {scales.dtype} on {scales.device}"
            )
        if not scales.is_contiguous():
            raise ShapeError(f"{name} must be contiguous, got strides {scales.stride()}")
        if scales.requires_grad:
            raise ConstantError(f"{name} requires grad, but a pool is a constant: detach it")
    return True


def under_fake_mode() -> bool:
    """Whether tensors have shapes only, outside a compiler's trace."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


def check_slots(slots: Tensor, shape: list[int], num_slots: int) -> None:
    """Check the slots that rows of frames, `[B, frames]`, are about to be written to.

    Raises:
        ShapeError, DtypeError: naming the branch, the frame and the slot.
    """
    if not isinstance(slots, Tensor):
        raise DtypeError(f"slots must be a tensor or of `prepare_write`, got {slots!r}")
    if slots.dtype is not torch.int64 or slots.device.type != "cpu":
        raise DtypeError(f"slots must be int64 on the cpu, got {slots.dtype} on {slots.device}")
    if list(slots.shape) != shape:
        raise ShapeError(f"slots must be {shape}, got {list(slots.shape)}")
    if torch.compiler.is_compiling() or under_fake_mode():
        return  # values are not known
    named = slots.flatten().tolist()
    if not named or (min(named) >= 0 and max(named) < num_slots and len(set(named)) == len(named)):
        return
    seen: set[int] = set()
    for b, row in enumerate(slots.tolist()):
        for i, slot in enumerate(row):
            if not 0 <= slot < num_slots:
                raise RangeError(f"slots[branch={b}, frame={i}] = {slot} not in [0, {num_slots})")
            if slot in seen:
                raise RangeError(f"slots[branch={b}, frame={i}] = {slot} is named twice")
            seen.add(slot)


@torch.no_grad()
def store_frames(
    pool: Tensor,
    scales: Tensor | None,
    slots: Tensor,
    frames: Tensor,
    backend: str | None = None,
) -> None:
    """Write frames `[n, T, H, D]` into slots `[n]` of a pool `[F, T, H, D]`, quantized or not.

    All has been checked: slots are int64 on the host, and all different. Scales are given, `[F, H]`
    contiguous, where the pool is quantized. A plain pool needs no kernel of ours.
    """
    if scales is None:
        # From pageable memory the driver takes its own copy first: nothing waits, nothing is lost.
        pool[slots.to(pool.device, non_blocking=True)] = frames
    elif frames.numel():
        problem = Problem(frames.device.type, frames.dtype)
        chosen = registry.select(OP, BACKENDS, problem, backend).name
        _store(frames, pool, scales, slots, chosen)
        note_written(pool, scales)


def check_offsets(written: dict[str, Tensor]) -> None:
    """Refuse what a compiled graph would write elsewhere; called where it is traced.

    Inductor puts a view at 0 whose offset it takes for dynamic (seen with torch 2.11 and 2.13), and
    with torch 2.8 adds constant offsets twice.

    Raises:
        ShapeError: a tensor that begins somewhere inside its memory.
    """
    if torch._guards.TracingContext.try_get() is None:
        return  # fake tensors of somebody who compiles nothing
    for name, tensor in written.items():
        at = tensor.storage_offset()
        if not isinstance(at, int) or (at and not _CONSTANT_OFFSETS):
            raise ShapeError(
                f"{name} is a view into a larger tensor of dynamic sizes, and torch.compile would"
                " write to another part of it: hand over memory of its own (a FramePool's layers"
                " have), or compile with torch 2.13 and dynamic=False"
            )


_CONSTANT_OFFSETS = TorchVersion(torch.__version__) >= "2.13"  # the oldest where it was tried


def note_written(*tensors: Tensor) -> None:
    """Tell autograd of writes that it cannot see, so that no backward reads what it did not save.

    Kernels write through addresses. Where the compiler traces, it knows of them from the schema.
    """
    if not torch.compiler.is_compiling():
        increment_version(tensors)


torch.library.define(
    "kvpo::store_frames",
    "(Tensor frames, Tensor(a!) pool, Tensor(b!) scales, Tensor slots, str backend) -> ()",
)
_MODULES = {b.name: b for b in BACKENDS}


def _store_impl(frames: Tensor, pool: Tensor, scales: Tensor, slots: Tensor, backend: str) -> None:
    _MODULES[backend].load().store(frames, pool, scales, slots)


def _store_fake(frames: Tensor, pool: Tensor, scales: Tensor, *_: object) -> None:
    check_offsets({"pool": pool, "scales": scales})


_store = registry.register("kvpo::store_frames", _store_impl, _store_fake)
