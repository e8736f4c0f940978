"""What a case is: one call at one size and precision, and what it is held against.

Each op's file makes its cases of this; the command, `pytest benchmarks` and the device suite
measure them (`measurement.py`), so that a case is written once.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from kvpo_kernels import explain, registry

Call = Callable[[], Any]
"""Does the work; returns a tensor or a tuple of them, of which all that it writes is part."""


class Work(Protocol):
    """The inputs of a case, made once for all that is compared on them."""

    backend: str | None
    """Ours; baselines that are ways to use ours take it as well. None until it is chosen."""
    flops: float
    """Useful floating-point operations of a call."""
    bytes: int
    """What a call must at least read and write."""

    def ours(self, backend: str) -> Call:
        """The op itself."""

    def expected(self) -> Any:
        """What a call returns, by the reference backend."""

    def clear(self) -> None:
        """Unwrite what calls write beside their results, so that what one leaves out shows."""


@dataclass(frozen=True)
class Baseline:
    """Another way to the same result, checked to get there."""

    name: str
    about: str
    make: Callable[[Any], Call]
    """From the case's work; what happens here, compilation for one, is not timed."""


@dataclass(frozen=True)
class Yardstick:
    """Not the same result, but a bound: `make` returns a call, and its time to that of a bound."""

    name: str
    about: str
    make: Callable[[Any], tuple[Call, float]]


@dataclass(frozen=True)
class Case:
    """One call that is timed.

    `part` says of which part of the op ("forward"), `name` at which size; `about` explains both.
    """

    op: str
    part: str
    name: str
    about: str
    dtype: torch.dtype
    device: str
    shape: Mapping[str, object]
    make: Callable[[], Work]
    baselines: tuple[Baseline, ...]
    yardsticks: tuple[Yardstick, ...]
    problem: Mapping[str, object] = field(default_factory=dict)
    """What `explain` is asked, beside device and dtype."""
    tolerance: float = 3e-2
    """Of the largest value: the sides round to 16 bits in different places."""
    reference_row: bool = True
    """Whether the reference backend is of use as a row."""
    small: bool = False
    """Of a size at which only results matter: no bars."""
    with_memory: bool = False
    """Whether peaks of memory are measured as well."""

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def group(self) -> str:
        """Of its rows: everything but who did it."""
        return " ".join(filter(None, (self.op, self.part, self.name, self.dtype_name)))

    def reasons(self) -> dict[str, str | None]:
        """Of every backend of the op: why it cannot run the case, or None."""
        return explain(self.op, device=self.device, dtype=self.dtype, **self.problem)

    def backends(self) -> list[str]:
        """Those that can run it, first the one that a call takes."""
        able = [name for name, why in self.reasons().items() if why is None]
        if self.device == "cpu":  # else it would be Triton's interpreter that is timed
            able = [name for name in able if name not in ("triton", "gluon")]
        if not self.reference_row and len(able) > 1:
            able.remove("reference")
        default = registry.DEFAULT_BACKEND
        return sorted(able, key=lambda name: name != default)

    def rows(self) -> dict[str, str]:
        """Name -> what it is, of all that is compared: backends, baselines, yardsticks."""
        found = {name: "this library" for name in self.backends()}
        found |= {row.name: row.about for row in self.baselines}
        return found | {row.name: row.about for row in self.yardsticks}


def compiled(function: Callable[..., Any], small: bool) -> Callable[..., Any]:
    """By torch.compile, afresh; where only results matter, without the seconds of code generation.

    Without the reset it would give up after eight shapes and run eagerly.
    """
    torch.compiler.reset()
    return torch.compile(function, dynamic=False, backend="eager" if small else "inductor")


def tensors(result: Any) -> tuple[Tensor, ...]:
    """Of a call's result."""
    return tuple(result) if isinstance(result, tuple) else (result,)
