"""Pools of 8-bit frames: what rounding costs, that attention adds nothing, and the pool's part."""

import pytest
import torch
from attention_checks import (
    assert_same_bits,
    check_quantized,
    output_weight,
    quantized,
    results,
    widened,
)
from cases import ROUTED, RoutedCase

from kvpo_kernels import (
    BackendUnavailable,
    FramePool,
    RopeTable,
    RouteTable,
    explain,
    frame_attention_mass,
    qk_norm_rope,
    qk_norm_rope_write,
    quantize_frames,
    routed_attention,
    text_relevance,
)
from kvpo_kernels.backends.triton import configs
from kvpo_kernels.backends.triton import routed_attention as triton_launcher

PAGES = (torch.int8, torch.float8_e4m3fn)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
each_page = pytest.mark.parametrize("page", PAGES, ids=["int8", "float8"])
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
NAMES = ("ragged", "repeated-frames", "grouped-heads", "odd-tiles", "widest", "half-pairs")
CASES = [case for case in ROUTED if case.name in (*NAMES, "routed-only")]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
RUNNING = [n for n, why in explain("routed_attention", page_dtype=PAGES[0]).items() if why is None]
each_backend = pytest.mark.parametrize("backend", RUNNING)


@each_page
@each_dtype
@each_case
def test_cpu(case: RoutedCase, dtype: torch.dtype, page: torch.dtype, isa: str) -> None:
    check_quantized(case, dtype, page, "cpu")


@each_page
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=["float32", "bfloat16"])
@each_case
def test_triton(case: RoutedCase, dtype: torch.dtype, page: torch.dtype) -> None:
    check_quantized(case, dtype, page, "triton")


@each_page
def test_triton_reads_the_same_through_descriptors_and_conversions(
    page: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = next(c for c in CASES if c.name == "ragged")
    inputs, scales = quantized(case.inputs(torch.float16), page)
    expected = results(inputs, case.table(), "triton", **scales)
    launches = configs.Launches(*3 * [configs.Launch(32, 32, 4, 1, descriptors=True)])
    monkeypatch.setattr(configs, "launches", lambda *_: launches)
    assert_same_bits(results(inputs, case.table(), "triton", **scales), expected)
    # As on Ada and later, which convert float8 themselves.
    monkeypatch.setattr(triton_launcher, "_pages", lambda pool: pool)
    assert_same_bits(results(inputs, case.table(), "triton", **scales), expected)


@each_page
@each_backend
def test_every_code_is_read_exactly(page: torch.dtype, backend: str) -> None:
    """One key has weight 1: the output is the value, and lse the score. 2^-3 scales exactly."""
    codes = torch.arange(256, dtype=torch.uint8).view(page)
    values = codes.float() / 8
    pool = codes.view(1, 1, 1, 256)
    q = torch.eye(256).view(1, 256, 1, 256)  # query d picks element d of the key
    zeros, eighth = torch.zeros(1, 1, 1, 256).to(page), torch.full((1, 1), 0.125)
    for dtype in (torch.float32, torch.bfloat16):
        table = RouteTable([[0]], 1)
        both = {"k_scales": eighth, "v_scales": eighth}
        out = routed_attention(q[:, :1].to(dtype) * 0, zeros, pool, table, backend=backend, **both)
        torch.testing.assert_close(
            out.view(-1).float(), values, rtol=0, atol=0, equal_nan=True, check_dtype=False
        )
        keep = values.isfinite()  # NaN times 0 would reach every query
        keys = torch.where(keep, codes.view(torch.uint8), 0).view(page).view(1, 1, 1, 256)
        args = (q.to(dtype), keys, keys, table)
        _, lse = routed_attention(*args, scale=1.0, return_lse=True, backend=backend, **both)
        # An exp of float32 on the way, with a relative error of 1.4e-7, and a log.
        torch.testing.assert_close(
            lse.view(-1)[keep].float(), values[keep], rtol=3e-7, atol=3e-7, check_dtype=False
        )


@pytest.mark.parametrize("page", PAGES, ids=["int8", "float8"])
def test_bits_of_a_row_depend_on_nothing_else(page: torch.dtype, isa: str) -> None:
    case = next(c for c in CASES if c.name == "grouped-heads")
    inputs, scales = quantized(case.inputs(torch.bfloat16), page)
    rows, weight = case.slot_lists(), output_weight(inputs[0])
    together = results(inputs, case.table(), "cpu", weight, **scales)
    threads = torch.get_num_threads()
    for n in (1, 2, 5):
        torch.set_num_threads(n)
        for b in range(case.B):
            one = (inputs[0][[b]], *inputs[1:3], inputs[3][[b]], inputs[4][[b]])
            alone = results(one, RouteTable([rows[b]], case.F), "cpu", weight[[b]], **scales)
            assert_same_bits(alone, tuple(t[[b]] for t in together))
    torch.set_num_threads(threads)


@each_backend
def test_scales_of_any_sign_and_a_negative_softmax_scale(backend: str) -> None:
    case = next(c for c in CASES if c.name == "ragged")
    inputs, scales = quantized(case.inputs(), torch.int8)
    flipped = {n: s * torch.tensor([1.0, -1.0]) for n, s in scales.items()}
    same = (inputs[0], *(t * torch.tensor([[1], [-1]], dtype=torch.int8) for t in inputs[1:3]))
    for scale in (0.2, -0.2):
        a = results(inputs, case.table(), backend, scale=scale, **flipped)
        b = results((*same, *inputs[3:]), case.table(), backend, scale=scale, **scales)
        for x, y in zip(a, b, strict=True):  # a sign moved: rounding of float32 at most
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6, equal_nan=True)


