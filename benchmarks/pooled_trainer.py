"""A KVPO iteration over this library.

One frame pool, branches in one batch, attention that reads frames in place, denoise steps that are
replays of CUDA graphs, energies without a graph of autograd and then one block-step at a time, and
no replay of an old policy that is the current one. The contexts of the second pass are remade block
by block, not kept from the first.
"""

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from denoise_graph import Capture, DenoiseGraph
from torch import Tensor, nn
from trainers import GRADIENT_STEPS, SIGMAS, WEIGHTS, Clock, Problem, Trainer
from wan import Transformer

from kvpo_kernels import (
    FramePool,
    RopeTable,
    RouteTable,
    Slots,
    Timeline,
    TrajectoryEnergies,
    branch_policy_loss,
    qk_norm_rope,
    routed_attention,
    velocity_gradient,
)
from kvpo_kernels.cost.iteration import LOCAL, SINK


@dataclass
class Context:
    """What the rows of a block attend to besides it."""

    slots: list[Slots]
    table: RouteTable


@dataclass
class Trace:
    """A rollout's record: inputs and predictions of every block, `[G, 4, N, P]`."""

    prefix: Timeline
    noisy: list[Tensor]
    x0: list[Tensor]


def _window(first: int) -> set[int]:
    """What the block after the one at `first` will read besides that."""
    return {*range(SINK), *range(first + 3 - LOCAL, first)}


class Pooled(Trainer):
    """All branches in one batch over one pool.

    `capture` is how denoise steps are captured; None launches each.
    """

    def __init__(self, problem: Problem, capture: Capture | None = None) -> None:
        super().__init__(problem)
        p = problem
        # What is kept of the prefix, and of each branch and the anchor the local window.
        start = p.plan.start_frame
        kept = {*range(SINK), *p.plan.candidates, *range(start - LOCAL, start)}
        slots = len(kept) + (p.routing.num_branches + 1) * LOCAL
        sizes = (slots, p.size.frame_tokens, p.size.layers, p.size.heads, p.size.head_dim)
        self.pool = FramePool(*sizes, dtype=p.dtype, device=p.device)
        self._capture = capture
        self._graphs: dict[tuple[Transformer, int], DenoiseGraph] = {}
        self._grid = (3, *p.size.grid)
        self._fixed_rope = RopeTable(p.size.head_dim, device=p.device, in_place=True)

    def iteration(self, clock: Clock, synced: bool) -> None:
        p = self.problem
        with clock("prefix"), torch.no_grad():
            prefix = self.pool.timeline()
            for first in range(0, p.plan.start_frame, 3):
                keep = _window(first).union(p.plan.candidates)
                self._sample_block(self.old, [prefix], first, self._normal([prefix]), keep)
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
            keep = _window(first).union(*p.plan.attended)  # these cost nothing: they are shared
            noisy, x0 = self._sample_block(self.old, rows, first, context, keep)
            trace.noisy.append(noisy[:G])
            trace.x0.append(x0[:G])
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
        self,
        policy: Transformer,
        rows: list[Timeline],
        first: int,
        context: Context,
        keep: Iterable[int],
    ) -> tuple[Tensor, Tensor]:
        predict = lambda x, sigma: self._x0(policy, first, sigma, context, x)
        inputs, predictions = self._denoise(first, len(rows), predict)
        self._commit(policy, rows, first, context, predictions[-1], keep)
        return torch.stack(inputs, 1), torch.stack(predictions, 1)

    def _advance(
        self, policy: Transformer, rows: list[Timeline], first: int, context: Context, x0: Tensor
    ) -> None:
        """In a replay: the block becomes history, the oldest of the window goes."""
        if first != self.problem.blocks()[-1]:
            self._commit(policy, rows, first, context, x0, _window(first))

    def _x0(
        self, policy: Transformer, first: int, sigma: float, context: Context, x: Tensor
    ) -> Tensor:
        if self._capture is None or torch.is_grad_enabled():
            table, rope = context.table, self.problem.rope
            return x - sigma * self._velocity(policy, x, sigma, table, rope, first)
        graph = self._graph(policy, x, self._capture)
        return x - sigma * graph(x, sigma, context.table, first)

    def _graph(self, policy: Transformer, x: Tensor, capture: Capture) -> DenoiseGraph:
        key = (policy, len(x))
        if key not in self._graphs:
            velocity = functools.partial(self._velocity, policy)
            sizes = (SINK + LOCAL, self.pool.num_slots)
            angles = (self._fixed_rope, self._grid)
            self._graphs[key] = DenoiseGraph(velocity, x, *sizes, *angles, capture)
        return self._graphs[key]

    def _velocity(
        self,
        policy: Transformer,
        x: Tensor,
        sigma: float | Tensor,
        table: RouteTable,
        rope: RopeTable,
        first: int,
    ) -> Tensor:
        p, pool = self.problem, self.pool

        def attend(layer: int, block: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k = qk_norm_rope(q, k, block.q_norm, block.k_norm, rope, first, grid=self._grid)
            pages = (pool.k(layer), pool.v(layer))
            return routed_attention(q, *pages, table, k, v, backend=p.backend)

        return policy(x, sigma, p.text, attend, p.checkpoint_layers)

    def _commit(
        self,
        policy: Transformer,
        rows: list[Timeline],
        first: int,
        context: Context,
        x0: Tensor,
        keep: Iterable[int],
    ) -> None:
        """The context pass: keys and values take the slots of the frames that leave."""
        p, pool = self.problem, self.pool
        _, slots = pool.advance(rows, 3, keep, context.table)

        def attend(layer: int, block: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k = qk_norm_rope(q, k, block.q_norm, block.k_norm, p.rope, first, grid=self._grid)
            pages = (pool.k(layer), pool.v(layer))
            attended = routed_attention(q, *pages, context.table, k, v, backend=p.backend)
            pool.write(layer, slots, k, v)  # after the last look at what was there
            return attended

        policy(self._context_input(first, x0), 0.0, p.text, attend)
