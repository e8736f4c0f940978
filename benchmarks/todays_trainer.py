"""A KVPO iteration as today's trainers run it.

Rebuilt from what the released trainer does (its facts, not its code): rolling caches per
layer, copied whole to insert a block and rolled again to keep it; float64 rotation; the window
joined by `cat`; branches one by one, state saved to and restored from host memory; graphs of all
branches, checkpointed per forward, kept until one backward; three replays, needed or not.
"""

import copy
import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from trainers import GRADIENT_STEPS, SIGMAS, WEIGHTS, Clock, Problem, Trainer
from wan import Transformer, axis_tables, rope_float64

from kvpo_kernels.bench.norm_rope import rms_norm
from kvpo_kernels.bench.tve_grpo import policy_loss
from kvpo_kernels.cost.iteration import CACHE, LOCAL, SINK


class Cache:
    """Keys and values of one video, `[1, CACHE * T, H, D]` per layer, and how far they reach."""

    def __init__(self, k: list[Tensor], v: list[Tensor], ends: list[Tensor]) -> None:
        self.k, self.v, self.ends = k, v, ends  # ends: [2], global and local, on the device

    @classmethod
    def empty(cls, p: Problem) -> "Cache":
        shape = (1, p.tokens(CACHE), p.size.heads, p.size.head_dim)
        new = lambda: torch.zeros(shape, dtype=p.dtype, device=p.device)
        layers = range(p.size.layers)
        ends = [torch.zeros(2, dtype=torch.int64, device=p.device) for _ in layers]
        return cls([new() for _ in layers], [new() for _ in layers], ends)

    def _tensors(self) -> Iterator[Tensor]:
        yield from (*self.k, *self.v, *self.ends)

    def saved(self, ledger: "Ledger") -> "Cache":
        """In host memory, and copied there once more, as `copy.deepcopy` of the state does."""
        ledger.host_bytes += sum(t.nbytes for t in self._tensors())
        parts = ([t.to("cpu", copy=True) for t in ts] for ts in (self.k, self.v, self.ends))
        return copy.deepcopy(Cache(*parts))

    def restore(self, saved: "Cache", ledger: "Ledger") -> None:
        for mine, theirs in zip(self._tensors(), saved._tensors(), strict=True):
            mine.copy_(theirs)
            ledger.host_bytes += mine.nbytes

    def materialized(self, device: torch.device, ledger: "Ledger") -> "Cache":
        """On the device, and cloned there, as the replay prepares each branch's."""
        ledger.host_bytes += sum(t.nbytes for t in self._tensors())
        parts = (
            [t.to(device, copy=True).clone() for t in ts] for ts in (self.k, self.v, self.ends)
        )
        return Cache(*parts)


@dataclass
class Ledger:
    """What the dispatcher does not see as such."""

    host_bytes: int = 0
    """Between host and device, on a machine that has both."""


