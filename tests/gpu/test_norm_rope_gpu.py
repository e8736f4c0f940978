"""`qk_norm_rope` and `qk_norm_rope_write` on a GPU, against float64 on the CPU."""

import pytest
import torch

from kvpo_kernels import RopeTable, qk_norm_rope, qk_norm_rope_write

GRID = (3, 30, 52)
each_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:]
)


def make(dtype: torch.dtype, heads: int = 12, size: int = 128) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    tokens = GRID[0] * GRID[1] * GRID[2]
    q, k, v = torch.randn(3, 2, tokens, heads, size, generator=g).to(dtype)
    weights = [1 + 0.1 * torch.randn(heads * size, generator=g) for _ in range(2)]
    return [q, k, v, *weights]


def ulp(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.finfo(dtype).eps * 2.0 ** x.abs().clamp_min(1e-6).log2().floor()


@each_dtype
@pytest.mark.parametrize("first_frame", [0, 1021])
def test_forward_as_float64(dtype: torch.dtype, first_frame: int) -> None:
    q, k, _, wq, wk = make(dtype)
    ropes = [RopeTable(128, device=d) for d in ("cpu", "cuda")]
    wide = [t.double() for t in (q, k, wq, wk)]
    expected = qk_norm_rope(*wide, ropes[0], first_frame, grid=GRID, backend="reference")
    on_gpu = [t.cuda() for t in (q, k, wq, wk)]
    actual = qk_norm_rope(*on_gpu, ropes[1], first_frame, grid=GRID, backend="triton")
    for a, e in zip(actual, expected, strict=True):
        # One rounding to the dtype; in float32 the norm, two products and a sum as well.
        steps = 8 if dtype is torch.float32 else 1
        off = (a.cpu().double() - e).abs() - 8 * 2**-24
        assert (off <= steps * ulp(e, dtype)).all()


@each_dtype
def test_write_is_the_forward_in_its_slots(dtype: torch.dtype) -> None:
    q, k, v, wq, wk = (t.cuda() for t in make(dtype))
    rope, tokens = RopeTable(128, device="cuda"), GRID[1] * GRID[2]
    expected = qk_norm_rope(q, k, wq, wk, rope, 9, grid=GRID, backend="triton")
    pools = torch.zeros(2, 9, tokens, 12, 128, dtype=dtype, device="cuda")
    slots = torch.tensor([[7, 0, 3], [5, 8, 1]])
    options = {"grid": GRID, "k_pool": pools[0], "v_pool": pools[1], "slots": slots}
    written = qk_norm_rope_write(q, k, v, wq, wk, rope, 9, **options, backend="triton")
    assert torch.equal(written, expected[0])
    index = slots.flatten().cuda()
    assert torch.equal(pools[0, index], expected[1].view(6, tokens, 12, 128))
    assert torch.equal(pools[1, index], v.view(6, tokens, 12, 128))
    assert not pools[:, [2, 4, 6]].any()


def test_backward_repeats_and_is_near_float64() -> None:
    q, k, _, wq, wk = make(torch.bfloat16)
    g = torch.Generator().manual_seed(1)
    seeds = torch.randn(2, *q.shape, generator=g)

    def grads(device: str, dtype: torch.dtype, backend: str) -> list[torch.Tensor]:
        cast = [t.to(device, dtype).requires_grad_() for t in (q, k)]
        weights = [w.to(device, torch.promote_types(dtype, torch.float32)) for w in (wq, wk)]
        leaves = [*cast, *(w.requires_grad_() for w in weights)]
        rope = RopeTable(128, device=device)
        out = qk_norm_rope(*leaves, rope, 5, grid=GRID, backend=backend)
        return list(torch.autograd.grad(out, leaves, [s.to(device, dtype) for s in seeds]))

    exact = grads("cpu", torch.float64, "reference")
    first = grads("cuda", torch.bfloat16, "triton")
    for actual, expected in zip(first, exact, strict=True):
        error = (actual.cpu().double() - expected).norm() / expected.norm()
        assert error < 2**-8  # bfloat16 inputs, seeds and results
    for again in (grads("cuda", torch.bfloat16, "triton") for _ in range(3)):
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
