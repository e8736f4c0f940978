"""Self-attention of one layer for all branches, from q, k, v to its output: E1 and E2.

    python benchmarks/layer.py [--size tiny|wan-1.3b|wan-14b] [--branches G] [--device cpu|cuda]
                               [--rounds N] [--backend NAME] [--out FILE]

E1, context pass: norm, rotation, write, attention, forward. E2, replay: norm, rotation, attention,
forward and backward to q, k and v. As today's trainers do it, branch by branch over caches of 33
frames that are full and roll (`todays_trainer.py`), and over the pool. They take turns in this
process, after a check that they agree. The exit status is 1 if a bar is missed; only GPUs have
bars.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from run import environment
from todays_trainer import Cache, attend_joined, keep
from torch import Tensor
from trainers import Problem, make_problem
from wan import axis_tables

from kvpo_kernels import (
    FramePool,
    RouteTable,
    qk_norm_rope,
    qk_norm_rope_write,
    routed_attention,
)
from kvpo_kernels.bench.timing import interleaved, ratio
from kvpo_kernels.cost.iteration import CACHE, LOCAL, SINK
from kvpo_kernels.cost.sizes import SIZES

FIRST = 48  # the block; caches have held frames up to it and roll for it
BAR = 2.3
Call = Callable[[], tuple[Tensor, ...]]


class Layer:
    """The same branches in both forms; each has a random history of its own."""

    def __init__(self, problem: Problem) -> None:
        self.p = p = problem
        G = p.routing.num_branches
        self.block = p.old.blocks[0]
        heads, grid = (p.size.heads, p.size.head_dim), p.size.grid
        g = torch.Generator(p.device).manual_seed(2)
        draw = lambda *shape: torch.randn(*shape, generator=g, device=p.device).to(p.dtype)
        self.q, self.k, self.v, self.grad = (draw(G, p.tokens(3), *heads) for _ in range(4))
        self.grid = (3, *grid)
        self.caches = []
        self.pool = FramePool(G * (SINK + LOCAL + 3), p.tokens(1), 1, *heads, p.dtype, p.device)
        rows = []
        ends = torch.tensor([p.tokens(FIRST), p.tokens(CACHE)], device=p.device)
        for _ in range(G):
            k, v = draw(1, p.tokens(CACHE), *heads), draw(1, p.tokens(CACHE), *heads)
            self.caches.append(Cache([k], [v], [ends.clone()]))
            row = self.pool.timeline()
            row.append(SINK + LOCAL)
            ours = [torch.cat([t[0, : p.tokens(SINK)], t[0, -p.tokens(LOCAL) :]]) for t in (k, v)]
            row.write(0, 0, *ours)
            row.append(3)
            rows.append(row)
        self.slots = self.pool.prepare_write(rows, SINK + LOCAL, 3)
        history = [row.window(SINK, LOCAL) for row in rows]
        self.table = self.pool.routes(history)
        own = [old + new for old, new in zip(history, self.slots, strict=True)]
        self.with_block = RouteTable(own, self.pool.num_slots, p.device)
        self.rows = rows

    def today_forward(self) -> tuple[Tensor]:
        tables = axis_tables(self.p.rope, FIRST, self.grid)
        outs = []
        for b, cache in enumerate(self.caches):
            one = (t[b : b + 1] for t in (self.q, self.k, self.v))
            out, k = attend_joined(self.p, cache, 0, self.block, *one, FIRST, tables, None)
            keep(self.p, cache, 0, k, self.v[b : b + 1], FIRST)
            cache.ends[0][0] -= self.p.tokens(3)  # the next call rolls again, as each block does
            outs.append(out)
        return (torch.cat(outs),)

    def ours_forward(self) -> tuple[Tensor]:
        q = qk_norm_rope_write(
            self.q,
            self.k,
            self.v,
            self.block.q_norm,
            self.block.k_norm,
            self.p.rope,
            FIRST,
            grid=self.grid,
            k_pool=self.pool.k(0),
            v_pool=self.pool.v(0),
            slots=self.slots,
        )
        self.pool.mark_written(0, self.slots)
        pages = (self.pool.k(0), self.pool.v(0))
        return (routed_attention(q, *pages, self.with_block, backend=self.p.backend),)

    def today_backward(self) -> tuple[Tensor, ...]:
        tables = axis_tables(self.p.rope, FIRST, self.grid)
        grads = []
        for b, cache in enumerate(self.caches):
            leaves = [t[b : b + 1].detach().requires_grad_() for t in (self.q, self.k, self.v)]
            out, _ = attend_joined(self.p, cache, 0, self.block, *leaves, FIRST, tables, None)
            grads.append(torch.autograd.grad(out, leaves, self.grad[b : b + 1]))
        return tuple(torch.cat(parts) for parts in zip(*grads, strict=True))

    def ours_backward(self) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in (self.q, self.k, self.v)]
        norms = (self.block.q_norm, self.block.k_norm)
        q, k = qk_norm_rope(*leaves[:2], *norms, self.p.rope, FIRST, grid=self.grid)
        pages, live = (self.pool.k(0), self.pool.v(0)), (k, leaves[2])
        out = routed_attention(q, *pages, self.table, *live, backend=self.p.backend)
        return torch.autograd.grad(out, leaves, self.grad)


def measure(layer: Layer, rounds: int) -> list[dict[str, Any]]:
    """E1 and E2."""
    records = []
    for case, today, ours in (
        ("E1", torch.no_grad()(layer.today_forward), torch.no_grad()(layer.ours_forward)),
        ("E2", layer.today_backward, layer.ours_backward),
    ):
        # E1 keeps what it writes: every call of today's rolls its history by a block.
        caches = [([t.clone() for t in c.k], [t.clone() for t in c.v]) for c in layer.caches]
        for a, b in zip(ours(), today(), strict=True):
            error = float((a.float() - b.float()).norm() / b.float().norm())
            # Both round to the dtype in different orders; float32 differs in its last bits only.
            assert error < (1e-5 if a.dtype is torch.float32 else 2e-2), f"{case}: {error}"
        times = interleaved(
            {"ours": ours, "today": today}, device=layer.p.device.type, rounds=rounds, quick=True
        )
        for cache, (k, v) in zip(layer.caches, caches, strict=True):
            cache.k, cache.v = k, v
        records.append(
            {
                "case": case,
                "ours_ms": times["ours"].median_ms,
                "today_ms": times["today"].median_ms,
                "ratio": ratio(times["today"], times["ours"]),
                "bar": BAR if layer.p.device.type == "cuda" else None,
            }
        )
    return records


def main() -> int:
    """Measure, print, write; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--branches", type=int, default=8)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--backend", help="of routed attention; default: what a call would take")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    size = dataclasses.replace(SIZES[args.size], layers=1)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    sizes = (size, args.branches, args.branches, False)
    problem = make_problem(*sizes, args.device, dtype, args.backend)
    facts = environment(args.threads)
    records = measure(Layer(problem), args.rounds)
    print(f"{args.size}, one layer, {args.branches} branches, {args.device}")
    for r in records:
        verdict = "" if r["bar"] is None else "ok" if r["ratio"] >= r["bar"] else "MISSED"
        print(
            f"{r['case']}: today {r['today_ms']:.3f} ms, ours {r['ours_ms']:.3f} ms,"
            f" x{r['ratio']:.2f} {verdict}"
        )
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        shape = {"size": args.size, "branches": args.branches, **dataclasses.asdict(size)}
        result = {"records": records, "shape": shape, "environment": facts}
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return int(any(r["bar"] is not None and r["ratio"] < r["bar"] for r in records))


if __name__ == "__main__":
    sys.exit(main())
