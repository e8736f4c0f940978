"""Energies against float64, the two spaces, the two-pass gradient, and the host checks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvpo_kernels import (
    BackendUnavailable,
    TrajectoryEnergies,
    registry,
    trajectory_velocity_energy,
    velocity_gradient,
    velocity_step_weights,
)
from kvpo_kernels.ops.velocity_energy import BACKENDS

NAMES = [b.name for b in BACKENDS]
each_backend = pytest.mark.parametrize("backend", NAMES)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
# [G, S, ...]: one value, less than a vector, a prime, one chunk and a bit, several chunks
SHAPES = [(1, 1), (3, 2, 5), (2, 3, 7, 11), (8, 4, 3, 19, 73), (2, 2, 12_301)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def make(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    pred = torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)
    target = (pred.double() + 0.3 * torch.randn(shape, generator=g, dtype=torch.float64)).to(dtype)
    weights = torch.rand(shape[1], generator=g, dtype=torch.float64) + 0.1
    return pred, target, weights


def truth(pred: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    diff = pred.double() - target.double()
    mse = diff.square().reshape(*pred.shape[:2], -1).mean(-1)
    return (mse * weights).sum(1)


def energy(backend: str, *args: Tensor) -> Tensor:
    try:
        return trajectory_velocity_energy(*args, backend=backend)
    except BackendUnavailable as e:
        pytest.skip(str(e))


@each_backend
@each_dtype
@each_shape
def test_energy_is_that_of_float64(
    shape: tuple[int, ...], dtype: torch.dtype, backend: str
) -> None:
    pred, target, weights = make(shape, dtype)
    e = energy(backend, pred, target, weights)
    assert e.dtype is torch.float32 and e.shape == shape[:1]
    # 1e-6: the contract; one rounding to float32 is 6e-8, the rest is the order of summation.
    torch.testing.assert_close(e.double(), truth(pred, target, weights), rtol=1e-6, atol=0)


@each_backend
@each_dtype
@each_shape
def test_gradient_is_that_of_float64(
    shape: tuple[int, ...], dtype: torch.dtype, backend: str
) -> None:
    pred, target, weights = make(shape, dtype)
    cotangent = torch.linspace(-2, 1, shape[0])
    pred.requires_grad_()
    (grad,) = torch.autograd.grad(energy(backend, pred, target, weights), pred, cotangent)
    wide = pred.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(truth(wide, target, weights), wide, cotangent.double())
    assert grad.dtype is dtype and grad.is_contiguous()
    # Relative: one rounding to the dtype, and three in float32 (difference, coefficient, product).
    eps = torch.finfo(dtype).eps / 2 + 3 * 2**-24
    if backend == "triton" and not torch.cuda.is_available():
        eps += torch.finfo(dtype).eps / 2  # the interpreter cuts bfloat16 off, it does not round
    torch.testing.assert_close(grad.double(), expected, rtol=eps, atol=1e-30)


def test_float64_is_exact_and_passes_gradcheck() -> None:
    pred, target, weights = make((3, 2, 4, 5), torch.float64)
    e = trajectory_velocity_energy(pred, target, weights)
    assert e.dtype is torch.float64
    torch.testing.assert_close(e, truth(pred, target, weights), rtol=1e-14, atol=0)
    pred.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda p: trajectory_velocity_energy(p, target, weights), (pred,)
    )


def test_half_is_subtracted_in_float32() -> None:
    """65504 - (-65504) overflows float16, and its square float32's neighbours do not."""
    pred = torch.full((1, 1, 8), 65504.0, dtype=torch.float16)
    e = trajectory_velocity_energy(pred, -pred, torch.ones(1))
    assert e.item() == pytest.approx(131008.0**2, rel=1e-6)


@each_backend
@each_dtype
def test_branch_invariance_is_bitwise(dtype: torch.dtype, backend: str) -> None:
    pred, target, weights = make((8, 3, 9001), dtype)
    upstream = torch.linspace(-1, 1, 8, dtype=weights.dtype)

    def both(branches: list[int]) -> tuple[Tensor, Tensor]:
        leaf = pred[branches].requires_grad_()
        e = energy(backend, leaf, target[branches], weights)
        (grad,) = torch.autograd.grad(e, leaf, upstream[branches].to(e.dtype))
        return e.detach(), grad

    e, grad = both([*range(8)])
    for branches in ([5, 0, 7, 2, 1, 6, 3, 4], *([g] for g in range(8))):
        for ours, all_ in zip(both(branches), (e, grad), strict=True):
            assert torch.equal(ours, all_[branches]), f"branches {branches}"


@each_dtype
def test_every_isa_and_thread_count(isa: str, dtype: torch.dtype) -> None:
    pred, target, weights = make((3, 2, 20_011), dtype)
    expected = truth(pred, target, weights)
    threads, results = torch.get_num_threads(), []
    cotangent = torch.tensor([1.0, -2.0, 0.0])
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            p = pred.clone().requires_grad_()
            e = energy("cpu", p, target, weights)
            results.append((e.detach(), *torch.autograd.grad(e, p, cotangent)))
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(results[0][0].double(), expected, rtol=1e-6, atol=0)
    for other in results[1:]:
        assert torch.equal(other[0], results[0][0]) and torch.equal(other[1], results[0][1])


