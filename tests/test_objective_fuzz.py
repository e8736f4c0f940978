"""Random shapes, dtypes, strides and options: the fused loss against the reference in float64."""

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvpo_kernels import (
    BackendUnavailable,
    ContrastiveObjective,
    branch_policy_loss,
    registry,
    trajectory_velocity_energy,
    tve_grpo_loss,
)


@dataclass(frozen=True)
class Case:
    pred: Tensor
    target: Tensor
    weights: Tensor
    old: Tensor
    advantages: Tensor
    ref: Tensor | None
    grad_steps: Tensor | None
    options: dict[str, Any]


def laid_out(draw: st.DrawFn, x: Tensor) -> Tensor:
    """The same values in some other memory."""
    kind = draw(st.sampled_from(("plain", "transposed", "strided", "shifted", "row-gaps")))
    if kind == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if kind == "strided":
        return torch.stack([x, torch.full_like(x, torch.nan)], dim=-1)[..., 0]
    if kind == "shifted":  # out of any alignment
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    if kind == "row-gaps":
        return torch.cat([x, torch.full_like(x, torch.nan)], dim=1)[:, : x.shape[1]]
    return x


@st.composite
def cases(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...]) -> Case:
    dtype = draw(st.sampled_from(dtypes))
    G, S = draw(st.integers(1, 9)), draw(st.integers(1, 4))
    large = draw(st.integers(0, 15)) == 0  # more than a chunk of partial sums
    N = (
        (draw(st.integers(4000, 9000)),)
        if large
        else draw(st.lists(st.integers(1, 9), min_size=0, max_size=3).map(tuple))
    )
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    normal = lambda *n: torch.randn(*n, generator=rng, dtype=torch.float64)
    spread = 10.0 ** draw(st.floats(-3, 1))
    pred = normal(G, S, *N).to(dtype)
    target = (pred + spread * normal(G, S, *N)).to(dtype)
    own = draw(st.booleans())
    weights = torch.rand(*((G,) if own else ()), S, generator=rng, dtype=torch.float64)
    energy = trajectory_velocity_energy(pred, target, weights, backend="reference").double()
    distance = 10.0 ** draw(st.floats(-4, 1.5))  # of the policies: none, clipped or clamped
    score = torch.float64 if dtype is torch.float64 else torch.float32
    old, ref = ((distance * normal(G) - energy).to(score) for _ in range(2))
    if draw(st.booleans()):
        old = (-energy).to(score)
    advantages = normal(G).to(score)
    if draw(st.booleans()):
        advantages = advantages.round()  # ties and zeros
    drop = draw(st.booleans())
    if drop and draw(st.booleans()):
        pred = pred.clone()
        pred[draw(st.integers(0, G - 1)), draw(st.integers(0, S - 1))] = torch.nan
    low = draw(st.floats(0, 1))
    objective = ContrastiveObjective(
        clip_range_low=low,
        clip_range_high=draw(st.floats(0, 2)),
        kl_coef=draw(st.sampled_from((0.0, 0.3, 10.0))),
        protect=draw(st.sampled_from(("mechanism_1", "mechanism_2"))),
        log_ratio_clamp=draw(st.floats(0.01, 60)),
        min_update_entropy_ratio=draw(st.floats(0, 1)),
    )
    options = {"objective": objective, "safe": draw(st.booleans())}
    if drop:
        options["nonfinite"] = "drop"
    return Case(
        laid_out(draw, pred),
        laid_out(draw, target),
        weights,
        old,
        advantages,
        draw(st.sampled_from((ref, None))),
        torch.rand(S, generator=rng) < 0.7 if draw(st.booleans()) else None,
        options,
    )


def check(c: Case, backend: str) -> None:
    pred = c.pred.detach().requires_grad_()
    try:
        r = tve_grpo_loss(
            pred,
            c.target,
            c.weights,
            c.old,
            c.advantages,
            c.ref,
            grad_steps=c.grad_steps,
            backend=backend,
            **c.options,
        )
    except BackendUnavailable as e:
        pytest.skip(str(e))
    r.loss.backward()
    # The contract of the energies.
    energies = trajectory_velocity_energy(
        c.pred.detach().double(), c.target.double(), c.weights, backend="reference"
    )
    torch.testing.assert_close(r.energies.double(), energies, rtol=1e-6, atol=1e-30, equal_nan=True)
    # The policy, of the energies as they came out: float64 inside, rounded once. The Triton sums
    # round differently from the reference's: 1e-12 of the terms, which are up to kl_coef * 25.
    wide = [None if x is None else x.double() for x in (c.old, c.advantages, c.ref)]
    p = branch_policy_loss(-r.energies.double(), *wide, backend="reference", **c.options)  # type: ignore[arg-type]
    for name in ("loss", "grpo_loss", "kl", "entropy", "clip_fraction", "score_grad"):
        ours, truth = getattr(r, name).detach().double(), getattr(p, name).detach()
        torch.testing.assert_close(ours, truth, rtol=1.3e-7, atol=1e-9, msg=name)
    for name in ("ratio", "log_ratio"):
        ours, truth = getattr(r, name).double(), getattr(p, name)
        torch.testing.assert_close(ours, truth, rtol=1.3e-7, atol=1e-9, equal_nan=True, msg=name)
    assert r.dropped == p.dropped
    kept = len(c.old) - int(p.dropped)
    threshold = math.log(max(1, kept)) * (1 - c.options["objective"].min_update_entropy_ratio)
    if abs(float(p.entropy) - threshold) > 1e-9:  # else either way is right
        assert r.skip == p.skip
    # The gradient, of the score gradient as it came out: a rounding to the dtype, three in float.
    mask = torch.ones(c.pred.shape[1], dtype=torch.bool) if c.grad_steps is None else c.grad_steps
    factor = -2 * r.score_grad.double()[:, None] * c.weights * mask / c.pred[0, 0].numel()
    factor = factor.view(*c.pred.shape[:2], *[1] * (c.pred.ndim - 2))
    truth = factor * (c.pred.detach().double() - c.target.double())
    truth = torch.where(factor == 0, 0.0, truth)
    info = torch.finfo(c.pred.dtype)
    rounding = info.eps / 2
    if backend == "triton" and c.pred.dtype is torch.bfloat16 and registry.TRITON_INTERPRETS:
        rounding = info.eps  # the interpreter cuts the lower bits off
    wide_eps = 0 if c.pred.dtype is torch.float64 else 3 * 2**-24
    torch.testing.assert_close(
        pred.grad.double(),
        truth,
        rtol=rounding + wide_eps,
        atol=info.smallest_normal,  # below it, values have fewer bits
    )


quiet = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=2000, **quiet)
@given(cases((torch.float32, torch.bfloat16)))
def test_cpu(case: Case) -> None:
    check(case, "cpu")


@settings(max_examples=300, **quiet)
@given(cases((torch.float32, torch.float64, torch.float16, torch.bfloat16)))
def test_reference(case: Case) -> None:
    check(case, "reference")


@settings(max_examples=150, **quiet)
@given(cases((torch.float32, torch.bfloat16, torch.float16)))
def test_triton(case: Case) -> None:
    check(case, "triton")
