"""The closed forms against autograd of the formulas as written, in float64."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvpo_kernels import (
    BackendUnavailable,
    BranchPolicyLoss,
    ContrastiveObjective,
    anchor_advantages,
    branch_policy_loss,
    fuse_advantages,
)
from kvpo_kernels.errors import ConfigError, ShapeError
from kvpo_kernels.ops.branch_policy_loss import BACKENDS

NAMES = [b.name for b in BACKENDS]
each_backend = pytest.mark.parametrize("backend", NAMES)


def loss(backend: str, *args: Any, **kwargs: Any) -> BranchPolicyLoss:
    try:
        return branch_policy_loss(*args, **kwargs, backend=backend)
    except BackendUnavailable as e:
        pytest.skip(str(e))


def as_written(
    l: Tensor, old: Tensor, A: Tensor, ref: Tensor | None, o: ContrastiveObjective, safe: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The objective from torch operations only, to be differentiated by autograd."""
    lp, lpo = l.log_softmax(0), old.log_softmax(0)
    rho = (lp - lpo).clamp(-o.log_ratio_clamp, o.log_ratio_clamp).exp()
    clipped = rho.clamp(1 - o.clip_range_low, 1 + o.clip_range_high)
    grpo = -torch.min(rho * A, clipped * A).mean()
    kl = (
        lp.exp() * ((lp.exp() + 1e-10).log() - (lpo if ref is None else ref.log_softmax(0)))
    ).sum()
    k = 1.0 if safe else {"mechanism_1": 0.0, "mechanism_2": 0.5}[o.protect]
    # Unsafe mechanism_2: the branches' entries of softmax([log pi, 0]).
    halved = not safe and o.protect == "mechanism_2"
    q = torch.cat([lp, torch.zeros(1)]).log_softmax(0)[:-1] if halved else lp
    entropy = -(q.exp() * q).sum()
    return k * (grpo + o.kl_coef * kl), grpo, kl, entropy


def random_case(i: int) -> dict[str, Any]:
    """Case i of a fixed sequence that visits ties, zeros, clips, clamps, G = 1 and underflow."""
    g = torch.Generator().manual_seed(i)
    G = [1, 2, 3, 8, 9, 16][i % 6]
    u = lambda *n: torch.rand(*n, generator=g, dtype=torch.float64)
    spread = [0.0, 1e-3, 0.3, 3.0, 40.0, 1000.0, 1e5][int(7 * u(1))]
    old = spread * torch.randn(G, generator=g, dtype=torch.float64)
    step = [0.0, 0.02, 0.3, 30.0][int(4 * u(1))]
    scores = old + step * torch.randn(G, generator=g, dtype=torch.float64)
    if u(1) < 0.2:
        scores = scores.round()  # ties
    A = torch.randn(G, generator=g, dtype=torch.float64).clamp(-2.5, 2.5)
    A = torch.where(u(G) < 0.2, 0.0, A)
    ref = None if u(1) < 0.3 else old + 0.5 * torch.randn(G, generator=g, dtype=torch.float64)
    objective = ContrastiveObjective(
        clip_range_low=0.3 * u(1).item(),
        clip_range_high=0.6 * u(1).item(),
        kl_coef=[0.0, 0.1, 10.0][int(3 * u(1))],
        protect=["mechanism_1", "mechanism_2"][int(2 * u(1))],  # type: ignore[arg-type]
        log_ratio_clamp=[20.0, 2.0][int(2 * u(1))],
        min_update_entropy_ratio=[0.0, 0.05, 0.5][int(3 * u(1))],
    )
    return dict(l=scores, old=old, A=A, ref=ref, o=objective, safe=bool(u(1) < 0.5))


