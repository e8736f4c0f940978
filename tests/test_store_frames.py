"""Every backend of `store_frames` gives the reference's bits, in its slots and nowhere else."""

import math

import pytest
import torch
from torch import Tensor

from kvpo_kernels import BackendUnavailable, FramePool, quantize_frames
from kvpo_kernels.errors import DtypeError, ShapeError
from kvpo_kernels.ops import store_frames

PAGES = (torch.int8, torch.float8_e4m3fn)
each_page = pytest.mark.parametrize("page", PAGES, ids=["int8", "float8"])
each_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:]
)
BACKENDS = ("cpu", "triton", "reference")


def bits(pages: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """To compare: as integers, one NaN like another."""
    codes = pages.view(torch.uint8).clone()
    if pages.dtype is torch.float8_e4m3fn:
        codes[(codes & 0x7F) == 0x7F] = 0x7F
    return codes, scales.nan_to_num(nan=-1.0)


def frames_of(dtype: torch.dtype, tokens: int, head_size: int) -> Tensor:
    """Heads that differ in size, with zeros, subnormal codes, NaN and infinity among them."""
    rng = torch.Generator().manual_seed(tokens)
    x = torch.randn(5, tokens, 3, head_size, generator=rng)
    x *= torch.randn(x.shape, generator=rng).mul(3).exp()  # many sizes within a head
    x *= torch.tensor([1e-4, 1.0, 30.0])[:, None]
    x[1, :, 0] = 0.0
    x[2, -1, 1, -1] = float("nan")
    x[3, 0, 2, 0] = -float("inf")
    x[4, :, 1] *= 1e-36  # below what a scale may be; subnormal or zero in 16 bits
    return x.to(dtype)


def assert_bits_of_the_reference(
    backend: str, page: torch.dtype, dtype: torch.dtype, tokens: int, head_size: int
) -> None:
    frames = frames_of(dtype, tokens, head_size)
    slots = torch.tensor([6, 0, 3, 2, 5])
    results = []
    for name in (backend, "reference"):
        memory = torch.zeros(7, tokens, 4, head_size + 3, dtype=torch.int8)
        pool = memory.view(page)[:, :, 1:, :head_size]  # strided
        scales = torch.full((7, 3), -2.0)
        store_frames.store_frames(pool, scales, slots, frames, name)
        assert (scales[[1, 4]] == -2).all()
        results.append((memory.view(page), scales))
    for ours, expected in zip(*(bits(*r) for r in results), strict=True):
        assert torch.equal(ours, expected)
    pages, scales = quantize_frames(frames, page, backend=backend)
    for ours, expected in zip(
        bits(pages, scales), bits(*quantize_frames(frames, page, backend="reference")), strict=True
    ):
        assert torch.equal(ours, expected)


@each_page
@each_dtype
@pytest.mark.parametrize(("tokens", "head_size"), [(1, 1), (7, 16), (70, 37), (130, 128)])
def test_cpu(page: torch.dtype, dtype: torch.dtype, tokens: int, head_size: int, isa: str) -> None:
    assert_bits_of_the_reference("cpu", page, dtype, tokens, head_size)


@each_page
@each_dtype
@pytest.mark.parametrize(("tokens", "head_size"), [(1, 1), (70, 37), (130, 128)])
def test_triton(page: torch.dtype, dtype: torch.dtype, tokens: int, head_size: int) -> None:
    assert_bits_of_the_reference("triton", page, dtype, tokens, head_size)


@each_page
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_value_goes_to_the_nearest_code(page: torch.dtype, backend: str) -> None:
    """All 16-bit values in range, ties to the even code: by hand, not by a conversion."""
    values = torch.arange(2**16).to(torch.uint16).view(torch.bfloat16)
    largest = 127.0 if page is torch.int8 else 448.0
    values = values[values.isfinite() & (values.abs() <= largest)]
    values[0] = largest  # which makes the scale 1
    pages, scales = quantize_frames(values.view(-1, 1, 1), page, backend=backend)
    assert scales.item() == 1
    every = torch.arange(256, dtype=torch.uint8)
    every = every[every.view(page).float().isfinite()]
    codes, order = every.view(page).double().sort(stable=True)
    every = every[order]
    x = values.double()
    above = torch.searchsorted(codes, x).clamp_max(len(codes) - 1)
    below = (above - 1).clamp_min(0)
    up, down = codes[above] - x, x - codes[below]
    even = every[above].int() % 2 == 0
    expected = torch.where((up < down) | ((up == down) & even), codes[above], codes[below])
    assert torch.equal(pages.view(-1).double(), expected)


@pytest.mark.parametrize("seed", range(20))
@each_page
def test_rounding_is_within_its_bound(page: torch.dtype, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 7, 3, 16, generator=rng) * torch.logspace(-6, 6, 4)[:, None, None, None]
    x *= torch.randn(7, 1, 1, generator=rng).exp()  # tokens that differ in size
    pages, scales = quantize_frames(x.to(torch.bfloat16), page)
    assert pages.dtype is page and pages.shape == x.shape and scales.shape == (4, 3)
    x, step = x.to(torch.bfloat16).double(), scales.double()[:, None, :, None]
    error = (pages.double() * step - x).abs()
    bound = step / 2 if page is torch.int8 else torch.maximum(x.abs() / 16, step / 1024)
    # Besides, two roundings of float32: of the scale and of the quotient.
    assert (error <= bound + 2.0**-22 * x.abs()).all()


def test_scale_is_never_too_small_for_a_product() -> None:
    _, scales = quantize_frames(torch.full((1, 2, 1, 16), 1e-40), torch.int8)
    assert scales.item() * 16**-0.5 * math.log2(math.e) > torch.finfo(torch.float32).tiny


@pytest.mark.parametrize("backend", BACKENDS)
def test_registration_is_sound(backend: str) -> None:
    frames, slots = torch.randn(2, 5, 2, 16), torch.tensor([3, 1])
    pool, scales = torch.zeros(4, 5, 2, 16, dtype=torch.int8), torch.ones(4, 2)
    args = (frames, pool, scales, slots, backend)
    torch.library.opcheck(torch.ops.kvpo.store_frames.default, args)


@each_page
def test_compiles_without_graph_breaks(page: torch.dtype) -> None:
    slots = torch.tensor([2, 0])

    def run(frames: Tensor) -> tuple[Tensor, Tensor]:
        pool, scales = torch.zeros(3, 5, 2, 16).to(page), torch.ones(3, 2)
        store_frames.store_frames(pool, scales, slots, frames)
        return pool.float(), scales

    frames = torch.randn(2, 5, 2, 16)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for ours, expected in zip(compiled(frames), run(frames), strict=True):
        assert torch.equal(ours, expected)
    assert run(frames)[0][[2, 0]].any()


@each_page
def test_threads_rows_and_strides_do_not_matter(page: torch.dtype) -> None:
    frames, threads = frames_of(torch.bfloat16, 70, 32), torch.get_num_threads()
    expected = bits(*quantize_frames(frames, page))
    for n in (1, 2, 5):
        torch.set_num_threads(n)
        for ours, e in zip(bits(*quantize_frames(frames, page)), expected, strict=True):
            assert torch.equal(ours, e)
    torch.set_num_threads(threads)
    alone = bits(*quantize_frames(frames[3], page))
    wide = torch.stack([frames, frames], dim=-2).flatten(-3, -2)[..., ::2, :]
    assert not wide.is_contiguous()
    for one, strided, e in zip(alone, bits(*quantize_frames(wide, page)), expected, strict=True):
        assert torch.equal(one, e[3]) and torch.equal(strided, e)


def test_float64_goes_to_the_reference() -> None:
    x = torch.randn(2, 3, 2, 8, dtype=torch.float64)
    with pytest.raises(BackendUnavailable, match=r"got torch\.float64"):
        quantize_frames(x, torch.int8, backend="cpu")
    pages, _ = quantize_frames(x, torch.int8)
    assert torch.equal(pages, quantize_frames(x.float(), torch.int8)[0])


def test_empty_batches_of_frames() -> None:
    pages, scales = quantize_frames(torch.ones(0, 2, 3, 4), torch.int8)
    assert pages.shape == (0, 2, 3, 4) and scales.shape == (0, 3)


def test_errors_name_the_argument() -> None:
    with pytest.raises(DtypeError, match="dtype must be one of"):
        quantize_frames(torch.ones(1, 2, 3), torch.float16)
    with pytest.raises(DtypeError, match="frames must be a floating-point tensor"):
        quantize_frames(torch.ones(1, 2, 3, dtype=torch.int32), torch.int8)
    for shape in ((2, 3), (2, 0, 3)):
        with pytest.raises(ShapeError, match="frames must be"):
            quantize_frames(torch.ones(shape), torch.int8)


def test_a_pool_on_no_device_can_be_planned_with() -> None:
    pool = FramePool(4, 8, 1, 2, 16, dtype=torch.bfloat16, page_dtype=torch.int8, device="meta")
    slots = pool.prepare_write([video := pool.timeline()], video.append(1), 1)
    k = torch.empty(1, 8, 2, 16, dtype=torch.bfloat16, device="meta")
    pool.write(0, slots, k, k)
