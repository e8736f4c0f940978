"""The least ratios that are accepted, by instruction set: measured ones, less what noise takes.

A machine whose instruction set has no bars is only measured. `python -m kvpo_kernels bench --bars`
and `make bench` check them.
"""

from typing import Any, Final, NamedTuple


class Bar(NamedTuple):
    """Ours must be that many times as fast as `row`; of a yardstick, that share of it."""

    op: str
    part: str
    row: str
    """A baseline or yardstick; "memory/ROW": its peak of memory over ours; "kernel/NAME": that
    kernel's share of the peak; "MiB of memory below 32": ours, beyond inputs and outputs."""
    least: float
    name: str = ""
    """Of the case; "" for all."""
    dtype: str = ""
    """"" for all."""


_F, _FB, _B = "forward", "forward+backward", "backward"
_ATTENTION, _TVE, _NORM = "routed_attention", "tve_grpo", "norm_rope"
_TORCH = ("loop", "gather", "compile")

BARS: Final[dict[str, tuple[Bar, ...]]] = {
    "avx512_bf16": (
        *(
            Bar(_ATTENTION, part, row, least, name, dtype)
            for part, dtype, least in (
                (_F, "float32", 1.3),
                (_F, "bfloat16", 2.5),
                (_FB, "float32", 1.6),
                (_FB, "bfloat16", 2.5),
            )
            for row in _TORCH
            for name in ("small", "mid", "large")
        ),
        *(
            Bar(_ATTENTION, _F, "peak", least, name, dtype)
            for dtype, least in (("float32", 0.75), ("bfloat16", 0.65))
            for name in ("small", "mid", "large")
        ),
        Bar(_ATTENTION, _FB, "MiB of memory below 32", 0.0),
        Bar(_TVE, "loss+gradient", "compile", 2.5, "trainer"),
        Bar(_TVE, "loss+gradient", "eager", 10.0, "trainer"),
        Bar(_TVE, "loss+gradient", "compile", 1.4, "wan-1.3b"),
        Bar(_TVE, "loss+gradient", "eager", 3.5, "wan-1.3b"),
        Bar(_TVE, "loss+gradient", "read", 0.85, "wan-1.3b"),
        *(
            Bar(_NORM, "write", row, least, name)
            for row, least in (("compile", 2.5), ("original", 8.0))
            for name in ("trainer", "wan-1.3b")
        ),
        Bar("store_frames", "to-int8", "compile", 2.0),
        Bar("store_frames", "to-float8", "compile", 2.0),
    ),
    "sm_90": (
        Bar(_ATTENTION, _F, "joined", 0.93, "wan-1.3b"),
        Bar(_ATTENTION, _F, "gather", 1.0, "wan-1.3b"),
        Bar(_ATTENTION, _F, "loop", 2.0, "wan-1.3b"),
        Bar(_ATTENTION, _F, "flex", 1.6, "wan-1.3b"),
        Bar(_ATTENTION, _F, "side-by-side", 0.98, "wan-1.3b"),
        Bar(_ATTENTION, _F, "per-branch", 1.12, "wan-1.3b"),
        Bar(_ATTENTION, _F, "kernel/_forward_kernel", 0.78, "wan-1.3b"),
        Bar(_ATTENTION, _B, "joined", 1.15, "wan-1.3b"),
        Bar(_ATTENTION, _B, "flash-deterministic", 2.2, "wan-1.3b"),
        Bar(_ATTENTION, _B, "kernel/_grad_q_kernel", 0.72, "wan-1.3b"),
        Bar(_ATTENTION, _B, "kernel/_grad_live_kernel", 0.68, "wan-1.3b"),
        Bar(_ATTENTION, _FB, "memory/gather", 1 / 0.3, "wan-1.3b"),
        Bar(_TVE, "loss+gradient", "eager", 10.0, "one-step"),
        Bar(_TVE, "loss+gradient", "compile", 1.0, "one-step"),
        Bar(_TVE, "loss+gradient", "eager", 6.0, "wan-1.3b"),
        Bar(_TVE, "loss+gradient", "compile", 1.2, "wan-1.3b"),
        Bar(_TVE, "loss+gradient", "copy", 0.55, "wan-1.3b"),
        Bar(_NORM, "write", "original", 10.0, "wan-1.3b"),
        Bar(_NORM, "write", "compile", 1.2, "wan-1.3b"),
        Bar(_NORM, "write", "copy", 0.8, "wan-1.3b"),
    ),
}


def check(instructions: str, case: Any, values: dict[str, float]) -> list[dict[str, Any]]:
    """What of a case's values by row has a bar on this machine, and whether it holds."""
    found = []
    for bar in BARS.get(instructions, ()):
        here = (bar.op, bar.part) == (case.op, case.part) and bar.row in values
        if here and bar.name in ("", case.name) and bar.dtype in ("", case.dtype_name):
            value = values[bar.row]
            found.append(
                {"what": bar.row, "value": value, "bar": bar.least, "holds": value >= bar.least}
            )
    return found
