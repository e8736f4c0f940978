"""`routed_attention` on a GPU. Collected only where there is one; see `tests/conftest.py`."""

from typing import Any

import pytest
import torch
from attention_checks import (
    Inputs,
    assert_accuracy,
    assert_same_bits,
    check_accuracy,
    check_bits_of_rows,
    check_quantized,
    output_weight,
    results,
)
from cases import ROUTED, RoutedCase
from torch import Tensor

from kvpo_kernels import RouteTable, explain, routed_attention

BOTH = (torch.bfloat16, torch.float16)
RUNNING = [
    name
    for name, why in explain("routed_attention", device="cuda", dtype=torch.bfloat16).items()
    if why is None and name != "reference"
]
each_backend = pytest.mark.parametrize("backend", RUNNING)
# flash-attn's launcher reads the routes on the host.
each_asynchronous = pytest.mark.parametrize("backend", [b for b in RUNNING if b != "flash_attn"])
each_dtype = pytest.mark.parametrize("dtype", BOTH, ids=["bfloat16", "float16"])

# Tiles are 128 by 128: several of each kind, cut off at odd places.
HOPPER = (
    RoutedCase("whole", B=2, Q=300, H=2, D=128, F=5, T=256, R=3, L=128),
    RoutedCase("tails", B=3, Q=129, H=4, D=64, F=9, T=24, R=7, L=0, kv_heads=2),
    RoutedCase("both", B=4, Q=200, H=2, D=128, F=6, T=152, R=3, L=150, kv_heads=1, ragged=True),
    RoutedCase("broken-boxes", B=2, Q=17, H=3, D=64, F=6, T=263, R=4, L=129, kv_heads=1),
    RoutedCase("one-token", B=3, Q=5, H=1, D=64, F=40, T=1, R=33, L=1, ragged=True),
    RoutedCase("live-only", B=2, Q=65, H=2, D=128, F=1, T=3, R=0, L=130),
    RoutedCase("no-keys", B=4, Q=3, H=1, D=64, F=5, T=130, R=3, ragged=True),
    RoutedCase("wan", B=2, Q=1560, H=2, D=128, F=6, T=1560, R=4, L=1560),
)


def on_gpu(case: RoutedCase, dtype: torch.dtype) -> tuple[Inputs, RouteTable]:
    table = RouteTable(case.slot_lists(), case.F, "cuda", allow_duplicates=case.repeats)
    return tuple(t.cuda() for t in case.inputs(dtype)), table


@each_dtype
@each_backend
@pytest.mark.parametrize("case", HOPPER, ids=lambda c: c.name)
def test_as_accurate_as_torch(case: RoutedCase, dtype: torch.dtype, backend: str) -> None:
    check_accuracy(case, dtype, backend, "cuda")


