"""Launch configurations, one row per kind of GPU and width of a head. Nothing is tuned at run time.

Tile sizes also set the order of summation: with a row fixed, so are a call's bits.
"""

from typing import NamedTuple


class Launch(NamedTuple):
    """How one kernel is launched."""

    block_m: int
    """Queries per tile."""

    block_n: int
    """Keys per tile."""

    num_warps: int
    num_stages: int

    descriptors: bool = False
    """Load keys and values through tensor descriptors (TMA) where the tensors allow it."""


class Launches(NamedTuple):
    """Of the three kernels of an attention."""

    forward: Launch
    grad_q: Launch
    grad_live: Launch


def width(head_size: int) -> int:
    """Columns of a tile: the power of two that holds a head, at least a matrix instruction's."""
    return max(16, 1 << (head_size - 1).bit_length())


def launches(kind: str, head_size: int, itemsize: int, quantized: bool = False) -> Launches:
    """Return the row for a head.

    Args:
        kind: "interpreter", "sm_80" (163 KiB of shared memory), "sm_86" (99 KiB: 86, 89, 120),
            "sm_90", "sm_100" or "amd"; see `kind_of`.
        head_size: D.
        itemsize: bytes of an element of q.
        quantized: whether the pools are; widening takes registers.
    """
    if kind == "interpreter":  # small, so that small tests have several tiles
        return Launches(*3 * [Launch(32, 32, 4, 1)])
    if itemsize == 4:  # no matrix instructions without rounding to TF32
        side = 32 if width(head_size) <= 128 else 16
        return Launches(*3 * [Launch(side, side, 4, 1)])
    row = max(64, width(head_size))
    plain = _TABLE[kind][row]
    if not quantized or (kind, row) not in _QUANTIZED:
        return plain
    forward, grad_q = _QUANTIZED[kind, row]
    return Launches(forward, grad_q, plain.grad_live)  # which reads no pool


def kind_of(capability: tuple[int, int] | None) -> str:
    """Return the table's kind for a CUDA compute capability; None for AMD."""
    if capability is None:
        return "amd"
    major, minor = capability
    if major == 8:
        return "sm_80" if minor in (0, 7) else "sm_86"
    return {9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(major, "sm_86")


_TABLE: dict[str, dict[int, Launches]] = {
    "sm_80": {
        64: Launches(Launch(128, 64, 4, 3), Launch(128, 64, 8, 2), Launch(64, 128, 8, 2)),
        128: Launches(Launch(128, 64, 8, 3), Launch(128, 32, 8, 2), Launch(64, 64, 8, 2)),
        256: Launches(Launch(64, 64, 8, 1), Launch(64, 32, 8, 1), Launch(32, 64, 8, 1)),
    },
    "sm_86": {
        64: Launches(Launch(128, 64, 4, 2), Launch(64, 64, 4, 2), Launch(64, 64, 4, 2)),
        128: Launches(Launch(64, 64, 4, 2), Launch(64, 32, 4, 2), Launch(32, 64, 4, 2)),
        256: Launches(Launch(64, 32, 8, 1), Launch(32, 32, 8, 1), Launch(32, 32, 8, 1)),
    },
    "sm_90": {
        64: Launches(
            Launch(128, 128, 8, 2, True), Launch(128, 128, 8, 2, True), Launch(64, 128, 8, 2, True)
        ),
        128: Launches(
            Launch(128, 128, 8, 2, True), Launch(128, 64, 8, 2, True), Launch(64, 128, 8, 2, True)
        ),
        256: Launches(
            Launch(128, 32, 8, 2, True), Launch(32, 64, 8, 1, True), Launch(64, 32, 8, 1, True)
        ),
    },
    "sm_100": {
        64: Launches(
            Launch(128, 128, 8, 2, True), Launch(128, 64, 8, 2, True), Launch(64, 128, 8, 2, True)
        ),
        128: Launches(
            Launch(128, 128, 8, 2, True), Launch(128, 64, 8, 2, True), Launch(64, 128, 8, 2, True)
        ),
        256: Launches(
            Launch(64, 64, 8, 2, True), Launch(64, 64, 8, 1, True), Launch(64, 64, 8, 1, True)
        ),
    },
    "amd": {
        64: Launches(Launch(128, 64, 4, 1), Launch(128, 64, 4, 1), Launch(64, 64, 4, 1)),
        128: Launches(Launch(128, 64, 4, 1), Launch(64, 64, 4, 1), Launch(32, 64, 4, 1)),
        256: Launches(Launch(64, 32, 4, 1), Launch(64, 16, 4, 1), Launch(16, 32, 4, 1)),
    },
}

# Smaller tiles than above, where those would spill. Forward and grad_q.
_QUANTIZED: dict[tuple[str, int], tuple[Launch, Launch]] = {
    ("sm_80", 64): (Launch(64, 64, 4, 2), Launch(64, 32, 4, 2)),
    ("sm_80", 128): (Launch(64, 64, 8, 2), Launch(64, 64, 8, 2)),
    ("sm_80", 256): (Launch(64, 32, 8, 1), Launch(32, 32, 8, 1)),
    ("sm_86", 64): (Launch(64, 64, 4, 2), Launch(64, 32, 4, 2)),
    ("sm_86", 128): (Launch(64, 64, 8, 2), Launch(64, 32, 8, 1)),
    ("sm_90", 256): (Launch(64, 32, 8, 2, True), Launch(32, 64, 8, 1, True)),
    ("sm_100", 128): (Launch(64, 128, 8, 2, True), Launch(128, 64, 8, 2, True)),
}
