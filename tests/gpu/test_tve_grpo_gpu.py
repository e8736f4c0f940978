"""`tve_grpo_loss` on a GPU, against the reference on the CPU."""

import contextlib

import pytest
import torch
from torch import Tensor

from kvpo_kernels import registry, trajectory_velocity_energy, tve_grpo_loss

Inputs = tuple[Tensor, ...]
SHAPES = ((8, 4, 3, 16, 60, 104), (2, 20, 12_301), (1, 1, 7), (64, 3, 5_000))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
KERNELS = [("triton", t) for t in DTYPES] + [("cuda", t) for t in DTYPES[:2]]
each_kernel = pytest.mark.parametrize(("backend", "dtype"), KERNELS, ids=str)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])


def make(shape: tuple[int, ...], dtype: torch.dtype) -> Inputs:
    g = torch.Generator().manual_seed(0)
    pred = torch.randn(shape, generator=g)
    target = (pred + 0.3 * torch.randn(shape, generator=g)).to(dtype)
    weights = torch.rand(shape[1], generator=g, dtype=torch.float64)
    old = -trajectory_velocity_energy(pred.to(dtype), target, weights, backend="reference")
    old, ref = (old + 0.05 * torch.randn(shape[0], generator=g) for _ in range(2))
    return pred.to(dtype), target, weights, old, torch.randn(shape[0], generator=g), ref


@each_kernel
@each_shape
def test_as_the_reference(shape: tuple[int, ...], backend: str, dtype: torch.dtype) -> None:
    if backend == "cuda" and not registry.HAS_CUDA_KERNELS:
        pytest.skip(registry.WHY_NO_CUDA_KERNELS)
    pred, *rest = make(shape, dtype)
    expected = tve_grpo_loss(
        pred.double().requires_grad_(),
        rest[0].double(),
        rest[1],
        *(t.double() for t in rest[2:]),
        backend="reference",
    )
    r = tve_grpo_loss(pred.cuda().requires_grad_(), *(t.cuda() for t in rest), backend=backend)
    # 1e-6: the contract of the energies; scores of size e then move log pi by e * 1e-6.
    torch.testing.assert_close(r.energies.cpu().double(), expected.energies, rtol=1e-6, atol=0)
    scale = max(1.0, expected.energies.abs().max().item())
    for name in ("ratio", "log_ratio", "score_grad", "loss", "kl", "entropy"):
        ours, theirs = getattr(r, name).detach().cpu().double(), getattr(expected, name).detach()
        assert (ours - theirs).abs().max().item() <= 1e-4 * scale, name
    # Of its own score gradient: one rounding to the dtype, and three in float32.
    factor = -2 * r.score_grad.cpu().double()[:, None] * rest[1] / pred[0, 0].numel()
    grad = factor.view(*shape[:2], *[1] * (len(shape) - 2)) * (pred.double() - rest[0].double())
    eps = torch.finfo(dtype).eps / 2 + 3 * 2**-24
    tiny = torch.finfo(dtype).smallest_normal  # below it, float16 has fewer bits
    torch.testing.assert_close(r.pred_grad.cpu().double(), grad, rtol=eps, atol=tiny)


@each_kernel
@pytest.mark.parametrize("shape", SHAPES[:2], ids=("two-launches", "one-launch"))
def test_bits_repeat_and_ratios_are_one(
    shape: tuple[int, ...], backend: str, dtype: torch.dtype
) -> None:
    if backend == "cuda" and not registry.HAS_CUDA_KERNELS:
        pytest.skip(registry.WHY_NO_CUDA_KERNELS)
    pred, *rest = (t.cuda() for t in make(shape, dtype))
    pred.requires_grad_()
    first = tve_grpo_loss(pred, *rest, backend=backend)
    for _ in range(20):
        again = tve_grpo_loss(pred, *rest, backend=backend)
        assert torch.equal(again.numbers, first.numbers)
        assert torch.equal(again.pred_grad, first.pred_grad)
    order = torch.randperm(len(pred), device="cuda")
    target, weights, *scores = rest
    permuted = tve_grpo_loss(
        pred.detach()[order].requires_grad_(),
        target[order],
        weights,
        *(s[order] for s in scores),
        backend=backend,
    )
    assert torch.equal(permuted.loss, first.loss)
    assert torch.equal(permuted.pred_grad, first.pred_grad[order])
    old = -first.energies
    same = tve_grpo_loss(pred, target, weights, old, scores[1], backend=backend)
    assert (same.ratio == 1).all()


def test_alone_has_the_same_energy() -> None:
    pred, target, weights, *_ = (t.cuda() for t in make(SHAPES[0], torch.bfloat16))
    together = trajectory_velocity_energy(pred, target, weights, backend="triton")
    for b in range(len(pred)):
        one = slice(b, b + 1)
        alone = trajectory_velocity_energy(pred[one], target[one], weights, backend="triton")
        assert torch.equal(alone, together[one])


def test_nothing_waits_for_the_gpu() -> None:
    pred, *rest = (t.cuda() for t in make(SHAPES[1], torch.bfloat16))
    pred.requires_grad_()
    tve_grpo_loss(pred, *rest).loss.backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        tve_grpo_loss(pred, *rest).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_branch_that_is_not_finite() -> None:
    pred, *rest = (t.cuda() for t in make(SHAPES[1], torch.float32))
    pred[1] = float("nan")
    pred.requires_grad_()
    r = tve_grpo_loss(pred, *rest)
    assert r.loss.isnan() and r.pred_grad.isnan().all()
    with pytest.raises(ValueError, match="branches \\[1\\]"):
        r.check()
    dropped = tve_grpo_loss(pred, *rest, nonfinite="drop")
    assert dropped.loss.isfinite() and dropped.dropped.item() == 1
    assert not dropped.pred_grad[1].any() and dropped.pred_grad[0].isfinite().all()


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_on_another_stream_and_device(backend: str) -> None:
    if backend == "cuda" and not registry.HAS_CUDA_KERNELS:
        pytest.skip(registry.WHY_NO_CUDA_KERNELS)
    inputs = make(SHAPES[1], torch.bfloat16)
    results = []
    for device in {0, torch.cuda.device_count() - 1}:
        pred, *rest = (t.to(f"cuda:{device}") for t in inputs)
        pred.requires_grad_()
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.default_stream(device))
        # In the first the current device is another one, where there are two.
        for where in (contextlib.nullcontext(), torch.cuda.stream(side)):
            with where:
                for _ in range(3):  # counters are the stream's own and set themselves back
                    r = tve_grpo_loss(pred, *rest, backend=backend)
            torch.cuda.synchronize(device)
            results.append((r.numbers.cpu(), r.pred_grad.cpu()))
    for numbers, grad in results[1:]:
        assert torch.equal(numbers, results[0][0]) and torch.equal(grad, results[0][1])
