"""The fused loss against its parts, against autograd in float64, and its autograd behaviour."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kvpo_kernels import (
    BackendUnavailable,
    ContrastiveObjective,
    TveGrpoLoss,
    branch_policy_loss,
    trajectory_velocity_energy,
    tve_grpo_loss,
)
from kvpo_kernels.ops.tve_grpo import BACKENDS

NAMES = [b.name for b in BACKENDS]
each_backend = pytest.mark.parametrize("backend", NAMES)
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
OBJECTIVE = ContrastiveObjective(clip_range_low=0.3, clip_range_high=0.4)


def tve(backend: str, *args: Any, **kwargs: Any) -> TveGrpoLoss:
    try:
        return tve_grpo_loss(*args, **kwargs, backend=backend)
    except BackendUnavailable as e:
        pytest.skip(str(e))


def make(dtype: torch.dtype, G: int = 4, S: int = 3, rest: tuple[int, ...] = (5, 401)) -> Any:
    g = torch.Generator().manual_seed(G)
    normal = lambda *n: torch.randn(*n, generator=g, dtype=torch.float64)
    pred = normal(G, S, *rest).to(dtype)
    target = (pred + 0.5 * normal(G, S, *rest)).to(dtype)
    weights = torch.linspace(0.2, 0.5, S, dtype=torch.float64)
    score = torch.float64 if dtype is torch.float64 else torch.float32
    e = trajectory_velocity_energy(pred, target, weights)
    old, ref = ((0.1 * normal(G)).to(score) - e for _ in range(2))
    return pred, target, weights, old, normal(G).to(score), ref


def parts(
    pred: Tensor, target: Tensor, weights: Tensor, *scores: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The loss and its gradient by autograd through torch operations, in float64."""
    p = pred.detach().double().requires_grad_()
    used = p if mask is None else torch.where(mask.view(-1, *[1] * (p.ndim - 2)), p, p.detach())
    mse = (used - target.double()).square().flatten(2).mean(-1)
    energy = (mse * weights.double()).sum(1)
    loss = branch_policy_loss(-energy, *(s.double() for s in scores), objective=OBJECTIVE).loss
    return loss.detach(), torch.autograd.grad(loss, p)[0]


@each_backend
@each_dtype
@pytest.mark.parametrize("masked", [False, True])
def test_loss_and_gradient_are_those_of_the_parts(
    dtype: torch.dtype, masked: bool, backend: str
) -> None:
    inputs = make(dtype)
    mask = torch.tensor([True, False, True]) if masked else None
    pred = inputs[0].requires_grad_()
    r = tve(backend, pred, *inputs[1:], objective=OBJECTIVE, grad_steps=mask)
    loss, grad = parts(*inputs, mask=mask)
    # The energies are good to 1e-6 relative and of size 0.1; KL_coef 10 multiplies their error.
    slack = 1e-12 if dtype is torch.float64 else 1e-5
    torch.testing.assert_close(r.loss.detach().double(), loss, rtol=slack, atol=slack)
    r.loss.backward()
    assert pred.grad.dtype is dtype
    error = (pred.grad.double() - grad).abs().max() / grad.abs().max()
    assert error <= torch.finfo(dtype).eps + slack
    if masked:
        assert (pred.grad[:, 1] == 0).all()
    torch.testing.assert_close(
        r.energies, trajectory_velocity_energy(pred.detach(), *inputs[1:3]), rtol=1e-6, atol=0
    )


@each_backend
@each_dtype
def test_the_backward_is_one_scale(dtype: torch.dtype, backend: str) -> None:
    pred, *rest = make(dtype)
    pred.requires_grad_()
    r = tve(backend, pred, *rest)
    (once,) = torch.autograd.grad(r.loss, pred, retain_graph=True)
    (half,) = torch.autograd.grad(0.5 * r.loss, pred, retain_graph=True)
    assert torch.equal(half, 0.5 * once)
    kept = once.clone()
    r.loss.backward(retain_graph=True)
    r.loss.backward(retain_graph=True)
    r.loss.backward()  # accumulation must not write into what the graph keeps
    assert torch.equal(once, kept)
    torch.testing.assert_close(pred.grad, 3 * kept, rtol=2 * torch.finfo(dtype).eps, atol=0)


@each_backend
def test_without_grad_nothing_is_kept(backend: str) -> None:
    pred, *rest = make(torch.float32)
    a = tve(backend, pred, *rest)
    with torch.no_grad():
        b = tve(backend, pred.clone().requires_grad_(), *rest)
    with torch.inference_mode():
        c = tve(backend, pred, *rest)
    assert not a.loss.requires_grad and not b.loss.requires_grad
    assert torch.equal(a.loss, b.loss) and torch.equal(a.numbers, c.numbers)


