"""A pool of KV-cache frames with copy-on-write timelines over it.

Bookkeeping is Python integers on the host; the only tensor work is writing frames and the copy
that a rewrite of a shared frame needs. A *slot* holds one frame of all layers. Whatever refers to a
slot counts as a reference: timelines, and route tables made by `FramePool.routes` for as long as
their `slots` tensor lives (a pending backward keeps it alive).
"""

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from kvpo_kernels.checks import integer
from kvpo_kernels.errors import DtypeError, PoolError, ShapeError
from kvpo_kernels.history.eviction import EvictionPolicy
from kvpo_kernels.history.pages import Pages
from kvpo_kernels.history.route_table import RouteTable, Rows
from kvpo_kernels.ops.store_frames import PAGE_DTYPES, check_slots, store_frames


@dataclass(frozen=True)
class PoolStats:
    """Counts of slots, sizes in bytes, and what has happened since the pool was made."""

    num_slots: int
    free_slots: int
    shared_slots: int  # with more than one reference
    timeline_slots: int  # held by at least one timeline
    table_slots: int  # held by at least one route table
    bytes: int  # of the pool
    slot_bytes: int  # of one frame, all layers, keys and values
    peak_slots: int  # the most that were ever held at once
    copied_slots: int  # frames copied because someone else held them
    host_slots: int  # of offloaded frames
    free_host_slots: int
    host_bytes: int


