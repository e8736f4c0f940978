"""`routed_attention` on every backend and instruction set: values, bits, and how torch sees it."""

import math
import mmap
import threading
from collections.abc import Iterator

import pytest
import torch
from attention_checks import (
    NAMES,
    Inputs,
    assert_accuracy,
    assert_same_bits,
    check_accuracy,
    check_bits_of_rows,
    output_weight,
    results,
)
from cases import ROUTED, RoutedCase
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from kvpo_kernels import RouteTable, _native, explain, routed_attention
from kvpo_kernels.backends.triton import configs
from kvpo_kernels.bench.machine import peak_extra_bytes
from kvpo_kernels.ops import routed_attention as op

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BY_NAME = {case.name: case for case in ROUTED}
each_case = pytest.mark.parametrize("case", ROUTED, ids=lambda c: c.name)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
RUNNING = [name for name, why in explain("routed_attention").items() if why is None]
each_backend = pytest.mark.parametrize("backend", RUNNING)


@pytest.fixture(autouse=True)
def restore_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@each_dtype
@each_case
def test_cpu_is_as_accurate_as_torch(case: RoutedCase, dtype: torch.dtype, isa: str) -> None:
    check_accuracy(case, dtype, "cpu")


@each_dtype
@each_case
def test_triton_is_as_accurate_as_torch(case: RoutedCase, dtype: torch.dtype) -> None:
    check_accuracy(case, dtype, "triton")


