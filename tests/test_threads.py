"""The C++ kernels take no more threads than their work is worth, and give the same bits."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from kvpo_kernels import (
    RopeTable,
    RouteTable,
    qk_norm_rope,
    qk_norm_rope_write,
    routed_attention,
    trajectory_velocity_energy,
    tve_grpo_loss,
)

_native = pytest.importorskip("kvpo_kernels._native")
store_frames = pytest.importorskip("kvpo_kernels.backends.native.store_frames")

THREADS = 3
Call = Callable[[], list[Tensor]]


@pytest.fixture(autouse=True)
def thresholds(all_threads: None) -> Iterator[None]:
    _native.set_all_threads(False)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("kind", _native.LEAST_WORK)
def test_one_thread_or_all(kind: str) -> None:
    least = _native.LEAST_WORK[kind]
    take = lambda amount, threads: _native.threads_for(kind, amount, threads)
    assert [take(n, 64) for n in (0, 1, least - 1, least, 2**62)] == [1, 1, 1, 64, 64]
    assert [take(least, n) for n in (-1, 0, 1, 2, 3)] == [1, 1, 1, 2, 3]
    with pytest.raises(ValueError, match="unknown kind of work nothing"):
        _native.threads_for("nothing", 1, 2)


# An op on `tokens` of something: the work of its last kernel, and the call. ---------------------


def attention(tokens: int, dtype: torch.dtype) -> tuple[int, Call]:
    q, k, v = torch.randn(3, 2, 16, 2, 32, dtype=dtype).unbind()
    pool = torch.randn(2, 3, tokens, 2, 32, dtype=dtype)
    table = RouteTable([[0, 1], [2, 1]], 3)
    amount = q.numel() * 2 * (2 * tokens + 16)
    return amount, lambda: [routed_attention(q, *pool, table, k, v, backend="cpu")]


def attention_backward(tokens: int, dtype: torch.dtype) -> tuple[int, Call]:
    q, k, v = (t.requires_grad_() for t in torch.randn(3, 2, 16, 2, 32, dtype=dtype).unbind())
    pool = torch.randn(2, 3, tokens, 2, 32, dtype=dtype)
    out = routed_attention(q, *pool, RouteTable([[0, 1], [2, 1]], 3), k, v, backend="cpu")
    grads = lambda: [*torch.autograd.grad(out, (q, k, v), torch.ones_like(out), retain_graph=True)]
    return q.numel() * 2 * (2 * tokens + 16), grads


def rope(tokens: int, dtype: torch.dtype) -> tuple[int, Call]:
    q, k = torch.randn(2, 2, tokens, 2, 32, dtype=dtype)
    weights, table = torch.ones(2, 64, dtype=dtype), RopeTable(32, max_width=4096)
    grid = {"grid": (1, 1, tokens), "backend": "cpu"}
    return q.numel(), lambda: [*qk_norm_rope(q, k, *weights, table, 0, **grid)]


def rope_backward(tokens: int, dtype: torch.dtype) -> tuple[int, Call]:
    leaves = [t.requires_grad_() for t in torch.randn(2, 2, tokens, 2, 32, dtype=dtype).unbind()]
    leaves += [torch.ones(64, dtype=dtype).requires_grad_() for _ in range(2)]
    out = qk_norm_rope(
        *leaves, RopeTable(32, max_width=4096), 0, grid=(1, 1, tokens), backend="cpu"
    )
    ones = [torch.ones_like(o) for o in out]
    grads = lambda: [*torch.autograd.grad(out, leaves, ones, retain_graph=True)]
    return leaves[0].numel(), grads


def rope_write(tokens: int, dtype: torch.dtype) -> tuple[int, Call]:
    q, k, v = torch.randn(3, 1, tokens, 2, 32, dtype=dtype)
    weights, table = torch.ones(2, 64, dtype=dtype), RopeTable(32, max_width=4096)
    pools, slots = torch.zeros(2, 1, tokens, 2, 32, dtype=dtype), torch.zeros(1, 1).long()

    def call() -> list[Tensor]:
        options = {"k_pool": pools[0], "v_pool": pools[1], "slots": slots, "backend": "cpu"}
        grid = (1, 1, tokens)
        return [qk_norm_rope_write(q, k, v, *weights, table, 0, grid=grid, **options), pools]

    return q.numel(), call  # the last kernel is q's own


def store(tokens: int, dtype: torch.dtype) -> tuple[int, Call]:
    frames, slots = torch.randn(1, tokens, 2, 32, dtype=dtype), torch.zeros(1).long()
    codes, scales = torch.zeros(1, tokens, 2, 32, dtype=torch.int8), torch.zeros(1, 2)

    def call() -> list[Tensor]:
        store_frames.store(frames, codes, scales, slots)
        return [codes, scales]

    return frames.numel(), call


def energy(tokens: int, dtype: torch.dtype) -> tuple[int, Call]:
    pred, target = torch.randn(2, 2, 1, 64, tokens, dtype=dtype)
    weights = torch.ones(1)
    return pred.numel(), lambda: [trajectory_velocity_energy(pred, target, weights, backend="cpu")]


def objective(tokens: int, dtype: torch.dtype) -> tuple[int, Call]:
    pred, target = torch.randn(2, 2, 1, 64, tokens, dtype=dtype)
    pred.requires_grad_()
    old = torch.zeros(2)

    def call() -> list[Tensor]:
        r = tve_grpo_loss(
            pred, target, torch.ones(1), old, torch.tensor([1.0, -1.0]), backend="cpu"
        )
        assert r.pred_grad is not None
        return [r.loss.detach(), r.pred_grad]

    return pred.numel(), call


KINDS = {
    attention: "attention",
    attention_backward: "attention_backward",
    rope: "norm_rope",
    rope_backward: "norm_rope_backward",
    rope_write: "norm_rope",
    store: "store_frames",
    energy: "velocities",
    objective: "velocities",
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("op", KINDS, ids=lambda op: op.__name__)
def test_a_call_takes_what_its_work_is_worth(
    op: Callable[[int, torch.dtype], tuple[int, Call]], dtype: torch.dtype
) -> None:
    least = _native.LEAST_WORK[KINDS[op]]
    one, two = op(1, dtype)[0], op(2, dtype)[0]
    enough = 1 + -(-(least - one) // (two - one))
    for tokens, team in ((enough - 1, 1), (enough, THREADS)):
        torch.set_num_threads(THREADS)
        amount, call = op(tokens, dtype)
        assert (amount >= least) == (team > 1)
        found = [t.clone() for t in call()]
        assert _native.last_team() == team, (amount, least)
        torch.set_num_threads(1)
        assert all(map(torch.equal, found, call())) and _native.last_team() == 1
