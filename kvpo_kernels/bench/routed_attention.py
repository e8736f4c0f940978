"""Cases of routed attention: against dense attention on keys that are copied together."""

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from kvpo_kernels import RouteTable, quantize_frames, routed_attention
from kvpo_kernels.bench import machine
from kvpo_kernels.bench.case import Baseline, Call, Case, compiled

Context = Callable[[], AbstractContextManager[Any]]
PARTS = {
    "forward": "output, no gradients",
    "backward": "gradients of queries and live tokens, without the forward",
    "forward+backward": "output and gradients of queries and live tokens",
}


@dataclass(frozen=True)
class Sizes:
    """One block of B branches: each attends to routed frames and to the block's own."""

    name: str
    about: str
    branches: int = 8
    frame_tokens: int = 1560
    routed_frames: int = 9
    block_frames: int = 3
    heads: int = 12
    head_size: int = 128
    pool_frames: int = 64
    page: str = ""
    """"" for frames in the dtype of the queries, else what they are quantized to."""
    main: bool = False
    """Whether it is held against everything, else against the nearest baseline."""

    def small(self) -> "Sizes":
        """Where only results matter."""
        return replace(self, branches=2, frame_tokens=8, heads=2, pool_frames=24)


_MID = Sizes("mid", "frames of 256 tokens, 6 heads of 64", 8, 256, 9, 3, 6, 64, 40, main=True)
_WAN = Sizes("wan-1.3b", "8 branches, frames of 1,560 tokens, 12 heads of 128", main=True)
SIZES = {
    "cpu": (
        Sizes("small", "frames of 64 tokens, 4 heads of 64", 8, 64, 9, 3, 4, 64, 40, main=True),
        _MID,
        Sizes("large", "2 branches, frames of 390 tokens", 2, 390, pool_frames=33, main=True),
        replace(_MID, name="int8", about="mid, frames rounded to int8", page="int8", main=False),
        replace(
            _MID, name="float8", about="mid, frames as float8", page="float8_e4m3fn", main=False
        ),
    ),
    "cuda": (
        _WAN,
        Sizes("one-branch", "wan-1.3b, one branch", branches=1),
        Sizes("21-frames", "wan-1.3b, 18 frames routed", routed_frames=18),
        Sizes("6-frames", "wan-1.3b, 3 frames routed", routed_frames=3),
        Sizes("wan-14b", "40 heads of 128", heads=40),
        Sizes("880-tokens", "frames of 880 tokens", frame_tokens=880),
        Sizes("1350-tokens", "frames of 1,350 tokens", frame_tokens=1350),
        Sizes("720p", "2 branches, frames of 3,600 tokens", branches=2, frame_tokens=3600),
        Sizes("heads-of-64", "wan-1.3b, heads of 64", head_size=64),
        Sizes("int8", "wan-1.3b, frames rounded to int8", page="int8"),
        Sizes("float8", "wan-1.3b, frames as float8", page="float8_e4m3fn"),
    ),
}