@each_page
def test_reference_passes_gradcheck(page: torch.dtype) -> None:
    case = next(c for c in CASES if c.name == "ragged")
    inputs, scales = quantized(case.inputs(torch.float64), page)
    q, k_pool, v_pool, k_live, v_live = inputs
    leaves = [t[:, :3].clone().requires_grad_() for t in (q, k_live, v_live)]
    call = lambda q, k, v: routed_attention(q, k_pool, v_pool, case.table(), k, v, **scales)
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


@each_page
@each_backend
def test_registration_and_compilation(page: torch.dtype, backend: str) -> None:
    case = next(c for c in CASES if c.name == "ragged")
    inputs, scales = quantized(tuple(t.nan_to_num() for t in case.inputs()), page)
    q, k_pool, v_pool, k_live, v_live = inputs
    args = (q, k_pool, v_pool, case.table().slots, k_live, v_live, *scales.values())
    ops = torch.ops.kvpo
    out, lse = ops.routed_attention_forward(*args, 0.5, backend)
    backward = (torch.ones_like(out), *args, out, lse, 0.5, backend)
    # test_schema compares inputs with an operator that float8 does not have.
    names = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    checks = ("test_schema", *names) if page is torch.int8 else names
    forward_args = (*args, 0.5, backend)
    torch.library.opcheck(ops.routed_attention_forward.default, forward_args, test_utils=checks)
    torch.library.opcheck(ops.routed_attention_backward.default, backward, test_utils=checks)

    table = case.table()
    call = lambda q: routed_attention(q, k_pool, v_pool, table, backend=backend, **scales)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q), call(q))


@each_page
def test_frames_of_zeros_and_of_nan(page: torch.dtype) -> None:
    x = torch.randn(3, 5, 2, 16)
    x[0] = 0.0
    x[1, 2, 0, 3] = float("nan")
    x[2, 0, 1, 0] = float("inf")
    pages, scales = quantize_frames(x, page)
    assert (scales[0] == 1).all() and not pages[0].float().any()
    assert scales.isnan().tolist() == [[False, False], [True, False], [False, True]]
    pool = (pages, pages)
    for backend in RUNNING:
        for frame, nan_head in ((1, 0), (2, 1)):
            out = routed_attention(
                torch.randn(2, 3, 2, 16),
                *pool,
                RouteTable([[frame], [0]], 3),
                k_scales=scales,
                v_scales=scales,
                backend=backend,
            )
            assert out[0, :, nan_head].isnan().all() and out[0, :, 1 - nan_head].isfinite().all()
            assert out[1].isfinite().all(), "another row"


# The pool ---------------------------------------------------------------------------------------


def pool_of(page: torch.dtype | None, dtype: torch.dtype = torch.float32) -> FramePool:
    return FramePool(12, 8, 2, 2, 16, dtype=dtype, page_dtype=page)