@pytest.mark.parametrize("dtype", [*BOTH, torch.float32], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", ROUTED, ids=lambda c: c.name)
def test_triton_takes_every_shape(case: RoutedCase, dtype: torch.dtype) -> None:
    check_accuracy(case, dtype, "triton", "cuda")


@each_dtype
@pytest.mark.parametrize("page", [torch.int8, torch.float8_e4m3fn], ids=["int8", "float8"])
@pytest.mark.parametrize("case", HOPPER, ids=lambda c: c.name)
def test_triton_reads_quantized_frames(
    case: RoutedCase, dtype: torch.dtype, page: torch.dtype
) -> None:
    check_quantized(case, dtype, page, "triton", "cuda")


@each_dtype
@each_backend
def test_bits_of_a_row(dtype: torch.dtype, backend: str) -> None:
    check_bits_of_rows(dtype, backend, "cuda", Q=200, L=200, heads=(4, 2), D=64)


@each_backend
def test_twenty_repeats_give_the_same_bits(backend: str) -> None:
    inputs, table = on_gpu(HOPPER[7], torch.bfloat16)
    first = results(inputs, table, backend)
    for _ in range(20):
        assert_same_bits(results(inputs, table, backend), first)


def guarded(tensor: Tensor, guard: int = 4096) -> tuple[Tensor, Tensor]:
    """The tensor in the middle of a larger one that is NaN around it, and that one."""
    arena = torch.full((tensor.numel() + 2 * guard,), float("nan"), dtype=tensor.dtype).cuda()
    inside = arena[guard:-guard].view(tensor.shape)
    inside.copy_(tensor)
    return inside, arena


@each_backend
def test_what_lies_around_is_neither_read_nor_written(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = HOPPER[2]
    inputs, table = on_gpu(case, torch.bfloat16)
    expected = results(inputs, table, backend)
    around = tuple(guarded(t)[0] for t in inputs)
    arenas: list[tuple[Tensor, Tensor]] = []

    def allocate(self: Tensor, *size: Any, **options: Any) -> Tensor:
        shape = torch.Size(size[0] if len(size) == 1 and not isinstance(size[0], int) else size)
        blank = torch.zeros(shape, dtype=options.get("dtype", self.dtype), device=self.device)
        if not blank.is_floating_point():
            return blank
        arenas.append(guarded(blank))
        arenas[-1][0].fill_(float("nan"))
        return arenas[-1][0]

    monkeypatch.setattr(Tensor, "new_empty", allocate)
    actual = results(around, table, backend)
    assert len(arenas) >= 4
    assert_same_bits(actual, expected)
    for inside, arena in arenas:
        first = inside.storage_offset()
        assert arena[:first].isnan().all() and arena[first + inside.numel() :].isnan().all()


@each_backend
def test_pools_beyond_two_gibibytes(backend: str) -> None:
    F, T, H, D = 3, 200, 2, 128
    stride = (1 << 30) + 4096  # elements: slot 2 begins past 4 GiB
    arena = torch.empty(2 * stride + T * H * D, dtype=torch.bfloat16, device="cuda")
    far = arena.as_strided((F, T, H, D), (stride, H * D, D, 1))
    near = torch.randn(F, T, H, D, device="cuda").bfloat16()
    far.copy_(near)
    q, k, v = torch.randn(3, 1, 130, H, D, device="cuda").bfloat16()
    table = RouteTable([[2, 0]], F, "cuda")  # both ends of the pool
    assert_same_bits(
        results((q, far, far, k, v), table, backend), results((q, near, near, k, v), table, backend)
    )


@each_backend
def test_pools_of_several_layers(backend: str) -> None:
    layers = torch.randn(5, 3, 200, 2, 64, device="cuda").bfloat16()  # slot, layer, token
    q, k, v = torch.randn(3, 2, 130, 2, 64, device="cuda").bfloat16()
    table = RouteTable([[4, 0], [1]], 5, "cuda")
    view = layers[:, 1]
    assert_same_bits(
        results((q, view, view, k, v), table, backend),
        results((q, view.contiguous(), view.contiguous(), k, v), table, backend),
    )


@each_asynchronous
def test_a_captured_graph_follows_the_table(backend: str) -> None:
    case = HOPPER[2]
    (q, k_pool, v_pool, k_live, v_live), table = on_gpu(case, torch.bfloat16)
    k_pool, v_pool = k_pool.nan_to_num(), v_pool.nan_to_num()
    call = lambda: routed_attention(q, k_pool, v_pool, table, k_live, v_live, backend=backend)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = call()
    for rows in ([[0], [1, 2], [], [5, 4, 3]], [[5, 0, 1], [2], [3, 4], []]):
        table.update(rows)
        graph.replay()
        torch.cuda.synchronize()
        with torch.no_grad():
            assert torch.equal(out, call())


@each_backend
def test_compiles_without_graph_breaks(backend: str) -> None:
    case = HOPPER[0]
    (q, k_pool, v_pool, k_live, v_live), table = on_gpu(case, torch.bfloat16)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return routed_attention(q, k_pool, v_pool, table, k, v, backend=backend)

    def run(f: Any) -> Inputs:
        leaves = [t.detach().requires_grad_() for t in (q, k_live, v_live)]
        out = f(*leaves)
        return out, *torch.autograd.grad(out, leaves, output_weight(out))

    for actual, expected in zip(run(torch.compile(call, fullgraph=True)), run(call), strict=True):
        assert torch.equal(actual, expected)


@each_asynchronous
def test_streams_and_no_synchronization(backend: str) -> None:
    case = HOPPER[1]
    (q, k_pool, v_pool, k_live, v_live), table = on_gpu(case, torch.bfloat16)
    call = lambda: routed_attention(q, k_pool, v_pool, table, k_live, v_live, backend=backend)
    expected = call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(torch.cuda.Stream()):
            out = call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert torch.equal(out, expected)


@pytest.mark.parametrize("scale", [-0.3, 0.0, 2.0])
@each_backend
def test_any_scale(scale: float, backend: str) -> None:
    case = HOPPER[2]
    inputs, table = on_gpu(case, torch.bfloat16)
    cpu = tuple(t.cpu() for t in inputs)
    actual = tuple(t.cpu() for t in results(inputs, table, backend, scale=scale))
    assert_accuracy(case, cpu, actual, scale=scale)