@each_backend
def test_any_strides_and_offsets(backend: str) -> None:
    pred, target, weights = make((3, 2, 4, 1031), torch.float32)
    e = energy(backend, pred, target, weights)
    turned = pred.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)
    shifted = torch.cat([torch.zeros(1), target.flatten()])[1:].view(target.shape)
    assert torch.equal(energy(backend, turned, shifted, weights), e)


@each_backend
def test_a_nan_stays_in_its_branch(backend: str) -> None:
    pred, target, weights = make((3, 2, 100), torch.float32)
    clean = energy(backend, pred, target, weights)
    pred[1, 0, 17] = float("nan")
    e = energy(backend, pred, target, weights)
    assert e[1].isnan() and torch.equal(e[[0, 2]], clean[[0, 2]])


@each_backend
def test_compiles_fully(backend: str) -> None:
    pred, target, weights = make((2, 2, 33), torch.float32)
    run = lambda *x: energy(backend, *x)
    found = []
    for f in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        leaf = pred.clone().requires_grad_()
        e = f(leaf, target, weights)
        found.append((e.detach(), torch.autograd.grad(e.sum(), leaf)[0]))
    assert all(map(torch.equal, *found))


def test_passes_opcheck() -> None:
    pred, target, weights = make((2, 2, 33), torch.float32)
    for b in BACKENDS:
        if b.name == "reference" or registry.HAS_NATIVE:
            torch.library.opcheck(
                torch.ops.kvpo.velocity_energy_forward.default, (pred, target, weights, b.name)
            )
            torch.library.opcheck(
                torch.ops.kvpo.velocity_energy_backward.default,
                (pred, target, weights, torch.ones(2), b.name),
            )


def test_double_backward_is_refused() -> None:
    pred, target, weights = make((2, 2, 5), torch.float64)
    pred.requires_grad_()
    e = trajectory_velocity_energy(pred, target, weights).square().sum()
    (grad,) = torch.autograd.grad(e, pred, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# Step weights -----------------------------------------------------------------------------------


def test_step_weights_of_the_released_schedule() -> None:
    sigmas = [1.0, 0.9375, 5 / 6, 0.625]
    w = velocity_step_weights(sigmas, space="x0")
    assert w.tolist() == [0.5] * 4  # floor 1 everywhere
    v = velocity_step_weights(sigmas, space="velocity")
    assert (2 * v).tolist() == pytest.approx([1, 0.87890625, 0.69444444444, 0.390625])
    low = velocity_step_weights(torch.tensor(sigmas), space="velocity", sigma_floor=0.0)
    assert low.tolist() == pytest.approx([0.5] * 4, rel=1e-15)  # the plain velocity energy
    assert velocity_step_weights([0.5], sigma_floor=0.7).item() == pytest.approx(0.5 / 0.49)


@given(
    sigmas=st.lists(st.floats(0.01, 2.0), min_size=1, max_size=6),
    floor=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=50, deadline=None)
def test_both_spaces_give_the_same_energy(sigmas: list[float], floor: float, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    sigma = torch.tensor(sigmas, dtype=torch.float64).view(1, -1, 1)
    x_t, v, u = torch.randn(3, 2, len(sigmas), 11, generator=g, dtype=torch.float64)
    energies = {
        "x0": (x_t - sigma * v, x_t - sigma * u),
        "velocity": (v, u),
    }
    a, b = (
        trajectory_velocity_energy(p, t, velocity_step_weights(sigmas, space, floor))  # type: ignore[arg-type]
        for space, (p, t) in energies.items()
    )
    # x_t - sigma v loses up to log2(|x_t| / (sigma |v - u|)) bits of 53; 1e-10 leaves 20 of them.
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


# The two-pass form ------------------------------------------------------------------------------


@each_dtype
def test_two_passes_equal_one(dtype: torch.dtype) -> None:
    pred, target, weights = make((4, 3, 50), dtype)
    kappa = torch.tensor([0.5, -1.0, 0.25, 0.25])
    acc = TrajectoryEnergies(4)
    for s in range(3):
        acc.add(pred[2:, s], target[2:, s], weights[s].item(), branches=[2, 3])
        acc.add(pred[:2, s], target[:2, s], weights[s].item(), branches=torch.tensor([0, 1]))
    # One more rounding: each step's energy is rounded to float32 before they are added.
    torch.testing.assert_close(
        acc.energies, trajectory_velocity_energy(pred, target, weights), rtol=1e-6, atol=0
    )
    leaf = pred.clone().requires_grad_()
    e = trajectory_velocity_energy(leaf, target, weights)
    (whole,) = torch.autograd.grad(-e, leaf, kappa)
    for s in range(3):
        part = velocity_gradient(pred[:, s], target[:, s], weights[s].item(), kappa)
        assert torch.equal(part, whole[:, s])


def test_ragged_windows_are_means_over_their_own_values() -> None:
    acc = TrajectoryEnergies(2, dtype=torch.float64)
    long, short = torch.full((1, 30), 2.0), torch.full((1, 10), 3.0)
    acc.add(long, torch.zeros_like(long), 0.5, branches=[1])
    acc.add(short, torch.zeros_like(short), 0.5, branches=[0])
    acc.add(short, torch.zeros_like(short), 1.0, branches=[0])
    assert acc.energies.tolist() == [13.5, 2.0]
    kept = acc.energies
    acc.add(torch.ones(2, 3), torch.zeros(2, 3), 1.0)
    assert kept.tolist() == [13.5, 2.0] and acc.energies.tolist() == [14.5, 3.0]