@each_backend
def test_values_and_gradients_equal_autograd_over_2400_cases(backend: str) -> None:
    seen = dict.fromkeys(("clipped", "clamped", "underflow", "tie", "single", "skip"), 0)
    cases = 360 if backend == "triton" else 2400  # all hold there too, but take a minute
    for i in range(cases):
        c = random_case(i)
        l, o = c["l"].requires_grad_(), c["o"]
        expected, grpo, kl, entropy = as_written(**c)
        (grad,) = torch.autograd.grad(expected, l)
        r = loss(backend, l, c["old"], c["A"], c["ref"], objective=o, safe=c["safe"])
        # Relative to the largest term of the sum: exp(20) A in a clamped branch is 1e9.
        rho, divergence = r.ratio.max().item(), kl.abs().item()
        size = max(1.0, rho, o.kl_coef * divergence)
        for name, ours, theirs, largest in (
            ("loss", r.loss, expected, size),
            ("score_grad", r.score_grad, grad, size),
            ("grpo_loss", r.grpo_loss, grpo, max(1.0, rho)),
            ("kl", r.kl, kl, max(1.0, divergence)),
            ("entropy", r.entropy, entropy, 1.0),
        ):
            error = (ours - theirs).abs().max().item() / largest
            assert error <= 1e-12, f"case {i}: {name} is off by {error}"
        assert r.score_grad.sum().abs().item() <= 1e-12 * size, f"case {i}"
        limit = math.log(len(l)) * (1 - o.min_update_entropy_ratio)
        if abs(entropy.item() - limit) > 1e-12:
            assert bool(r.skip) == (o.min_update_entropy_ratio > 0 and entropy.item() > limit)
        low, high = 1 - o.clip_range_low, 1 + o.clip_range_high
        outside = (r.ratio < low) | (r.ratio > high)
        assert r.clip_fraction.item() == pytest.approx(outside.double().mean().item(), abs=1e-15)
        seen["clipped"] += bool(outside.any())
        seen["clamped"] += bool((r.log_ratio.abs() > o.log_ratio_clamp).any())
        seen["underflow"] += bool((l.detach().softmax(0) == 0).any())
        seen["tie"] += bool(len(set(l.tolist())) < len(l))
        seen["single"] += len(l) == 1
        seen["skip"] += bool(r.skip)
    assert min(seen.values()) >= cases // 24, f"the cases do not reach what they are for: {seen}"


