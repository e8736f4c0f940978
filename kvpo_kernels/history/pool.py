"""A pool of KV-cache frames with copy-on-write timelines over it.

Bookkeeping is Python integers on the host (`ledger.py`); the only tensor work is writing frames and
the copy that a rewrite of a shared frame needs. A *slot* holds one frame of all layers.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from kvpo_kernels.checks import integer, tensors
from kvpo_kernels.errors import DtypeError, PoolError, ShapeError
from kvpo_kernels.history import compiled
from kvpo_kernels.history.eviction import EvictionPolicy
from kvpo_kernels.history.ledger import Ledger
from kvpo_kernels.history.memory import pool_of, register
from kvpo_kernels.history.pages import Pages
from kvpo_kernels.history.pool_table import PoolTable
from kvpo_kernels.history.route_table import RouteTable, has_no_memory
from kvpo_kernels.history.slots import (
    Held,
    PreparedSlots,
    Slot,
    Slots,
    backward_now,
    check_no_recompute,
    frame_index,
)
from kvpo_kernels.history.timeline import Timeline, frames_to_keep
from kvpo_kernels.ops.store_frames import PAGE_DTYPES, store_frames


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
        self._ledger = Ledger(self._pages, num_layers)
        self._layer_at: dict[int, int] = {}
        for layer in range(num_layers):
            if not has_no_memory(keys := self.k(layer)):
                self._layer_at[keys.data_ptr()] = layer
        register(self)

    @property
    def device(self) -> torch.device:
        """Of keys and values."""
        return self._pages.device

    def k(self, layer: int) -> Tensor:
        """The keys of a layer, a view `[F, T, H, D]`."""
        self._check_layer(layer)
        return _view(self._pages.layers[0][layer])

    def v(self, layer: int) -> Tensor:
        """The values of a layer, a view `[F, T, H, D]`."""
        self._check_layer(layer)
        return _view(self._pages.layers[1][layer])

    def k_scales(self, layer: int) -> Tensor | None:
        """The scales of a layer's keys, a view `[F, H]` float32; None in a pool of plain frames."""
        self._check_layer(layer)
        scales = self._pages.layer_scales
        return None if scales is None else _view(scales[0][layer])

    def v_scales(self, layer: int) -> Tensor | None:
        """As `k_scales`, of the values."""
        self._check_layer(layer)
        scales = self._pages.layer_scales
        return None if scales is None else _view(scales[1][layer])

    def timeline(self) -> "Timeline":
        """An empty timeline."""
        with self._ledger.lock:
            return Timeline(self, Held({}, backward_now()), 0, 0)

    def routes(
        self, slot_lists: Iterable[Iterable[Slot]], allow_duplicates: bool = False
    ) -> RouteTable:
        """A table over this pool that keeps its frames alive and unchanged while it lives.

        A backward over it may run at any later time, whatever is written, with one exception: a
        table that `advance` has handed slots of, or that `update` has changed, serves no backward
        of a forward before; under reentrant activation checkpointing, which saves nothing of the
        forward, `update` goes unnoticed.

        Args:
            slot_lists: per row its slots: `Timeline.window`, `Timeline.routed`, sums and slices of
                these, or lists of `Timeline.slot`. `RouteTable.update` of the table takes such rows
                as well. For plain numbers, over other pools, make a `RouteTable`.
            allow_duplicates: accept a slot twice in a row.

        Raises:
            DtypeError: something else than slots.
            ShapeError: slots of another pool; a slot twice.
            FrameError: a slot whose frame has left it, or is not yet written in every layer.
            GradientError: in a backward, which under activation checkpointing runs the forward
                again: the timelines may have moved on. Make it outside and hand it in.
        """
        return PoolTable(self, slot_lists, allow_duplicates)

    def prepare_write(
        self, timelines: Sequence["Timeline"], first_frame: int, num_frames: int
    ) -> PreparedSlots:
        """Slots of the next frames to write, each private to its timeline for now.

        A slot that anything else refers to is replaced by a fresh one that carries the frame's
        other layers along (copy-on-write). Once per block, for all layers. A later `fork` or
        `routes` shares the slots again, and `write` then refuses them.

        Args:
            timelines: B timelines; their frames `first_frame .. first_frame + num_frames - 1` must
                have been appended.

        Returns:
            `[B, num_frames]`, all different.

        Raises:
            FrameError: a frame that was not appended, or was evicted or offloaded.
            ShapeError: a timeline named twice, or of another pool.
            PoolError: not enough free slots. Nothing has changed then, nor where a copy fails.
            GradientError: in a backward, as `routes`.
        """
        first_frame = frame_index("first_frame", first_frame)
        frames = range(first_frame, first_frame + integer("num_frames", num_frames))
        ledger = self._ledger
        with ledger.lock:
            ledger.settle()
            self._check_rows(timelines, "prepare_write")
            uses: dict[int, int] = {}
            for timeline in timelines:
                for frame in frames:
                    slot = timeline._slot(frame)
                    uses[slot] = uses.get(slot, 0) + 1
            # Of a slot's holders that write, the last may keep it when nobody else holds it.
            fresh_needed = sum(
                n if ledger.references(slot) > n else n - 1 for slot, n in uses.items()
            )
            if fresh_needed > len(ledger.free):
                raise ledger.exhausted(fresh_needed)
            # First the copies, into slots that nobody holds yet: they may fail.
            fresh_slots = iter(ledger.free[len(ledger.free) - fresh_needed :][::-1])
            leaving = dict.fromkeys(uses, 0)
            result: list[list[int]] = []
            moves: list[tuple[Timeline, int, int, int]] = []
            for timeline in timelines:
                row = []
                for frame in frames:
                    slot = timeline._frames[frame]
                    if ledger.references(slot) - leaving[slot] > 1:
                        leaving[slot] += 1
                        fresh = next(fresh_slots)
                        moves.append((timeline, frame, slot, fresh))
                        slot = fresh
                    row.append(slot)
                result.append(row)
            self._pages.wait_for(slot for row in result for slot in row)
            self._pages.copy([(old, new) for _, _, old, new in moves if ledger.written[old]])
            for timeline, frame, old, new in moves:
                ledger.take()  # `new`, in the order in which they were named above
                ledger.timeline_refs[old] -= 1
                ledger.written[new] = ledger.written[old]
                ledger.copied_slots += ledger.written[old] != 0
                timeline._frames[frame] = new
            for row in result:  # what was asked for before may come to be another frame's
                for slot in row:
                    ledger.generation[slot] += 1
            return self._prepared(timelines, frames)

    def advance(
        self,
        timelines: Sequence["Timeline"],
        num_frames: int,
        keep: Iterable[int] | EvictionPolicy | Sequence[EvictionPolicy],
        table: RouteTable,
    ) -> tuple[int, PreparedSlots]:
        """Append the next frames to every timeline where frames leave that `table` still reads.

        For the context pass of a block, instead of `append`, `prepare_write` and, after it,
        `evict`: the new frames take the slots of those that leave, and a branch never holds more
        than its window. That is safe because a layer of a slot is read last by that layer's
        attention: in every layer, first attend over `table`, for all rows, then write. After the
        pass `table` is of no use: a backward that was to need it raises, and so does a forward over
        a layer that is written.

        Args:
            timelines: B timelines of the same length.
            num_frames: frames to append to each.
            keep: what each timeline keeps of its frames, as in `Timeline.evict`, or a policy for
                each timeline; a policy is asked before the new frames are there.
            table: of `routes`, the one that the pass attends over.

        Returns:
            `(first_frame, slots)`: the absolute index of the first new frame, and slots
            `[B, num_frames]`, all different, as of `prepare_write`.

        Raises:
            ShapeError: timelines of different lengths or named twice, a table of another pool, not
                one policy per timeline.
            PoolError: not enough slots leave or are free. Nothing has changed then.
            GradientError: in a backward, as `routes`.
        """
        num_frames = integer("num_frames", num_frames)
        self._check_rows(timelines, "advance")
        for b, timeline in enumerate(timelines):
            if timeline.num_frames != timelines[0].num_frames:
                raise ShapeError(
                    f"timelines[{b}] has {timeline.num_frames} frames, timelines[0] has"
                    f" {timelines[0].num_frames}"
                )
        if not isinstance(table, PoolTable) or table.pool is not self:
            raise ShapeError("table was not made by `routes` of this pool")
        check_no_recompute(table.made_in, "advance")
        kept = frames_to_keep(keep, timelines)
        ledger = self._ledger
        with ledger.lock:
            ledger.settle()
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
                if slot < self.num_slots and ledger.timeline_refs[slot] == n
            ]
            # Of those that leave for good, only this pass may still read.
            leaving = [s for s in alone if ledger.table_refs[s] == 1 and s in table.hold.slots]
            freed = sum(ledger.table_refs[slot] == 0 for slot in alone)
            needed = num_frames * len(timelines)
            if needed > len(ledger.free) + freed + len(leaving):
                raise ledger.exhausted(needed - freed - len(leaving))
            for timeline, frames in zip(timelines, gone, strict=True):
                timeline._lose(frames)
            handed = leaving[: max(0, needed - freed)]  # before free slots: these come back anyway
            if handed:  # no backward may read them from now on, nor one that saved them before
                table.spent = True
                increment_version(table.slots)
            table.hold.slots.difference_update(handed)
            ledger.drop_table(handed)
            first = timelines[0].num_frames if timelines else 0
            new = range(first, first + num_frames)
            for timeline in timelines:
                timeline._frames.update({frame: ledger.take() for frame in new})
                timeline._num_frames += num_frames
            table.handed.update((slot, ledger.generation[slot]) for slot in handed)
            return first, self._prepared(timelines, new)

    def write(self, layer: int, slots: PreparedSlots, k: Tensor, v: Tensor) -> None:
        """Write one layer of the frames that `prepare_write` or `advance` named.

        Args:
            slots: `[B, frames]`, of `prepare_write` or `advance`, or a slice of these.
            k, v: `[B, frames * T, H, D]` or `[B, frames, T, H, D]`, in the pool's dtype. They may
                lie in the pool: they are as they were before the call.

        Raises:
            ShapeError, DtypeError: before anything is written.
            PoolError: a slot that has come to be shared since, or whose frame was evicted, released
                or offloaded: `prepare_write` again.
            GradientError: in a backward, as `routes`.
        """
        self._check_layer(layer)
        self._check_private(slots)
        tensors(k=k, v=v)
        B, frames = slots.tensor.shape
        page = (self.frame_tokens, self.num_heads, self.head_dim)
        flat, split = (B, frames * page[0], *page[1:]), (B, frames, *page)
        for name, tensor in (("k", k), ("v", v)):
            if not (tensor.shape == flat or tensor.shape == split):  # to a compiler `in` is no
                raise ShapeError(
                    f"{name} must be {list(flat)} or {list(split)}, got {list(tensor.shape)}"
                )
            if tensor.dtype != self.dtype or tensor.device != self.device:
                raise DtypeError(
                    f"{name} must be {self.dtype} on {self.device} like the pool, got"
                    f" {tensor.dtype} on {tensor.device}"
                )
        memory = (self.k(layer), self.v(layer), self.k_scales(layer), self.v_scales(layer))
        if torch.compiler.is_compiling():
            compiled.write_frames(slots.ticket, layer, k, v, *memory)
            return
        self._store(slots, k, v, memory)
        self._mark(layer, slots)

    def mark_written(self, layer: int, slots: PreparedSlots) -> None:
        """Record that a kernel wrote one layer of these slots directly, as `write` does.

        Args:
            slots: `[B, frames]`, of `prepare_write` or `advance`, or a slice of these.

        Raises:
            DtypeError, ShapeError: other slots, or of another pool; nothing is recorded then.
            PoolError: a slot that has come to be shared since, or another frame's: the kernel has
                written over a frame of others.
            GradientError: in a backward, as `routes`.
        """
        self._check_layer(layer)
        self._check_private(slots)
        if torch.compiler.is_compiling():
            compiled.mark_written(slots.ticket, layer, self.k(layer))
            return
        self._mark(layer, slots)

    def _store(
        self, slots: PreparedSlots, k: Tensor, v: Tensor, memory: Sequence[Tensor | None]
    ) -> None:
        k_pool, v_pool, k_scales, v_scales = memory
        k, v = (t.clone() if pool_of(t) is self else t for t in (k, v))
        page = (-1, self.frame_tokens, self.num_heads, self.head_dim)
        for to, scales, frames in ((k_pool, k_scales, k), (v_pool, v_scales, v)):
            assert to is not None
            store_frames(to, scales, slots.tensor.reshape(-1), frames.reshape(page))

    def _mark(self, layer: int, slots: PreparedSlots) -> None:
        with self._ledger.lock:
            for row in slots.rows:
                for slot in row._numbers:
                    self._ledger.written[slot] |= 1 << layer

    def stats(self) -> PoolStats:
        """Counts of the moment."""
        ledger = self._ledger
        with ledger.lock:
            ledger.settle()
            return PoolStats(
                num_slots=self.num_slots,
                free_slots=len(ledger.free),
                shared_slots=sum(ledger.references(s) > 1 for s in range(self.num_slots)),
                timeline_slots=sum(n > 0 for n in ledger.timeline_refs[: self.num_slots]),
                table_slots=sum(n > 0 for n in ledger.table_refs),
                bytes=self._pages.nbytes,
                slot_bytes=self._pages.nbytes // self.num_slots,
                peak_slots=self.num_slots - ledger.fewest_free,
                copied_slots=ledger.copied_slots,
                host_slots=self._pages.host_slots,
                free_host_slots=len(ledger.free_host),
                host_bytes=self._pages.host_nbytes,
            )

    def __reduce_ex__(self, protocol: object) -> str:
        raise PoolError(
            "a FramePool is neither copied nor pickled: timelines and tables refer to its memory."
            " Keep it out of the module and hand it to `forward`, or share it with the copy:"
            " copy.deepcopy(module, {id(pool): pool})"
        )

    def _check_private(self, slots: PreparedSlots) -> None:
        if not isinstance(slots, PreparedSlots):
            raise DtypeError(
                "slots must be of `prepare_write` or `advance`, got"
                f" {slots if isinstance(slots, Slots | list) else type(slots).__name__}: a plain"
                " number does not say whose frame it means"
            )
        if torch.compiler.is_compiling():
            return  # when the graph runs
        if slots.pool is not self:
            raise ShapeError("slots are of another FramePool")
        if backward_now() != -1:
            for row in slots.rows:
                for held in row._held:
                    check_no_recompute(held.made_in, "a write to the pool")
        with self._ledger.lock:
            self._ledger.settle()
            self._ledger.check_write(slots)

    def _check_read(self, slots: Slots, what: str) -> None:
        if slots and slots._pool is not self:
            raise ShapeError(f"{what.format(0)} is of another FramePool")
        with self._ledger.lock:
            self._ledger.settle()
            self._ledger.check_read(slots, what)

    def _check_rows(self, timelines: Sequence["Timeline"], what: str) -> None:
        if not isinstance(timelines, Sequence):
            raise DtypeError(f"timelines must be a list of Timelines, got {timelines!r}")
        for b, timeline in enumerate(timelines):
            if not isinstance(timeline, Timeline):
                raise DtypeError(f"timelines[{b}] must be a Timeline, got {timeline!r}")
            timeline._check_of(self, f"timelines[{b}]")
            check_no_recompute(timeline._frames.made_in, what)
            if any(timeline is other for other in timelines[:b]):
                raise ShapeError(f"timelines[{b}] is named twice")

    def _check_layer(self, layer: int) -> None:
        if type(layer) is not int:
            layer = integer("layer", layer, None)
        if not 0 <= layer < self.num_layers:
            raise ShapeError(f"layer = {layer} not in [0, {self.num_layers})")

    # Below: called with the lock held.

    def _prepared(self, timelines: Sequence["Timeline"], frames: range) -> PreparedSlots:
        self._pages.renew()
        return PreparedSlots(self, [t._slots(frames) for t in timelines], len(frames))

    def _move(self, slots: Sequence[int], to_host: bool) -> None:
        """Move frames of timelines between device and host, for all timelines that share them."""
        ledger = self._ledger
        ledger.settle()
        free = ledger.free_host if to_host else ledger.free
        if len(slots) > len(free):
            if not to_host:
                raise ledger.exhausted(len(slots))
            raise PoolError(
                f"frame pool: {len(slots)} host slots needed, {len(free)} of"
                f" {self._pages.host_slots} free"
            )
        moves = dict(zip(slots, free[len(free) - len(slots) :][::-1], strict=True))
        self._pages.move(moves)  # may fail: nothing has changed yet
        ledger.move(moves)


def _view(layer: Tensor) -> Tensor:
    """With a version counter of its own; in a compiled graph the tensor itself, whose writes the
    compiler can then see."""
    return layer if torch.compiler.is_compiling() else layer.data
