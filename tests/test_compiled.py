"""Under torch.compile with inductor: what a graph returns and everything that it may write.

A graph serves many pools, so several sizes go through each function. `aot_eager`, which the ops'
own tests use, neither plans memory nor writes in place.
"""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kvpo_trainer.data import DataConfig
from kvpo_trainer.generator import Generator, GeneratorConfig
from torch import Tensor
from torch._inductor.compile_fx import compile_fx

from kvpo_kernels import (
    FramePool,
    PreparedSlots,
    RopeTable,
    RouteTable,
    Timeline,
    qk_norm_rope,
    qk_norm_rope_write,
    quantize_frames,
    routed_attention,
    trajectory_velocity_energy,
    tve_grpo_loss,
    velocity_gradient,
)
from kvpo_kernels.errors import DtypeError, FrameError, PoolError, ShapeError
from kvpo_kernels.ops import store_frames

T, H, D, LAYERS = 4, 2, 16, 2
GRID = (1, 2, 2)
PAGES = [None, torch.int8, torch.float8_e4m3fn]
WEIGHT = torch.linspace(0.5, 1.5, H * D)


@pytest.fixture(autouse=True)
def poison_memory() -> None:
    """In place of the one that replaces functions which a compiler knows."""
    torch.manual_seed(0)
    torch.compiler.reset()


