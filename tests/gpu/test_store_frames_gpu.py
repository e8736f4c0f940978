"""`store_frames` on a GPU gives the bits of the CPU."""

import pytest
import torch

from kvpo_kernels import FramePool, quantize_frames


@pytest.mark.parametrize("page", [torch.int8, torch.float8_e4m3fn], ids=["int8", "float8"])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:]
)
def test_bits_of_the_cpu(page: torch.dtype, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(6, 1560, 12, 128, generator=g)
    x *= torch.randn(x.shape, generator=g).mul(3).exp()  # many sizes within a head
    x[1, :, 0] = 0.0
    x[2, 9, 1, 3] = float("nan")
    x[3, 0, 2, 0] = -float("inf")
    x = x.to(dtype)
    expected = quantize_frames(x, page, backend="reference")
    for backend in ("triton", "reference"):
        pages, scales = quantize_frames(x.cuda(), page, backend=backend)
        assert torch.equal(scales.cpu().nan_to_num(nan=-1.0), expected[1].nan_to_num(nan=-1.0))
        ours, e = pages.cpu().float(), expected[0].float()
        assert torch.equal(ours.nan_to_num(nan=-1e3), e.nan_to_num(nan=-1e3))


def test_a_pool_is_written_in_place() -> None:
    pool = FramePool(
        9, 1560, 1, 12, 128, dtype=torch.bfloat16, device="cuda", page_dtype=torch.int8
    )
    rows = [pool.timeline() for _ in range(2)]
    for row in rows:
        row.append(3)
    slots = pool.prepare_write(rows, 0, 3)
    k, v = torch.randn(2, 2, 3, 1560, 12, 128, dtype=torch.bfloat16, device="cuda")
    pool.write(0, slots, k, v)
    index = slots.tensor.flatten().cuda()
    for view, scales, x in (
        (pool.k(0), pool.k_scales(0), k),
        (pool.v(0), pool.v_scales(0), v),
    ):
        pages, own = quantize_frames(x.flatten(0, 1), torch.int8, backend="reference")
        assert torch.equal(view[index], pages) and torch.equal(scales[index], own)
