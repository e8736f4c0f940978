"""The C++ kernels' threads flush subnormal numbers if, and only if, their caller does."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from kvpo_kernels import RopeTable, RouteTable, qk_norm_rope, registry, routed_attention
from kvpo_kernels.ops.tve_grpo import tve_grpo_loss

pytestmark = pytest.mark.skipif(not registry.HAS_NATIVE, reason="the native module is not built")

TINY = 1e-39  # subnormal, and so is what it is multiplied to below


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_flush_denormal(False)
    torch.set_num_threads(threads)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def attention() -> Callable[[], list[Tensor]]:
    k_pool, v_pool = random(2, 3, 16, 2, 32).unbind()
    q, k, v = random(3, 4, 16, 2, 32).unbind()
    v_pool, v, grad = v_pool * TINY, v * TINY, random(4, 16, 2, 32)
    for t in (q, k, v):
        t.requires_grad_()
    table = RouteTable([[0, 1], [1, 2], [0, 2], [2, 1]], 3)

    def run() -> list[Tensor]:
        out = routed_attention(q, k_pool, v_pool, table, k, v, backend="cpu")
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad)]

    return run


def objective() -> Callable[[], list[Tensor]]:
    pred, target = (random(8, 4, 9_000) * TINY).requires_grad_(), torch.zeros(8, 4, 9_000)
    weights = torch.full((4,), 1e3, dtype=torch.float64)
    old, advantages = torch.zeros(8), random(8)

    def run() -> list[Tensor]:
        r = tve_grpo_loss(pred, target, weights, old, advantages, backend="cpu")
        assert r.pred_grad is not None
        return [r.pred_grad]

    return run


def rope() -> Callable[[], list[Tensor]]:
    q, k = (x.requires_grad_() for x in random(2, 2, 96, 2, 32).unbind())
    q_weight, k_weight = ((x * TINY).requires_grad_() for x in random(2, 64).unbind())
    table, ones = RopeTable(32), torch.ones(2, 96, 2, 32)

    def run() -> list[Tensor]:
        out = qk_norm_rope(q, k, q_weight, k_weight, table, 0, grid=(1, 8, 12), backend="cpu")
        grads = torch.autograd.grad(out, (q, k, q_weight, k_weight), (ones, ones))
        return [*(o.detach() for o in out), *grads]

    return run


@pytest.mark.parametrize("op", [attention, objective, rope])
def test_bits_do_not_follow_the_partition(op: Callable[[], Callable[[], list[Tensor]]]) -> None:
    run, found = op(), {}
    for threads in (1, 2, 3):
        for flush in (False, True):
            torch.set_num_threads(threads)
            run()  # its workers are there, in the mode of before
            torch.set_num_threads(1)  # newer torch tells as many threads as it has
            if not torch.set_flush_denormal(flush):
                pytest.skip("this processor cannot flush subnormal numbers")
            torch.set_num_threads(threads)
            found[flush, threads] = run()
    torch.set_num_threads(1)
    torch.set_flush_denormal(False)
    subnormal = lambda xs: any(((x != 0) & (x.abs() < 1.1e-38)).any() for x in xs)
    for flush in (False, True):
        assert subnormal(found[flush, 1]) != flush
        for threads in (2, 3):
            assert all(map(torch.equal, found[flush, 1], found[flush, threads])), (flush, threads)