class Compiled:
    """A function under inductor; counts its graphs and how often one of them ran."""

    def __init__(self, function: Callable[..., Any], dynamic: bool | None = None) -> None:
        self.graphs = self.runs = 0
        self.call = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=self._backend)

    def _backend(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.graphs += 1
        inner = compile_fx(graph, inputs)

        def run(*args: Any) -> Any:
            self.runs += 1
            return inner(*args)

        return run


def history(num_slots: int, page: torch.dtype | None = None) -> tuple[FramePool, Timeline]:
    torch.manual_seed(num_slots)
    pool = FramePool(num_slots, T, LAYERS, H, D, dtype=torch.float32, page_dtype=page)
    video = pool.timeline()
    first = video.append(3)
    for layer in range(LAYERS):
        video.write(layer, first, *torch.randn(2, 3 * T, H, D))
    return pool, video


def memory(pool: FramePool) -> list[Tensor]:
    views = [f(n) for n in range(LAYERS) for f in (pool.k, pool.v, pool.k_scales, pool.v_scales)]
    return [t.clone().view(torch.uint8) for t in views if t is not None]


def scales(pool: FramePool, layer: int) -> dict[str, Tensor | None]:
    return {"k_scales": pool.k_scales(layer), "v_scales": pool.v_scales(layer)}


def context_pass(
    pool: FramePool,
    x: Tensor,
    rope: RopeTable,
    first: Any,
    table: RouteTable,
    slots: PreparedSlots,
    backend: str | None,
) -> Tensor:
    """Attends, then writes, in both ways that there are."""
    x = x + routed_attention(x, pool.k(0), pool.v(0), table, x, x, **scales(pool, 0))
    where = {"k_pool": pool.k(0), "v_pool": pool.v(0), **scales(pool, 0), "slots": slots}
    x = qk_norm_rope_write(
        x, x * 2, x * 3, WEIGHT, WEIGHT, rope, first, grid=GRID, backend=backend, **where
    )
    pool.mark_written(0, slots)
    q, k = qk_norm_rope(x, x, WEIGHT, WEIGHT, rope, first, grid=GRID, backend=backend)
    out = routed_attention(q, pool.k(1), pool.v(1), table, k, x, **scales(pool, 1))
    pool.write(1, slots, k, out)
    return torch.stack([out, pool.k(0).float()[slots.tensor[:, 0]]])


def run_pass(
    function: Callable[..., Any], num_slots: int, rows: int, page: Any, backend: str | None
) -> tuple[Tensor, ...]:
    pool, video = history(num_slots, page)
    branches = video.fork(rows)
    table = pool.routes([b.window(1, 2) for b in branches])
    first = max(b.append(1) for b in branches)
    slots = pool.prepare_write(branches, first, 1)
    x = torch.randn(rows, T, H, D)
    with torch.no_grad():
        out = function(pool, x, RopeTable(D), first, table, slots, backend)
    assert all(b.resident_frames == [0, 1, 2, 3] for b in branches)
    return out, *memory(pool)


@pytest.mark.parametrize(
    ("page", "dynamic"),
    [*itertools.product(PAGES, [None, True]), (None, False)],
    ids=str,
)
def test_a_context_pass_writes_its_slots_and_no_other(
    page: torch.dtype | None, dynamic: bool | None
) -> None:
    backend = "reference" if dynamic is False else None
    compiled = Compiled(context_pass, dynamic)
    for num_slots, rows in ((8, 2), (12, 2), (20, 3), (9, 2)):
        case = (num_slots, rows, page, backend)
        expected, actual = run_pass(context_pass, *case), run_pass(compiled.call, *case)
        for a, e in zip(actual, expected, strict=True):
            assert torch.equal(a, e), (num_slots, rows)
    assert compiled.runs == 4


def test_a_compiled_write_copies_no_pool() -> None:
    """Of 80 MiB a block writes 64 KiB; a graph allocates no tensor larger than the block."""
    pool = FramePool(1280, 64, 2, 4, 16, dtype=torch.float32)
    video, rope, w = pool.timeline(), RopeTable(16), torch.ones(64)

    def step(pool: FramePool, x: Tensor, first: int, slots: PreparedSlots) -> Tensor:
        for layer in range(2):
            where = {"k_pool": pool.k(layer), "v_pool": pool.v(layer), "slots": slots}
            x = qk_norm_rope_write(x, x, x, w, w, rope, first, grid=(1, 8, 8), **where)
            pool.mark_written(layer, slots)
            pool.write(layer, slots, x, x)
        return x

    compiled = Compiled(step, dynamic=True)
    x = torch.randn(1, 64, 4, 16)
    for _ in range(3):
        slots = pool.prepare_write([video], video.append(1), 1)
        with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
            compiled.call(pool, x, slots.rows[0].frames[0] + 2, slots)
        taken = [e.nbytes() for e in _events(profile) if e.nbytes() > 0]
        assert taken and max(taken) <= x.nbytes, max(taken)
    assert pool.stats().bytes == 80 << 20


def _events(profile: torch.profiler.profile) -> list[Any]:
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    return [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]


def step(
    pool: FramePool,
    x: Tensor,
    rope: RopeTable,
    first: Any,
    table: RouteTable,
    slots: PreparedSlots | None,
) -> Tensor:
    grid = (3, 2, 2)
    for layer in range(LAYERS):
        q, k = qk_norm_rope(x, x, WEIGHT, WEIGHT, rope, first, grid=grid)
        x = x + routed_attention(q, pool.k(layer), pool.v(layer), table, k, x)
        if slots is not None:
            pool.write(layer, slots, k, x)
    return x


@pytest.mark.parametrize("position", [int, torch.tensor], ids=["int", "tensor"])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_step_is_traced_twice_for_any_number_of_videos(
    rows: int, position: Callable[[int], Any]
) -> None:
    denoise, context = Compiled(step), Compiled(step)
    for video in range(3):
        rope = RopeTable(D)  # each video its own, as a process that loads a generator does
        pool = FramePool(14 * rows + video, T, LAYERS, H, D, dtype=torch.float32)
        branches = [pool.timeline() for _ in range(rows)]
        for block in range(20):
            first = position(3 * block)
            table = pool.routes([b.window(3, 6) for b in branches])
            x = torch.randn(rows, 3 * T, H, D)
            with torch.no_grad():
                out = denoise.call(pool, x, rope, first, table, None)
                assert torch.equal(out, step(pool, x, rope, first, table, None))
                keep = [0, 1, 2, *range(3 * block - 3, 3 * block)]
                slots = pool.advance(branches, 3, keep, table)[1]
                context.call(pool, x, rope, first, table, slots)
    assert (denoise.runs, context.runs) == (60, 60)
    assert denoise.graphs <= 2 and context.graphs <= 2


def test_positions_of_tensors_are_checked() -> None:
    rope, grid = RopeTable(D, max_frames=8), (2, 2, 2)
    for f in (rope.tokens, Compiled(lambda at, grid: rope.tokens(at, grid)).call):
        for at in (0, 5):
            for tensor in (torch.tensor(at), torch.tensor([at], dtype=torch.int32)):
                assert all(map(torch.equal, f(tensor, grid), rope.tokens(at, grid)))
        for at in (7, -1):
            with pytest.raises(Exception, match=r"frame 8 not in \[0, 8\)|at least 0, got -1"):
                f(torch.tensor(at), grid)


def attention(q: Tensor, k: Tensor, v: Tensor, pool: FramePool, table: RouteTable) -> Tensor:
    return routed_attention(q, pool.k(0), pool.v(0), table, k, v, **scales(pool, 0))


@pytest.mark.parametrize("page", [None, torch.int8], ids=str)
def test_attention_and_its_gradients(page: torch.dtype | None) -> None:
    compiled = Compiled(attention)
    for num_slots, rows, tokens in ((8, 2, 4), (12, 3, 8), (20, 1, 5)):
        pool, video = history(num_slots, page)
        table = pool.routes([video.window(1, 1 + r % 2) for r in range(rows)])
        before = memory(pool)
        inputs = [torch.randn(rows, tokens, H, D).requires_grad_() for _ in range(3)]
        results = [_with_gradients(f, inputs, pool, table) for f in (attention, compiled.call)]
        assert all(map(torch.equal, *results))
        assert all(map(torch.equal, before, memory(pool)))
    assert compiled.runs == 3


def _with_gradients(f: Callable[..., Any], inputs: list[Tensor], *others: Any) -> list[Tensor]:
    out = f(*inputs, *others)
    outs = [out] if isinstance(out, Tensor) else list(out)
    total = sum((i + 1) * o.square().sum() for i, o in enumerate(outs))
    return [*outs, *torch.autograd.grad(total, inputs)]


def rotated(q: Tensor, k: Tensor, qw: Tensor, kw: Tensor, rope: RopeTable, first: int) -> Any:
    return qk_norm_rope(q, k, qw, kw, rope, first, grid=(q.shape[1] // 4, 2, 2))


def energies(pred: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    return trajectory_velocity_energy(pred, target, weights)


def objective(pred: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    old = torch.zeros(pred.shape[0])
    advantages = torch.linspace(-1, 1, pred.shape[0])
    return tve_grpo_loss(pred, target, weights, old, advantages).loss


def test_the_other_ops_and_their_gradients() -> None:
    """Of several sizes through one function each."""
    wide = lambda n: torch.randn(n, 2, 3 * n)
    heads = lambda n: [*torch.randn(2, n, 4 * n, H, D), *torch.randn(2, H * D)]
    cases: list[tuple[Callable[..., Any], Callable[[int], list[Tensor]], Callable[[int], Any]]] = [
        (rotated, heads, lambda n: (RopeTable(D), 3 * n)),
        (energies, lambda n: [wide(n)], lambda n: (wide(n), torch.ones(2))),
        (objective, lambda n: [wide(n)], lambda n: (wide(n), torch.ones(2))),
    ]
    for function, differentiable, constant in cases:
        compiled = Compiled(function)
        for n in (2, 3, 5):
            inputs, others = [t.requires_grad_() for t in differentiable(n)], constant(n)
            kept = [t.detach().clone() for t in inputs]
            results = [_with_gradients(f, inputs, *others) for f in (function, compiled.call)]
            for a, e in zip(*results, strict=True):
                # Scalars around the op are fused and summed in another order: a few roundings.
                torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-6)
            assert all(map(torch.equal, inputs, kept))
        assert compiled.runs == 3


def test_ops_without_gradients() -> None:
    def both(frames: Tensor, pred: Tensor, target: Tensor) -> Any:
        kappa = torch.ones(pred.shape[0])
        return *quantize_frames(frames, torch.int8), velocity_gradient(pred, target, 0.5, kappa)

    compiled = Compiled(both)
    for n in (2, 3, 5):
        inputs = (torch.randn(n, T, H, D), *torch.randn(2, n, 7))
        assert all(map(torch.equal, both(*inputs), compiled.call(*inputs)))
    assert compiled.runs == 3


def test_one_tensor_may_be_several_inputs() -> None:
    def same(x: Tensor, weight: Tensor, pool: FramePool, table: RouteTable) -> Tensor:
        q, k = qk_norm_rope(x, x, weight, weight, RopeTable(D), 0, grid=GRID)
        return attention(x, x, x, pool, table) + attention(q, q, q, pool, table) + k

    pool, video = history(8)
    inputs = [torch.randn(1, T, H, D).requires_grad_(), WEIGHT.clone().requires_grad_()]
    others = (pool, pool.routes([video.window(1, 2)]))
    results = [_with_gradients(f, inputs, *others) for f in (same, Compiled(same).call)]
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-6)  # gradients are summed around the op


def test_the_trainers_stream() -> None:
    """Its denoising steps and its context pass, over int8 pools of several sizes."""
    generator = Generator(GeneratorConfig(layers=2), DataConfig())
    generator.history = "int8"
    compiled = Compiled(generator.stream)
    tokens, patch = generator.block_tokens, generator.data.patch_values
    text = generator.encode_text(torch.zeros(1, 8, dtype=torch.int64))
    results = []
    for stream in (generator.stream, compiled.call):
        torch.manual_seed(0)
        outs = []
        for num_slots in (12, 15):
            pool = generator.new_pool(num_slots)
            video = pool.timeline()
            for _ in range(2):
                with torch.no_grad():
                    x, first = torch.randn(1, tokens, patch), video.num_frames
                    table = pool.routes([video.window(1, 6)])
                    for sigma in (1.0, 0.7):
                        x = x - 0.3 * stream(x, sigma, text, first, pool, table)
                    frames = generator.data.block_frames
                    slots = pool.prepare_write([video], video.append(frames), frames)
                    stream(x, 0.0, text, first, pool, table, slots)
                outs.append(x)
            outs += [pool.k(layer).float() for layer in range(2)]
        results.append(outs)
    for a, e in zip(*results, strict=True):
        # Arithmetic around the ops is fused: a key at the edge between two steps of 8 bits may take
        # the other, which moves what attends to it by a part in 127.
        assert (a - e).abs().max() <= 0.02 * e.abs().max()
    # Two of context passes and two of steps, as everywhere, and one more for the first noise level.
    assert compiled.runs == 12 and compiled.graphs <= 5


def raw_write(storage: Tensor, x: Tensor, rope: RopeTable, slots: Tensor) -> Tensor:
    where = {"k_pool": storage[0, 1], "v_pool": storage[1, 1], "slots": slots}
    return qk_norm_rope_write(x, x, x, WEIGHT, WEIGHT, rope, 2, grid=GRID, **where)


def test_views_that_inductor_would_misplace_are_refused() -> None:
    """Of a pool that is no FramePool's: right where sizes are constant, an error where not."""
    x, rope, slots = torch.randn(1, T, H, D), RopeTable(D), torch.tensor([[3]])
    static, dynamic = Compiled(raw_write, dynamic=False), Compiled(raw_write, dynamic=True)
    for num_slots in (8, 12):
        expected, actual = (torch.zeros(2, 2, num_slots, T, H, D) for _ in range(2))
        with torch.no_grad():
            out = raw_write(expected, x, rope, slots)
            if store_frames._CONSTANT_OFFSETS:
                assert torch.equal(static.call(actual, x, rope, slots), out)
                assert torch.equal(actual, expected)
            else:
                with pytest.raises(Exception, match="k_pool is a view into a larger tensor"):
                    static.call(actual, x, rope, slots)
                expected = actual.clone()
            with pytest.raises(Exception, match="k_pool is a view into a larger tensor of dynamic"):
                dynamic.call(actual, x, rope, slots)
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("reads_compiled", [False, True])
@pytest.mark.parametrize("writes_compiled", [False, True])
def test_a_write_ends_no_backward_that_reads_other_slots(
    reads_compiled: bool, writes_compiled: bool
) -> None:
    read = Compiled(attention).call if reads_compiled else attention
    write = Compiled(context_pass).call if writes_compiled else context_pass
    grads = []
    for disturbed in (False, True):
        pool, video = history(12)
        table = pool.routes([video.window(1, 2)])
        q, k, v = (torch.randn(1, T, H, D).requires_grad_() for _ in range(3))
        out = read(q, k, v, pool, table)
        if disturbed:
            slots = pool.prepare_write([video], video.append(1), 1)
            with torch.no_grad():
                write(pool, q.detach(), RopeTable(D), 3, table, slots, None)
        grads.append(torch.autograd.grad(out.sum(), (q, k, v)))
    assert all(map(torch.equal, *grads))


def test_a_graph_keeps_the_frames_of_its_backward() -> None:
    pool, video = history(6)
    inputs = [torch.randn(1, T, H, D).requires_grad_() for _ in range(3)]
    table = pool.routes([video.window(1, 2)])
    expected = torch.autograd.grad(attention(*inputs, pool, table).sum(), inputs)
    out = Compiled(attention).call(*inputs, pool, table)
    del table
    video.release()
    assert pool.stats().free_slots == 3  # a graph saves the table's tensor, which holds them
    other = pool.timeline()
    other.append(3)
    with pytest.raises(PoolError):
        other.append(1)
    assert all(map(torch.equal, torch.autograd.grad(out.sum(), inputs), expected))
    del out
    assert pool.stats().free_slots == 3


def test_a_graph_checks_whose_slots_it_writes() -> None:
    x, rope = torch.randn(1, T, H, D), RopeTable(D)
    compiled = Compiled(context_pass)
    for num_slots in (8, 12):
        pool, video = history(num_slots)
        table = pool.routes([video.window(1, 2)])
        slots = pool.prepare_write([video], video.append(1), 1)
        with torch.no_grad():
            compiled.call(pool, x, rope, 3, table, slots, None)
        before = memory(pool)
        fork = video.fork(1)
        with torch.no_grad(), pytest.raises(PoolError, match=r"frame=0\] = \d+ is held by 2"):
            compiled.call(pool, x, rope, 3, table, slots, None)
        del fork
        video.evict([0, 1, 2])
        other = pool.timeline()
        other.append(1)  # takes the slot that was left
        with torch.no_grad(), pytest.raises(FrameError, match="frame 3 was evicted"):
            compiled.call(pool, x, rope, 3, table, slots, None)
        assert all(map(torch.equal, before, memory(pool)))


@pytest.mark.parametrize("page", [None, torch.int8], ids=str)
def test_a_graph_checks_whose_frames_it_is_given(page: torch.dtype | None) -> None:
    """As in eager mode: slots and tables of another pool, numbers that do not say whose."""
    x, rope = torch.randn(1, T, H, D), RopeTable(D)

    def write(pool: FramePool, slots: PreparedSlots | Tensor) -> Tensor:
        where = {"k_pool": pool.k(0), "v_pool": pool.v(0), **scales(pool, 0), "slots": slots}
        return qk_norm_rope_write(x, x, x, WEIGHT, WEIGHT, rope, 3, grid=GRID, **where)

    def read(pool: FramePool, table: RouteTable) -> Tensor:
        return routed_attention(x, pool.k(0), pool.v(0), table, **scales(pool, 0))

    (pool, video), (other, _) = history(8, page), history(8, page)
    slots = pool.prepare_write([video], video.append(1), 1)
    table = pool.routes([video.window(1, 2)])
    before = [*memory(pool), *memory(other)]
    for f, g in ((write, read), (Compiled(write).call, Compiled(read).call)):
        with torch.no_grad():
            with pytest.raises(ShapeError, match="k_pool is not of the FramePool whose slots"):
                f(other, slots)
            with pytest.raises(DtypeError, match="k_pool is of a FramePool: slots must be of"):
                f(pool, slots.tensor)
            with pytest.raises(ShapeError, match="k_pool is not of the FramePool whose `routes`"):
                g(other, table)
        assert all(map(torch.equal, before, [*memory(pool), *memory(other)]))


def test_a_graph_reads_no_frame_that_took_the_place_of_anothers() -> None:
    def read(pool: FramePool, table: RouteTable) -> Tensor:
        return routed_attention(x, pool.k(0), pool.v(0), table)

    x, compiled = torch.randn(1, T, H, D), Compiled(read)
    pool, video = history(3)
    table = pool.routes([video.window(1, 2)])
    slots = pool.advance([video], 1, [1, 2], table)[1]
    assert torch.equal(compiled.call(pool, table), read(pool, table))  # not yet written
    pool.write(0, slots, x, x)
    for f in (read, compiled.call):
        with pytest.raises(FrameError, match="has given to another frame that is written by now"):
            f(pool, table)
    assert compiled.runs == 2