@each_case
def test_triton_reads_the_same_through_descriptors(
    case: RoutedCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, table = case.inputs(torch.float16), case.table()
    by_pointer = results(inputs, table, "triton")
    launches = configs.Launches(*3 * [configs.Launch(32, 32, 4, 1, descriptors=True)])
    monkeypatch.setattr(configs, "launches", lambda *_: launches)
    assert_same_bits(results(inputs, table, "triton"), by_pointer)


@pytest.mark.parametrize("scale", [-0.3, 0.0, 2.0])
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_any_scale(scale: float, backend: str) -> None:
    case = BY_NAME["ragged"]
    inputs = case.inputs()
    actual = results(inputs, case.table(), backend, scale=scale)
    assert_accuracy(case, inputs, actual, scale)


def test_reference_by_hand() -> None:
    # One query, keys log 2 apart after scaling: weights 1/3 and 2/3.
    q = torch.tensor([[[[1.0]]]], dtype=torch.float64)
    k_pool = torch.tensor([0.0, 99.0], dtype=torch.float64).view(2, 1, 1, 1)
    v_pool = torch.tensor([3.0, 99.0], dtype=torch.float64).view(2, 1, 1, 1)
    live_k = torch.full((1, 1, 1, 1), 2.0, dtype=torch.float64).log()
    live_v = torch.full((1, 1, 1, 1), 6.0, dtype=torch.float64)
    table = RouteTable([[0]], 2)
    out, lse = routed_attention(q, k_pool, v_pool, table, live_k, live_v, return_lse=True)
    torch.testing.assert_close(out.item(), 5.0, rtol=1e-15, atol=0)  # rounding of float64
    torch.testing.assert_close(lse.exp().item(), 3.0, rtol=1e-15, atol=0)


@pytest.mark.parametrize("name", ["ragged", "no-keys", "repeated-frames"])
def test_reference_passes_gradcheck(name: str) -> None:
    case = BY_NAME[name]
    q, k_pool, v_pool, k_live, v_live = case.inputs(torch.float64)
    leaves = [t[:, :3].clone().requires_grad_() for t in (q, k_live, v_live)]
    call = lambda q, k, v: routed_attention(q, k_pool, v_pool, case.table(), k, v)
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


@each_backend
def test_rows_without_keys_are_zero(backend: str) -> None:
    case = BY_NAME["no-keys"]
    out, lse, grad_q, *_ = results(case.inputs(), case.table(), backend)
    empty = [b for b, row in enumerate(case.slot_lists()) if not row]
    assert empty
    for b in empty:
        assert not out[b].any() and not grad_q[b].any() and (lse[b] == float("-inf")).all()


@each_backend
@pytest.mark.parametrize(("B", "Q"), [(0, 3), (2, 0)])
def test_empty_batches_and_queries(B: int, Q: int, backend: str) -> None:
    q, pool, live = torch.randn(B, Q, 2, 16), torch.randn(3, 4, 2, 16), torch.randn(B, 5, 2, 16)
    out, lse, *grads = results((q, pool, pool, live, live), RouteTable([[0]] * B, 3), backend)
    assert out.shape == q.shape and lse.shape == (B, 2, Q)
    assert [g.shape for g in grads] == [q.shape, live.shape, live.shape]
    assert not any(g.any() for g in grads)


def test_long_sums_are_as_accurate(isa: str) -> None:
    """Values that do not cancel, of as many keys and queries as a real block has: a sum one after
    the other of all terms would be off by ten times what torch is."""
    case = RoutedCase("long", B=1, Q=700, H=1, D=32, F=31, T=300, R=30, L=300)
    q, k_pool, v_pool, k_live, v_live = case.inputs(torch.float32)
    inputs = (0.3 * q, k_pool, v_pool + 1, k_live, v_live + 1)
    assert_accuracy(case, inputs, results(inputs, case.table(), "cpu"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_infinite_key_reaches_nothing_but_its_gradient(dtype: torch.dtype, isa: str) -> None:
    """Also where the last query is paired with a lane past it."""
    for Q in (4, 5, 47):
        case = RoutedCase("inf", B=1, Q=Q, H=1, D=32, F=2, T=5, R=1, L=3)
        q, k_pool, v_pool, k_live, v_live = case.inputs(dtype)
        k_live[0, 1, 0, 0] = -math.inf
        inputs = (q.abs() + 0.1, k_pool, v_pool, k_live, v_live)
        ours, same = (results(inputs, case.table(), name) for name in ("cpu", "reference"))
        for name, a, b in zip(NAMES, ours, same, strict=True):
            assert torch.equal(a.isnan(), b.isnan()), (name, Q)


def test_nothing_of_anything_has_gradients() -> None:
    """The gradient of a sum is expanded, with strides of 0."""
    for sizes in ({"B": 0}, {"Q": 0}, {"L": 0}, {"R": 0, "L": 0}):
        case = RoutedCase(
            "none", **({"B": 2, "Q": 3, "H": 2, "D": 16, "F": 2, "T": 5} | {"R": 1} | sizes)
        )
        q, k_pool, v_pool, k_live, v_live = case.inputs(torch.float32)
        leaves = [t.requires_grad_() for t in (q, k_live, v_live)]
        out = routed_attention(q, k_pool, v_pool, case.table(), k_live, v_live, backend="cpu")
        out.sum().backward()
        assert all(t.grad.isfinite().all() for t in leaves), sizes


@pytest.mark.parametrize("backend", ["cpu", "triton", "reference"])
def test_tensors_whose_memory_is_not_what_they_are(backend: str) -> None:
    """Views with a negative bit, and zeros without memory: the dispatcher resolves them."""
    case = RoutedCase("neg", B=1, Q=5, H=2, D=16, F=3, T=4, R=2, L=2)
    inputs, table = case.inputs(torch.float32), case.table()
    negative = tuple(torch._neg_view(-t) for t in inputs)
    assert all(t.is_neg() for t in negative)
    plain = results(inputs, table, backend)
    assert_same_bits(results(negative, table, backend), plain)
    weight = output_weight(plain[0])
    assert_same_bits(results(inputs, table, backend, torch._neg_view(-weight)), plain)
    nothing = torch._efficientzerotensor(plain[0].shape)
    assert not results(inputs, table, backend, nothing)[2].any()


@each_dtype
def test_bits_of_a_row_depend_on_nothing_else(dtype: torch.dtype, isa: str) -> None:
    check_bits_of_rows(dtype, "cpu", threads=(1, 2, 3, 16))


@each_dtype
def test_bits_of_a_row_in_triton(dtype: torch.dtype) -> None:
    check_bits_of_rows(dtype, "triton", Q=35, L=40, heads=(2, 1))  # two tiles of each


def test_bits_of_a_row_on_the_reference() -> None:
    case = BY_NAME["ragged"]
    inputs, rows = case.inputs(), case.slot_lists()
    weight = output_weight(inputs[0])
    together = results(inputs, case.table(), "reference", weight)
    for b in range(case.B):
        one = (inputs[0][[b]], *inputs[1:3], inputs[3][[b]], inputs[4][[b]])
        alone = results(one, RouteTable([rows[b]], case.F), "reference", weight[[b]])
        assert_same_bits(alone, tuple(t[[b]] for t in together))
    order = [*range(case.B)][::-1]
    turned = (inputs[0][order], *inputs[1:3], inputs[3][order], inputs[4][order])
    table = RouteTable([rows[b] for b in order], case.F)
    assert_same_bits(
        results(turned, table, "reference", weight[order]), tuple(t[order] for t in together)
    )


@each_dtype
def test_twenty_repeats_give_the_same_bits(dtype: torch.dtype) -> None:
    case = BY_NAME["many-chunks"]
    torch.set_num_threads(2)
    first = results(case.inputs(dtype), case.table(), "cpu")
    for _ in range(20):
        assert_same_bits(results(case.inputs(dtype), case.table(), "cpu"), first)


def test_calls_from_four_threads_do_not_meet() -> None:
    torch.set_num_threads(2)
    cases = [BY_NAME[n] for n in ("many-chunks", "odd-tiles", "grouped-heads", "ragged")]
    expected = [results(c.inputs(), c.table(), "cpu") for c in cases]
    actual: dict[int, list[Inputs]] = {}

    def work(i: int) -> None:
        actual[i] = [results(cases[i].inputs(), cases[i].table(), "cpu") for _ in range(5)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for i in range(4):
        for got in actual[i]:
            assert_same_bits(got, expected[i])


@each_dtype
@each_backend
def test_any_strides(dtype: torch.dtype, backend: str) -> None:
    case = BY_NAME["grouped-heads"]
    q, k_pool, v_pool, k_live, v_live = inputs = case.inputs(dtype)
    arena = torch.full((3, case.T + 2, case.kv_heads + 1, case.F, 2, case.D + 2), float("nan"))
    arena = arena.to(dtype)  # NaN around every vector of the pool
    layer = arena[1, 1:-1, 1:, :, :, 1:-1]
    k_view, v_view = (layer[..., i, :].permute(2, 0, 1, 3) for i in (0, 1))
    k_view.copy_(k_pool)
    v_view.copy_(v_pool)
    wide = lambda t: torch.stack([t, t], dim=2)[:, :, 1]
    strided = (q.transpose(1, 2).contiguous().transpose(1, 2), k_view, v_view)
    strided += (wide(k_live), v_live.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0))
    weight = output_weight(q)
    out = results(strided, case.table(), backend, weight.transpose(0, 3).clone().transpose(0, 3))
    assert_same_bits(out, results(inputs, case.table(), backend, weight))


def test_expanded_output_gradient() -> None:
    case = BY_NAME["routed-only"]
    q, k_pool, v_pool, *_ = case.inputs()
    grads = []
    for backend in ("cpu", "reference"):
        leaf = q.clone().requires_grad_()
        routed_attention(leaf, k_pool, v_pool, case.table(), backend=backend).sum().backward()
        grads.append(leaf.grad)
    # The sum's gradient is 0 in theory wherever values are alike; rounding of float32 otherwise.
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)


@each_dtype
def test_frames_beyond_two_gibibytes(dtype: torch.dtype, isa: str) -> None:
    # Lazily mapped: only the pages of two frames are ever touched.
    stride = (1 << 31) // dtype.itemsize + 4096
    arena = torch.frombuffer(mmap.mmap(-1, (2 * stride + 4096) * dtype.itemsize), dtype=dtype)
    pool = arena.as_strided((3, 5, 1, 32), (stride, 32, 32, 1))
    small = torch.randn(3, 5, 1, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    for f in (1, 2):
        pool[f] = small[f]
    q, live = torch.randn(1, 4, 1, 32).to(dtype), torch.randn(1, 2, 1, 32).to(dtype)
    table = RouteTable([[2, 1]], 3)
    far = results((q, pool, pool, live, live), table, "cpu")
    assert_same_bits(far, results((q, small, small, live, live), table, "cpu"))


def test_working_memory_is_bounded() -> None:
    torch.set_num_threads(2)
    pool = torch.zeros(2, 8, 4096, 4, 64)
    q, live = torch.zeros(4, 48, 4, 64), torch.zeros(4, 4096, 4, 64)
    table = RouteTable([list(range(8))] * 4, 8)  # a gathered copy would be 268 MB
    leaves = [q.requires_grad_(), live.requires_grad_()]

    def call() -> Inputs:
        out = routed_attention(leaves[0], *pool, table, leaves[1], live, backend="cpu")
        return out, *torch.autograd.grad(out.sum(), leaves)

    assert peak_extra_bytes(call) - live.nbytes <= 32 << 20  # its grad_v, which is not asked for


# How torch sees it -------------------------------------------------------------------------------


@each_backend
def test_registration_is_sound(backend: str) -> None:
    case = BY_NAME["ragged"]
    q, k_pool, v_pool, k_live, v_live = (t.nan_to_num() for t in case.inputs())
    args = (q, k_pool, v_pool, case.table().slots, k_live, v_live, None, None)
    ops = torch.ops.kvpo
    out, lse = ops.routed_attention_forward(*args, 0.5, backend)
    torch.library.opcheck(ops.routed_attention_forward.default, (*args, 0.5, backend))
    backward = (torch.ones_like(out), *args, out, lse, 0.5, backend)
    torch.library.opcheck(ops.routed_attention_backward.default, backward)


def test_what_a_gpus_backend_asks_of_strides_is_traced() -> None:
    """That branch of the call is not reached here."""
    whole = torch.compile(op._in_whole_units, fullgraph=True, backend="eager")
    x = torch.zeros(4, 2, 3, 64, dtype=torch.bfloat16)
    assert whole(x) and whole(x[1:]) and not whole(torch.zeros(4, 2, 3, 60, dtype=torch.bfloat16))


@each_backend
@pytest.mark.parametrize("case", [BY_NAME["ragged"], BY_NAME["routed-only"]], ids=lambda c: c.name)
def test_compiles_without_graph_breaks(case: RoutedCase, backend: str) -> None:
    q, k_pool, v_pool, k_live, v_live = case.inputs()
    table = case.table()

    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        live = (k, v) if case.L else (None, None)
        return routed_attention(q, k_pool, v_pool, table, *live, return_lse=True, backend=backend)

    def run(f: object) -> Inputs:
        leaves = [t.detach().requires_grad_() for t in (q, k_live, v_live)]
        out, lse = f(*leaves)
        assert out.requires_grad and not lse.requires_grad
        return (
            out,
            lse,
            *torch.autograd.grad(out, leaves, output_weight(out), materialize_grads=True),
        )

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert_same_bits(run(compiled), run(call))


@each_backend
def test_inference_mode_and_no_grad(backend: str) -> None:
    case = BY_NAME["ragged"]
    q, k_pool, v_pool, k_live, v_live = case.inputs()
    expected = routed_attention(
        q.requires_grad_(), k_pool, v_pool, case.table(), k_live, v_live, backend=backend
    )
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            out = routed_attention(q, k_pool, v_pool, case.table(), k_live, v_live, backend=backend)
            assert torch.equal(out, expected) and not out.requires_grad


@pytest.mark.parametrize(("policy", "forwards"), [("save", 1), ("recompute", 2)])
def test_checkpoint_policy_can_save_the_attention(
    policy: str, forwards: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvpo_kernels.backends.native import routed_attention as launcher

    case = BY_NAME["ragged"]
    q, k_pool, v_pool, k_live, v_live = case.inputs()
    table, calls, real = case.table(), [], launcher.forward
    monkeypatch.setattr(launcher, "forward", lambda *args: (calls.append(1), real(*args))[1])
    must = CheckpointPolicy.MUST_SAVE if policy == "save" else CheckpointPolicy.MUST_RECOMPUTE

    def decide(_ctx: object, op: object, *_a: object, **_k: object) -> CheckpointPolicy:
        mine = op is torch.ops.kvpo.routed_attention_forward.default
        return must if mine else CheckpointPolicy.MUST_RECOMPUTE

    def layer(q: Tensor) -> Tensor:
        attended = routed_attention(q.sin(), k_pool, v_pool, table, k_live, v_live, backend="cpu")
        return attended.cos()

    leaf = q.requires_grad_()
    (expected,) = torch.autograd.grad(layer(leaf).sum(), leaf)
    calls.clear()
    out = checkpoint(
        layer,
        leaf,
        use_reentrant=False,
        context_fn=lambda: create_selective_checkpoint_contexts(decide),
    )
    (actual,) = torch.autograd.grad(out.sum(), leaf)
    assert len(calls) == forwards
    assert torch.equal(actual, expected)


def test_meta_tensors_have_the_right_shapes() -> None:
    q, pool = torch.empty(2, 5, 4, 16, device="meta"), torch.empty(3, 7, 2, 16, device="meta")
    slots, live = torch.empty(2, 1, dtype=torch.int32, device="meta"), q[:, :0, :2]
    forward = torch.ops.kvpo.routed_attention_forward
    out, lse = forward(q, pool, pool, slots, live, live, None, None, 0.5, "cpu")
    assert out.shape == q.shape and out.is_contiguous() and lse.shape == (2, 4, 5)


def test_peak_probe_counts_all_threads() -> None:
    one = _native.peak_flops(pairs=False, threads=1, iterations=10)
    assert _native.peak_flops(pairs=False, threads=2, iterations=10) == 2 * one > 0
