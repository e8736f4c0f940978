"""Which frames a timeline keeps: `timeline.evict(policy)` after each block.

A policy says what to keep and knows nothing of slots; the pool frees what nobody holds. Any object
with `keep(timeline)` will do.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from kvpo_kernels.checks import integer, number, tensors
from kvpo_kernels.errors import ConfigError, DtypeError, NonFiniteError, RangeError, ShapeError
from kvpo_kernels.history.memory import pool_of
from kvpo_kernels.history.route_table import RouteTable
from kvpo_kernels.history.slots import Slot, Slots, frame_index
from kvpo_kernels.ops.store_frames import check_scales


class Frames(Protocol):
    """What a policy sees of a `Timeline`."""

    @property
    def committed_frames(self) -> int:
        """The absolute index after the last frame that is written."""

    @property
    def resident_frames(self) -> list[int]:
        """Absolute indices of the frames that are held and written."""


class EvictionPolicy(Protocol):
    """Chooses the frames of a timeline that stay."""

    def keep(self, timeline: Frames) -> Iterable[int]:
        """Absolute frames to keep; those that the timeline does not hold are ignored."""


@dataclass(frozen=True)
class Window:
    """The first `sink` frames, the last `local` and, of those between, `candidates`.

    With the candidates of a `RoutingPlan` it is what a KVPO rollout needs: memory
    O(sink + candidates + local) per branch, whatever the length of the video.
    """

    sink: int
    """Frames at the start, at least 0."""
    local: int
    """Latest frames, at least 0."""
    candidates: Collection[int] = ()
    """Absolute frames that may still be routed to."""

    def __post_init__(self) -> None:
        for name in ("sink", "local"):
            object.__setattr__(self, name, integer(name, getattr(self, name), 0, ConfigError))

    def keep(self, timeline: Frames) -> set[int]:
        """As `EvictionPolicy.keep`."""
        end = timeline.committed_frames
        chosen = (frame_index("a candidate", frame) for frame in self.candidates)
        return {*range(self.sink), *range(max(0, end - self.local), end), *chosen}


class TopScored:
    """Sink, window, and of the frames between them the `budget` with the highest scores.

    Scores come from outside, after each block, by `observe`: `frame_attention_mass` makes it an
    adaptive cache that keeps what is attended to (as H2O does for tokens, arXiv:2306.14048), and
    `text_relevance` with `record_every=9` the bank of MemFlow, which records the first frame of
    every third block and ranks by the prompt. A frame without a score yet outranks those that have
    one, the latest first. One object per timeline, or for timelines that share their scores: asking
    changes nothing.

    Args:
        sink: the first frames, always kept.
        local: the latest frames, always kept.
        budget: frames kept besides.
        decay: in [0, 1), how much of a frame's former score is kept when it is observed again; 0
            takes the latest.
        record_every: only frames whose absolute index it divides compete for the budget.
    """

    def __init__(
        self, sink: int, local: int, budget: int, *, decay: float = 0.0, record_every: int = 1
    ) -> None:
        self.always = Window(sink, local)
        self.budget = integer("budget", budget, 0, ConfigError)
        self.record_every = integer("record_every", record_every, 1, ConfigError)
        if not 0 <= number("decay", decay) < 1:
            raise ConfigError(f"decay must be in [0, 1), got {decay}")
        self.decay = decay
        self.scores: dict[int, float] = {}
        """Absolute frame -> score, of all that were ever observed."""

    def observe(self, scores: Mapping[int, float]) -> None:
        """Take the scores of this block.

        Raises:
            NonFiniteError: a score is not finite; nothing has changed then.
        """
        bad = {frame: score for frame, score in scores.items() if not math.isfinite(score)}
        if bad:
            raise NonFiniteError(f"scores must be finite, got {bad}")
        for frame, score in scores.items():
            former = self.scores.get(frame, score)
            self.scores[frame] = self.decay * former + (1 - self.decay) * score

    def keep(self, timeline: Frames) -> set[int]:
        """As `EvictionPolicy.keep`."""
        always = self.always.keep(timeline)
        held = timeline.resident_frames
        competing = [f for f in held if f not in always and f % self.record_every == 0]
        competing.sort(key=lambda f: (self.scores.get(f, float("inf")), f), reverse=True)
        return always.union(competing[: self.budget])


@torch.no_grad()
def frame_attention_mass(
    q: Tensor,
    k_pool: Tensor,
    table: RouteTable,
    lse: Tensor,
    *,
    k_scales: Tensor | None = None,
    scale: float | None = None,
    queries: int = 64,
) -> Tensor:
    r"""Share of each row's attention that falls on each of its routed frames.

        mass[b, r] = mean over h, i of  sum_t exp(scale * q[b, i, h] . k[slot, t, h] - lse[b, h, i])

    with the LSE over all keys that `routed_attention(..., return_lse=True)` returned. The rest, up
    to 1, falls on the live tokens.

    Args:
        q: `[B, Q, H, D]`, any float dtype.
        k_pool: `[F, T, Hkv, D]`.
        table: B rows of slots.
        lse: `[B, H, Q]`, natural log.
        k_scales: `[F, Hkv]`, of a quantized pool.
        scale: `D ** -0.5` if None.
        queries: how many are looked at, evenly spaced; all where Q is smaller.

    Returns:
        `[B, R]` float32, 0 where a row has fewer slots. Holds one frame per row at a time.

    Raises:
        ShapeError: a shape does not fit, or scales are missing or superfluous.
        DtypeError: scales of another dtype or device.
    """
    tensors(q=q, k_pool=k_pool, lse=lse)
    if not isinstance(table, RouteTable):
        raise DtypeError(f"table must be a RouteTable, got {type(table).__name__}")
    if q.ndim != 4:
        raise ShapeError(f"q must be [B, Q, H, D], got {list(q.shape)}")
    B, Q, H, D = q.shape
    if table.num_rows != B or lse.shape != (B, H, Q):
        raise ShapeError(
            f"q {list(q.shape)} needs a table of {B} rows and lse {[B, H, Q]}, got"
            f" {table.num_rows} and {list(lse.shape)}"
        )
    if k_pool.ndim != 4 or k_pool.shape[3] != D or H % k_pool.shape[2]:
        raise ShapeError(f"k_pool {list(k_pool.shape)} does not fit q {list(q.shape)}")
    if table.num_slots != k_pool.shape[0]:
        raise ShapeError(
            f"table was made for a pool of {table.num_slots} slots, but k_pool has"
            f" {k_pool.shape[0]}"
        )
    if Q == 0:
        raise ShapeError(f"q {list(q.shape)} has no queries to take the mean of")
    table.check_memory("k_pool", k_pool)
    table.check_frames(k_pool)
    check_scales(k_pool, k_pool, k_scales, k_scales, q.device)
    steps = min(integer("queries", queries, 1, ConfigError), Q)
    picked = torch.linspace(0, Q - 1, steps, dtype=torch.float64, device=q.device).round().long()
    some = q[:, picked].float() * (D**-0.5 if scale is None else scale)
    total = lse[:, :, picked].float()
    mass = []
    for slots in table.slots.unbind(1):
        keys = _frames(k_pool, k_scales, slots.clamp_min(0).long())
        keys = keys.repeat_interleave(H // keys.shape[2], dim=2)
        logits = torch.einsum("bqhd,bthd->bhqt", some, keys)
        share = (logits.logsumexp(-1) - total).exp().mean((1, 2))
        mass.append(torch.where(slots >= 0, share, 0.0))
    return torch.stack(mass, 1) if mass else q.new_zeros(B, 0, dtype=torch.float32)


@torch.no_grad()
def text_relevance(
    text_k: Tensor,
    k_pool: Tensor,
    slots: Iterable[Slot] | Iterable[int],
    *,
    k_scales: Tensor | None = None,
) -> Tensor:
    r"""How well frames match a prompt: the score by which MemFlow's bank keeps its frames.

        score[n] = mean over l, h, t of  text_k[l, h] . k[slot n, t, h] / sqrt(D)

    Args:
        text_k: `[L, H, D]`, the prompt's keys of the cross-attention.
        k_pool: `[F, T, H, D]`.
        slots: of the frames, as `Timeline.window`, `routed` and `slot` give them; of pools that are
            no FramePool's, plain numbers.
        k_scales: `[F, H]`, of a quantized pool.

    Returns:
        `[number of slots]` float32.

    Raises:
        ShapeError: heads or head sizes differ, a slot outside the pool, no text, or scales are
            missing or superfluous.
        DtypeError: scales of another dtype or device, or plain numbers for slots of a FramePool.
        FrameError: a slot whose frame has left it, or is not yet written in every layer.
    """
    tensors(text_k=text_k, k_pool=k_pool)
    if text_k.ndim != 3:
        raise ShapeError(f"text_k must be [L, H, D], got {list(text_k.shape)}")
    if k_pool.ndim != 4:
        raise ShapeError(f"k_pool must be [F, T, H, D], got {list(k_pool.shape)}")
    if text_k.shape[1:] != k_pool.shape[2:]:
        raise ShapeError(f"text_k {list(text_k.shape)} does not fit k_pool {list(k_pool.shape)}")
    if len(text_k) == 0:
        raise ShapeError(f"text_k {list(text_k.shape)} has no tokens to take the mean of")
    check_scales(k_pool, k_pool, k_scales, k_scales, text_k.device)
    try:
        given: list[Any] = list(slots)
    except TypeError:
        raise DtypeError(f"slots must be a sequence, got {type(slots).__name__}") from None
    named: list[int] = list(given)
    for i, slot in enumerate(named):
        named[i] = slot = integer(f"slots[{i}]", slot, None)
        if not 0 <= slot < k_pool.shape[0]:
            raise RangeError(f"slots[{i}] = {slot} not in [0, {k_pool.shape[0]})")
    if (pool := pool_of(k_pool)) is not None:
        pool._check_read(Slots.of(given, "slots[{}]"), "slots[{}]")
    index = torch.tensor(named, dtype=torch.int64, device=k_pool.device)
    frames = _frames(k_pool, k_scales, index).mean(1)  # the score is linear: means first
    H, D = text_k.shape[1:]
    score: Tensor = torch.einsum("hd,nhd->n", text_k.float().mean(0), frames) / (H * D**0.5)
    return score


def _frames(pool: Tensor, scales: Tensor | None, slots: Tensor) -> Tensor:
    """`[n, T, H, D]` float32."""
    if scales is None:
        return pool[slots].float()
    pages = pool.view(torch.uint8)[slots].view(pool.dtype)  # float8 has no index
    return pages.float() * scales[slots][:, None, :, None]
