"""Every case there is."""

from collections.abc import Iterator, Sequence
from typing import Any, Final

from kvpo_kernels.bench import norm_rope, routed_attention, store_frames, tve_grpo
from kvpo_kernels.bench.case import Case

OPS: Final[dict[str, Any]] = {
    "routed_attention": routed_attention,
    "tve_grpo": tve_grpo,
    "norm_rope": norm_rope,
    "store_frames": store_frames,
}


def cases(op: str, device: str, small: bool = False) -> Iterator[Case]:
    """Of one op, the main one first. `small`: of a size at which only results matter."""
    found: Iterator[Case] = OPS[op].cases(device, small)
    return found


def explained(device: str, ops: Sequence[str]) -> str:
    """The names of cases and rows in words."""
    lines = []
    for op in ops:
        rows: dict[str, str] = {}
        for case in cases(op, device):
            lines.append(f"{case.group}: {case.about}")
            rows |= case.rows()
        lines += [f"    {name:20} {about}" for name, about in rows.items()]
    return "\n".join(lines)