@each_backend
def test_a_clip_that_is_tighter_above(backend: str) -> None:
    """[0.5, 1.05], which the released code takes."""
    o = ContrastiveObjective(clip_range_low=0.5, clip_range_high=0.05, kl_coef=0.0)
    old = torch.zeros(4, dtype=torch.float64)
    l = torch.tensor([0.3, 0.0, -0.2, -1.5], dtype=torch.float64, requires_grad=True)
    A = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    expected, *_ = as_written(l, old, A, None, o, True)
    (grad,) = torch.autograd.grad(expected, l)
    r = loss(backend, l, old, A, objective=o)
    torch.testing.assert_close(r.loss, expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(r.score_grad, grad, rtol=1e-14, atol=1e-15)
    low, high = 0.5, 1.05
    assert (
        r.ratio[0] > high
        and r.ratio[3] < low
        and r.clip_fraction == ((r.ratio < low) | (r.ratio > high)).double().mean()
    )


@each_backend
def test_backward_is_the_score_gradient(backend: str) -> None:
    c = random_case(9)
    l = c["l"].requires_grad_()
    r = loss(backend, l, c["old"], c["A"])
    (once,) = torch.autograd.grad(r.loss, l, retain_graph=True)
    assert torch.equal(once, r.score_grad)
    (thrice,) = torch.autograd.grad(3 * r.loss, l, retain_graph=True)
    assert torch.equal(thrice, 3 * r.score_grad)
    r.loss.backward(retain_graph=True)
    r.loss.backward()  # accumulation must not write into what the graph keeps
    assert torch.equal(l.grad, 2 * once) and torch.equal(r.score_grad, once)


@each_backend
def test_gradcheck(backend: str) -> None:
    c = random_case(3 + 6 * 5)
    old = torch.linspace(-1, 1, 8, dtype=torch.float64)
    A = torch.tensor([1.0, -1, 0.5, 0, 2, -2, 0.3, -0.3], dtype=torch.float64)
    l = (old + 0.01 * torch.arange(8)).requires_grad_()  # away from the kinks of clip and clamp
    assert torch.autograd.gradcheck(lambda s: loss(backend, s, old, A, objective=c["o"]).loss, (l,))


@each_backend
@pytest.mark.parametrize("seed", range(20))
def test_the_order_of_the_branches_does_not_matter_to_a_bit(backend: str, seed: int) -> None:
    c = random_case(seed)
    inputs = [c[k] for k in ("l", "old", "A", "ref")]
    order = torch.randperm(len(c["l"]), generator=torch.Generator().manual_seed(seed))
    a = loss(backend, *inputs, objective=c["o"])
    b = loss(backend, *(x if x is None else x[order] for x in inputs), objective=c["o"])
    assert torch.equal(a.numbers[:7], b.numbers[:7])
    assert torch.equal(a.numbers[7:].view(4, -1)[:, order], b.numbers[7:].view(4, -1))


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@given(st.lists(st.floats(-1e5, 1e5), min_size=1, max_size=9))
@settings(max_examples=40, deadline=None)
def test_the_ratio_at_the_old_policy_is_exactly_one(
    backend: str, dtype: torch.dtype, values: list[float]
) -> None:
    s = torch.tensor(values, dtype=dtype)
    r = loss(backend, s, s.clone(), torch.ones_like(s))
    assert r.ratio.dtype is dtype
    assert torch.equal(r.ratio, torch.ones_like(s)) and r.clip_fraction == 0


@each_backend
def test_float32_results_are_the_rounded_float64_ones(backend: str) -> None:
    c = random_case(21)
    wide = [c[k] if c[k] is None else c[k].float().double() for k in ("l", "old", "A", "ref")]
    narrow = [x if x is None else x.float() for x in wide]
    a = loss(backend, *narrow, objective=c["o"], safe=False)
    b = loss(backend, *wide, objective=c["o"], safe=False)
    assert torch.equal(a.loss, b.loss.float()) and torch.equal(a.numbers, b.numbers.float())


@each_backend
def test_protection(backend: str) -> None:
    s, A = torch.tensor([0.3, 0.1, -0.2]), torch.tensor([1.0, -1.0, 0.5])
    both = [ContrastiveObjective(protect=p) for p in ("mechanism_1", "mechanism_2")]  # type: ignore[arg-type]
    safe = loss(backend, s, s, A, objective=both[0])
    for objective, scale in zip(both, (0.0, 0.5), strict=True):
        assert loss(backend, s, s, A, objective=objective).scale == 1.0
        r = loss(backend, s, s, A, objective=objective, safe=False)
        assert type(r.scale) is float and r.scale == scale
        assert torch.equal(r.score_grad, scale * safe.score_grad)
        assert torch.equal(r.loss, scale * safe.loss) and torch.equal(r.grpo_loss, safe.grpo_loss)


@each_backend
def test_the_entropy_rule(backend: str) -> None:
    s = torch.zeros(4, dtype=torch.float64)
    at = lambda ratio, safe=True: loss(
        backend,
        s,
        s,
        s,
        objective=ContrastiveObjective(min_update_entropy_ratio=ratio),
        safe=safe,
    )
    assert at(0.0).skip.dtype is torch.bool and not at(0.0).skip
    assert at(0.01).skip  # a uniform policy has the entropy log 4
    assert at(0.01).entropy.item() == pytest.approx(math.log(4))
    half = at(0.01, safe=False)
    assert half.entropy.item() == pytest.approx(math.log(4) / 2 + math.log(2) / 2)
    assert not half.skip and at(0.3, safe=False).skip  # 1.04 against 0.99 and 0.7 times log 4


@each_backend
def test_without_a_reference_the_old_policy_is_it(backend: str) -> None:
    c = random_case(9)
    a = loss(backend, c["l"], c["old"], c["A"])
    b = loss(backend, c["l"], c["old"], c["A"], c["old"])
    assert a.kl_reference == "old" and b.kl_reference == "given"
    assert torch.equal(a.loss, b.loss) and torch.equal(a.numbers, b.numbers)


@each_backend
def test_dropping_equals_leaving_out(backend: str) -> None:
    c = random_case(3 + 6 * 7)
    old, A, ref = c["old"], c["A"], c["old"] + 0.1
    l = (old + 0.05).clone()
    keep = torch.tensor([0, 2, 3, 6])
    few = loss(backend, l[keep], old[keep], A[keep], ref[keep])
    l[1], old[4], A[5], ref[7] = float("nan"), float("inf"), float("nan"), -float("inf")
    l.requires_grad_()
    r = loss(backend, l, old, A, ref, nonfinite="drop")
    assert r.dropped == 4 and few.dropped == 0
    assert torch.equal(r.score_grad[keep], few.score_grad)
    assert (r.score_grad[[1, 4, 5, 7]] == 0).all() and r.ratio[[1, 4, 5, 7]].isnan().all()
    for name in ("loss", "kl", "entropy", "clip_fraction", "grpo_loss"):
        assert torch.equal(getattr(r, name), getattr(few, name)), name
    r.check()
    r.loss.backward()
    assert torch.equal(l.grad, r.score_grad)


@each_backend
def test_all_dropped_is_zero_loss(backend: str) -> None:
    s = torch.full((3,), float("nan"), requires_grad=True)
    r = loss(backend, s, torch.zeros(3), torch.zeros(3), nonfinite="drop")
    assert r.loss == 0 and r.dropped == 3 and (r.score_grad == 0).all() and not r.skip


@each_backend
def test_compiles_fully_and_passes_opcheck(backend: str) -> None:
    c = random_case(9)
    args = (c["l"], c["old"], c["A"], c["ref"])
    loss(backend, *args)
    f = torch.compile(
        lambda s: branch_policy_loss(s, *args[1:], backend=backend),
        fullgraph=True,
        backend="aot_eager",
    )
    leaf, eager_leaf = (c["l"].clone().requires_grad_() for _ in range(2))
    compiled, eager = f(leaf), loss(backend, eager_leaf, *args[1:])
    assert torch.equal(compiled.loss, eager.loss) and torch.equal(compiled.ratio, eager.ratio)
    assert compiled.scale == 1.0
    (2 * compiled.loss).backward()
    (2 * eager.loss).backward()
    assert torch.equal(leaf.grad, eager_leaf.grad)
    with pytest.raises(ValueError, match=r"scores must be finite, got \[nan\] for branches \[1\]"):
        f(torch.where(torch.arange(len(leaf)) == 1, torch.nan, c["l"]))
    scalars = (0.1, 0.2, 10.0, 20.0, 0.0, 1.0, 1.0, False)
    torch.library.opcheck(torch.ops.kvpo.branch_policy_loss.default, (*args, *scalars, backend))


# Advantages -------------------------------------------------------------------------------------


@given(st.integers(1, 4), st.integers(1, 9), st.integers(0, 2**20))
@settings(max_examples=50, deadline=None)
def test_anchor_advantages_are_those_of_the_formula(C: int, G: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    r, anchor, w = (torch.randn(*n, generator=g, dtype=torch.float64) for n in ((C, G), (C,), (C,)))
    expected = torch.zeros(G, dtype=torch.float64)
    for c in range(C):
        std = torch.cat([r[c], anchor[c : c + 1]]).std(unbiased=True)
        expected += w[c] * (r[c] - anchor[c]) / (std + 1e-8)
    torch.testing.assert_close(anchor_advantages(r, anchor, w), expected, rtol=1e-11, atol=1e-12)
    one = anchor_advantages(r[0].float(), anchor[0].item())
    assert one.dtype is torch.float32 and one.shape == (G,)


def test_equal_rewards_have_no_advantage() -> None:
    r = torch.full((2, 7), 0.1)
    assert torch.equal(anchor_advantages(r, r[:, 0], [1.0, 2.0]), torch.zeros(7))
    assert anchor_advantages(r[0, :1], 0.1 + 1.0).tolist() == pytest.approx([-(2**0.5)])


def test_fusion_modes() -> None:
    local = torch.tensor([1.0, 2.0, -1.0, 4.0], dtype=torch.float64)
    far = torch.tensor([-2.0, 0.0, 2.0, 8.0], dtype=torch.float64)
    std = lambda x: x / x.std(unbiased=False)
    z = lambda x: (x - x.mean()) / x.std(unbiased=False)
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-14)
    close(fuse_advantages(local), std(local))
    close(fuse_advantages(local, far, clamp=None), std(local) + 0.5 * std(far))
    close(fuse_advantages(local, far), (std(local) + 0.5 * std(far)).clamp(-2.5, 2.5))
    close(fuse_advantages(local, far, 2.0, -1.0, mode="zscore", clamp=None), 2 * z(local) - z(far))
    close(fuse_advantages(local, far, mode="none", clamp=3.0), (local + far / 2).clamp(-3, 3))
    assert torch.equal(fuse_advantages(local[:1]), local[:1])  # no deviation: not divided by
    same = torch.full((7,), 0.1)
    assert torch.equal(fuse_advantages(same, mode="zscore"), torch.zeros(7))


def test_dropping_advantages_equals_leaving_out() -> None:
    r = torch.tensor([[1.0, 2.0, float("nan"), 0.5], [0.0, 3.0, 1.0, 2.0]], dtype=torch.float64)
    anchor = torch.tensor([0.7, 1.0], dtype=torch.float64)
    keep = [0, 1, 3]
    a = anchor_advantages(r, anchor, nonfinite="drop")
    assert a[2].isnan()
    left = anchor_advantages(r[:, keep], anchor)  # one component is enough to leave it out
    torch.testing.assert_close(a[keep], left, rtol=1e-14, atol=1e-14)
    fused = fuse_advantages(a, mode="zscore", nonfinite="drop")
    torch.testing.assert_close(
        fused[keep], fuse_advantages(a[keep], mode="zscore"), rtol=1e-14, atol=1e-14
    )
    assert fused[2].isnan()
    s = torch.zeros(4, dtype=torch.float64)
    r4 = branch_policy_loss(s, s, fused, nonfinite="drop")
    assert r4.dropped == 1 and r4.loss.isfinite()
    gone = anchor_advantages(torch.full((2,), float("nan")), 0.0, nonfinite="drop")
    assert gone.isnan().all()


def steps(x: float, n: int, dtype: torch.dtype) -> float:
    """The n-th neighbour of a number in a dtype."""
    number = torch.tensor(x, dtype=dtype)
    unit = {torch.float64: torch.int64, torch.float32: torch.int32}.get(dtype, torch.int16)
    return (number.view(unit) + n).view(dtype).item()


@pytest.mark.parametrize("mode", ["std", "zscore", "none"])
@pytest.mark.parametrize("value", [0.3, 1.0, 1000.0, -0.7, 3e-6, 2e30])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
def test_rewards_equal_up_to_rounding_have_no_advantage(
    dtype: torch.dtype, value: float, mode: Any
) -> None:
    if dtype is torch.float16 and value in (3e-6, 2e30):
        pytest.skip("its normal numbers are from 6e-5 to 65504")
    noisy = torch.full((8,), value, dtype=dtype)
    noisy[3], noisy[5] = steps(value, 1, dtype), steps(value, -2, dtype)
    for anchor in (noisy[0], noisy[0].item(), steps(value, 2, dtype)):
        A = anchor_advantages(noisy, anchor)
        assert torch.equal(A, torch.zeros(8, dtype=dtype))
        assert torch.equal(fuse_advantages(A, A, mode=mode), torch.zeros(8, dtype=dtype))
    # Of several components only that one has no say; a single float32 step among the others too.
    real = torch.linspace(-1, 1, 8).to(dtype)
    both = anchor_advantages(torch.stack([noisy, real]), [noisy[0].item(), 0.0])
    assert torch.equal(both, anchor_advantages(real, 0.0))
    # All better than the anchor by the same: no branch is told from another.
    far = noisy[0].item() / 2
    A = anchor_advantages(noisy, far)
    assert len(set(A.tolist())) == 1 and A[0] != 0
    fused = fuse_advantages(A, mode=mode)
    assert torch.equal(fused, torch.zeros_like(A) if mode == "zscore" else A.clamp(-2.5, 2.5))


@pytest.mark.parametrize("base", [0.0, 1e-6, 6e-5])
def test_steps_of_float16_are_coarse_below_its_normal_numbers(base: float) -> None:
    r = torch.full((8,), base, dtype=torch.float16)
    r[3] = steps(r[0].item(), 1, torch.float16)
    assert not anchor_advantages(r, r[0]).any()
    assert not fuse_advantages(r, mode="zscore").any()
    assert anchor_advantages(torch.stack([r[0], r[0] + 1e-5]), r[0]).any()


def test_one_step_of_noise_does_not_move_the_policy() -> None:
    """As released it is the largest advantage there is: the epsilon lies below float32's step."""
    r = torch.full((8,), 0.3)
    r[2] = steps(0.3, 1, torch.float32)
    released = anchor_advantages(r, 0.3, std_floor=0)
    assert fuse_advantages(released, std_floor=0).max() == 2.5
    s = torch.zeros(8)
    for A in (anchor_advantages(r, 0.3), fuse_advantages(anchor_advantages(r, 0.3))):
        assert branch_policy_loss(s, s, A).score_grad.abs().max() < 1e-12  # of the KL: rounding
    # Noise that reaches the fusion is not told from rewards there either.
    noise = torch.full((8,), 1.25)
    noise[2] = steps(1.25, 1, torch.float32)
    assert torch.equal(fuse_advantages(noise), noise)
    assert not fuse_advantages(noise, mode="zscore").any()
    assert fuse_advantages(noise, mode="zscore", std_floor=0).max() == 2.5


@pytest.mark.parametrize(
    ("base", "spread", "dtype"),
    [
        (1000.0, 1e-3, torch.float32),  # 16 steps of float32
        (1000.0, 1e-9, torch.float64),
        (0.0, 1e-30, torch.float32),
        (0.3, 0.05, torch.bfloat16),
        (0.3, 0.01, torch.float16),
        (1e200, 1e200, torch.float64),  # whose squares overflow
    ],
)
def test_a_real_spread_keeps_its_bits(base: float, spread: float, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(3)
    r = (base + spread * torch.randn(2, 9, generator=g, dtype=torch.float64)).to(dtype)
    ours = anchor_advantages(r[:, :-1], r[:, -1])
    assert torch.equal(ours, anchor_advantages(r[:, :-1], r[:, -1], std_floor=0.0))
    scaled = [x.double() * (1 / base if base > 1e9 else 1.0) for x in r]
    expected = sum((x[:-1] - x[-1]) / (x.std() + (0.0 if base > 1e9 else 1e-8)) for x in scaled)
    # One rounding of the result; the plain formula's mean is off by 1e-4 of a spread of 1e-9.
    rtol = max(torch.finfo(dtype).eps, 1e-7)
    torch.testing.assert_close(ours.double(), expected, rtol=rtol, atol=1e-12)
    for mode in ("std", "zscore"):
        fused = fuse_advantages(ours, mode=mode)  # type: ignore[arg-type]
        assert torch.equal(fused, fuse_advantages(ours, mode=mode, std_floor=0.0))  # type: ignore[arg-type]
    # An anchor far away says nothing about the branches' own rounding.
    far = anchor_advantages(r[0, :-1], 1e6 if base < 1e9 else 0.0)
    if dtype is torch.float64:
        assert len(set(far.tolist())) > 4


def test_a_floor_of_ones_own() -> None:
    r = torch.tensor([[1.0, 2.0, 3.0], [0.1, 0.2, 0.3]], dtype=torch.float64)
    second = anchor_advantages(r[1], 0.2)
    assert torch.equal(anchor_advantages(r, [2.0, 0.2], std_floor=[1.0, 0.0]), second)
    assert torch.equal(anchor_advantages(r, [2.0, 0.2], std_floor=1.0), torch.zeros(3).double())
    nan = torch.cat([r[0], torch.tensor([float("nan")])])
    dropped = anchor_advantages(nan, 2.0, std_floor=1.0, nonfinite="drop")
    assert dropped[:3].tolist() == [0.0] * 3 and dropped[3].isnan()
    assert fuse_advantages(r[0], std_floor=1.0).tolist() == [1.0, 2.0, 2.5]
    for bad in (-1.0, float("nan"), float("inf")):
        for call in (lambda x: anchor_advantages(r[0], 0.0, std_floor=x),
                     lambda x: fuse_advantages(r[0], std_floor=x)):  # fmt: skip
            with pytest.raises(ConfigError, match="std_floor must be >= 0 and finite"):
                call(bad)
    with pytest.raises(ShapeError, match=r"std_floor must be \[2\], got \[3\]"):
        anchor_advantages(r, [2.0, 0.2], std_floor=[0.0] * 3)
