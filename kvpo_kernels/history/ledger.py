"""Who holds which slot of a frame pool, and what has been written there: counts on the host.

Whatever refers to a slot counts as a reference: timelines, and route tables made by
`FramePool.routes` for as long as they, or a backward over them, live.
"""

import threading
from collections import deque
from collections.abc import Iterable

from kvpo_kernels.errors import FrameError, PoolError
from kvpo_kernels.history.pages import Pages
from kvpo_kernels.history.slots import Held, PreparedSlots, Slots


class Ledger:
    """Counts by slot; those from `num_slots` on are of offloaded frames.

    Called with `lock` held.
    """

    def __init__(self, pages: Pages, num_layers: int) -> None:
        self.lock = threading.RLock()
        self._pages = pages
        self.num_slots = num_slots = pages.num_slots
        everywhere = num_slots + pages.host_slots
        self.num_layers = num_layers
        self.all_layers = (1 << num_layers) - 1
        self.timeline_refs = [0] * everywhere
        self.table_refs = [0] * everywhere
        self.written = [0] * everywhere  # bit l: layer l of the slot has been written
        # Goes up when a slot is taken and when the one timeline that holds it may rewrite it.
        self.generation = [0] * everywhere
        self.free = list(range(num_slots - 1, -1, -1))
        self.free_host = list(range(everywhere - 1, num_slots - 1, -1))
        # Of every timeline whose references are counted, by identity: a timeline may be dead and
        # still in the queue below.
        self.counted: dict[int, Held] = {}
        self.fewest_free = num_slots
        self.copied_slots = 0
        # Finalizers run at any allocation, on any thread, possibly while this thread is inside a
        # method: they only append here, and every method settles the queue first.
        self.dropped_timelines: deque[Held] = deque()
        self.dropped_tables: deque[set[int]] = deque()

    def settle(self) -> None:
        """Count what finalizers have dropped."""
        while self.dropped_timelines:
            frames = self.dropped_timelines.popleft()
            del self.counted[id(frames)]
            self.drop_frames(frames.values())
            frames.clear()
        while self.dropped_tables:
            self.drop_table(self.dropped_tables.popleft())

    def references(self, slot: int) -> int:
        """Of timelines and tables."""
        return self.timeline_refs[slot] + self.table_refs[slot]

    def is_resident(self, slot: int) -> bool:
        """Whether it is held, and written in every layer."""
        return self.references(slot) > 0 and self.written[slot] == self.all_layers

    def take(self) -> int:
        """A free slot, for one timeline."""
        slot = self.free.pop()
        self.fewest_free = min(self.fewest_free, len(self.free))
        self._pages.wait_for([slot])
        self.timeline_refs[slot] = 1
        self.written[slot] = 0
        self.generation[slot] += 1
        return slot

    def drop_frames(self, slots: Iterable[int]) -> None:
        """A timeline's references, one each."""
        for slot in slots:
            self.timeline_refs[slot] -= 1
            self._free_if_unused(slot)

    def drop_table(self, slots: Iterable[int]) -> None:
        """A table's references, one each."""
        for slot in slots:
            self.table_refs[slot] -= 1
            self._free_if_unused(slot)

    def move(self, moves: dict[int, int]) -> None:
        """The frames of timelines have moved between device and host, the latest free slots."""
        for old, new in moves.items():
            (self.free if new < self.num_slots else self.free_host).pop()
            self.timeline_refs[new], self.timeline_refs[old] = self.timeline_refs[old], 0
            self.written[new] = self.written[old]
            self.generation[new] += 1
            self._free_if_unused(old)  # a table may still read it
        self.fewest_free = min(self.fewest_free, len(self.free))
        for frames in self.counted.values():
            for frame, slot in frames.items():
                frames[frame] = moves.get(slot, slot)

    def check_resident(self, slot: int, what: str) -> None:
        """Check that a slot that is held is written in every layer.

        Raises:
            FrameError: it is not; `what` names it.
        """
        missing = self.all_layers & ~self.written[slot]
        if missing:
            first = (missing & -missing).bit_length() - 1
            raise FrameError(
                f"{what}: frame not resident: layer {first} of {self.num_layers} is not yet written"
            )

    def check_read(self, row: Slots, what: str) -> None:
        """Check that slots still hold, in every layer, the frames that they were asked for.

        Raises:
            FrameError: one does not; the format `what` names its position.
        """
        generation, written, all_layers = self.generation, self.written, self.all_layers
        timelines, tables = self.timeline_refs, self.table_refs
        for i, (slot, was) in enumerate(zip(row._numbers, row._generations, strict=True)):
            if generation[slot] != was and row._held[i].get(row.frames[i]) != slot:
                raise FrameError(
                    f"{what.format(i)} = {slot} is stale: frame {row.frames[i]}"
                    f" {self._what_became(row._held[i], row.frames[i])}, and the slot has been"
                    " written to since; ask the timeline again"
                )
            if not (timelines[slot] or tables[slot]):
                raise FrameError(
                    f"{what.format(i)} = {slot}: frame not resident: nothing holds this slot; frame"
                    f" {row.frames[i]} {self._what_became(row._held[i], row.frames[i])}"
                )
            if written[slot] != all_layers:
                self.check_resident(slot, f"{what.format(i)} = {slot}")

    def check_write(self, slots: PreparedSlots) -> None:
        """Check that slots are still their timelines' alone.

        Raises:
            PoolError: one is not.
        """
        for b, row in enumerate(slots.rows):
            for i, slot in enumerate(row._numbers):
                held, frame = row._held[i], row.frames[i]
                if held.get(frame) != slot:
                    raise FrameError(
                        f"slots[branch={b}, frame={i}] = {slot} is stale: frame {frame}"
                        f" {self._what_became(held, frame)} since it was prepared"
                    )
                timelines, tables = self.timeline_refs[slot], self.table_refs[slot]
                if (timelines, tables) != (1, 0):
                    raise PoolError(
                        f"slots[branch={b}, frame={i}] = {slot} is held by {timelines} timelines"
                        f" and {tables} route tables, not by one timeline alone: `prepare_write`"
                        " again"
                    )

    def exhausted(self, needed: int) -> PoolError:
        """That there are too few free slots, and who holds the others."""
        refs = zip(self.table_refs, self.timeline_refs, strict=True)
        tables_only = sum(t > 0 and r == 0 for t, r in refs)
        held = sum(n > 0 for n in self.timeline_refs[: self.num_slots])
        return PoolError(
            f"frame pool: {needed} slots needed, {len(self.free)} of {self.num_slots} free; {held}"
            f" held by timelines, {tables_only} by route tables or pending backwards only"
        )

    def _free_if_unused(self, slot: int) -> None:
        if self.references(slot) == 0:
            (self.free if slot < self.num_slots else self.free_host).append(slot)

    def _what_became(self, held: Held, frame: int) -> str:
        if id(held) not in self.counted:
            return "went with its timeline, which was released"
        now = held.get(frame)
        if now is None:
            return "was evicted"
        if now >= self.num_slots:
            return "was offloaded"
        return f"has moved to slot {now} (it was shared, or offloaded and fetched)"