@each_backend
def test_gradcheck(backend: str) -> None:
    pred, target, weights, old, A, ref = make(torch.float64, rest=(3,))
    old = -trajectory_velocity_energy(pred, target, weights) + 0.01 * torch.arange(4)
    pred.requires_grad_()
    f = lambda p: tve(backend, p, target, weights, old, A, ref, objective=OBJECTIVE).loss
    assert torch.autograd.gradcheck(f, (pred,))


@each_backend
def test_the_ratio_at_the_old_policy_is_exactly_one(backend: str) -> None:
    pred, target, weights, _, A, _ = make(torch.float32)
    first = tve(backend, pred, target, weights, A, A)
    again = tve(backend, pred, target, weights, -first.energies, A)
    assert torch.equal(again.ratio, torch.ones(4))


@each_backend
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_the_order_of_the_branches_does_not_matter_to_a_bit(
    dtype: torch.dtype, backend: str
) -> None:
    pred, target, weights, old, A, ref = make(dtype, rest=(5001,))
    order = torch.tensor([2, 0, 3, 1])

    def run(pick: torch.Tensor) -> tuple[torch.Tensor, ...]:
        p = pred[pick].clone().requires_grad_()
        r = tve(backend, p, target[pick], weights, old[pick], A[pick], ref[pick])
        r.loss.backward()
        assert p.grad is not None and r.pred_grad is not None
        assert torch.equal(p.grad, r.pred_grad)
        return r.numbers[:7], r.energies, r.score_grad, r.ratio, p.grad

    one, other = run(torch.arange(4)), run(order)
    assert torch.equal(one[0], other[0])
    for a, b in zip(one[1:], other[1:], strict=True):
        assert torch.equal(a[order], b)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_every_isa_and_thread_count(isa: str, dtype: torch.dtype) -> None:
    inputs = make(dtype, rest=(9001,))
    loss, grad = parts(*inputs)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            p = inputs[0].clone().requires_grad_()
            r = tve("cpu", p, *inputs[1:], objective=OBJECTIVE)
            r.loss.backward()
            results.append((r.numbers, p.grad))
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(results[0][0][0].double(), loss, rtol=1e-5, atol=1e-5)
    error = (results[0][1].double() - grad).abs().max() / grad.abs().max()
    assert error <= torch.finfo(dtype).eps + 1e-5  # as above
    for numbers, g in results[1:]:
        assert torch.equal(numbers, results[0][0]) and torch.equal(g, results[0][1])


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_a_gradient_that_streams_past_the_cache(dtype: torch.dtype) -> None:
    """Above 8 MiB the kernel writes with streaming stores, from every alignment of a row."""
    inputs = make(dtype, rest=(350_003 * 4 // dtype.itemsize,))
    mask = [True, False, True]
    grads = []
    for backend in ("cpu", "reference"):
        p = inputs[0].clone().requires_grad_()
        tve(backend, p, *inputs[1:], grad_steps=mask).loss.backward()
        grads.append(p.grad.double())
    # The energies of both are good to 1e-6, which KL_coef 10 makes 1e-5 of the gradient's scale.
    error = (grads[0] - grads[1]).abs().max() / grads[1].abs().max()
    assert error <= torch.finfo(dtype).eps + 1e-5


@each_backend
def test_ragged_leading_shapes_and_strides(backend: str) -> None:
    pred, *rest = make(torch.float32)
    turned = pred.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0).requires_grad_()
    plain = pred.clone().requires_grad_()
    for p in (turned, plain):
        tve(backend, p, *rest).loss.backward()
    assert torch.equal(turned.grad, plain.grad)


@each_backend
def test_compiles_fully_and_passes_opcheck(backend: str) -> None:
    pred, *rest = make(torch.float32)
    eager_leaf, leaf = pred.clone().requires_grad_(), pred.clone().requires_grad_()
    eager = tve(backend, eager_leaf, *rest, grad_steps=[True, True, False])
    f = torch.compile(
        lambda p: tve_grpo_loss(p, *rest, grad_steps=[True, True, False], backend=backend),
        fullgraph=True,
        backend="aot_eager",
    )
    compiled = f(leaf)
    assert torch.equal(compiled.loss, eager.loss) and torch.equal(compiled.kl, eager.kl)
    (2 * compiled.loss).backward()
    (2 * eager.loss).backward()
    assert torch.equal(leaf.grad, eager_leaf.grad)
    broken = pred.clone()
    broken[2, 1, 3, 4] = float("nan")
    with pytest.raises(
        ValueError, match=r"energies must be finite, got \[nan\] for branches \[2\]"
    ):
        f(broken)
    scalars = (0.1, 0.2, 10.0, 20.0, 0.0, 1.0, 1.0, False)
    target, weights, old, A, ref = rest
    for needs_grad in (False, True):
        torch.library.opcheck(
            torch.ops.kvpo.tve_grpo.default,
            (pred, target, weights, weights, old, A, ref, *scalars, needs_grad, backend),
        )


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_dropped_branch_gets_zeros_and_touches_no_other(dtype: torch.dtype, backend: str) -> None:
    pred, target, weights, old, A, ref = make(dtype)
    keep = [0, 2, 3]
    few = pred[keep].requires_grad_()
    r_few = tve(backend, few, target[keep], weights, old[keep], A[keep], ref[keep])
    r_few.loss.backward()
    pred[1, 0, 0, 0] = float("inf")
    pred.requires_grad_()
    r = tve(backend, pred, target, weights, old, A, ref, nonfinite="drop")
    r.loss.backward()
    assert r.dropped == 1 and torch.equal(r.loss, r_few.loss)
    assert torch.equal(pred.grad[keep], few.grad) and (pred.grad[1] == 0).all()


def test_an_update_is_two_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing else on the device: no memory is set, copied or converted in between."""
    velocity = pytest.importorskip("kvpo_kernels.backends.triton.velocity_energy")
    from kvpo_kernels.backends.triton import tve_grpo

    launches, operations = [], []

    class Kernel:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int]):
            return lambda *args, **options: launches.append(self.name)

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            operations.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    for name in ("energies_kernel", "gradient_kernel"):
        monkeypatch.setattr(velocity, name, Kernel(name))
    x, w, s = torch.zeros(3, 2, 40), torch.ones(2, dtype=torch.float64), torch.zeros(3)
    call = lambda: tve_grpo.forward(x, x, w, w, s, s, None, 0.1, 0.2, 10, 20, 0, 1, 1, False, True)
    call()  # makes the counters
    launches.clear()
    with Recorder():
        call()
    assert launches == ["energies_kernel", "gradient_kernel"]
    # fill_: what the tests put into new memory. Zeros or a copy would go by other names.
    assert set(operations) <= {"new_empty", "empty_like", "slice", "view", "fill_"}


@each_dtype
def test_repeats_give_the_same_bits(dtype: torch.dtype) -> None:
    pred, *rest = make(dtype, G=8, S=4, rest=(5_000,))
    pred.requires_grad_()
    run = lambda: tve_grpo_loss(pred, *rest)
    first = run()
    for _ in range(250):
        again = run()
        assert torch.equal(again.numbers, first.numbers)
        assert again.pred_grad is not None and torch.equal(again.pred_grad, first.pred_grad)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_results_are_made_inside_a_compiled_graph(compiler: str, dynamic: bool) -> None:
    """Asked for inside, they must take no lock; and several sizes go through one function."""

    def both(pred: Tensor, scores: Tensor, target: Tensor, old: Tensor, A: Tensor) -> Any:
        r = tve_grpo_loss(pred, target, torch.ones(2), old, A)
        b = branch_policy_loss(scores, advantages=A, old_energies=-old, ref_energies=r.energies)
        results = (r.pred_grad, r.score_grad, r.energies, b.ratio, b.kl, b.skip, b.dropped)
        return 2 * r.loss + b.loss, r.loss + b.loss, *results

    compiled = torch.compile(both, fullgraph=True, backend=compiler, dynamic=dynamic)
    g = torch.Generator().manual_seed(1)
    for G in (3, 5) if dynamic or compiler == "aot_eager" else (3,):
        leaves = [torch.randn(G, 2, 30, generator=g), torch.randn(G, generator=g)]
        target = torch.randn(G, 2, 30, generator=g)
        old, A = torch.randn(2, G, generator=g)
        grads = []
        for f in (both, compiled):
            pred, scores = (x.clone().requires_grad_() for x in leaves)
            results = f(pred, scores, target, old, A)
            (results[0] + results[1]).backward()
            grads.append((*results, pred.grad, scores.grad))
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    torch.compiler.reset()


def test_the_loss_is_made_once() -> None:
    pred = torch.randn(2, 1, 4, requires_grad=True)
    r = tve_grpo_loss(pred, torch.zeros(2, 1, 4), torch.ones(1), torch.zeros(2), torch.ones(2))
    with torch.no_grad():
        loss = r.loss
    assert r.loss is loss and loss.requires_grad
