"""Which frames each row attends to: a checked, device-resident table of pool slots."""

from collections.abc import Iterable

import torch
from torch import Tensor

from kvpo_kernels.checks import integer
from kvpo_kernels.errors import DtypeError, RangeError, ShapeError

Rows = list[list[int]]


class RouteTable:
    """Per row (one branch of one prompt) the ordered pool slots that its queries attend to.

    Attributes:
        slots: int32 `[B, R]` on `device`; each row's slots, then -1 up to the capacity R.
        num_rows: B.
        capacity: R, the longest row the table can hold.
        num_slots: F of the pool that the table was made for.
        allow_duplicates: whether a row may name a slot twice (its keys then count twice).

    Every value is checked here, on the host, so that a kernel needs no check of its own.

    Args:
        slot_lists: B ragged lists, or an integer tensor `[B, R]` padded with -1 at the tail.
        num_slots: number of slots F of the pool.
        device: where the kernels run. A tensor must already be there.
        allow_duplicates: accept a slot twice in a row.

    Raises:
        ShapeError: a slot outside `[0, num_slots)`, a -1 before the tail or a duplicate; the
            message names branch, position, value and limit.
        DtypeError: slots that are not integers, or a tensor on another device.
    """

    memory: tuple[int, int] | None = None
    """Of a table made by a `FramePool`: where all its frames lie."""

    @torch.inference_mode(False)  # a table outlives the mode in which it may be made
    def __init__(
        self,
        slot_lists: Iterable[Iterable[int]] | Tensor,
        num_slots: int,
        device: torch.device | str = "cpu",
        allow_duplicates: bool = False,
    ) -> None:
        self.num_slots = integer("num_slots", num_slots)
        target = torch.device(device)
        self.allow_duplicates = allow_duplicates
        rows = self._rows(slot_lists, target)
        self.num_rows = len(rows)
        self.capacity = (
            int(slot_lists.shape[1])
            if isinstance(slot_lists, Tensor)
            else max((len(row) for row in rows), default=0)
        )
        # `num_slots` as a size: a compiler takes an int for a constant until it has seen another.
        self._pool_size = size_may_differ(torch.empty(self.num_slots, 0, device="cpu"), 0)
        self.slots = size_may_differ(self._padded(rows).to(target, non_blocking=True), 1)
        self._hold(rows)
        self.spent = False
        """Whether `FramePool.advance` has handed slots of it to new frames."""

    @property
    def device(self) -> torch.device:
        """Where `slots` lies."""
        return self.slots.device

    def update(self, slot_lists: Iterable[Iterable[int]] | Tensor) -> None:
        """Replace the routes in place, as a captured CUDA graph needs it: all rows or none.

        A pending backward over the former routes raises; one that runs its forward again
        (activation checkpointing) cannot know, and takes the new ones.

        Raises:
            ShapeError: as the constructor, or a different number of rows, or a row longer than
                the capacity. The table is then unchanged.
        """
        rows = self._rows(slot_lists, self.device)
        if len(rows) != self.num_rows:
            raise ShapeError(f"route table has {self.num_rows} rows, the update has {len(rows)}")
        for b, row in enumerate(rows):
            if len(row) > self.capacity:
                raise ShapeError(
                    f"route[branch={b}] has {len(row)} slots, the table's capacity is"
                    f" {self.capacity}"
                )
        padded = self._padded(rows)
        self._hold(rows)
        self.slots.copy_(padded, non_blocking=True)
        self.spent = False

    def _hold(self, rows: Rows) -> None:
        """Called with the slots that `slots` is about to name, before it is used; may refuse."""

    def fits(self, pool: Tensor) -> bool:
        """Whether the table was made for as many slots as a pool `[F, T, H, D]` has."""
        if torch.compiler.is_compiling():
            return self._pool_size.shape[0] == pool.shape[0]
        return self.num_slots == pool.shape[0]

    def check_memory(self, name: str, pool: Tensor) -> None:
        """Check that a table made by a `FramePool` is used over its frames: it holds no others.

        Raises:
            ShapeError: `pool`, an argument of that name, lies elsewhere.
        """
        if self.memory is None or has_no_memory(pool):
            return
        first, end = self.memory
        if not first <= pool.data_ptr() < end:
            raise ShapeError(
                f"{name} is not of the FramePool whose `routes` made the table; for other frames"
                " make a RouteTable"
            )

    def check_frames(self, pool: Tensor) -> None:
        """Check that the frames in `pool`, keys of a layer, are still those that were meant.

        Raises:
            FrameError: of a table made by a `FramePool`: some have been written over.
        """

    def tolist(self) -> Rows:
        """The routes as ragged lists (synchronises where the table is on a GPU)."""
        return [[s for s in row if s >= 0] for row in self.slots.tolist()]

    def __repr__(self) -> str:
        return (
            f"RouteTable(rows={self.num_rows}, capacity={self.capacity},"
            f" num_slots={self.num_slots}, device={self.device})"
        )

    def _rows(self, slot_lists: Iterable[Iterable[int]] | Tensor, device: torch.device) -> Rows:
        if isinstance(slot_lists, Tensor):
            rows = self._tensor_rows(slot_lists, device)
        else:
            try:
                rows = [list(row) for row in slot_lists]
            except TypeError:
                raise DtypeError(
                    f"routes must be a list of slots for each row, got {slot_lists!r}"
                ) from None
        for b, row in enumerate(rows):
            for i, slot in enumerate(row):
                if type(slot) is not int:
                    row[i] = slot = integer(f"route[branch={b}, slot={i}]", slot, None)
                if not 0 <= slot < self.num_slots:
                    raise RangeError(
                        f"route[branch={b}, slot={i}] = {slot} not in [0, {self.num_slots})"
                    )
            if not self.allow_duplicates and len(set(row)) != len(row):
                seen: dict[int, int] = {}
                for i, slot in enumerate(row):
                    if slot in seen:
                        raise RangeError(
                            f"route[branch={b}, slot={i}] = {slot} repeats slot={seen[slot]};"
                            " pass allow_duplicates=True to count it twice"
                        )
                    seen[slot] = i
        return rows

    @staticmethod
    def _tensor_rows(slots: Tensor, device: torch.device) -> Rows:
        if slots.dtype not in (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8):
            raise DtypeError(f"routes must be integers, got {slots.dtype}")
        if slots.ndim != 2:
            raise ShapeError(f"routes must be [B, R], got {list(slots.shape)}")
        same_index = device.index is None or slots.device.index == device.index
        if slots.device.type != device.type or not same_index:
            raise DtypeError(f"routes are on {slots.device}, the table is to be on {device}")
        rows: Rows = []
        for b, row in enumerate(slots.tolist()):
            used = len(row)
            while used > 0 and row[used - 1] == -1:
                used -= 1
            if -1 in row[:used]:
                at = row.index(-1)
                raise ShapeError(
                    f"route[branch={b}, slot={at}] = -1: padding is allowed at the tail only"
                )
            rows.append(row[:used])
        return rows

    def _padded(self, rows: Rows) -> Tensor:
        # Never a view: of those a compiled graph saves another tensor than `slots` itself.
        if not rows:
            return torch.empty(0, self.capacity, dtype=torch.int32, device="cpu")
        full = [row + [-1] * (self.capacity - len(row)) for row in rows]
        return torch.tensor(full, dtype=torch.int32, device="cpu")


def has_no_memory(tensor: Tensor) -> bool:
    """Whether there are no addresses to look at: a traced, fake, sharded, meta or empty tensor."""
    return (
        torch.compiler.is_compiling()
        or type(tensor) not in (Tensor, torch.nn.Parameter)
        or tensor.device.type == "meta"
        or tensor.numel() == 0
    )


def size_may_differ(tensor: Tensor, dim: int) -> Tensor:
    """Tell torch.compile that the next tensor may have another size there, sparing it a graph.

    As `torch._dynamo.maybe_mark_dynamic`, whose import takes a second.
    """
    tensor._dynamo_weak_dynamic_indices = {dim}  # type: ignore[attr-defined]
    return tensor