class Today(Trainer):
    """Branches one by one over caches of their own."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.ledger = Ledger()

    def iteration(self, clock: Clock, synced: bool) -> None:
        p = self.problem
        with clock("prefix"), torch.no_grad():
            cache = Cache.empty(p)
            for first in range(0, p.plan.start_frame, 3):
                self._sample_block(self.old, cache, first, None)
        with clock("rollout"), torch.no_grad():
            saved = cache.saved(self.ledger)
            traces = []
            for routed in (*p.plan.attended, None):  # the last is the anchor
                cache.restore(saved, self.ledger)
                held = None if routed is None else Routed(routed)
                blocks = []
                for first in p.blocks():
                    inside = first < p.plan.end_frame
                    blocks.append(
                        self._sample_block(self.old, cache, first, held if inside else None)
                    )
                self.ledger.host_bytes += sum(t.nbytes for pair in blocks for t in pair)
                traces.append([tuple(t.cpu() for t in pair) for pair in blocks])
        with clock("replay"):
            scores = self._scores(self.policy, saved, traces[:-1])
        with clock("replay, old"), torch.no_grad():
            old_scores = self._scores(self.old, saved, traces[:-1])
        with clock("replay, initial"), torch.no_grad():
            ref_scores = self._scores(p.initial, saved, traces[:-1])
        with clock("gradient"):
            self.optimizer.zero_grad()
            policy_loss(scores, old_scores, p.advantages, ref_scores).backward()
        with clock("optimizer"):
            self._update()
        self.scores = scores.detach()

    def _scores(
        self, policy: Transformer, saved: Cache, traces: list[list[tuple[Tensor, Tensor]]]
    ) -> Tensor:
        scores = []
        for trace in traces:
            cache = saved.materialized(self.problem.device, self.ledger)
            scores.append(self._score(policy, cache, trace))
        return torch.stack(scores)

    def _score(
        self, policy: Transformer, cache: Cache, trace: list[tuple[Tensor, Tensor]]
    ) -> Tensor:
        p = self.problem
        energy = torch.zeros((), device=p.device)
        for first, pair in zip(p.blocks(), trace, strict=True):
            noisy, targets = (t.to(p.device) for t in pair)
            self.ledger.host_bytes += noisy.nbytes + targets.nbytes
            for step, sigma in enumerate(SIGMAS):
                x = noisy[step]
                forward = functools.partial(self._x0, policy, cache, first, sigma, None)
                if torch.is_grad_enabled() and step < GRADIENT_STEPS:
                    x0 = checkpoint(forward, x, use_reentrant=False)
                else:
                    with torch.no_grad():
                        x0 = forward(x)
                mse = (targets[step] - x0).float().square().mean()
                energy = energy + WEIGHTS[step] * mse
            if first != p.blocks()[-1]:
                with torch.no_grad():
                    self._commit(policy, cache, first, None, x0.detach())
        return -energy

    def _sample_block(
        self, policy: Transformer, cache: Cache, first: int, routed: "Routed | None"
    ) -> tuple[Tensor, Tensor]:
        """Inputs and predictions `[4, 1, N, P]` of a block's denoise steps."""
        # The released rollout keeps the noisy block as well; the context pass overwrites it.
        predict = lambda x, sigma: self._x0(policy, cache, first, sigma, routed, x, update=True)
        inputs, predictions = self._denoise(first, 1, predict)
        self._commit(policy, cache, first, routed, predictions[-1])
        return torch.stack(inputs), torch.stack(predictions)

    def _commit(
        self, policy: Transformer, cache: Cache, first: int, routed: "Routed | None", x0: Tensor
    ) -> None:
        x = self._context_input(first, x0)
        self._x0(policy, cache, first, 0.0, routed, x, update=True)

    def _x0(
        self,
        policy: Transformer,
        cache: Cache,
        first: int,
        sigma: float,
        routed: "Routed | None",
        x: Tensor,
        update: bool = False,
    ) -> Tensor:
        p = self.problem
        tables = axis_tables(p.rope, first, (3, *p.size.grid))
        writes: list[tuple[int, Tensor, Tensor]] = []

        def attend(layer: int, block: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            attended, k = attend_joined(p, cache, layer, block, q, k, v, first, tables, routed)
            if update:
                writes.append((layer, k, v))
            return attended

        velocity = policy(x, sigma, p.text, attend)
        for layer, k, v in writes:  # only now: all layers have read the cache as it was
            keep(p, cache, layer, k, v, first)
        return x - sigma * velocity


def attend_joined(
    p: Problem,
    cache: Cache,
    layer: int,
    block: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: int,
    tables: tuple[Tensor, ...],
    routed: "Routed | None",
) -> tuple[Tensor, Tensor]:
    """One branch's self-attention, and its rotated keys: rotate, clone, roll, insert, join."""
    grid = (3, *p.size.grid)
    q = rope_float64(rms_norm(q, block.q_norm), grid, tables)
    k = rope_float64(rms_norm(k, block.k_norm), grid, tables)
    temporary = (cache.k[layer].clone(), cache.v[layer].clone())
    end, _ = insert(p, cache.ends[layer], temporary, (k, v), first)
    if routed is None:
        keys, values = (window(p, t, end) for t in temporary)
    else:
        keys, values = routed.window(p, layer, *temporary, end)
    heads_first = (t.transpose(1, 2) for t in (q, keys, values))
    return scaled_dot_product_attention(*heads_first).transpose(1, 2), k


@torch.no_grad()
def keep(p: Problem, cache: Cache, layer: int, k: Tensor, v: Tensor, first: int) -> None:
    """Roll the cache itself, as the temporary one was, and insert the block."""
    caches = (cache.k[layer], cache.v[layer])
    local, reach = insert(p, cache.ends[layer], caches, (k, v), first)
    cache.ends[layer].copy_(torch.tensor([reach, local]))


def insert(
    p: Problem, ends: Tensor, caches: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], first: int
) -> tuple[int, int]:
    """Write a block into caches, which roll if full; return the block's local and global end."""
    reach, local = ends[0].item(), ends[1].item()
    end, count, capacity, sink = p.tokens(first + 3), p.tokens(3), p.tokens(CACHE), p.tokens(SINK)
    if end > reach:
        overflow = local + count - capacity
        if overflow > 0:
            for t in caches:
                t[:, sink : capacity - overflow] = t[:, sink + overflow :].clone()
            local -= overflow
        local, reach = local + count, end
        at = local
    else:  # a block seen before: overwritten where it is
        at = local - (reach - end)
    for t, value in zip(caches, new, strict=True):
        t[:, at - count : at] = value
    return at, reach


def window(p: Problem, cache: Tensor, end: int) -> Tensor:
    """Sink and the last frames, the block included, joined."""
    sink, local = p.tokens(SINK), p.tokens(LOCAL + 3)
    if end <= sink + local:
        return cache[:, :end]
    return torch.cat([cache[:, :sink], cache[:, end - local : end]], dim=1)


class Routed:
    """The routed context of one branch; its routed frames are copied once and kept."""

    def __init__(self, frames: list[int]) -> None:
        self.frames = frames
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}

    def window(
        self, p: Problem, layer: int, k: Tensor, v: Tensor, end: int
    ) -> tuple[Tensor, Tensor]:
        if layer not in self.kept:  # at the fork: nothing has rolled yet
            T = p.tokens(1)
            pick = lambda t: torch.cat([t[:, f * T : (f + 1) * T] for f in self.frames], dim=1)
            self.kept[layer] = (pick(k), pick(v))
        sink, last = p.tokens(SINK), p.tokens(4)
        joined = tuple(
            torch.cat([t[:, :sink], kept, t[:, end - last : end]], dim=1)
            for t, kept in zip((k, v), self.kept[layer], strict=True)
        )
        return joined[0], joined[1]
