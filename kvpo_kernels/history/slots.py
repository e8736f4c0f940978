"""Slots that know what they are: of which pool, of which frame, and taken for the how-manieth time.

A frame is an absolute index in its video, a slot a place in a pool. Timelines take frames and hand
out what is defined here; what reads or writes a pool takes nothing else, so that a slot that has
come to hold another frame since is noticed.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from kvpo_kernels.checks import integer
from kvpo_kernels.errors import DtypeError, GradientError, ShapeError
from kvpo_kernels.history import compiled
from kvpo_kernels.history.memory import pool_of, refuse_plain_slots
from kvpo_kernels.history.route_table import has_no_memory

if TYPE_CHECKING:
    from kvpo_kernels.history.pool import FramePool


class Held(dict[int, int]):
    """The frames of one timeline: absolute index -> slot, ascending."""

    __slots__ = ("made_in",)

    def __init__(self, frames: dict[int, int], made_in: int) -> None:
        super().__init__(frames)
        self.made_in = made_in
        """The backward in which the timeline, or the first it was forked from, was made; or -1."""

    def copy(self) -> "Held":
        """Of a fork, which is no newer than what it was forked from."""
        return Held(self, self.made_in)


class Slot(int):
    """The slot of one frame, of `Timeline.slot`: an int that knows its pool.

    Attributes:
        pool: where it is.
        frame: absolute, of the timeline that was asked.
    """

    pool: "FramePool"
    frame: int
    generation: int
    held: Held

    def __new__(
        cls, number: int, pool: "FramePool", frame: int, generation: int, held: Held
    ) -> "Slot":
        self = super().__new__(cls, number)
        self.pool, self.frame, self.generation, self.held = pool, frame, generation, held
        return self

    __str__ = int.__repr__

    def __repr__(self) -> str:
        return f"Slot({int(self)}, frame={self.frame})"

    def __copy__(self) -> "Slot":
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "Slot":
        return self


class Slots(Sequence[Slot]):
    """The slots of one row in their order, of `Timeline.window` and `Timeline.routed`.

    An immutable sequence of `Slot`s, for a row of `FramePool.routes`. `+` joins rows, a slice is a
    row. It compares with lists of ints, and with a list `+` gives a list.

    Attributes:
        frames: the absolute frames, in the same order.
    """

    __slots__ = ("_generations", "_held", "_numbers", "_pool", "frames")
    __hash__ = None  # type: ignore[assignment]

    def __init__(
        self,
        pool: "FramePool | None",
        numbers: Iterable[int],
        frames: Iterable[int],
        generations: Iterable[int],
        held: Iterable[Held],
    ) -> None:
        self._pool = pool  # None: of an empty row that came from nowhere
        self._numbers = tuple(numbers)
        self.frames = tuple(frames)
        self._generations = tuple(generations)
        self._held = tuple(held)

    @classmethod
    def of(cls, row: Iterable[Slot], what: str) -> "Slots":
        """The row as `Slots`; `what` is a format that names a position.

        Raises:
            DtypeError: something else than slots.
            ShapeError: slots of several pools.
        """
        if isinstance(row, Slots):
            return row
        items = list(row)
        for i, slot in enumerate(items):
            if not isinstance(slot, Slot):
                raise DtypeError(
                    f"{what.format(i)} must be a slot of `window`, `routed` or `slot` of a"
                    f" timeline, got {slot!r}: a plain number does not say whose frame it means."
                    " For pools that are no FramePool's make a RouteTable"
                )
            if slot.pool is not items[0].pool:
                raise ShapeError(f"{what.format(i)} is of another FramePool than the first")
        return cls(
            items[0].pool if items else None,
            map(int, items),
            (slot.frame for slot in items),
            (slot.generation for slot in items),
            (slot.held for slot in items),
        )

    def tolist(self) -> list[int]:
        """Plain numbers, as a `RouteTable` takes them."""
        return list(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, at: int) -> Slot: ...
    @overload
    def __getitem__(self, at: slice) -> "Slots": ...
    def __getitem__(self, at: int | slice) -> "Slot | Slots":
        if isinstance(at, slice):
            return Slots(
                self._pool,
                self._numbers[at],
                self.frames[at],
                self._generations[at],
                self._held[at],
            )
        return Slot(
            self._numbers[at],
            self._pool,  # type: ignore[arg-type]
            self.frames[at],
            self._generations[at],
            self._held[at],
        )

    @overload
    def __add__(self, other: "Slots") -> "Slots": ...
    @overload
    def __add__(self, other: list[Any]) -> list[Any]: ...
    def __add__(self, other: "Slots | list[Any]") -> "Slots | list[Any]":
        if not isinstance(other, Slots):
            return [*self, *other] if isinstance(other, list) else NotImplemented
        if self._pool is not other._pool and self and other:
            raise ShapeError("slots of two FramePools are no row")
        return Slots(
            self._pool if self else other._pool,
            self._numbers + other._numbers,
            self.frames + other.frames,
            self._generations + other._generations,
            self._held + other._held,
        )

    def __radd__(self, other: list[Any]) -> list[Any]:
        return [*other, *self] if isinstance(other, list) else NotImplemented

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Slots):
            return (self._pool, self._numbers, self._generations) == (
                other._pool,
                other._numbers,
                other._generations,
            )
        if isinstance(other, list | tuple):
            return list(self._numbers) == list(other)
        return NotImplemented

    def __repr__(self) -> str:
        return f"Slots({list(self._numbers)}, frames={list(self.frames)})"

    def __copy__(self) -> "Slots":
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "Slots":
        return self


class PreparedSlots(Sequence[Slots]):
    """Slots `[B, frames]` that are about to be written: of `prepare_write` and `advance`.

    For `FramePool.write`, `FramePool.mark_written` and `qk_norm_rope_write`, which check that each
    is still its timeline's alone. A row is `Slots`; slices, of rows or of rows and frames, are
    prepared as well.

    Attributes:
        tensor: int64 `[B, frames]` on the host, as kernels take it; not to be changed.
        shape: as of the tensor.
    """

    def __init__(self, pool: "FramePool", rows: list[Slots], frames: int) -> None:
        self.pool = pool
        self.rows = rows
        numbers = [row._numbers for row in rows]
        flat = torch.tensor(numbers, dtype=torch.int64, device="cpu")
        self.tensor = flat.reshape(len(rows), frames)
        self.shape = self.tensor.shape
        self.ticket = compiled.ticket_of(self)

    def tolist(self) -> list[list[int]]:
        """Plain numbers."""
        return [row.tolist() for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Slots]:
        return iter(self.rows)

    @overload
    def __getitem__(self, at: int) -> Slots: ...
    @overload
    def __getitem__(self, at: slice | tuple[slice, slice]) -> "PreparedSlots": ...
    def __getitem__(self, at: int | slice | tuple[slice, slice]) -> "Slots | PreparedSlots":
        if isinstance(at, slice):
            return PreparedSlots(self.pool, self.rows[at], self.shape[1])
        if isinstance(at, tuple):
            if len(at) != 2 or not all(isinstance(part, slice) for part in at):
                raise DtypeError(f"prepared slots take slices of rows and of frames, got {at}")
            some, frames = at
            rows = [row[frames] for row in self.rows[some]]
            return PreparedSlots(self.pool, rows, len(range(self.shape[1])[frames]))
        return self.rows[at]

    def __repr__(self) -> str:
        return f"PreparedSlots({self.tolist()})"

    def __copy__(self) -> "PreparedSlots":
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "PreparedSlots":
        return self

    def check(self, **tensors: Tensor | None) -> None:
        """Check that they may be written to now, in the layer that the tensors are views of.

        Raises:
            ShapeError: a tensor, of that name, is not of the pool.
            PoolError: a slot that is no longer its timeline's alone, or holds another frame.
            GradientError: in a backward.
        """
        for name, tensor in tensors.items():
            if tensor is None or has_no_memory(tensor):
                continue
            if pool_of(tensor) is not self.pool or tensor.shape[0] != self.pool.num_slots:
                raise ShapeError(f"{name} is not of the FramePool whose slots these are")
        self.pool._check_private(self)


def for_kernels(slots: PreparedSlots | Tensor, **memory: Tensor | None) -> Tensor:
    """The slots `[B, frames]` of memory that is about to be written to, as kernels take them.

    Checked, in a compiled graph when it runs, as by `PreparedSlots.check`.

    Raises:
        DtypeError: plain numbers for slots of a FramePool.
    """
    ticket, numbers = None, slots
    if isinstance(slots, PreparedSlots):
        ticket, numbers = slots.ticket, slots.tensor
    assert isinstance(numbers, Tensor)
    if torch.compiler.is_compiling():
        where = [t for t in memory.values() if t is not None]
        return compiled.checked_slots(ticket, numbers, where)  # type: ignore[no-any-return]
    if isinstance(slots, PreparedSlots):
        slots.check(**memory)
    else:
        refuse_plain_slots(memory)
    return numbers


def frame_index(name: str, frame: Any) -> int:
    """The absolute index of a frame as an int.

    Raises:
        DtypeError: it is none, or a slot.
    """
    if type(frame) is not int:
        if isinstance(frame, Slot):
            raise DtypeError(
                f"{name} is {frame!r}, a place in the pool: a frame is an absolute index in its"
                " video"
            )
        return integer(name, frame, None)
    return frame


def backward_now() -> int:
    """Which backward runs on this thread; -1: none."""
    return torch._C._current_graph_task_id()


def check_no_recompute(made_in: int, what: str) -> None:
    """Check that no backward runs, except the one in which the timeline itself was made.

    Activation checkpointing runs the forward again in a backward. By then a timeline may have moved
    on, and what was appended would be appended twice.

    Raises:
        GradientError: what was called, and what to do instead.
    """
    now = backward_now()
    if now not in (-1, made_in):
        raise GradientError(
            f"{what} in a backward, as where activation checkpointing runs the forward again: the"
            " timeline may have moved on since. Take slots, make tables and write frames outside"
            " the checkpointed function, and hand them in"
        )
