"""Every backend of `norm_rope` against the reference, forward, backward and into the pool."""

import subprocess
import sys

import pytest
import torch
from tolerance import assert_as_accurate
from torch._subclasses.fake_tensor import FakeTensorMode

from kvpo_kernels import (
    BackendUnavailable,
    FramePool,
    RopeTable,
    _native,
    qk_norm_rope,
    qk_norm_rope_write,
)
from kvpo_kernels.errors import DtypeError, ShapeError
from kvpo_kernels.ops import norm_rope

ISAS = ["portable", "avx2", "avx512", "avx512_bf16"]
GRIDS = {"tiny": (1, 1, 1), "odd": (2, 3, 5), "block": (3, 4, 4)}


@pytest.fixture(params=[*ISAS, "triton"])
def kernel(request):
    """The backend's name; "cpu" once for each instruction set."""
    if request.param == "triton":
        yield "triton"
        return
    _native.set_isa_limit(request.param)
    if _native.isa() != request.param:
        _native.set_isa_limit(ISAS[-1])
        pytest.skip(f"this machine does not run {request.param}")
    yield "cpu"
    _native.set_isa_limit(ISAS[-1])


def make(grid, heads=(3, 1), head_dim=32, rows=2, dtype=torch.float32, seed=0):
    rng = torch.Generator().manual_seed(seed)
    n = grid[0] * grid[1] * grid[2]
    q = torch.randn(rows, n, heads[0], head_dim, generator=rng).to(dtype)
    k = torch.randn(rows, n, heads[1], head_dim, generator=rng).to(dtype)
    weights = [torch.randn(h * head_dim, generator=rng).to(dtype) for h in heads]
    return q, k, *weights


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [16, 48, 128])
def test_forward_matches_reference(kernel: str, grid, dtype, head_dim: int) -> None:
    inputs, rope = make(grid, head_dim=head_dim, dtype=dtype), RopeTable(head_dim)
    run = lambda backend, *x: qk_norm_rope(*x, rope, 7, grid=grid, backend=backend)
    truth = run("reference", *(t.double() for t in inputs))
    for name, a, s, t in zip(
        "qk", run(kernel, *inputs), run("reference", *inputs), truth, strict=True
    ):
        assert_as_accurate(name, a, s, t)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_match_reference(kernel: str, dtype) -> None:
    grid, rope = GRIDS["odd"], RopeTable(32)

    def grads(backend: str, dtype: torch.dtype):
        inputs = [t.to(dtype).requires_grad_() for t in make(grid)]
        q, k = qk_norm_rope(*inputs, rope, 3, grid=grid, backend=backend)
        rng = torch.Generator().manual_seed(1)
        seeds = [torch.randn(t.shape, generator=rng).to(dtype) for t in (q, k)]
        return torch.autograd.grad((q, k), inputs, seeds)

    # bf16 inputs of the float64 truth are rounded to bf16 first: the same problem for all three.
    rounded = lambda dtype: [t.to(dtype).double() for t in make(grid)]
    inputs = [t.requires_grad_() for t in rounded(dtype)]
    q, k = qk_norm_rope(*inputs, rope, 3, grid=grid, backend="reference")
    rng = torch.Generator().manual_seed(1)
    seeds = [torch.randn(t.shape, generator=rng).to(dtype).double() for t in (q, k)]
    truth = torch.autograd.grad((q, k), inputs, seeds)
    results = grads(kernel, dtype), grads("reference", dtype)
    for name, a, s, t in zip(("q", "k", "q_weight", "k_weight"), *results, truth, strict=True):
        assert_as_accurate(name, a, s, t, slack=3.0)


def test_reference_passes_gradcheck() -> None:
    grid, rope = (2, 1, 2), RopeTable(8)
    inputs = [t.double().requires_grad_() for t in make(grid, head_dim=8)]
    run = lambda *x: qk_norm_rope(*x, rope, 1, grid=grid, backend="reference")
    assert torch.autograd.gradcheck(run, inputs)


