"""`routed_attention` on every backend and instruction set against the reference in float64."""

import pytest
import torch
from cases import ROUTED, RoutedCase

from kvpo_kernels import _native
from kvpo_kernels.ops.routed_attention import routed_attention

ISAS = ("portable", "avx2", "avx512", "avx512_bf16")
each_case = pytest.mark.parametrize("case", ROUTED, ids=lambda c: c.name)


@pytest.fixture(params=ISAS)
def isa(request):
    _native.set_isa_limit(request.param)
    if _native.isa() != request.param:
        pytest.skip(f"this machine runs {_native.isa()} at best")
    yield request.param
    _native.set_isa_limit(ISAS[-1])


def results(
    case: RoutedCase, dtype: torch.dtype, backend: str, **options
) -> dict[str, torch.Tensor]:
    """Output, lse and the gradients of a fixed linear form of the output."""
    q, k_pool, v_pool, k_live, v_live = case.inputs(dtype)
    leaves = [t.requires_grad_() for t in (q, k_live, v_live)]
    out, lse = routed_attention(
        q, k_pool, v_pool, case.table(), k_live, v_live, return_lse=True, backend=backend
    )
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).to(dtype).view_as(out)
    grads = torch.autograd.grad(out, leaves, weight)
    names = ("out", "lse", "grad_q", "grad_k_live", "grad_v_live")
    return dict(zip(names, (out.detach(), lse, *grads), strict=True))


@each_case
def test_float32_matches_float64(case: RoutedCase, isa: str) -> None:
    actual = results(case, torch.float32, "cpu")
    truth = results(case, torch.float64, "reference")
    for name, value in actual.items():
        torch.testing.assert_close(value.double(), truth[name], rtol=1e-4, atol=1e-5)