@each_page
@each_dtype
def test_pool_rounds_what_is_written(page: torch.dtype, dtype: torch.dtype) -> None:
    pool, plain = pool_of(page, dtype), pool_of(None, dtype)
    assert pool.dtype is dtype and pool.k(0).dtype is page and plain.k_scales(0) is None
    g = torch.Generator().manual_seed(6)
    frames = torch.randn(2, 3 * 8, 2, 16, generator=g).to(dtype)
    for p in (pool, plain):
        video = p.timeline()
        first = video.append(3)
        for layer in range(2):
            video.write(layer, first, *frames)
        assert video.window(sink=1, local=2) == [0, 1, 2]
    k, v = (quantize_frames(f.unflatten(0, (3, 8)), page) for f in frames)
    for layer in range(2):
        for view, scales, (pages, own) in (
            (pool.k(layer), pool.k_scales(layer), k),
            (pool.v(layer), pool.v_scales(layer), v),
        ):
            assert torch.equal(view[:3].float(), pages.float())
            assert torch.equal(scales[:3], own)
    q = torch.randn(1, 5, 4, 16, generator=g).to(dtype)
    scales = {"k_scales": pool.k_scales(0), "v_scales": pool.v_scales(0)}
    table = RouteTable([[0, 1, 2]], pool.num_slots)
    out = routed_attention(q, pool.k(0), pool.v(0), table, **scales)
    expected = routed_attention(q, plain.k(0), plain.v(0), table)
    # Values of about 1 rounded to a sixteenth at most, and averaged over 24 keys.
    torch.testing.assert_close(out, expected, rtol=0, atol=0.1)


@each_page
def test_copy_on_write_takes_the_scales_along(page: torch.dtype) -> None:
    pool = pool_of(page)
    video = pool.timeline()
    first = video.append(1)
    for layer in range(2):
        video.write(layer, first, *torch.randn(2, 8, 2, 16))
    before = [pool.k_scales(1)[video.slot(0)].clone(), pool.v(1)[video.slot(0)].float()]
    (branch,) = video.fork(1)
    branch.write(0, 0, *torch.randn(2, 8, 2, 16) * 9)
    assert branch.slot(0) != video.slot(0) and pool.stats().copied_slots == 1
    for timeline in (branch, video):  # layer 1 came along, and is still there
        slot = timeline.slot(0)
        assert torch.equal(pool.k_scales(1)[slot], before[0])
        assert torch.equal(pool.v(1)[slot].float(), before[1])
    assert not torch.equal(pool.k_scales(0)[branch.slot(0)], pool.k_scales(0)[video.slot(0)])


@each_page
def test_memory_is_half_of_sixteen_bits(page: torch.dtype) -> None:
    sizes = (4, 1560, 1, 12, 128)  # frames of Wan-1.3B
    plain, small = FramePool(*sizes), FramePool(*sizes, page_dtype=page)
    ratio = small.stats().bytes / plain.stats().bytes
    assert 0.5 < ratio <= 0.52 and small.stats().slot_bytes * 4 == small.stats().bytes


@each_page
def test_context_pass_writes_quantized_frames(page: torch.dtype) -> None:
    grid, pool = (2, 2, 4), pool_of(page)
    q, k, v = torch.randn(3, 1, 16, 2, 16)
    weight, rope = torch.randn(32), RopeTable(16)
    videos = [pool.timeline() for _ in range(3)]
    for video in videos:
        video.append(2)
    slots = pool.prepare_write(videos[1:2], 0, 2)
    with torch.no_grad():
        new_q = qk_norm_rope_write(
            *(q, k, v, weight, weight, rope, 5),
            grid=grid,
            k_pool=pool.k(1),
            v_pool=pool.v(1),
            slots=slots,
            k_scales=pool.k_scales(1),
            v_scales=pool.v_scales(1),
        )
    expected_q, expected_k = qk_norm_rope(q, k, weight, weight, rope, 5, grid=grid)
    assert torch.equal(new_q, expected_q)
    for view, scales, x in (
        (pool.k(1), pool.k_scales(1), expected_k),
        (pool.v(1), pool.v_scales(1), v),
    ):
        pages, own = quantize_frames(x.reshape(2, 8, 2, 16), page)
        assert torch.equal(view.float()[slots.tensor[0]], pages.float())
        assert torch.equal(scales[slots.tensor[0]], own)
    untouched = [s for s in range(12) if s not in slots[0]]
    assert not pool.k(1).float()[untouched].any() and (pool.k_scales(1)[untouched] == 1).all()


