"""One KVPO iteration in two ways: as today's trainers run it, and over this library.

Both run the same weights on the same noise, routes and advantages, and both are checked to make the
same scores and gradients. Rewards and the VAE are no part of it. All weights are trained (the
release trains LoRA's), text keys and values are cached constants, as in the release.

`Today` is rebuilt from what the released trainer does (its facts, not its code): rolling caches per
layer, copied whole to insert a block and rolled again to keep it; float64 rotation; the window
joined by `cat`; branches one by one, state saved to and restored from host memory; graphs of all
branches, checkpointed per forward, kept until one backward; three replays, needed or not.

`Pooled` has one frame pool, branches in one batch, attention that reads frames in place, energies
without a graph and then one block-step at a time, and no replay of an old policy that is the
current one. The contexts of the second pass are remade block by block, not kept from the first.
"""

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from wan import PATCH, Transformer, axis_tables, rms_norm, rope_float64

from kvpo_kernels import (
    FramePool,
    HistoryRouting,
    RopeTable,
    RouteTable,
    RoutingPlan,
    Timeline,
    TrajectoryEnergies,
    branch_policy_loss,
    plan_history_routing,
    qk_norm_rope,
    qk_norm_rope_write,
    routed_attention,
    velocity_gradient,
)
from kvpo_kernels.cost.sizes import GeneratorSize

SIGMAS = (1.0, 0.9375, 5 / 6, 0.625)
WEIGHTS = tuple(0.5 for _ in SIGMAS)  # x0 space, floor 1: 1 / (2 sigma_floor^2)
CONTEXT_SIGMA = 0.00498
GRADIENT_STEPS = 2
SINK, LOCAL, CACHE = 3, 6, 33

Clock = Callable[[str], AbstractContextManager[None]]


