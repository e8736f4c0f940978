"""The frames of one video or branch, by absolute index, over slots of a pool that others share."""

import weakref
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from kvpo_kernels.checks import integer, tensors
from kvpo_kernels.errors import DtypeError, FrameError, PoolError, ShapeError
from kvpo_kernels.history.eviction import EvictionPolicy
from kvpo_kernels.history.slots import Held, Slot, Slots, check_no_recompute, frame_index

if TYPE_CHECKING:
    from kvpo_kernels.history.pool import FramePool


class Timeline:
    """The frames of one video or branch, by absolute index; made by `FramePool.timeline`.

    Frames lost to `evict` are gone for this timeline only. A timeline that is garbage-collected
    releases its frames.
    """

    def __init__(
        self, pool: "FramePool", frames: Held, num_frames: int, committed_frames: int
    ) -> None:
        self._pool = pool
        self._frames = frames  # absolute frame -> slot, ascending
        self._num_frames = num_frames
        self._committed = committed_frames  # at least: frames that are held may be further
        pool._ledger.counted[id(frames)] = frames
        dropped = pool._ledger.dropped_timelines
        self._finalizer = weakref.finalize(self, dropped.append, frames)
        self._finalizer.atexit = False

    @property
    def num_frames(self) -> int:
        """Frames appended so far, evicted ones included: the absolute index of the next one."""
        return self._num_frames

    @property
    def committed_frames(self) -> int:
        """The absolute index after the last frame written in every layer, evicted or not."""
        with self._pool._ledger.lock:
            self._check_of(self._pool, "timeline")
            return self._commit()

    @property
    def resident_frames(self) -> list[int]:
        """Absolute indices of the frames held and written in every layer."""
        with self._pool._ledger.lock:
            return [f for f, s in self._frames.items() if self._pool._ledger.is_resident(s)]

    def append(self, num_frames: int) -> int:
        """Reserve slots for the next frames; returns the absolute index of the first.

        Raises:
            PoolError: not enough free slots; nothing has changed then.
            GradientError: in a backward, which under activation checkpointing runs the forward
                again: the frames would be appended twice.
        """
        num_frames = integer("num_frames", num_frames)
        check_no_recompute(self._frames.made_in, "timeline.append")
        pool = self._pool
        with pool._ledger.lock:
            self._check_of(pool, "timeline")
            pool._ledger.settle()
            if num_frames > len(pool._ledger.free):
                raise pool._ledger.exhausted(num_frames)
            first = self._num_frames
            for frame in range(first, first + num_frames):
                self._frames[frame] = pool._ledger.take()
            self._num_frames += num_frames
        return first

    def write(self, layer: int, first_frame: int, k: Tensor, v: Tensor) -> None:
        """Write one layer of appended frames, copy-on-write where a slot is shared.

        Args:
            k, v: `[frames * T, H, D]` or `[frames, T, H, D]`, in the pool's dtype. They may lie in
                the pool: they are as they were before the call.

        Raises:
            ShapeError, DtypeError: a wrong shape.
            FrameError: frames that were not appended, or were evicted or offloaded.
            PoolError: a shared slot and no free one to copy it to.
            GradientError: in a backward, as `append`.
        """
        pool = self._pool
        pool._check_layer(layer)
        tensors(k=k, v=v)
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
        with pool._ledger.lock:
            self._check_of(pool, "timeline")
            for slot in self._frames.values():
                pool._ledger.timeline_refs[slot] += num_branches
            return [
                Timeline(pool, self._frames.copy(), self._num_frames, self._committed)
                for _ in range(num_branches)
            ]

    def slot(self, frame: int) -> Slot:
        """The slot of a resident frame: an int that knows its pool and its frame.

        Raises:
            FrameError: the frame is evicted, offloaded, not yet appended or not yet written in
                every layer.
            GradientError: in a backward, as `window`.
        """
        return self._resident([frame], "timeline.slot")[0]

    def window(self, sink: int, local: int) -> Slots:
        """Slots of the normal context before the next block: sink and last committed frames.

        Frames that would be in both are listed once; early in a video the list is shorter.

        Raises:
            ShapeError: a negative number.
            FrameError: a frame of the window has been evicted or offloaded.
            GradientError: in a backward, which under activation checkpointing runs the forward
                again: the timeline may have moved on.
        """
        sink, local = integer("sink", sink), integer("local", local)
        end = self.committed_frames
        frames = [*range(min(sink, end)), *range(max(sink, end - local), end)]
        return self._resident(frames, "timeline.window")

    def routed(self, sink: int, selected: Sequence[int], nearest: int) -> Slots:
        """Slots of a routed context: sink, the selected frames in the order given, nearest.

        Args:
            selected: absolute frames.
            nearest: how many of the last committed frames to append. Overlaps are kept: a table
                refuses them unless it allows duplicates.

        Raises:
            ShapeError: a negative number.
            FrameError: a frame that is not resident.
            GradientError: in a backward, as `window`.
        """
        sink, nearest = integer("sink", sink), integer("nearest", nearest)
        end = self.committed_frames
        frames = [*range(min(sink, end)), *selected, *range(max(0, end - nearest), end)]
        return self._resident(frames, "timeline.routed")

    def evict(self, keep: Iterable[int] | EvictionPolicy) -> None:
        """Drop every frame but those of `keep`: absolute indices, of which absent ones are ignored,
        or a policy that names them (`Window`, `TopScored`)."""
        pool = self._pool
        (wanted,) = frames_to_keep(keep, [self])
        with pool._ledger.lock:
            self._check_of(pool, "timeline")
            self._lose([frame for frame in self._frames if frame not in wanted])

    def offload(self, frames: Iterable[int]) -> None:
        """Move frames to host memory and free their slots, for all timelines that share them.

        A route table keeps its slots until it is gone. On a GPU the move runs beside what is
        launched later; a slot is not written to before its frame has left.

        Args:
            frames: absolute; those that are offloaded already are ignored.

        Raises:
            FrameError: a frame that is not held or not yet written in every layer.
            PoolError: not enough free host slots. Nothing has changed then, nor where a copy fails.
        """
        with self._pool._ledger.lock:
            slots = self._slots_of(frames)
            for frame, slot in slots.items():
                self._pool._ledger.check_resident(slot, f"frame {frame}")
            here = [s for s in dict.fromkeys(slots.values()) if s < self._pool.num_slots]
            self._pool._move(here, to_host=True)

    def fetch(self, frames: Iterable[int]) -> None:
        """Bring offloaded frames back, for all timelines that share them.

        Ask for them a block ahead: on a GPU the move runs beside what is launched before the first
        table that names them, and nothing but that waits for it.

        Args:
            frames: absolute; those that are not offloaded are ignored.

        Raises:
            FrameError: a frame that is not held.
            PoolError: not enough free slots. Nothing has changed then, nor where a copy fails.
        """
        with self._pool._ledger.lock:
            slots = self._slots_of(frames)
            there = [s for s in dict.fromkeys(slots.values()) if s >= self._pool.num_slots]
            self._pool._move(there, to_host=False)

    @property
    def offloaded_frames(self) -> list[int]:
        """Absolute indices of the frames in host memory."""
        with self._pool._ledger.lock:
            return [f for f, s in self._frames.items() if s >= self._pool.num_slots]

    def release(self) -> None:
        """Drop all frames. The timeline cannot be used afterwards; a second call does nothing."""
        with self._pool._ledger.lock:
            if self._finalizer.detach() is not None:
                # Settled later: a garbage collector may call this from inside another method.
                frames, self._frames = self._frames, Held({}, self._frames.made_in)
                self._pool._ledger.dropped_timelines.append(frames)

    def __reduce_ex__(self, protocol: object) -> str:
        raise PoolError("a Timeline is not copied but forked: `timeline.fork(1)`")

    def _lose(self, frames: Iterable[int]) -> None:
        self._commit()
        self._pool._ledger.drop_frames([self._frames.pop(frame) for frame in frames])

    def _commit(self) -> int:
        for frame in reversed(self._frames):
            if self._pool._ledger.is_resident(self._frames[frame]):
                self._committed = max(self._committed, frame + 1)
                break
        return self._committed

    def _resident(self, frames: Iterable[int], what: str) -> Slots:
        pool = self._pool
        check_no_recompute(self._frames.made_in, what)
        with pool._ledger.lock:
            slots = self._slots([frame_index("frame", frame) for frame in frames])
            for slot, frame in zip(slots._numbers, slots.frames, strict=True):
                if not pool._ledger.is_resident(slot):
                    pool._ledger.check_resident(slot, f"frame {frame}")
            pool._pages.wait_for(slots._numbers)
            return slots

    def _slots(self, frames: Sequence[int]) -> Slots:
        numbers = [self._slot(frame) for frame in frames]
        generation = self._pool._ledger.generation
        held = [self._frames] * len(numbers)
        return Slots(self._pool, numbers, frames, [generation[s] for s in numbers], held)

    def _slot(self, frame: int) -> int:
        """On the device."""
        slot = self._anywhere(frame)
        if slot >= self._pool.num_slots:
            raise FrameError(f"frame {frame} is offloaded: fetch it first")
        return slot

    def _slots_of(self, frames: Iterable[int]) -> dict[int, int]:
        return {frame: self._anywhere(frame_index("frame", frame)) for frame in frames}

    def _anywhere(self, frame: int) -> int:
        slot = self._frames.get(frame)
        if slot is None:
            self._check_of(self._pool, "timeline")
            held = list(self._frames)
            runs = f"[{held[0]}, {held[-1]}]" if held else "none"
            why = "was evicted" if 0 <= frame < self._num_frames else "was never appended"
            raise FrameError(f"frame {frame} {why}; frames held: {runs} ({len(held)} of them)")
        return slot

    def _check_of(self, pool: "FramePool", what: str) -> None:
        if self._pool is not pool:
            raise ShapeError(f"{what} belongs to another pool")
        if not self._finalizer.alive:
            raise PoolError(f"{what} has been released")


def frames_to_keep(
    keep: Iterable[int] | EvictionPolicy | Sequence[EvictionPolicy], timelines: Sequence[Timeline]
) -> list[set[int]]:
    """Per timeline the frames to keep."""
    if not isinstance(keep, Iterable):
        if not hasattr(keep, "keep"):
            raise DtypeError(f"keep must be absolute frames or an EvictionPolicy, got {keep!r}")
        return [_indices(keep.keep(timeline)) for timeline in timelines]
    named: list[Any] = list(keep)
    if not any(hasattr(item, "keep") for item in named):
        return [_indices(named)] * len(timelines)
    if len(named) != len(timelines):
        raise ShapeError(f"keep has {len(named)} policies for {len(timelines)} timelines")
    return [_indices(p.keep(timeline)) for p, timeline in zip(named, timelines, strict=True)]


def _indices(frames: Iterable[int]) -> set[int]:
    return {frame_index("a frame to keep", frame) for frame in frames}