def test_rotation_is_wans_complex_product_within_one_rounding() -> None:
    """Wan rotates float64 complex pairs, angles position * theta^(-j/n) per axis."""
    D, grid, first = 128, (3, 2, 2), 1021  # the last frames of the table
    q, k, qw, kw = make(grid, heads=(2, 2), head_dim=D, dtype=torch.bfloat16)
    new_q, _ = qk_norm_rope(q, k, qw, kw, RopeTable(D), first, grid=grid)
    f, h, w = torch.meshgrid(
        torch.arange(first, first + 3), torch.arange(2), torch.arange(2), indexing="ij"
    )
    angles = torch.cat(
        [
            p.reshape(-1, 1).double() * 10000.0 ** (-torch.arange(n).double() / n)
            for p, n in ((f, 22), (h, 21), (w, 21))
        ],
        dim=1,
    )
    x = q.double().flatten(2)
    x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * qw.double()
    pairs = torch.view_as_complex(x.view(*q.shape[:3], D // 2, 2))
    turned = torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)[:, None])
    truth = turned.flatten(-2)
    step = 2.0 ** (truth.abs().log2().floor() - 7)  # distance of bf16 numbers there
    # half a step is the rounding itself; the float32 arithmetic may tip it to the neighbour
    assert ((new_q.double() - truth).abs() <= 0.51 * step + 1e-6).all()


def test_write_puts_keys_and_values_into_slots_and_nowhere_else(kernel: str) -> None:
    grid, rope = (3, 2, 2), RopeTable(32)
    q, k, qw, kw = make(grid, heads=(2, 2), rows=2)
    v = torch.randn_like(k)
    storage = torch.full((2, 9, 4, 3, 32), float("nan"))
    k_pool, v_pool = storage[0, :, :, :2], storage[1, :, :, 1:]  # strided
    slots = torch.tensor([[4, 0, 7], [8, 1, 2]])
    new_q = qk_norm_rope_write(
        q,
        k,
        v,
        qw,
        kw,
        rope,
        5,
        grid=grid,
        k_pool=k_pool,
        v_pool=v_pool,
        slots=slots,
        backend=kernel,
    )
    expected_q, expected_k = qk_norm_rope(q, k, qw, kw, rope, 5, grid=grid, backend=kernel)
    assert torch.equal(new_q, expected_q)
    assert torch.equal(k_pool[slots].flatten(1, 2), expected_k)
    assert torch.equal(v_pool[slots].flatten(1, 2), v)
    for unused in (3, 5, 6):
        assert storage[:, unused].isnan().all()
    assert storage[0, :, :, 2].isnan().all() and storage[1, :, :, 0].isnan().all()