@dataclass
class Problem:
    """What both ways are given."""

    size: GeneratorSize
    routing: HistoryRouting
    plan: RoutingPlan
    old: Transformer
    initial: Transformer
    text: list[tuple[Tensor, Tensor]]
    noise: Tensor
    """`[blocks, 5, N, P]`: of the first step, of the three between steps, of the context pass."""
    advantages: Tensor
    rope: RopeTable
    micro_batch: int
    """Branches whose activations one backward of `Pooled` holds."""
    checkpoint_layers: bool
    """Whether `Pooled` recomputes each layer in the backward, as `Today` does the whole forward."""

    @property
    def dtype(self) -> torch.dtype:
        return self.noise.dtype

    @property
    def device(self) -> torch.device:
        return self.noise.device

    def tokens(self, frames: int) -> int:
        return frames * self.size.frame_tokens

    def blocks(self) -> range:
        """First frames of the blocks from the fork to the end of its chunk."""
        return range(self.plan.start_frame, self.noise.shape[0] * self.size.block_frames, 3)

    def noise_of(self, first_frame: int) -> Tensor:
        return self.noise[first_frame // self.size.block_frames]


def make_problem(
    size: GeneratorSize,
    branches: int,
    micro_batch: int,
    checkpoint_layers: bool,
    device: str,
    dtype: torch.dtype,
) -> Problem:
    """Random weights and noise; the fork at frame 21, its chunk ends at 39: six blocks."""
    torch.manual_seed(0)
    rng = torch.Generator().manual_seed(1)
    with torch.device(device):
        old = Transformer(size).to(dtype)
    initial = copy.deepcopy(old)
    with torch.no_grad():
        for weight in initial.parameters():
            weight.add_(1e-3 * torch.randn_like(weight))
    old.requires_grad_(False), initial.requires_grad_(False)
    routing = HistoryRouting(num_branches=branches)
    plan = plan_history_routing(routing, video_frames=57, start_frame=21)
    N, P = 3 * size.frame_tokens, PATCH * size.latent_channels
    return Problem(
        size,
        routing,
        plan,
        old,
        initial,
        old.text(rng),
        torch.randn(13, 5, N, P, generator=rng).to(device, dtype),
        torch.randn(branches, generator=rng).to(device),
        RopeTable(size.head_dim, device=device),
        micro_batch,
        checkpoint_layers,
    )


class Trainer:
    """A policy and its optimizer; `iteration` is one rollout and one update."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.old = problem.old
        self.policy = copy.deepcopy(problem.old).requires_grad_(True)
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=1e-5, fused=False)
        self.scores = torch.empty(0)
        """Of the last iteration, for the check."""

    def iteration(self, clock: Clock, synced: bool) -> None:
        """`synced`: the old policy is still the current one."""
        raise NotImplementedError

    def _update(self) -> None:
        nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
        self.optimizer.step()


# As today's trainers -----------------------------------------------------------------------------


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
        noise = self.problem.noise_of(first)
        x, inputs, predictions = noise[:1], [], []
        for step, sigma in enumerate(SIGMAS):
            # The released rollout keeps the noisy block as well; the context pass overwrites it.
            x0 = self._x0(policy, cache, first, sigma, routed, x, update=True)
            inputs.append(x)
            predictions.append(x0)
            if step + 1 < len(SIGMAS):
                following = SIGMAS[step + 1]
                x = (1 - following) * x0 + following * noise[step + 1]
        self._commit(policy, cache, first, routed, x0)
        return torch.stack(inputs), torch.stack(predictions)

    def _commit(
        self, policy: Transformer, cache: Cache, first: int, routed: "Routed | None", x0: Tensor
    ) -> None:
        x = (1 - CONTEXT_SIGMA) * x0 + CONTEXT_SIGMA * self.problem.noise_of(first)[4]
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


def policy_loss(scores: Tensor, old: Tensor, advantages: Tensor, ref: Tensor) -> Tensor:
    """The released objective with its defaults, for a group in which some branch is safe."""
    log_pi, log_old, log_ref = (torch.log_softmax(s, dim=0) for s in (scores, old, ref))
    ratio = (log_pi - log_old).clamp(-20.0, 20.0).exp()
    gain = torch.minimum(ratio * advantages, ratio.clamp(0.9, 1.2) * advantages)
    pi = log_pi.exp()
    return -gain.mean() + 10.0 * (pi * ((pi + 1e-10).log() - log_ref)).sum()


# Over this library -------------------------------------------------------------------------------


@dataclass
class Context:
    """What the rows of a block attend to besides it."""

    slots: list[list[int]]
    table: RouteTable


@dataclass
class Trace:
    """A rollout's record: inputs and predictions of every block, `[G, 4, N, P]`."""

    prefix: Timeline
    noisy: list[Tensor]
    x0: list[Tensor]


class Pooled(Trainer):
    """All branches in one batch over one pool."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        p = problem
        # The prefix, and of each branch and the anchor the local window and a block.
        slots = p.plan.start_frame + (p.routing.num_branches + 1) * (LOCAL + 3)
        sizes = (slots, p.size.frame_tokens, p.size.layers, p.size.heads, p.size.head_dim)
        self.pool = FramePool(*sizes, dtype=p.dtype, device=p.device)

    def iteration(self, clock: Clock, synced: bool) -> None:
        p = self.problem
        with clock("prefix"), torch.no_grad():
            prefix = self.pool.timeline()
            for first in range(0, p.plan.start_frame, 3):
                self._sample_block(self.old, [prefix], first, self._normal([prefix]))
        with clock("rollout"), torch.no_grad():
            trace = self._roll_out(prefix)
        with clock("replay"), torch.no_grad():
            scores, last = self._scores(self.policy, trace)
        with clock("replay, old"), torch.no_grad():
            old_scores = scores if synced else self._scores(self.old, trace)[0]
        with clock("replay, initial"), torch.no_grad():
            ref_scores, _ = self._scores(p.initial, trace)
        with clock("gradient"):
            self.optimizer.zero_grad()
            kappa = branch_policy_loss(scores, old_scores, p.advantages, ref_scores).score_grad
            self._accumulate(trace, last, kappa)
        with clock("optimizer"):
            self._update()
        self.scores = scores

    def _roll_out(self, prefix: Timeline) -> Trace:
        p, G = self.problem, self.problem.routing.num_branches
        rows = prefix.fork(G + 1)
        trace = Trace(prefix, [], [])
        for first in p.blocks():
            if first < p.plan.end_frame:
                branches = zip(rows[:G], p.plan.attended, strict=True)
                slots = [row.routed(SINK, frames, nearest=1) for row, frames in branches]
                slots.append(rows[G].window(SINK, LOCAL))
                context = Context(slots, self.pool.routes(slots))
            else:
                context = self._normal(rows)
            noisy, x0 = self._sample_block(self.old, rows, first, context)
            trace.noisy.append(noisy[:G])
            trace.x0.append(x0[:G])
            for row, frames in zip(rows, [*p.plan.attended, []], strict=True):
                row.evict([*range(SINK), *frames, *range(first + 3 - LOCAL, first + 3)])
        return trace

    def _scores(self, policy: Transformer, trace: Trace) -> tuple[Tensor, list[Tensor]]:
        """Scores, and the last prediction of every block, from which its context can be remade."""
        p, last = self.problem, []
        rows = trace.prefix.fork(p.routing.num_branches)
        energies = TrajectoryEnergies(len(rows), device=p.device)
        for i, first in enumerate(p.blocks()):
            context = self._normal(rows)
            for step, sigma in enumerate(SIGMAS):
                x0 = self._x0(policy, first, sigma, context, trace.noisy[i][:, step])
                energies.add(x0, trace.x0[i][:, step], WEIGHTS[step])
            last.append(x0)
            self._advance(policy, rows, first, context, x0)
        return -energies.energies, last

    def _accumulate(self, trace: Trace, last: list[Tensor], kappa: Tensor) -> None:
        """Backward of one block-step at a time; contexts are remade, not kept since `_scores`."""
        p, G = self.problem, self.problem.routing.num_branches
        rows = trace.prefix.fork(G)
        for i, first in enumerate(p.blocks()):
            context = self._normal(rows)
            for low in range(0, G, p.micro_batch):
                some = slice(low, min(low + p.micro_batch, G))
                slots = context.slots[some]
                part = Context(slots, self.pool.routes(slots))
                for step, sigma in enumerate(SIGMAS[:GRADIENT_STEPS]):
                    x0 = self._x0(self.policy, first, sigma, part, trace.noisy[i][some, step])
                    target = trace.x0[i][some, step]
                    x0.backward(velocity_gradient(x0.detach(), target, WEIGHTS[step], kappa[some]))
                del part
            with torch.no_grad():
                self._advance(self.policy, rows, first, context, last[i])

    def _normal(self, rows: list[Timeline]) -> Context:
        slots = [row.window(SINK, LOCAL) for row in rows]
        return Context(slots, self.pool.routes(slots))

    def _sample_block(
        self, policy: Transformer, rows: list[Timeline], first: int, context: Context
    ) -> tuple[Tensor, Tensor]:
        noise = self.problem.noise_of(first)
        x, inputs, predictions = noise[:1].expand(len(rows), -1, -1), [], []
        for step, sigma in enumerate(SIGMAS):
            x0 = self._x0(policy, first, sigma, context, x)
            inputs.append(x)
            predictions.append(x0)
            if step + 1 < len(SIGMAS):
                following = SIGMAS[step + 1]
                x = (1 - following) * x0 + following * noise[step + 1]
        self._commit(policy, rows, first, context, x0)
        return torch.stack(inputs, 1), torch.stack(predictions, 1)

    def _advance(
        self, policy: Transformer, rows: list[Timeline], first: int, context: Context, x0: Tensor
    ) -> None:
        """In a replay: the block becomes history, the oldest of the window goes."""
        if first == self.problem.blocks()[-1]:
            return
        self._commit(policy, rows, first, context, x0)
        for row in rows:
            row.evict([*range(SINK), *range(first + 3 - LOCAL, first + 3)])

    def _x0(
        self, policy: Transformer, first: int, sigma: float, context: Context, x: Tensor
    ) -> Tensor:
        p, pool, grid = self.problem, self.pool, (3, *self.problem.size.grid)

        def attend(layer: int, block: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k = qk_norm_rope(q, k, block.q_norm, block.k_norm, p.rope, first, grid=grid)
            return routed_attention(q, pool.k(layer), pool.v(layer), context.table, k, v)

        return x - sigma * policy(x, sigma, p.text, attend, p.checkpoint_layers)

    def _commit(
        self, policy: Transformer, rows: list[Timeline], first: int, context: Context, x0: Tensor
    ) -> None:
        """The context pass: keys and values go straight into their slots and are read there."""
        p, pool, grid = self.problem, self.pool, (3, *self.problem.size.grid)
        for row in rows:
            row.append(3)
        slots = pool.prepare_write(rows, first, 3)
        own = [old + new for old, new in zip(context.slots, slots.tolist(), strict=True)]
        with_block = RouteTable(own, pool.num_slots, pool.device)

        def attend(layer: int, block: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            pools = {"k_pool": pool.k(layer), "v_pool": pool.v(layer), "slots": slots}
            weights = (block.q_norm, block.k_norm)
            q = qk_norm_rope_write(q, k, v, *weights, p.rope, first, grid=grid, **pools)
            pool.mark_written(layer, slots)
            return routed_attention(q, pool.k(layer), pool.v(layer), with_block)

        x = (1 - CONTEXT_SIGMA) * x0 + CONTEXT_SIGMA * p.noise_of(first)[4]
        policy(x, 0.0, p.text, attend)
