"""The route table of a `FramePool`: it holds the frames that it names."""

import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvpo_kernels.errors import DtypeError, FrameError, PoolError
from kvpo_kernels.history.memory import pool_of
from kvpo_kernels.history.route_table import RouteTable, Rows, has_no_memory
from kvpo_kernels.history.slots import Slot, Slots, backward_now, check_no_recompute

if TYPE_CHECKING:
    from kvpo_kernels.history.pool import FramePool


class Hold:
    """References to slots, for as long as it lives: in a table, and in what a backward keeps."""

    __slots__ = ("__weakref__", "_table", "slots")

    def __init__(self, table: "PoolTable") -> None:
        self._table = weakref.ref(table)
        self.slots: set[int] = set()

    def check(self, k_pool: Tensor, v_pool: Tensor) -> None:
        """Check what kernels are about to read over the table, also where a graph runs them.

        Raises:
            ShapeError: another FramePool's memory.
            FrameError: as `RouteTable.check_frames`.
        """
        table = self._table()
        if table is None or table.memory is None or has_no_memory(k_pool):
            return
        first, end = table.memory
        for name, pool in (("k_pool", k_pool), ("v_pool", v_pool)):
            if not first <= pool.data_ptr() < end:
                if pool_of(pool) is not None:
                    table.check_memory(name, pool)
                return  # a copy that a compiler has made: what is written is none of its business
        table.check_frames(k_pool)


class PoolTable(RouteTable):
    """Of `FramePool.routes`."""

    def __init__(
        self, pool: "FramePool", slot_lists: Iterable[Iterable[Slot]], allow_duplicates: bool
    ) -> None:
        self.pool = pool
        self.memory = pool._pages.memory
        self.made_in = backward_now()
        self.hold = Hold(self)
        self.handed: dict[int, int] = {}
        """Slots that `FramePool.advance` has given to new frames, and their generations then."""
        with pool._ledger.lock:  # what is checked is what is held
            super().__init__(slot_lists, pool.num_slots, pool.device, allow_duplicates)
        # The tensor has it too, for a compiled graph saves nothing else of the table.
        self.slots.kvpo_hold = self.hold  # type: ignore[attr-defined]
        dropped = pool._ledger.dropped_tables
        weakref.finalize(self.hold, dropped.append, self.hold.slots).atexit = False

    def update(self, slot_lists: Iterable[Iterable[int]] | Tensor) -> None:
        """As `RouteTable.update`, with the rows that `FramePool.routes` takes."""
        check_no_recompute(self.made_in, "table.update")
        with self.pool._ledger.lock:
            super().update(slot_lists)

    def check_frames(self, pool: Tensor) -> None:
        """As `RouteTable.check_frames`."""
        if has_no_memory(pool) or not self.handed:
            return
        ledger, layer = self.pool._ledger, self.pool._layer_at.get(pool.data_ptr())
        with ledger.lock:
            for slot, generation in self.handed.items():
                written = layer is None or ledger.written[slot] >> layer & 1
                if written or ledger.generation[slot] != generation:
                    raise FrameError(
                        f"table names slot {slot}, which `FramePool.advance` has given to another"
                        f" frame that is written by now: in a layer (here {layer}), first attend,"
                        " for all rows, then write; after the pass make another table"
                    )

    def _rows(self, slot_lists: Iterable[Iterable[int]] | Tensor, device: torch.device) -> Rows:
        in_backward = backward_now() != -1
        rows: Rows = []
        if isinstance(slot_lists, Slots | Tensor) or not isinstance(slot_lists, Iterable):
            raise DtypeError(
                "routes takes a list of rows, each of `window` or `routed` of a timeline; got"
                f" {slot_lists!r}. For plain numbers, over pools that are no FramePool's, make a"
                " RouteTable"
            )
        for b, given in enumerate(slot_lists):
            if isinstance(given, str | Tensor) or not isinstance(given, Iterable):
                raise DtypeError(
                    f"route[branch={b}] must be a row of slots, of `window` or `routed` of a"
                    f" timeline, got {given!r}"
                )
            what = f"route[branch={b}, slot={{}}]"
            row = Slots.of(given, what)
            if in_backward:
                for held in row._held:
                    check_no_recompute(held.made_in, "pool.routes")
            self.pool._check_read(row, what)
            rows.append(list(row._numbers))
        return super()._rows(rows, device)

    def _hold(self, rows: Rows) -> None:
        wanted = {slot for row in rows for slot in row}
        pool, held = self.pool, self.hold.slots
        pool._pages.wait_for(wanted)
        for slot in wanted:
            pool._ledger.table_refs[slot] += 1
        previous = set(held)
        held.clear()
        held.update(wanted)
        pool._ledger.drop_table(previous)
        self.handed.clear()

    def __reduce_ex__(self, protocol: object) -> str:
        raise PoolError(
            "a table of `FramePool.routes` is not copied: it refers to frames of the pool. Make"
            " another by `routes`, or hand this one over"
        )