class Attention:
    """The inputs of a case, and the ways to its result.

    With `part` "forward" a call returns the output, else the gradients of q, k_live and v_live.
    """

    def __init__(self, sizes: Sizes, part: str, dtype: torch.dtype, device: str) -> None:
        self.sizes, self.part, self.device = sizes, part, device
        self.backend: str | None = None
        B, T, H, D = sizes.branches, sizes.frame_tokens, sizes.heads, sizes.head_size
        Q = sizes.block_frames * T
        g = torch.Generator(device).manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, device=device).to(dtype)

        self.q, self.k_live, self.v_live, self.grad_out = (draw(B, Q, H, D) for _ in range(4))
        self.k_pool, self.v_pool = (draw(sizes.pool_frames, T, H, D) for _ in range(2))
        order = torch.Generator().manual_seed(1)
        rows = [torch.randperm(sizes.pool_frames, generator=order) for _ in range(B)]
        self.routes = [row[: sizes.routed_frames].tolist() for row in rows]
        self.table = RouteTable(self.routes, sizes.pool_frames, device)
        self.index = torch.tensor(self.routes, device=device)
        self.leaves = [t.requires_grad_() for t in (self.q, self.k_live, self.v_live)]
        self.pages = (self.k_pool, self.v_pool)
        self.scales: tuple[Tensor | None, Tensor | None] = (None, None)
        if sizes.page:
            (k, k_scales), (v, v_scales) = (
                quantize_frames(pool, getattr(torch, sizes.page)) for pool in self.pages
            )
            self.pages, self.scales = (k, v), (k_scales, v_scales)
            # What baselines read is what the pages stand for.
            self.k_pool, self.v_pool = (
                (page.float() * scale[:, None, :, None]).to(dtype)
                for page, scale in ((k, k_scales), (v, v_scales))
            )
        keys = sizes.routed_frames * T + Q
        product = 2.0 * B * H * Q * D
        forward, backward = 2 * product * keys, 3 * product * keys + 4 * product * Q
        self.flops = forward * ("forward" in part) + backward * ("backward" in part)
        self.kernel_flops = {
            "_forward_kernel": forward,
            "_grad_q_kernel": 3 * product * keys,
            "_grad_live_kernel": 4 * product * Q,
        }
        frames = len({slot for row in self.routes for slot in row})
        read = 2 * frames * T * H * D * self.pages[0].itemsize + 2 * self.k_live.nbytes
        self.bytes = 2 * self.q.nbytes + read  # out or its gradient written; keys once

    def clear(self) -> None:
        """Nothing is written but results."""

    def timed(self, attend: Callable[[], Tensor], *contexts: Context) -> Call:
        """The part of the case, of a way to attend."""
        return self.gradients(attend, self.leaves, *contexts)

    def gradients(
        self, attend: Callable[[], Tensor], leaves: list[Tensor], *contexts: Context
    ) -> Call:
        def inside(run: Call) -> Any:
            with ExitStack() as stack:
                for context in contexts:
                    stack.enter_context(context())
                return run()

        if self.part == "forward":
            return lambda: inside(torch.no_grad()(attend))
        grad = functools.partial(torch.autograd.grad, inputs=leaves, grad_outputs=self.grad_out)
        if self.part == "forward+backward":
            return lambda: inside(lambda: grad(attend()))
        out = inside(attend)
        return lambda: inside(lambda: grad(out, retain_graph=True))

    def attend(
        self, backend: str | None, rows: slice = slice(None), table: RouteTable | None = None
    ) -> Tensor:
        live = (self.k_live[rows], self.v_live[rows])
        return routed_attention(
            *(self.q[rows], *self.pages, table or self.table, *live),
            k_scales=self.scales[0],
            v_scales=self.scales[1],
            backend=backend,
        )

    def ours(self, backend: str) -> Call:
        """Over the pool."""
        return self.timed(lambda: self.attend(backend))

    def expected(self) -> Any:
        """Head by head: the reference holds all scores of a row."""

        def head(h: int) -> Tensor:
            one = slice(h, h + 1)
            q, k, v, k_live, v_live = (
                t[:, :, one]
                for t in (self.q, self.pages[0], self.pages[1], self.k_live, self.v_live)
            )
            k_scales, v_scales = (s if s is None else s[:, one].contiguous() for s in self.scales)
            return routed_attention(
                *(q, k, v, self.table, k_live, v_live),
                k_scales=k_scales,
                v_scales=v_scales,
                backend="reference",
            )

        heads = range(self.sizes.heads)
        if self.part == "forward":
            with torch.no_grad():
                return torch.cat([head(h) for h in heads], dim=2)
        total = [torch.zeros_like(t) for t in self.leaves]
        for h in heads:
            grads = torch.autograd.grad(head(h), self.leaves, self.grad_out[:, :, h : h + 1])
            for sum_, grad in zip(total, grads, strict=True):
                sum_ += grad  # zero in the other heads
        return tuple(total)

    def joined(self, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Keys and values of the rows, copied together, `[B, H, K, D]`."""
        return _joined(*self._pool_and_live(rows))

    def dense(self, k: Tensor, v: Tensor, rows: slice = slice(None)) -> Tensor:
        return scaled_dot_product_attention(self.q[rows].transpose(1, 2), k, v).transpose(1, 2)

    def loop(self) -> Tensor:
        rows = [slice(b, b + 1) for b in range(self.sizes.branches)]
        return torch.cat([self.dense(*self.joined(r), r) for r in rows])

    def gather_in(self, gather: Callable[..., Tensor]) -> Tensor:
        return gather(self.q, *self._pool_and_live(slice(None)))

    def _pool_and_live(self, rows: slice) -> tuple[Tensor, ...]:
        live = (self.k_live[rows], self.v_live[rows])
        return self.k_pool, self.v_pool, self.index[rows], *live

    def on_joined(self, *contexts: Context) -> Call:
        """The copy is made here, once. Its gradients are those of all keys; the live are shown."""
        k, v = (t.detach().requires_grad_() for t in self.joined())
        whole = self.gradients(lambda: self.dense(k, v), [self.q, k, v], *contexts)
        if self.part == "forward":
            return whole
        live = self.k_live.shape[1]

        def run() -> tuple[Tensor, ...]:
            grad_q, *of_keys = whole()
            return grad_q, *(t.transpose(1, 2)[:, -live:] for t in of_keys)

        return run

    def side_by_side(self) -> Call:
        """Ours over another pool, with a copy of each branch's frames in the order of its route."""
        B, R = self.index.shape
        k, v = (pool[self.index].flatten(0, 1) for pool in (self.k_pool, self.v_pool))
        rows = [list(range(b * R, (b + 1) * R)) for b in range(B)]
        table = RouteTable(rows, B * R, self.device)
        live = (self.k_live, self.v_live)
        return self.timed(
            lambda: routed_attention(self.q, k, v, table, *live, backend=self.backend)
        )

    def per_branch(self) -> Call:
        tables = [RouteTable([r], self.sizes.pool_frames, self.device) for r in self.routes]
        rows = [slice(b, b + 1) for b in range(len(tables))]

        def attend() -> Tensor:
            pairs = zip(rows, tables, strict=True)
            return torch.cat([self.attend(self.backend, row, table) for row, table in pairs])

        return self.timed(attend)

    def unquantized(self) -> Call:
        pools = (self.k_pool, self.v_pool)
        live = (self.k_live, self.v_live)
        return self.timed(
            lambda: routed_attention(self.q, *pools, self.table, *live, backend=self.backend)
        )


def _joined(
    k_pool: Tensor, v_pool: Tensor, index: Tensor, k_live: Tensor, v_live: Tensor
) -> tuple[Tensor, Tensor]:
    k, v = (
        torch.cat([pool[index].flatten(1, 2), live], dim=1).transpose(1, 2)
        for pool, live in ((k_pool, k_live), (v_pool, v_live))
    )
    return k, v


def _gather(q: Tensor, *pool_and_live: Tensor) -> Tensor:
    k, v = _joined(*pool_and_live)
    return scaled_dot_product_attention(q.transpose(1, 2), k, v).transpose(1, 2)


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


def _flex(work: Attention) -> Call:
    """FlexAttention over the whole pool and the live tokens, blocks of unrouted frames skipped."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    sizes = work.sizes
    T, F = sizes.frame_tokens, sizes.pool_frames
    routed = torch.zeros(sizes.branches, F + 1, dtype=torch.bool, device=work.device)
    routed.scatter_(1, work.index, True)
    routed[:, F] = True  # stands for the block's own tokens

    def mask(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return routed[b, torch.clamp(k // T, max=F)]

    Q, live = work.q.shape[1], work.k_live.shape[1]
    blocks = create_block_mask(mask, sizes.branches, None, Q, F * T + live, device=work.device)
    flex = compiled(flex_attention, small=False)

    def keys(pool: Tensor, live: Tensor) -> Tensor:
        pages = pool.flatten(0, 1)[None].expand(sizes.branches, -1, -1, -1)
        return torch.cat([pages, live], dim=1).transpose(1, 2)

    k, v = keys(work.k_pool, work.k_live), keys(work.v_pool, work.v_live)  # once, not timed
    return work.timed(lambda: flex(work.q.transpose(1, 2), k, v, block_mask=blocks).transpose(1, 2))


def _baselines(sizes: Sizes, part: str, device: str, small: bool) -> tuple[Baseline, ...]:
    gpu = device == "cuda"
    fast: tuple[Context, ...] = (_cudnn,) if gpu else ()
    dense = "cuDNN's attention" if gpu else "torch's attention"

    def compile_(work: Attention) -> Call:
        gather = compiled(_gather, small)
        return work.timed(lambda: work.gather_in(gather))

    joined = Baseline(
        "joined",
        f"{dense} on keys that were joined before, not timed"
        + (": gradients of all keys" if part != "forward" else ""),
        lambda work: work.on_joined(*fast),
    )
    gather = Baseline(
        "gather",
        f"all branches' keys joined, {dense}",
        lambda work: work.timed(lambda: work.gather_in(_gather), *fast),
    )
    unquantized = Baseline(
        "unquantized", "ours, over frames that are not rounded", Attention.unquantized
    )
    if sizes.page:
        return (unquantized,) if gpu else (gather, unquantized)
    if gpu and (part == "backward" or not sizes.main):
        flash = Baseline(
            "flash-deterministic",
            "FlashAttention-2 on keys joined before, gradients of all keys, deterministic",
            # torch refuses cuDNN's backward where it must be deterministic
            lambda work: work.on_joined(_flash, _deterministic),
        )
        return (joined, flash) if sizes.main and part == "backward" else (joined,)
    loop = Baseline(
        "loop",
        "branch by branch: keys joined, " + ("FlashAttention-2" if gpu else dense),
        lambda work: work.timed(work.loop, *((_flash,) if gpu else ())),
    )
    compile_row = Baseline("compile", "gather under torch.compile", compile_)
    flex = Baseline("flex", "FlexAttention over the whole pool, unrouted frames skipped", _flex)
    if part == "forward+backward":
        return (gather,) if gpu else (loop, gather, compile_row)
    return (
        joined,
        gather,
        loop,
        flex if gpu else compile_row,
        Baseline(
            "side-by-side", "ours, each branch's frames copied together", Attention.side_by_side
        ),
        Baseline("per-branch", "ours, one call per branch", Attention.per_branch),
    )


def cases(device: str, small: bool) -> Iterator[Case]:
    """Every case of the device; the first is the main one."""
    for sizes in SIZES[device]:
        parts: tuple[str, ...] = ("forward", "forward+backward")
        if device == "cuda":
            parts = tuple(PARTS) if sizes.main else ("forward", "backward")
        given = sizes.small() if small else sizes
        dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
        for part in parts:
            for dtype in (torch.bfloat16,) if sizes.page or device == "cuda" else dtypes:
                problem: dict[str, object] = {"head_size": given.head_size}
                problem["needs_grad"] = part != "forward"
                if given.page:
                    problem["page_dtype"] = getattr(torch, given.page)
                yield Case(
                    "routed_attention",
                    part,
                    sizes.name,
                    f"{PARTS[part]}; {sizes.about}",
                    dtype,
                    device,
                    {k: v for k, v in vars(given).items() if k not in ("name", "about", "main")},
                    functools.partial(Attention, given, part, dtype, device),
                    _baselines(sizes, part, device, small),
                    (machine.of_peak(dtype, device),),
                    problem,
                    small=small,
                    tolerance=3e-2 if dtype is torch.bfloat16 else 1e-4,
                    reference_row=device == "cpu",  # all scores of a row at once
                    with_memory=part == "forward+backward",
                )