def test_write_composes_with_the_pool() -> None:
    pool = FramePool(8, 4, 1, 2, 32, dtype=torch.float32)
    rows = [pool.timeline() for _ in range(2)]
    for row in rows:
        row.append(3)
    slots = pool.prepare_write(rows, 0, 3)
    q, k, qw, kw = make((3, 2, 2), heads=(2, 2))
    with torch.no_grad():
        qk_norm_rope_write(
            q, k, k, qw, kw, RopeTable(32), 0,
            grid=(3, 2, 2), k_pool=pool.k(0), v_pool=pool.v(0), slots=slots,
        )  # fmt: skip
    pool.mark_written(0, slots)
    assert torch.equal(pool.v(0)[rows[1].slot(2)], k[1, 8:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["cpu", "triton", "reference"])
def test_bits_of_a_row_do_not_depend_on_the_others(backend: str, dtype) -> None:
    grid, rope = GRIDS["odd"], RopeTable(32)
    q, k, qw, kw = make(grid, rows=4, dtype=dtype)
    grads = make(grid, rows=4, dtype=dtype, seed=1)[:2]

    def run(rows: list[int]) -> tuple[torch.Tensor, ...]:
        leaves = [t[rows].requires_grad_() for t in (q, k)]
        out = qk_norm_rope(*leaves, qw, kw, rope, 2, grid=grid, backend=backend)
        return *out, *torch.autograd.grad(out, leaves, [g[rows] for g in grads])

    together = run([0, 1, 2, 3])
    for rows in ([2, 0, 3, 1], [0], [1], [2], [3]):
        for a, b in zip(together, run(rows), strict=True):
            assert torch.equal(a[rows], b), rows


def test_repeats_give_the_same_bits() -> None:
    grid, rope = (3, 8, 8), RopeTable(32)
    leaves = [t.requires_grad_() for t in make(grid)]

    def run() -> tuple[torch.Tensor, ...]:
        q, k = qk_norm_rope(*leaves, rope, 0, grid=grid, backend="cpu")
        return q, k, *torch.autograd.grad(q.sum() + k.square().sum(), leaves)

    first = run()
    for _ in range(250):
        assert all(map(torch.equal, run(), first))


@pytest.mark.parametrize("backend", ["cpu", "triton", "reference"])
def test_double_backward_is_refused(backend: str) -> None:
    grid = (1, 2, 2)
    leaves = [t.requires_grad_() for t in make(grid)]
    q, _ = qk_norm_rope(*leaves, RopeTable(32), 0, grid=grid, backend=backend)
    (grad,) = torch.autograd.grad(q.square().sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_weight_gradients_do_not_depend_on_threads() -> None:
    grid, rope = (3, 8, 8), RopeTable(32)
    results = []
    threads = torch.get_num_threads()
    for n in (1, 2, 5):
        torch.set_num_threads(n)
        inputs = [t.requires_grad_() for t in make(grid)]
        q, k = qk_norm_rope(*inputs, rope, 0, grid=grid, backend="cpu")
        results.append(torch.autograd.grad((q.sum() + k.square().sum()), inputs))
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_registration_is_sound() -> None:
    grid, rope = (2, 2, 2), RopeTable(32)
    q, k, qw, kw = make(grid, heads=(2, 2))
    cos, sin = rope.tokens(0, grid)
    ops, pool = torch.ops.kvpo, torch.zeros(2, 5, 4, 2, 32)
    slots = torch.tensor([[0, 1], [2, 3]])
    for backend in ("cpu", "triton", "reference"):
        torch.library.opcheck(
            ops.norm_rope_forward.default, (q, k, qw, kw, cos, sin, 1e-6, backend)
        )
        torch.library.opcheck(
            ops.norm_rope_backward.default, (q, k, q, k, qw, kw, cos, sin, 1e-6, backend)
        )
        torch.library.opcheck(
            ops.norm_rope_write.default,
            (q, k, k, qw, kw, cos, sin, pool[0], pool[1], slots, 1e-6, backend),
        )


@pytest.mark.parametrize("backend", ["cpu", "triton", "reference"])
def test_compiles_without_graph_breaks(backend: str) -> None:
    grid, rope = (2, 2, 2), RopeTable(32)
    run = lambda *x: qk_norm_rope(*x, rope, 3, grid=grid, backend=backend)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")

    def with_grads(f):
        inputs = [t.requires_grad_() for t in make(grid)]
        q, k = f(*inputs)
        return q, k, *torch.autograd.grad(q.sum() + k.square().sum(), inputs)

    for a, b in zip(with_grads(run), with_grads(compiled), strict=True):
        assert torch.equal(a, b)


def test_a_table_in_place_keeps_its_memory() -> None:
    grid, rope, fixed = (2, 3, 2), RopeTable(32), RopeTable(32, in_place=True)
    memory = fixed.tokens(0, grid)
    for first in (5, 5, 0, 70):
        angles = fixed.tokens(first, grid)
        assert all(a is m for a, m in zip(angles, memory, strict=True))
        assert all(map(torch.equal, angles, rope.tokens(first, grid)))
    other, wide = fixed.tokens(1, (1, 3, 2)), fixed.tokens(1, grid, wide=True)
    assert all(map(torch.equal, other, rope.tokens(1, (1, 3, 2))))
    assert all(map(torch.equal, wide, rope.tokens(1, grid, wide=True)))
    assert all(map(torch.equal, memory, rope.tokens(70, grid)))  # each grid has memory of its own
    with pytest.raises(ShapeError, match=r"rope table: frame 1024 not in \[0, 1024\)"):
        fixed.tokens(1023, grid)
    assert all(map(torch.equal, memory, rope.tokens(70, grid)))


def test_a_backward_refuses_angles_that_were_overwritten() -> None:
    grid, fixed = (2, 3, 2), RopeTable(32, in_place=True)
    q, k, qw, kw = make(grid, heads=(2, 2))
    out, _ = qk_norm_rope(q.requires_grad_(), k, qw, kw, fixed, 0, grid=grid)
    qk_norm_rope(q, k, qw, kw, fixed, 3, grid=grid)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_slots_that_a_compiled_graph_cannot_check_are_not_written() -> None:
    pool = torch.zeros(2, 2, 4, 4, 1, 16)  # the neighbours of either are the other's
    weight, rope, x = torch.ones(16), RopeTable(16), torch.ones(1, 8, 1, 16)

    @torch.compile(backend="eager")
    def write(slots: torch.Tensor) -> torch.Tensor:
        where = {"k_pool": pool[0, 0], "v_pool": pool[1, 0], "slots": slots}
        return qk_norm_rope_write(x, x, x, weight, weight, rope, 0, grid=(2, 2, 2), **where)

    for slots in ([[0, 4]], [[-1, 0]], [[0, 1 << 40]]):
        with pytest.raises(_native.Error, match="a slot is outside the pool"):
            write(torch.tensor(slots))
    assert not pool.any()
    write(torch.tensor([[3, 0]]))
    assert pool[:, 0].any() and not pool[:, 1].any()


def test_pools_whose_slots_overlap_are_refused() -> None:
    weight, rope, x = torch.ones(16), RopeTable(16), torch.ones(1, 8, 1, 16)
    pool = torch.zeros(1, 4, 1, 16).expand(3, -1, -1, -1)
    where = {"k_pool": pool, "v_pool": pool, "slots": torch.tensor([[0, 1]])}
    with pytest.raises(ShapeError, match="k_pool: slots overlap"):
        qk_norm_rope_write(x, x, x, weight, weight, rope, 0, grid=(2, 2, 2), **where)


def test_keys_and_values_that_lie_in_the_pool_are_refused() -> None:
    """They would be read after they were written, by a thread that comes late."""
    weight, rope, x = torch.ones(16), RopeTable(16), torch.randn(1, 8, 1, 16)
    memory = torch.randn(2 * 3 * 4 + 8, 1, 16)
    k_pool, v_pool = memory[:24].view(2, 3, 4, 1, 16).unbind()
    own = memory[24:].view(1, 8, 1, 16)  # of the same storage, beyond them
    slots = torch.tensor([[0, 2]])

    def write(k: torch.Tensor, v: torch.Tensor) -> None:
        where = {"k_pool": k_pool, "v_pool": v_pool, "slots": slots}
        qk_norm_rope_write(x, k, v, weight, weight, rope, 0, grid=(2, 2, 2), **where)

    before = memory.clone()
    inside = memory[4:12].view(1, 8, 1, 16)  # slots 1 and 2 of the keys
    across = memory[20:28].view(1, 8, 1, 16)  # the last slot of the values, and beyond
    for k, v, match in (
        (inside, x, "k lies in k_pool"),
        (x, inside, "v lies in k_pool"),
        (across, x, "k lies in v_pool"),
        (x, across, "v lies in v_pool"),
    ):
        with pytest.raises(ShapeError, match=f"{match}, which is written to"):
            write(k, v)
    assert torch.equal(memory, before)
    write(own, own)
    assert torch.equal(v_pool[[0, 2]].view(8, 1, 16), own[0])


OUT_OF_MEMORY = """
import resource
import torch
from kvpo_kernels import RopeTable, qk_norm_rope

torch.set_num_threads(1)
q = torch.randn(1, 64, 16384, 16, requires_grad=True)  # 64 MiB; its backward works in 128
k, k_weight = torch.randn(1, 64, 1, 16), torch.ones(16)
weight = torch.ones(16384 * 16, requires_grad=True)
out, _ = qk_norm_rope(q, k, weight, k_weight, RopeTable(16), 0, grid=(1, 8, 8), backend="cpu")
grad = torch.ones_like(out)
call = lambda: torch.autograd.grad(out, (q, weight), grad, retain_graph=True)
expected = call()
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
_, hard = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (used + (96 << 20), hard))
try:
    call()
except torch.OutOfMemoryError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
print(all(map(torch.equal, call(), expected)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits its memory as Linux does")
def test_memory_that_cannot_be_had_is_named_and_a_retry_works() -> None:
    command = [sys.executable, "-c", OUT_OF_MEMORY]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    refused, again = done.stdout.splitlines()
    assert refused == f"cannot allocate {64 * 2 * 16384 * 16 * 4} bytes of working memory"
    assert again == "True"


def test_angles_made_in_another_mode_serve_later() -> None:
    grid = (2, 2, 2)
    for in_place in (False, True):
        for mode in (torch.inference_mode(), FakeTensorMode()):
            rope = RopeTable(32, in_place=in_place)
            with mode:
                qk_norm_rope(*make(grid), rope, 3, grid=grid)
                qk_norm_rope(*make(grid), rope, 5, grid=grid)
            q, k, qw, kw = make(grid)
            out, _ = qk_norm_rope(q.requires_grad_(), k, qw, kw, rope, 3, grid=grid)
            out.sum().backward()
            again = qk_norm_rope(q, k, qw, kw, RopeTable(32), 3, grid=grid)[0]
            assert torch.equal(out, again) and q.grad is not None


@pytest.mark.parametrize("page", [None, torch.int8])
def test_a_write_has_shapes_without_values(page: torch.dtype | None) -> None:
    grid, rope, slots = (2, 2, 2), RopeTable(32), torch.tensor([[0, 1], [2, 4]])
    with FakeTensorMode(allow_non_fake_inputs=True):
        pool = FramePool(5, 4, 1, 2, 32, dtype=torch.float32, page_dtype=page)
        where = {"k_pool": pool.k(0), "v_pool": pool.v(0), "slots": torch.zeros_like(slots)}
        if page:
            where |= {"k_scales": pool.k_scales(0), "v_scales": pool.v_scales(0)}
        q, k, qw, kw = make(grid, heads=(3, 2))
        out = qk_norm_rope_write(q, k, k, qw, kw, rope, 0, grid=grid, **where)
    assert out.shape == q.shape and out.dtype is q.dtype


def test_errors_name_the_argument() -> None:
    grid, rope = (2, 2, 2), RopeTable(32, max_frames=16)
    q, k, qw, kw = make(grid, heads=(2, 2))
    run = lambda *x, first=0, g=grid, **o: qk_norm_rope(*x, rope, first, grid=g, **o)
    with pytest.raises(ShapeError, match=r"rope table: frame 16 not in \[0, 16\)"):
        run(q, k, qw, kw, first=15)
    with pytest.raises(ShapeError, match=r"grid \(2, 2, 3\) has not the 8 tokens of q"):
        run(q, k, qw, kw, g=(2, 2, 3))
    with pytest.raises(ShapeError, match=r"k_weight must be \[64\], got \[32\]"):
        run(q, k, qw, kw[:32])
    with pytest.raises(DtypeError, match=r"k must be torch.float32 .* got torch.float64"):
        run(q, k.double(), qw, kw)
    with pytest.raises(BackendUnavailable, match="takes float32 and bfloat16"):
        run(*(t.double() for t in (q, k, qw, kw)), backend="cpu")
    write = lambda slots, **o: qk_norm_rope_write(
        q, k, k, qw, kw, rope, 0,
        grid=grid, k_pool=pool[0], v_pool=pool[1], slots=torch.tensor(slots), **o,
    )  # fmt: skip
    pool = torch.zeros(2, 5, 4, 2, 32)
    with pytest.raises(ShapeError, match=r"slots\[branch=1, frame=0\] = 5 not in \[0, 5\)"):
        write([[0, 1], [5, 2]])
    with pytest.raises(ShapeError, match=r"slots\[branch=1, frame=1\] = 0 is named twice"):
        write([[0, 1], [2, 0]])
    with pytest.raises(DtypeError, match="slots must be int64"):
        write([[0.0, 1.0], [2.0, 3.0]])
    q = q.requires_grad_()
    with pytest.raises(RuntimeError, match="has no backward"):
        write([[0, 1], [2, 3]])
    assert (pool == 0).all()
    pool = pool.to(torch.float8_e5m2)
    with torch.no_grad(), pytest.raises(NotImplementedError, match=r"k_pool is .*e5m2.*NVFP4"):
        write([[0, 1], [2, 3]])


def test_the_table_of_backends_is_complete() -> None:
    assert [b.name for b in norm_rope.BACKENDS] == ["cpu", "triton", "reference"]
