"""Cases of routed attention: against dense attention on keys that were copied together.

The bars are those of an H200 in bfloat16; elsewhere the same cases run smaller and have none.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from kvpo_kernels import RouteTable, quantize_frames, routed_attention
from kvpo_kernels.bench import machine
from kvpo_kernels.bench.comparison import Baselines, Call, Comparison, Record
from kvpo_kernels.bench.timing import Timing, interleaved


@dataclass(frozen=True)
class Case:
    """One block of G branches: each attends to routed frames and to the block's own."""

    variant: str
    """"" for the main case; else what is different."""

    branches: int = 8
    frame_tokens: int = 1560
    routed_frames: int = 9
    block_frames: int = 3
    heads: int = 12
    head_size: int = 128
    pool_frames: int = 64
    page: str = ""
    """"" for frames in the dtype of the queries, else what they are quantized to."""

    def smaller(self) -> "Case":
        """The same on a CPU."""
        return replace(
            self,
            branches=min(self.branches, 2),
            frame_tokens=max(16, self.frame_tokens // 20),
            heads=2,
            pool_frames=24,
        )


CASES = (
    Case(""),
    Case("one-branch", branches=1),
    Case("21-frames", routed_frames=18),
    Case("6-frames", routed_frames=3),
    Case("h40", heads=40),
    Case("880-tokens", frame_tokens=880),
    Case("1350-tokens", frame_tokens=1350),
    Case("3600-tokens", frame_tokens=3600, branches=2),
    Case("d64", head_size=64),
    Case("int8", page="int8"),
    Case("float8", page="float8_e4m3fn"),
)

# Baseline time over ours, at least; memory likewise.
BARS = {
    "F1": 0.93,
    "F2": 1.0,
    "F3": 2.0,
    "F4": 1.6,
    "F5": 0.98,
    "F6": 1.12,
    "B1": 1.15,
    "B2": 2.2,
    "M1": 1 / 0.3,
    "F1 of GEMM": 0.78,
    "grad_q of GEMM": 0.72,
    "grad_live of GEMM": 0.68,
}


class Workload:
    """The inputs of a case and what is compared on them."""

    def __init__(self, case: Case, dtype: torch.dtype, device: str, backend: str | None) -> None:
        self.case, self.device, self.backend = case, device, backend
        B, T, H, D = case.branches, case.frame_tokens, case.heads, case.head_size
        Q = case.block_frames * T
        g = torch.Generator(device).manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, device=device).to(dtype)

        self.q, self.k_live, self.v_live, self.grad_out = (draw(B, Q, H, D) for _ in range(4))
        self.k_pool, self.v_pool = (draw(case.pool_frames, T, H, D) for _ in range(2))
        order = torch.Generator().manual_seed(1)
        rows = [torch.randperm(case.pool_frames, generator=order) for _ in range(B)]
        self.routes = [row[: case.routed_frames].tolist() for row in rows]
        self.table = RouteTable(self.routes, case.pool_frames, device)
        self.index = torch.tensor(self.routes, device=device)
        self.leaves = [t.requires_grad_() for t in (self.q, self.k_live, self.v_live)]
        self.pages = (self.k_pool, self.v_pool)
        self.scales: tuple[Tensor | None, Tensor | None] = (None, None)
        if case.page:
            (k, k_scales), (v, v_scales) = (
                quantize_frames(pool, getattr(torch, case.page)) for pool in self.pages
            )
            self.pages, self.scales = (k, v), (k_scales, v_scales)
            # What `plain` reads is what the pages stand for.
            self.k_pool, self.v_pool = (
                (page.float() * scale[:, None, :, None]).to(dtype)
                for page, scale in ((k, k_scales), (v, v_scales))
            )

    def ours(self, rows: slice = slice(None), table: RouteTable | None = None) -> Tensor:
        live = (self.k_live[rows], self.v_live[rows])
        return routed_attention(
            *(self.q[rows], *self.pages, table or self.table, *live),
            k_scales=self.scales[0],
            v_scales=self.scales[1],
            backend=self.backend,
        )

    def plain(self) -> Tensor:
        """Ours over frames that are not quantized."""
        pools, live = (self.k_pool, self.v_pool), (self.k_live, self.v_live)
        return routed_attention(*(self.q, *pools, self.table, *live), backend=self.backend)

    def joined(self, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Keys and values of the rows, copied together, `[B, H, K, D]`."""
        k, v = (
            torch.cat([pool[self.index[rows]].flatten(1, 2), live[rows]], 1).transpose(1, 2)
            for pool, live in ((self.k_pool, self.k_live), (self.v_pool, self.v_live))
        )
        return k, v

    def side_by_side(self) -> tuple[Tensor, Tensor, RouteTable]:
        """Another pool, with a copy of each branch's frames in the order of its route."""
        B, R = self.index.shape
        pools = (pool[self.index].flatten(0, 1) for pool in (self.k_pool, self.v_pool))
        rows = [list(range(b * R, (b + 1) * R)) for b in range(B)]
        k, v = pools
        return k, v, RouteTable(rows, B * R, self.device)

    def dense(self, k: Tensor, v: Tensor, rows: slice = slice(None)) -> Tensor:
        return scaled_dot_product_attention(self.q[rows].transpose(1, 2), k, v).transpose(1, 2)

    def loop(self) -> Tensor:
        """Branch by branch, as trainers do."""
        rows = [slice(b, b + 1) for b in range(self.case.branches)]
        return torch.cat([self.dense(*self.joined(r), r) for r in rows])

    def flops(self, products: float, keys: int) -> float:
        B, Q, H, D = self.q.shape
        return 2.0 * products * B * H * Q * keys * D

    @property
    def live(self) -> int:
        return self.k_live.shape[1]

    @property
    def keys(self) -> int:
        return self.case.routed_frames * self.case.frame_tokens + self.live


def _cudnn() -> AbstractContextManager[Any]:
    return sdpa_kernel(SDPBackend.CUDNN_ATTENTION)


def _flash() -> AbstractContextManager[Any]:
    return sdpa_kernel(SDPBackend.FLASH_ATTENTION)


@contextmanager
def _deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    options: Any = torch.utils.deterministic
    filling = options.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    options.fill_uninitialized_memory = False  # costs time, changes nothing here
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        options.fill_uninitialized_memory = filling


def _without_grad(call: Call, *contexts: Callable[[], AbstractContextManager[Any]]) -> Call:
    def run() -> Any:
        with torch.no_grad(), contexts[0]() if contexts else nullcontext():
            return call()

    return run


def _backward_of(
    call: Callable[[], Tensor], leaves: list[Tensor], grad_out: Tensor, *contexts: Any
) -> Call:
    """The backward alone: its forward has run already."""

    def inside(run: Call) -> Any:
        with contexts[0]() if contexts else nullcontext():
            if len(contexts) < 2:
                return run()
            with contexts[1]():
                return run()

    with torch.enable_grad():
        out = inside(call)
    return lambda: inside(lambda: torch.autograd.grad(out, leaves, grad_out, retain_graph=True))


def _flex(work: Workload) -> Call:
    """FlexAttention over the whole pool and the live tokens, blocks of unrouted frames skipped."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    case = work.case
    T, F = case.frame_tokens, case.pool_frames
    routed = torch.zeros(case.branches, F + 1, dtype=torch.bool, device=work.device)
    routed.scatter_(1, work.index, True)
    routed[:, F] = True  # stands for the block's own tokens

    def mask(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return routed[b, torch.clamp(k // T, max=F)]

    Q, K = work.q.shape[1], F * T + work.live
    blocks = create_block_mask(mask, case.branches, None, Q, K, device=work.device)
    compiled = torch.compile(flex_attention, dynamic=False)

    def keys(pool: Tensor, live: Tensor) -> Tensor:
        pages = pool.flatten(0, 1)[None].expand(case.branches, -1, -1, -1)
        return torch.cat([pages, live], dim=1).transpose(1, 2)

    k, v = keys(work.k_pool, work.k_live), keys(work.v_pool, work.v_live)  # once, not timed
    return lambda: compiled(work.q.transpose(1, 2), k, v, block_mask=blocks).transpose(1, 2)


class Bench(Comparison):
    """Measures one case at one precision; yields records."""

    def __init__(
        self, case: Case, dtype: torch.dtype, device: str, backend: str | None, quick: bool
    ) -> None:
        self.case = case
        self.work = work = Workload(case, dtype, device, backend)
        self.gpu = device == "cuda"
        # q, keys and values read, out written
        frames = {slot for row in work.routes for slot in row}
        tokens = len(frames) * case.frame_tokens + work.live * case.branches
        moved = 2 * work.q.nbytes + 2 * tokens * case.heads * case.head_size * dtype.itemsize
        shape = {k: v for k, v in vars(case).items() if k != "variant"}
        sizes = (shape, dtype, device, backend, quick)
        super().__init__("routed_attention", case.variant, *sizes, bars=BARS, moved=moved)

    def forward(self) -> Iterator[Record]:
        work, case = self.work, self.case
        k, v = (t.detach() for t in work.joined())
        first, per_branch = (_cudnn, _flash) if self.gpu else (nullcontext, nullcontext)
        dense, flash = ("cuDNN", "FlashAttention-2") if self.gpu else ("dense", "dense")
        others: Baselines = {}

        def add(id: str, name: str, call: Call, *contexts: Any) -> None:
            others[id] = (name, lambda: _without_grad(call, *contexts))

        if case.page:
            add("F7", "ours, frames of 16 bits", work.plain)
        else:
            add("F1", f"{dense}, keys already joined", lambda: work.dense(k, v), first)
        if not case.variant:
            add("F2", f"keys joined, {dense}", lambda: work.dense(*work.joined()), first)
            add("F3", f"per branch: keys joined, {flash}", work.loop, per_branch)
            if self.gpu:
                others["F4"] = ("FlexAttention over the pool", lambda: _without_grad(_flex(work)))
            k_runs, v_runs, in_order = work.side_by_side()
            add(
                "F5",
                "ours, each branch's frames side by side",
                lambda: routed_attention(
                    work.q, k_runs, v_runs, in_order, work.k_live, work.v_live, backend=work.backend
                ),
            )
            tables = [RouteTable([r], case.pool_frames, self.device) for r in work.routes]
            add(
                "F6",
                "ours, one launch per branch",
                lambda: torch.cat(
                    [work.ours(slice(b, b + 1), table) for b, table in enumerate(tables)]
                ),
            )
        yield from self.compare(_without_grad(work.ours), others, work.flops(2, work.keys))

    def backward(self) -> Iterator[Record]:
        work = self.work
        k, v = (t.detach().requires_grad_() for t in work.joined())
        dense = lambda: work.dense(k, v)

        def of(*contexts: Any) -> Call:
            whole = _backward_of(dense, [work.q, k, v], work.grad_out, *contexts)

            def live() -> tuple[Tensor, ...]:
                grad_q, *of_keys = whole()
                return grad_q, *(t.transpose(1, 2)[:, -work.live :] for t in of_keys)

            return live

        others: Baselines = {"B1": ("dense, all gradients", of)}
        if self.gpu:
            others = {"B1": ("cuDNN, all gradients", functools.partial(of, _cudnn))}
        if self.gpu and not self.case.variant:
            # torch refuses cuDNN's backward where it must be deterministic.
            others["B2"] = (
                "FlashAttention-2, all gradients, deterministic",
                functools.partial(of, _flash, _deterministic),
            )
        if self.case.page:
            plain = lambda: _backward_of(work.plain, work.leaves, work.grad_out)
            others = {"B3": ("ours, frames of 16 bits", plain)}
        flops = work.flops(3, work.keys) + work.flops(4, work.live)
        ours = _backward_of(work.ours, work.leaves, work.grad_out)
        yield from self.compare(ours, others, flops)

    def kernels(self, gemm_tflops: float) -> Iterator[Record]:
        """Each kernel's useful rate over that of a matrix product, from the profiler's times."""
        work = self.work
        call = _backward_of(work.ours, work.leaves, work.grad_out)
        forward = _without_grad(work.ours)
        call(), forward()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(5):
                forward(), call()
            torch.cuda.synchronize()
        flops = {
            "_forward_kernel": ("F1 of GEMM", work.flops(2, work.keys)),
            "_grad_q_kernel": ("grad_q of GEMM", work.flops(3, work.keys)),
            "_grad_live_kernel": ("grad_live of GEMM", work.flops(4, work.live)),
        }
        for event in profile.key_averages():
            if event.key in flops:
                id, useful = flops[event.key]
                ms = event.device_time_total / event.count / 1e3
                floor = useful / gemm_tflops / 1e9
                time, least = (Timing(x, x, (x,)) for x in (ms, floor))
                yield self.record(id, time, "a matrix product of as many operations", least, useful)

    def memory(self) -> Iterator[Record]:
        """Forward and backward together: what is held beyond inputs and outputs."""
        work = self.work
        ours = lambda: (out := work.ours(), *torch.autograd.grad(out, work.leaves, work.grad_out))

        def joined() -> tuple[Tensor, ...]:
            with _cudnn():
                out = work.dense(*work.joined())
                return out, *torch.autograd.grad(out, work.leaves, work.grad_out)

        extra, other = machine.peak_extra_bytes(ours), machine.peak_extra_bytes(joined)
        times = interleaved({"ours": ours, "M1": joined}, device="cuda", rounds=5, quick=True)
        flops = work.flops(5, work.keys) + work.flops(4, work.live)
        more = {"peak_extra_bytes": extra, "ratio": other / max(extra, 1)}
        baseline = "keys joined, cuDNN"
        yield self.record("M1", times["ours"], baseline, times["M1"], flops, **more)


def parts(
    device: str, quick: bool, backend: str | None, rates: dict[str, float]
) -> Iterator[tuple[str, Callable[[], Iterator[Record]]]]:
    """What is measured, each on its own so that one that fails leaves the others."""
    for case in CASES[:1] if quick else CASES:
        if case.page and backend in ("gluon", "flash_attn"):
            continue  # they read no quantized frames
        sized = case if device == "cuda" else case.smaller()
        make = functools.partial(Bench, sized, torch.bfloat16, device, backend, quick)
        label = case.variant or "main"
        yield f"{label}, forward", functools.partial(_run, make, "forward")
        yield f"{label}, backward", functools.partial(_run, make, "backward")
        if device == "cuda" and not case.variant:
            yield (
                f"{label}, kernels",
                functools.partial(_run, make, "kernels", rates["gemm_tflops"]),
            )
            yield f"{label}, memory", functools.partial(_run, make, "memory")


def _run(make: Callable[[], Bench], part: str, *arguments: float) -> Iterator[Record]:
    records: Iterator[Record] = getattr(make(), part)(*arguments)
    return records