@each_page
def test_scores_of_frames_see_the_scales(page: torch.dtype) -> None:
    case = next(c for c in CASES if c.name == "ragged")
    inputs, scales = quantized(tuple(t.nan_to_num() for t in case.inputs()), page)
    wide = widened(inputs, scales, torch.float32)
    table = case.table()
    _, lse = routed_attention(*wide[:3], table, *wide[3:], return_lse=True)
    mass = frame_attention_mass(inputs[0], inputs[1], table, lse, k_scales=scales["k_scales"])
    torch.testing.assert_close(mass, frame_attention_mass(*wide[:2], table, lse))
    text = torch.randn(6, 2, 64)
    relevance = text_relevance(text, inputs[1], range(4), k_scales=scales["k_scales"])
    torch.testing.assert_close(relevance, text_relevance(text, wide[1], range(4)))


# Faults -----------------------------------------------------------------------------------------


def arguments(**changes: object) -> dict[str, object]:
    rng = torch.Generator().manual_seed(0)
    pages, scales = quantize_frames(torch.randn(3, 7, 2, 16, generator=rng), torch.int8)
    return {
        "q": torch.randn(1, 5, 4, 16, generator=rng),
        "k_pool": pages,
        "v_pool": pages,
        "table": RouteTable([[1]], 3),
        "k_scales": scales,
        "v_scales": scales,
        **changes,
    }


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"k_scales": None}, ValueError, "k_scales must be given: k_pool is torch.int8"),
        ({"v_scales": None}, ValueError, "v_scales must be given"),
        ({"k_scales": torch.ones(2, 3)}, ValueError, r"k_scales must be \[3, 2\], got \[2, 3\]"),
        ({"v_scales": torch.ones(3, 2).double()}, TypeError, "v_scales must be float32 on cpu"),
        ({"k_scales": torch.ones(2, 3).T}, ValueError, "k_scales must be contiguous"),
        ({"k_scales": torch.ones(3, 2, device="meta")}, TypeError, "got torch.float32 on meta"),
        ({"k_scales": torch.ones(3, 2, requires_grad=True)}, ValueError, "requires grad"),
        ({"v_pool": torch.ones(3, 7, 2, 16)}, TypeError, "v_pool must be torch.int8 like k_pool"),
        (
            {"k_pool": torch.ones(3, 7, 2, 16), "v_pool": torch.ones(3, 7, 2, 16)},
            ValueError,
            "go with quantized pools, k_pool is torch.float32",
        ),
        (
            {"k_pool": torch.ones(3, 7, 2, 16).to(torch.float8_e5m2)},
            NotImplementedError,
            "int8 and float8_e4m3fn are supported, other formats",
        ),
        ({"backend": "gluon"}, NotImplementedError, "gluon"),
    ],
)
def test_refused_with_a_name(
    changes: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        routed_attention(**arguments(**changes))


def test_backends_without_quantized_pages_say_so() -> None:
    where = {"device": "cuda", "capability": (9, 0), "dtype": torch.bfloat16, "head_size": 128}
    reasons = explain("routed_attention", **where, page_dtype=torch.int8)
    for name, other in (("gluon", "for triton 3.6"), ("flash_attn", "not installed")):
        assert other in reasons[name] or "got torch.int8" in reasons[name]
    assert reasons["reference"] is None


def test_bad_arguments_of_a_quantized_pool() -> None:
    with pytest.raises(TypeError, match="page_dtype must be None or of"):
        pool_of(torch.float8_e5m2)
    pool = pool_of(torch.int8)
    video = pool.timeline()
    video.append(1)
    with pytest.raises(TypeError, match=r"k must be torch\.float32"):  # in what is written
        video.write(0, 0, *torch.ones(2, 8, 2, 16, dtype=torch.int8))


def test_only_these_backends_run_here() -> None:
    assert {"cpu", "triton", "reference"} <= set(RUNNING)
    with pytest.raises(BackendUnavailable):
        routed_attention(**arguments(backend="flash_attn"))