class FramePool:
    """Slots for the keys and values of `num_slots` frames, shared by all timelines.

    Args:
        num_slots: F, frames of all branches together that can be held at once.
        frame_tokens: T, tokens per frame.
        num_layers: layers of the generator.
        num_heads: key/value heads.
        head_dim: D.
        dtype, device: of the keys and values.
        page_dtype: torch.int8 or torch.float8_e4m3fn for a quantized history: half the memory of
            16 bits. Frames are rounded when they are written (`quantize_frames`) and
            `routed_attention` reads them as they are, with `k_scales` and `v_scales`. None keeps
            `dtype`.
        host_slots: frames that `Timeline.offload` can put into host memory, pinned where the pool
            is on a GPU.

    Memory is `2 * num_layers * num_slots * frame_tokens * num_heads * head_dim` elements, taken
    once, and where it is quantized 4 bytes per frame, layer and head, twice. References are counted
    on the host; no method synchronises a device.

    References, not autograd's version counters, keep what a pending backward reads: a write to one
    slot must not end a backward that reads others. So `k`, `v` and the scales are views with
    version counters of their own, new ones in each call. Keep none of them: a kernel's write to one
    (`qk_norm_rope_write`) does count for what was saved of that same view. And go back through
    frames only by `routed_attention` over a table of `routes`: nothing else holds them; clone what
    another operation is to save.
    """

    def __init__(
        self,
        num_slots: int,
        frame_tokens: int,
        num_layers: int,
        num_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        page_dtype: torch.dtype | None = None,
        host_slots: int = 0,
    ) -> None:
        if page_dtype is not None and page_dtype not in PAGE_DTYPES:
            raise DtypeError(f"page_dtype must be None or of {list(PAGE_DTYPES)}, got {page_dtype}")
        self.num_slots = num_slots = integer("num_slots", num_slots, 1)
        self.frame_tokens = frame_tokens = integer("frame_tokens", frame_tokens, 1)
        self.num_layers = num_layers = integer("num_layers", num_layers, 1)
        self.num_heads = num_heads = integer("num_heads", num_heads, 1)
        self.head_dim = head_dim = integer("head_dim", head_dim, 1)
        host_slots = integer("host_slots", host_slots)
        self.dtype = dtype
        """Of the frames that are written."""
        page, elements = (frame_tokens, num_heads, head_dim), page_dtype or dtype
        scaled = page_dtype is not None
        self._pages = Pages(num_slots, num_layers, page, elements, device, scaled, host_slots)
        self._all_layers = (1 << num_layers) - 1
        # By slot; those from `num_slots` on are of offloaded frames.
        everywhere = num_slots + host_slots
        self._timeline_refs = [0] * everywhere
        self._table_refs = [0] * everywhere
        self._written = [0] * everywhere  # bit l: layer l of the slot has been written
        self._free = list(range(num_slots - 1, -1, -1))
        self._free_host = list(range(everywhere - 1, num_slots - 1, -1))
        # Of every timeline whose references are counted, by identity: a timeline may be dead and
        # still in the queue below.
        self._counted: dict[int, dict[int, int]] = {}
        self._fewest_free = num_slots
        self._copied_slots = 0
        self._lock = threading.RLock()
        # Finalizers run at any allocation, on any thread, possibly while this thread is inside a
        # method: they only append here, and every method settles the queue first.
        self._dropped_timelines: deque[dict[int, int]] = deque()
        self._dropped_tables: deque[tuple[set[int], Callable[[], bool]]] = deque()

    @property
    def device(self) -> torch.device:
        """Of keys and values."""
        return self._pages.storage.device

    def k(self, layer: int) -> Tensor:
        """The keys of a layer, a view `[F, T, H, D]`."""
        return self._pages.storage[0, layer].data

    def v(self, layer: int) -> Tensor:
        """The values of a layer, a view `[F, T, H, D]`."""
        return self._pages.storage[1, layer].data

    def k_scales(self, layer: int) -> Tensor | None:
        """The scales of a layer's keys, a view `[F, H]` float32; None in a pool of plain frames."""
        return None if self._pages.scales is None else self._pages.scales[0, layer].data

    def v_scales(self, layer: int) -> Tensor | None:
        """As `k_scales`, of the values."""
        return None if self._pages.scales is None else self._pages.scales[1, layer].data

    def timeline(self) -> "Timeline":
        """An empty timeline."""
        with self._lock:
            return Timeline(self, {}, 0, 0)

    def routes(
        self, slot_lists: Iterable[Iterable[int]] | Tensor, allow_duplicates: bool = False
    ) -> RouteTable:
        """A table over this pool that keeps its frames alive and unchanged while it lives.

        A backward over it may run at any later time, whatever is written, with one exception: a
        table that `advance` has handed slots of, or that `update` has changed, serves no backward
        of a forward before; under activation checkpointing, whose backward runs the forward again,
        `update` goes unnoticed.

        Args:
            slot_lists: per row the slots, as `Timeline.window` and `Timeline.routed` give them; or
                as `RouteTable` takes them.
            allow_duplicates: accept a slot twice in a row.

        Raises:
            ShapeError: as `RouteTable`; or a slot that no timeline holds or that is not yet
                written in every layer.
        """
        return _HoldingTable(self, slot_lists, allow_duplicates)

    def prepare_write(
        self, timelines: Sequence["Timeline"], first_frame: int, num_frames: int
    ) -> Tensor:
        """Slots of the next frames to write, each private to its timeline for now.

        A slot that anything else refers to is replaced by a fresh one that carries the frame's
        other layers along (copy-on-write). Once per block, for all layers. A later `fork` or
        `routes` shares the slots again, and `write` then refuses them.

        Args:
            timelines: B timelines; their frames `first_frame .. first_frame + num_frames - 1` must
                have been appended.

        Returns:
            int64 `[B, num_frames]` on the host, all different.

        Raises:
            ShapeError: a frame that was not appended or was evicted, or a timeline named twice.
            PoolError: not enough free slots. Nothing has changed then, nor where a copy fails.
        """
        first_frame = integer("first_frame", first_frame, None)
        frames = range(first_frame, first_frame + integer("num_frames", num_frames))
        with self._lock:
            self._settle()
            self._check_rows(timelines)
            uses: dict[int, int] = {}
            for timeline in timelines:
                for frame in frames:
                    slot = timeline._slot(frame)
                    uses[slot] = uses.get(slot, 0) + 1
            # Of a slot's holders that write, the last may keep it when nobody else holds it.
            fresh_needed = sum(
                n if self._references(slot) > n else n - 1 for slot, n in uses.items()
            )
            if fresh_needed > len(self._free):
                raise self._exhausted(fresh_needed)
            # First the copies, into slots that nobody holds yet: they may fail.
            fresh_slots = iter(self._free[len(self._free) - fresh_needed :][::-1])
            leaving = dict.fromkeys(uses, 0)
            result: list[list[int]] = []
            moves: list[tuple[Timeline, int, int, int]] = []
            for timeline in timelines:
                row = []
                for frame in frames:
                    slot = timeline._frames[frame]
                    if self._references(slot) - leaving[slot] > 1:
                        leaving[slot] += 1
                        fresh = next(fresh_slots)
                        moves.append((timeline, frame, slot, fresh))
                        slot = fresh
                    row.append(slot)
                result.append(row)
            self._pages.wait_for(slot for row in result for slot in row)
            self._pages.copy([(old, new) for _, _, old, new in moves if self._written[old]])
            for timeline, frame, old, new in moves:
                self._take()  # `new`, in the order in which they were named above
                self._timeline_refs[old] -= 1
                self._written[new] = self._written[old]
                self._copied_slots += self._written[old] != 0
                timeline._frames[frame] = new
        return _on_host(result, len(frames))

    def advance(
        self,
        timelines: Sequence["Timeline"],
        num_frames: int,
        keep: Iterable[int] | EvictionPolicy | Sequence[EvictionPolicy],
        table: RouteTable,
    ) -> tuple[int, Tensor]:
        """Append the next frames to every timeline where frames leave that `table` still reads.

        For the context pass of a block, instead of `append`, `prepare_write` and, after it,
        `evict`: the new frames take the slots of those that leave, and a branch never holds more
        than its window. That is safe because a layer of a slot is read last by that layer's
        attention: in every layer, first attend over `table`, for all rows, then write. After the
        pass `table` is of no use; a backward that was to need it raises.

        Args:
            timelines: B timelines of the same length.
            num_frames: frames to append to each.
            keep: what each timeline keeps of its frames, as in `Timeline.evict`, or a policy for
                each timeline; a policy is asked before the new frames are there.
            table: of `routes`, the one that the pass attends over.

        Returns:
            `(first_frame, slots)`: the absolute index of the first new frame, and int64
            `[B, num_frames]` on the host, all different, as of `prepare_write`.

        Raises:
            ShapeError: timelines of different lengths or named twice, a table of another pool, not
                one policy per timeline.
            PoolError: not enough slots leave or are free. Nothing has changed then.
        """
        num_frames = integer("num_frames", num_frames)
        self._check_rows(timelines)
        for b, timeline in enumerate(timelines):
            if timeline.num_frames != timelines[0].num_frames:
                raise ShapeError(
                    f"timelines[{b}] has {timeline.num_frames} frames, timelines[0] has"
                    f" {timelines[0].num_frames}"
                )
        if not isinstance(table, _HoldingTable) or table.pool is not self:
            raise ShapeError("table was not made by `routes` of this pool")
        kept = _kept(keep, timelines)
        with self._lock:
            self._settle()
            gone = [
                [f for f in t._frames if f not in k] for t, k in zip(timelines, kept, strict=True)
            ]
            uses: dict[int, int] = {}
            for timeline, frames in zip(timelines, gone, strict=True):
                for frame in frames:
                    uses[timeline._frames[frame]] = uses.get(timeline._frames[frame], 0) + 1
            alone = [
                slot
                for slot, n in uses.items()
                if slot < self.num_slots and self._timeline_refs[slot] == n
            ]
            # Of those that leave for good, only this pass may still read.
            leaving = [s for s in alone if self._table_refs[s] == 1 and s in table.held]
            freed = sum(self._table_refs[slot] == 0 for slot in alone)
            needed = num_frames * len(timelines)
            if needed > len(self._free) + freed + len(leaving):
                raise self._exhausted(needed - freed - len(leaving))
            for timeline, frames in zip(timelines, gone, strict=True):
                timeline._lose(frames)
            handed = leaving[: max(0, needed - freed)]  # before free slots: these come back anyway
            if handed:  # no backward may read them from now on, nor one that saved them before
                table.spent = True
                increment_version(table.slots)
            table.held.difference_update(handed)
            self._drop_table(handed)
            first = timelines[0].num_frames if timelines else 0
            slots = []
            for timeline in timelines:
                own = {frame: self._take() for frame in range(first, first + num_frames)}
                timeline._frames.update(own)
                timeline._num_frames += num_frames
                slots.append(list(own.values()))
        return first, _on_host(slots, num_frames)

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Write one layer of the frames that `prepare_write` or `advance` named.

        Args:
            slots: int64 `[B, frames]`, from `prepare_write` or `advance`.
            k, v: `[B, frames * T, H, D]` or `[B, frames, T, H, D]`, in the pool's dtype.

        Raises:
            ShapeError, DtypeError: before anything is written.
            PoolError: a slot that has come to be shared since: `prepare_write` again.
        """
        self._check_layer(layer)
        if slots.ndim != 2:
            raise ShapeError(f"slots must be [B, frames], got {list(slots.shape)}")
        B, frames = slots.shape
        check_slots(slots, [B, frames], self.num_slots)
        page = (self.frame_tokens, self.num_heads, self.head_dim)
        flat, split = (B, frames * page[0], *page[1:]), (B, frames, *page)
        for name, tensor in (("k", k), ("v", v)):
            if tuple(tensor.shape) not in (flat, split):
                raise ShapeError(
                    f"{name} must be {list(flat)} or {list(split)}, got {list(tensor.shape)}"
                )
            if tensor.dtype != self.dtype or tensor.device != self.device:
                raise DtypeError(
                    f"{name} must be {self.dtype} on {self.device} like the pool, got"
                    f" {tensor.dtype} on {tensor.device}"
                )
        rows = slots.tolist()
        self._check_private(rows)
        to = slots.reshape(-1)
        store_frames(self.k(layer), self.k_scales(layer), to, k.reshape(B * frames, *page))
        store_frames(self.v(layer), self.v_scales(layer), to, v.reshape(B * frames, *page))
        self._mark(layer, rows)

    def mark_written(self, layer: int, slots: Tensor) -> None:
        """Record that a kernel wrote one layer of these slots directly, as `write` does.

        Args:
            slots: int64 `[B, frames]`, from `prepare_write` or `advance`.

        Raises:
            ShapeError: a slot outside the pool; nothing is recorded then.
            PoolError: a slot that has come to be shared since: the kernel has written over a frame
                of others.
        """
        self._check_layer(layer)
        check_slots(slots, list(slots.shape), self.num_slots)
        rows = slots.reshape(1, -1).tolist() if slots.ndim < 2 else slots.tolist()
        self._check_private(rows)
        self._mark(layer, rows)

    def _mark(self, layer: int, rows: Rows) -> None:
        with self._lock:
            for row in rows:
                for slot in row:
                    self._written[slot] |= 1 << layer

    def stats(self) -> PoolStats:
        """Counts of the moment."""
        with self._lock:
            self._settle()
            return PoolStats(
                num_slots=self.num_slots,
                free_slots=len(self._free),
                shared_slots=sum(self._references(s) > 1 for s in range(self.num_slots)),
                timeline_slots=sum(n > 0 for n in self._timeline_refs[: self.num_slots]),
                table_slots=sum(n > 0 for n in self._table_refs),
                bytes=self._pages.nbytes,
                slot_bytes=self._pages.nbytes // self.num_slots,
                peak_slots=self.num_slots - self._fewest_free,
                copied_slots=self._copied_slots,
                host_slots=self._pages.host_slots,
                free_host_slots=len(self._free_host),
                host_bytes=self._pages.host_nbytes,
            )

    def _check_private(self, rows: Rows) -> None:
        with self._lock:
            self._settle()
            for b, row in enumerate(rows):
                for i, slot in enumerate(row):
                    timelines, tables = self._timeline_refs[slot], self._table_refs[slot]
                    if (timelines, tables) != (1, 0):
                        raise PoolError(
                            f"slots[branch={b}, frame={i}] = {slot} is held by {timelines}"
                            f" timelines and {tables} route tables, not by one timeline alone"
                        )

    def _check_rows(self, timelines: Sequence["Timeline"]) -> None:
        for b, timeline in enumerate(timelines):
            timeline._check_of(self, f"timelines[{b}]")
            if any(timeline is other for other in timelines[:b]):
                raise ShapeError(f"timelines[{b}] is named twice")

    # Below: called with the lock held.

    def _references(self, slot: int) -> int:
        return self._timeline_refs[slot] + self._table_refs[slot]

    def _is_resident(self, slot: int) -> bool:
        return self._references(slot) > 0 and self._written[slot] == self._all_layers

    def _check_resident(self, slot: int, what: str) -> None:
        if self._references(slot) == 0:
            raise ShapeError(f"{what}: frame not resident: nothing holds this slot")
        missing = self._all_layers & ~self._written[slot]
        if missing:
            first = (missing & -missing).bit_length() - 1
            raise ShapeError(
                f"{what}: frame not resident: layer {first} of {self.num_layers} is not yet written"
            )

    def _check_layer(self, layer: int) -> None:
        if not 0 <= layer < self.num_layers:
            raise ShapeError(f"layer = {layer} not in [0, {self.num_layers})")

    def _take(self) -> int:
        slot = self._free.pop()
        self._fewest_free = min(self._fewest_free, len(self._free))
        self._pages.wait_for([slot])
        self._timeline_refs[slot] = 1
        self._written[slot] = 0
        return slot

    def _drop_frames(self, slots: Iterable[int]) -> None:
        for slot in slots:
            self._timeline_refs[slot] -= 1
            self._free_if_unused(slot)

    def _drop_table(self, slots: Iterable[int]) -> None:
        for slot in slots:
            self._table_refs[slot] -= 1
            self._free_if_unused(slot)

    def _free_if_unused(self, slot: int) -> None:
        if self._references(slot) == 0:
            (self._free if slot < self.num_slots else self._free_host).append(slot)

    def _move(self, slots: Sequence[int], to_host: bool) -> None:
        """Move frames of timelines between device and host, for all timelines that share them."""
        self._settle()
        free = self._free_host if to_host else self._free
        if len(slots) > len(free):
            if not to_host:
                raise self._exhausted(len(slots))
            raise PoolError(
                f"frame pool: {len(slots)} host slots needed, {len(free)} of"
                f" {self._pages.host_slots} free"
            )
        moves = dict(zip(slots, free[len(free) - len(slots) :][::-1], strict=True))
        self._pages.move(moves)  # may fail: nothing has changed yet
        for old, new in moves.items():
            free.pop()
            self._timeline_refs[new], self._timeline_refs[old] = self._timeline_refs[old], 0
            self._written[new] = self._written[old]
            self._free_if_unused(old)  # a table may still read it
        self._fewest_free = min(self._fewest_free, len(self._free))
        for frames in self._counted.values():
            for frame, slot in frames.items():
                frames[frame] = moves.get(slot, slot)

    def _settle(self) -> None:
        while self._dropped_timelines:
            self._forget(self._dropped_timelines.popleft())
        waiting = []
        while self._dropped_tables:
            held, is_gone = self._dropped_tables.popleft()
            if is_gone():
                self._drop_table(held)
            else:
                waiting.append((held, is_gone))
        self._dropped_tables.extend(waiting)

    def _forget(self, frames: dict[int, int]) -> None:
        del self._counted[id(frames)]
        self._drop_frames(frames.values())
        frames.clear()

    def _exhausted(self, needed: int) -> PoolError:
        tables_only = sum(
            t > 0 and r == 0 for t, r in zip(self._table_refs, self._timeline_refs, strict=True)
        )
        held = sum(n > 0 for n in self._timeline_refs[: self.num_slots])
        return PoolError(
            f"frame pool: {needed} slots needed, {len(self._free)} of {self.num_slots} free; {held}"
            f" held by timelines, {tables_only} by route tables or pending backwards only"
        )


def _kept(
    keep: Iterable[int] | EvictionPolicy | Sequence[EvictionPolicy], timelines: Sequence["Timeline"]
) -> list[set[int]]:
    """Per timeline the frames to keep."""
    if not isinstance(keep, Iterable):
        return [_indices(keep.keep(timeline)) for timeline in timelines]
    named: list[Any] = list(keep)
    if not any(hasattr(item, "keep") for item in named):
        return [_indices(named)] * len(timelines)
    if len(named) != len(timelines):
        raise ShapeError(f"keep has {len(named)} policies for {len(timelines)} timelines")
    return [_indices(p.keep(timeline)) for p, timeline in zip(named, timelines, strict=True)]


def _indices(frames: Iterable[int]) -> set[int]:
    return {integer("a frame to keep", frame, None) for frame in frames}


def _on_host(rows: Rows, columns: int) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64, device="cpu").reshape(len(rows), columns)


class _HoldingTable(RouteTable):
    """Has references to the slots it names, for as long as its `slots` tensor lives."""

    def __init__(
        self,
        pool: FramePool,
        slot_lists: Iterable[Iterable[int]] | Tensor,
        allow_duplicates: bool,
    ) -> None:
        self.pool = pool
        self.memory = pool._pages.memory
        self.held: set[int] = set()
        super().__init__(slot_lists, pool.num_slots, pool.device, allow_duplicates)
        # Before torch 2.10 the finalizer runs when only Python has lost the tensor, which autograd
        # may still hold: the pool asks the other reference.
        entry = (self.held, torch._C._WeakTensorRef(self.slots).expired)  # type: ignore[attr-defined]
        finalizer = weakref.finalize(self.slots, pool._dropped_tables.append, entry)
        finalizer.atexit = False

    def _hold(self, rows: Rows) -> None:
        pool = self.pool
        wanted = {slot for row in rows for slot in row}
        with pool._lock:
            pool._settle()
            for b, row in enumerate(rows):
                for i, slot in enumerate(row):
                    pool._check_resident(slot, f"route[branch={b}, slot={i}] = {slot}")
            pool._pages.wait_for(wanted)
            for slot in wanted:
                pool._table_refs[slot] += 1
            previous = set(self.held)
            self.held.clear()
            self.held.update(wanted)
            pool._drop_table(previous)


class Timeline:
    """The frames of one video or branch, by absolute index; made by `FramePool.timeline`.

    Frames lost to `evict` are gone for this timeline only. A timeline that is garbage-collected
    releases its frames.
    """

    def __init__(
        self, pool: FramePool, frames: dict[int, int], num_frames: int, committed_frames: int
    ) -> None:
        self._pool = pool
        self._frames = frames  # absolute frame -> slot, ascending
        self._num_frames = num_frames
        self._committed = committed_frames  # at least: frames that are held may be further
        pool._counted[id(frames)] = frames
        self._finalizer = weakref.finalize(self, pool._dropped_timelines.append, frames)
        self._finalizer.atexit = False

    @property
    def num_frames(self) -> int:
        """Frames appended so far, evicted ones included: the absolute index of the next one."""
        return self._num_frames

    @property
    def committed_frames(self) -> int:
        """The absolute index after the last frame written in every layer, evicted or not."""
        with self._pool._lock:
            self._check_of(self._pool, "timeline")
            return self._commit()

    @property
    def resident_frames(self) -> list[int]:
        """Absolute indices of the frames held and written in every layer."""
        with self._pool._lock:
            return [f for f, s in self._frames.items() if self._pool._is_resident(s)]

    def append(self, num_frames: int) -> int:
        """Reserve slots for the next frames; returns the absolute index of the first.

        Raises:
            PoolError: not enough free slots; nothing has changed then.
        """
        num_frames = integer("num_frames", num_frames)
        pool = self._pool
        with pool._lock:
            self._check_of(pool, "timeline")
            pool._settle()
            if num_frames > len(pool._free):
                raise pool._exhausted(num_frames)
            first = self._num_frames
            for frame in range(first, first + num_frames):
                self._frames[frame] = pool._take()
            self._num_frames += num_frames
        return first

    def write(self, layer: int, first_frame: int, k: Tensor, v: Tensor) -> None:
        """Write one layer of appended frames, copy-on-write where a slot is shared.

        Args:
            k, v: `[frames * T, H, D]` or `[frames, T, H, D]`, in the pool's dtype.

        Raises:
            ShapeError, DtypeError: a wrong shape, or frames that were not appended.
            PoolError: a shared slot and no free one to copy it to.
        """
        pool = self._pool
        pool._check_layer(layer)
        frames = k.shape[0] // (pool.frame_tokens if k.ndim == 3 else 1) if k.ndim else 0
        page = (frames, pool.frame_tokens, pool.num_heads, pool.head_dim)
        flat = (frames * page[1], *page[2:])
        for name, tensor in (("k", k), ("v", v)):
            if tuple(tensor.shape) not in (flat, page):
                raise ShapeError(
                    f"{name} must be [frames * {page[1]}, {page[2]}, {page[3]}] or"
                    f" [frames, {page[1]}, {page[2]}, {page[3]}], got {list(tensor.shape)}"
                    f" ({frames} frames by k)"
                )
            if tensor.dtype != pool.dtype or tensor.device != pool.device:
                raise DtypeError(
                    f"{name} must be {pool.dtype} on {pool.device}, got {tensor.dtype} on"
                    f" {tensor.device}"
                )
        slots = pool.prepare_write([self], first_frame, frames)
        pool.write(layer, slots, k.reshape(1, *page), v.reshape(1, *page))

    def fork(self, num_branches: int) -> list["Timeline"]:
        """`num_branches` timelines with the same frames; no tensor is touched.

        `fork(1)` is a snapshot: a handle on the frames as they are now, which no later write to
        this timeline changes.
        """
        num_branches = integer("num_branches", num_branches)
        pool = self._pool
        with pool._lock:
            self._check_of(pool, "timeline")
            for slot in self._frames.values():
                pool._timeline_refs[slot] += num_branches
            return [
                Timeline(pool, dict(self._frames), self._num_frames, self._committed)
                for _ in range(num_branches)
            ]

    def slot(self, frame: int) -> int:
        """The slot of a resident frame.

        Raises:
            ShapeError: the frame is evicted, offloaded, not yet appended or not yet written in
                every layer.
        """
        with self._pool._lock:
            slot = self._slot(frame)
            self._pool._check_resident(slot, f"frame {frame}")
            self._pool._pages.wait_for([slot])
            return slot

    def window(self, sink: int, local: int) -> list[int]:
        """Slots of the normal context before the next block: sink and last committed frames.

        Frames that would be in both are listed once; early in a video the list is shorter.

        Raises:
            ShapeError: a frame of the window has been evicted, or a negative number.
        """
        sink, local = integer("sink", sink), integer("local", local)
        end = self.committed_frames
        frames = [*range(min(sink, end)), *range(max(sink, end - local), end)]
        return [self.slot(frame) for frame in frames]

    def routed(self, sink: int, selected: Sequence[int], nearest: int) -> list[int]:
        """Slots of a routed context: sink, the selected frames in the order given, nearest.

        Args:
            selected: absolute frames.
            nearest: how many of the last committed frames to append. Overlaps are kept: a table
                refuses them unless it allows duplicates.

        Raises:
            ShapeError: a frame that is not resident, or a negative number.
        """
        sink, nearest = integer("sink", sink), integer("nearest", nearest)
        end = self.committed_frames
        frames = [*range(min(sink, end)), *selected, *range(max(0, end - nearest), end)]
        return [self.slot(frame) for frame in frames]

    def evict(self, keep: Iterable[int] | EvictionPolicy) -> None:
        """Drop every frame but those of `keep`: absolute indices, of which absent ones are ignored,
        or a policy that names them (`Window`, `TopScored`)."""
        pool = self._pool
        wanted = _indices(keep if isinstance(keep, Iterable) else keep.keep(self))
        with pool._lock:
            self._check_of(pool, "timeline")
            self._lose([frame for frame in self._frames if frame not in wanted])

    def offload(self, frames: Iterable[int]) -> None:
        """Move frames to host memory and free their slots, for all timelines that share them.

        A route table keeps its slots until it is gone. On a GPU the move runs beside what is
        launched later; a slot is not written to before its frame has left.

        Args:
            frames: absolute; those that are offloaded already are ignored.

        Raises:
            ShapeError: a frame that is not held or not yet written in every layer.
            PoolError: not enough free host slots. Nothing has changed then, nor where a copy fails.
        """
        with self._pool._lock:
            slots = self._slots_of(frames)
            for frame, slot in slots.items():
                self._pool._check_resident(slot, f"frame {frame}")
            here = [s for s in dict.fromkeys(slots.values()) if s < self._pool.num_slots]
            self._pool._move(here, to_host=True)

    def fetch(self, frames: Iterable[int]) -> None:
        """Bring offloaded frames back, for all timelines that share them.

        Ask for them a block ahead: on a GPU the move runs beside what is launched before the first
        table that names them, and nothing but that waits for it.

        Args:
            frames: absolute; those that are not offloaded are ignored.

        Raises:
            ShapeError: a frame that is not held.
            PoolError: not enough free slots. Nothing has changed then, nor where a copy fails.
        """
        with self._pool._lock:
            slots = self._slots_of(frames)
            there = [s for s in dict.fromkeys(slots.values()) if s >= self._pool.num_slots]
            self._pool._move(there, to_host=False)

    @property
    def offloaded_frames(self) -> list[int]:
        """Absolute indices of the frames in host memory."""
        with self._pool._lock:
            return [f for f, s in self._frames.items() if s >= self._pool.num_slots]

    def release(self) -> None:
        """Drop all frames. The timeline cannot be used afterwards; a second call does nothing."""
        with self._pool._lock:
            if self._finalizer.detach() is not None:
                # Settled later: a garbage collector may call this from inside another method.
                frames, self._frames = self._frames, {}
                self._pool._dropped_timelines.append(frames)

    def _lose(self, frames: Iterable[int]) -> None:
        self._commit()
        self._pool._drop_frames([self._frames.pop(frame) for frame in frames])

    def _commit(self) -> int:
        for frame in reversed(self._frames):
            if self._pool._is_resident(self._frames[frame]):
                self._committed = max(self._committed, frame + 1)
                break
        return self._committed

    def _slot(self, frame: int) -> int:
        """On the device."""
        slot = self._slots_of([frame])[frame]
        if slot >= self._pool.num_slots:
            raise ShapeError(f"frame {frame} is offloaded: fetch it first")
        return slot

    def _slots_of(self, frames: Iterable[int]) -> dict[int, int]:
        return {frame: self._anywhere(integer("frame", frame, None)) for frame in frames}

    def _anywhere(self, frame: int) -> int:
        slot = self._frames.get(frame)
        if slot is None:
            self._check_of(self._pool, "timeline")
            held = list(self._frames)
            runs = f"[{held[0]}, {held[-1]}]" if held else "none"
            why = "was evicted" if 0 <= frame < self._num_frames else "was never appended"
            raise ShapeError(f"frame {frame} {why}; frames held: {runs} ({len(held)} of them)")
        return slot

    def _check_of(self, pool: FramePool, what: str) -> None:
        if self._pool is not pool:
            raise ShapeError(f"{what} belongs to another pool")
        if not self._finalizer.alive:
            raise PoolError(f"{what} has been released")
