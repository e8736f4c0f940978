"""Energies, advantages and the loss refuse what cannot be meant, naming it."""

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

from kvpo_kernels import (
    BackendUnavailable,
    ContrastiveObjective,
    TrajectoryEnergies,
    anchor_advantages,
    branch_policy_loss,
    fuse_advantages,
    trajectory_velocity_energy,
    tve_grpo_loss,
    velocity_gradient,
    velocity_step_weights,
)
from kvpo_kernels.errors import NonFiniteError

BACKEND_NAMES = ("cpu", "triton", "reference")
each_backend = pytest.mark.parametrize("backend", BACKEND_NAMES)
NAN, INF = float("nan"), float("inf")


def runs(f: Callable[[], Any]) -> Any:
    try:
        return f()
    except BackendUnavailable as e:
        pytest.skip(str(e))


def refuses(match: str, f: Callable[[], Any], kind: type[Exception] = ValueError) -> None:
    with pytest.raises(kind, match=match):
        runs(f)


# 36: non-finite energies
@each_backend
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("which", ["scores", "old_scores", "advantages", "ref_scores"])
def test_nonfinite_scores_name_argument_and_branches(which: str, bad: float, backend: str) -> None:
    inputs = {n: torch.zeros(5) for n in ("scores", "old_scores", "advantages", "ref_scores")}
    inputs[which][[1, 4]] = bad
    f = lambda: branch_policy_loss(**inputs, backend=backend)
    refuses(rf"{which} must be finite, got \[.*\] for branches \[1, 4\]", f)


@each_backend
def test_nonfinite_predictions_name_the_branch(backend: str) -> None:
    pred = torch.zeros(3, 2, 40)
    pred[2, 1, 39] = NAN
    args = (torch.zeros(3, 2, 40), torch.ones(2), torch.zeros(3), torch.zeros(3))
    f = lambda: tve_grpo_loss(pred, *args, backend=backend)
    refuses(r"energies must be finite, got \[nan\] for branches \[2\]", f)


@each_backend
def test_nonfinite_weights_are_named(backend: str) -> None:
    args = (torch.zeros(3, 2, 40), torch.tensor([1.0, NAN]), torch.zeros(3), torch.zeros(3))
    f = lambda: tve_grpo_loss(torch.zeros(3, 2, 40), *args, backend=backend)
    refuses(r"step_weights must be finite, got \[1.0, nan\]", f)


def test_a_result_with_nonfinite_inputs_is_all_nan_and_check_names_them() -> None:
    """What a GPU, where nothing looks at values, returns: the reference, below the host check."""
    from kvpo_kernels import BranchPolicyLoss
    from kvpo_kernels.reference import branch_policy_loss as reference

    s = torch.zeros(4)
    s[3] = -INF  # log pi = -inf gives finite terms: they must become NaN all the same
    numbers = reference.forward(s, s * 0, s * 0 + 1, None, 0.1, 0.2, 10, 20, 0, 1, 1, False)
    r = BranchPolicyLoss(numbers, 4, 1.0, "old", None)
    assert r.loss.isnan() and r.score_grad.isnan().all() and r.ratio.isnan().all()
    refuses(r"not finite for branches \[3\]", r.check)


# 37, 38, 39: groups and rewards
@each_backend
def test_one_branch_is_legal_and_has_no_gradient(backend: str) -> None:
    s = torch.tensor([-3.0], requires_grad=True)
    r = runs(lambda: branch_policy_loss(s, torch.tensor([-2.0]), torch.ones(1), backend=backend))
    r.loss.backward()
    assert r.loss.item() == pytest.approx(-1.0, abs=1e-6) and s.grad.item() == 0.0
    assert anchor_advantages(torch.ones(1), 0.0).item() == pytest.approx(2**0.5)


@each_backend
def test_equal_rewards_give_zero_gradient(backend: str) -> None:
    A = fuse_advantages(anchor_advantages(torch.full((3, 8), 0.3), torch.full((3,), 0.3)))
    assert torch.equal(A, torch.zeros(8))
    s = torch.linspace(-1, 1, 8, requires_grad=True)
    o = ContrastiveObjective(kl_coef=0.0)
    r = runs(lambda: branch_policy_loss(s, s.detach(), A, objective=o, backend=backend))
    r.loss.backward()
    assert r.loss == 0 and torch.equal(s.grad, torch.zeros(8))


def test_nonfinite_rewards_name_component_and_branches() -> None:
    r = torch.zeros(2, 4)
    r[1, 2] = NAN
    refuses(
        r"rewards\[1\] must be finite, got \[nan\] for branches \[2\]",
        lambda: anchor_advantages(r, torch.zeros(2)),
    )
    refuses(r"anchor_rewards must be finite", lambda: anchor_advantages(r[:1], INF))
    refuses(r"global_ must be finite.*branches \[2\]", lambda: fuse_advantages(r[0], r[1]))
    refuses(r"component_weights must be finite", lambda: anchor_advantages(r[:1], 0.0, [NAN]))


# 40: spread
@each_backend
def test_energies_of_1e5_are_stable(backend: str) -> None:
    s = torch.tensor([-1e5, 0.0, 1e5, -3.0], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([1e5, 0.0, -1e5, 3.0], dtype=torch.float64)
    A = torch.tensor([1.0, -1.0, 0.5, -0.5], dtype=torch.float64)
    o = ContrastiveObjective(kl_coef=0.0)
    r = runs(lambda: branch_policy_loss(s, old, A, objective=o, backend=backend))
    r.loss.backward()
    assert r.loss.isfinite() and s.grad.isfinite().all()
    assert r.log_ratio.tolist() == [-2e5, 0.0, 2e5, -6.0]
    assert r.ratio.tolist() == pytest.approx([math.exp(x) for x in (-20, 0, 20, -6)], rel=1e-15)
    # Branches 0 and 2 are clamped, 3 is clipped; 1 has ratio 1 and no mass, which 2 has.
    assert s.grad.tolist() == [0.0, 0.25, -0.25, 0.0]


# 41: sigmas
@pytest.mark.parametrize("bad", [0.0, -0.5, NAN, INF])
def test_bad_sigmas_name_the_step(bad: float) -> None:
    refuses(
        r"sigmas must be > 0 and finite, got \[.*\] at steps \[1\]",
        lambda: velocity_step_weights([1.0, bad]),
    )
    refuses(r"at steps \[\[0, 1\]\]", lambda: velocity_step_weights(torch.tensor([[1.0, bad]])))


def test_bad_weight_options() -> None:
    refuses("space must be", lambda: velocity_step_weights([1.0], space="eps"))  # type: ignore[arg-type]
    for floor in (-1.0, NAN, INF):
        refuses("sigma_floor must be", lambda f=floor: velocity_step_weights([1.0], sigma_floor=f))
    for t in (0.0, -1.0, NAN, INF):
        refuses("temperature must be", lambda t=t: velocity_step_weights([1.0], temperature=t))


# 42: shapes, dtypes, devices
def test_mismatched_trajectories_do_not_broadcast() -> None:
    x, w = torch.zeros(3, 2, 5), torch.ones(2)
    e = trajectory_velocity_energy
    refuses(r"target must be \[3, 2, 5\] like pred", lambda: e(x, x[:, :, :1], w))
    refuses(r"target must be \[3, 2, 5\] like pred", lambda: e(x, x[:1], w))
    refuses(r"step_weights must be \[2\] or \[3, 2\], got \[1\]", lambda: e(x, x, w[:1]))
    refuses(r"step_weights must be \[2\] or \[3, 2\], got \[\]", lambda: e(x, x, torch.tensor(1.0)))
    refuses(r"pred must be \[G, S, ...\]", lambda: e(x[0, 0], x[0, 0], w))
    refuses("not empty", lambda: e(x[:0], x[:0], w))
    refuses("target must be torch.float32", lambda: e(x, x.double(), w), TypeError)
    refuses("pred must be one of", lambda: e(x.int(), x.int(), w), TypeError)
    refuses("step_weights must be a floating", lambda: e(x, x, w.int()), TypeError)
    refuses("target must be on cpu", lambda: e(x, x.to("meta"), w), TypeError)
    refuses("target requires grad", lambda: e(x, x.clone().requires_grad_(), w))
    refuses("step_weights requires grad", lambda: e(x, x, w.clone().requires_grad_()))
    refuses(
        "takes float32 and bfloat16",
        lambda: e(x.half(), x.half(), w, backend="cpu"),
        NotImplementedError,
    )


def test_mismatched_scores() -> None:
    s = torch.zeros(3)
    f = branch_policy_loss
    refuses(r"scores must be \[G\] with G >= 1", lambda: f(s[:0], s[:0], s[:0]))
    refuses(r"old_scores must be \[3\], got \[2\]", lambda: f(s, s[:2], s))
    refuses(r"advantages must be \[3\], got \[1, 3\]", lambda: f(s, s, s[None]))
    refuses("ref_scores must be torch.float32", lambda: f(s, s, s, s.double()), TypeError)
    refuses("scores must be float32 or float64", lambda: f(s.half(), s, s), TypeError)
    refuses("advantages must be a tensor", lambda: f(s, s, [0.0] * 3), TypeError)  # type: ignore[arg-type]
    refuses("old_scores must be on cpu", lambda: f(s, s.to("meta"), s), TypeError)


def test_mismatched_fused_arguments() -> None:
    x, w, s = torch.zeros(3, 2, 5), torch.ones(2), torch.zeros(3)
    f = tve_grpo_loss
    refuses(r"old_scores must be \[3\]", lambda: f(x, x, w, s[:2], s))
    refuses("old_scores must be torch.float32", lambda: f(x, x, w, s.double(), s), TypeError)
    refuses("grad_steps must be bool", lambda: f(x, x, w, s, s, grad_steps=[1, 0]), TypeError)  # type: ignore[list-item]
    refuses(r"grad_steps must be \[2\], got \[1\]", lambda: f(x, x, w, s, s, grad_steps=[True]))
    refuses(r"target must be \[3, 2, 5\]", lambda: f(x, x[..., :1], w, s, s))


def test_bad_two_pass_arguments_change_nothing() -> None:
    acc = TrajectoryEnergies(3)
    x = torch.ones(2, 4)
    zero = torch.zeros_like(x)
    refuses("pred has 2 rows", lambda: acc.add(x, zero, 1.0))
    refuses(r"branches\[1\] = 3 not in \[0, 3\)", lambda: acc.add(x, zero, 1.0, [0, 3]))
    refuses(r"branches\[0\] = -1 not in", lambda: acc.add(x, zero, 1.0, [-1, 0]))
    refuses(r"branches\[1\] = 2 is named twice", lambda: acc.add(x, zero, 1.0, [2, 2]))
    refuses("must name the 2 rows", lambda: acc.add(x, zero, 1.0, [0]))
    refuses(r"branches\[0\] must be an int", lambda: acc.add(x, zero, 1.0, [0.0, 1.0]), TypeError)  # type: ignore[list-item]
    refuses("weight must be finite", lambda: acc.add(x, zero, NAN, [0, 1]))
    refuses(r"target must be \[2, 4\]", lambda: acc.add(x, zero[:1], 1.0, [0, 1]))
    refuses(r"weight must be a float or \[2\]", lambda: acc.add(x, zero, x[0], [0, 1]))
    refuses("weight must be finite", lambda: acc.add(x, zero, x[:, 0] / 0, [0, 1]))
    assert acc.energies.tolist() == [0.0, 0.0, 0.0]
    refuses("num_branches must be at least 1", lambda: TrajectoryEnergies(0))
    refuses("dtype must be", lambda: TrajectoryEnergies(1, dtype=torch.float16), TypeError)
    refuses(r"kappa must be \[2\]", lambda: velocity_gradient(x, zero, 1.0, torch.ones(3)))
    refuses("kappa must be a floating", lambda: velocity_gradient(x, zero, 1.0, [1, 1]), TypeError)  # type: ignore[arg-type]


def test_mismatched_rewards() -> None:
    r = torch.zeros(2, 4)
    refuses(r"anchor_rewards must be \[2\]", lambda: anchor_advantages(r, 0.0))
    refuses(r"component_weights must be \[2\]", lambda: anchor_advantages(r, r[:, 0], [1.0]))
    refuses(r"rewards must be \[C, G\] or \[G\]", lambda: anchor_advantages(r[None], r[:, 0]))
    refuses("rewards must be a floating", lambda: anchor_advantages(r.int(), r[:, 0]), TypeError)
    refuses(r"global_ must be \[4\] like local", lambda: fuse_advantages(r[0], r[0, :1]))
    refuses(r"local must be \[G\]", lambda: fuse_advantages(r))


# 43, 45: options
@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"clip_range_low": 1.2, "clip_range_high": 2.0}, "clip_range_low must be in"),
        ({"clip_range_low": -0.1}, "clip_range_low must be in"),
        ({"clip_range_high": -0.1}, "clip_range_high must be >= 0, got -0.1"),
        ({"clip_range_low": 0.1, "clip_range_high": -0.2}, "clip_range_high must be >= 0"),
        ({"clip_range_high": NAN}, "clip_range_high must be a finite number"),
        ({"clip_range_high": True}, "clip_range_high must be a finite number"),
        ({"kl_coef": -1.0}, "kl_coef must be >= 0"),
        ({"kl_coef": 1e39}, "kl_coef must be at most 3.4e[+]38"),
        ({"kl_coef": "10"}, "kl_coef must be a finite number"),
        ({"protect": "mechanism_3"}, "protect must be"),
        ({"log_ratio_clamp": 0.0}, "log_ratio_clamp must be in"),
        ({"log_ratio_clamp": 800.0}, "log_ratio_clamp must be in"),
        ({"min_update_entropy_ratio": 1.5}, "min_update_entropy_ratio must be in"),
    ],
)
def test_objectives_that_cannot_be_meant(options: dict[str, Any], match: str) -> None:
    refuses(match, lambda: ContrastiveObjective(**options))


def test_unknown_names_are_errors() -> None:
    s = torch.zeros(2)
    refuses("unexpected keyword", lambda: ContrastiveObjective(clip_low=0.1), TypeError)  # type: ignore[call-arg]
    refuses("unexpected keyword", lambda: branch_policy_loss(s, s, s, kl=1.0), TypeError)  # type: ignore[call-arg]
    refuses("nonfinite must be", lambda: branch_policy_loss(s, s, s, nonfinite="skip"))  # type: ignore[arg-type]
    refuses("mode must be", lambda: fuse_advantages(s, mode="minmax"))  # type: ignore[arg-type]
    refuses("clamp must be", lambda: fuse_advantages(s, clamp=0.0))
    refuses("local_weight must be finite", lambda: fuse_advantages(s, local_weight=NAN))
    refuses("unknown", lambda: branch_policy_loss(s, s, s, backend="gpu"), NotImplementedError)


# 44: constants that require grad
@each_backend
def test_constants_are_detached_with_a_warning(backend: str) -> None:
    s, old = torch.zeros(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    with pytest.warns(UserWarning, match="old_scores requires grad"):
        r = runs(lambda: branch_policy_loss(s, old, torch.ones(3), backend=backend))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        r.loss.backward()
    assert old.grad is None and s.grad is not None

    pred, target = torch.ones(3, 1, 4, requires_grad=True), torch.zeros(3, 1, 4)
    for i, name in enumerate(("old_scores", "advantages", "ref_scores")):
        values = [torch.zeros(3, requires_grad=i == j) for j in range(3)]
        objective = lambda values=values: branch_policy_loss(s, *values, backend=backend)
        fused = lambda values=values: tve_grpo_loss(
            pred, target, torch.ones(1), *values, backend=backend
        )
        for call in (objective, fused):
            with pytest.warns(UserWarning, match=f"{name} requires grad") as seen:
                result = runs(call)
            ours = [w for w in seen if "requires grad" in str(w.message)]
            assert [Path(w.filename) for w in ours] == [Path(__file__)]  # once, and at the call
            result.loss.backward()
            assert values[i].grad is None


# 26: the largest float16
@each_backend
def test_the_largest_float16_does_not_overflow(backend: str) -> None:
    if backend == "cpu":
        pytest.skip("takes no float16; the default then takes the reference, tested here as well")
    pred = torch.full((2, 1, 3000), 65504.0, dtype=torch.float16)
    pred[1] = 0.25
    target = -pred
    weights = torch.tensor([0.5])
    energies = runs(lambda: trajectory_velocity_energy(pred, target, weights, backend=backend))
    assert energies.tolist() == pytest.approx([0.5 * 131008.0**2, 0.125], rel=1e-6)
    kappa = torch.tensor([1e-3, 1.0])
    grad = runs(lambda: velocity_gradient(pred[:, 0], target[:, 0], 0.5, kappa, backend=backend))
    expected = -kappa[:, None] * torch.tensor([[131008.0], [0.5]]) / 3000
    # One rounding to float16, whose smallest step is 2^-24.
    torch.testing.assert_close(grad.float(), expected.expand(2, 3000), rtol=2**-11, atol=2**-25)
    # An energy of 8.6e9 leaves no branch but the other any probability.
    scores = torch.zeros(2)
    r = runs(lambda: tve_grpo_loss(pred, target, weights, scores, scores + 1, backend=backend))
    assert r.loss.isfinite() and r.log_ratio.isfinite().all()


# Finite inputs, a result that the dtype does not hold
FAR = ContrastiveObjective(log_ratio_clamp=80.0, kl_coef=0.0)
OVER = {  # scores, old scores, advantages, objective, what is named
    "ratio": ([0.0, 0.0], [0.0, 300.0], [-1e6, 1.0], FAR, "loss = inf, grpo_loss = inf"),
    "gradient": ([0.0, 0.0], [0.0, 70.0], [-1e10, 1.0], FAR, r"score_grad\[1\] = -inf"),
    "advantages": ([0.0, 0.0], [-3.0, 3.0], [-3e38, 0.0], FAR, r"advantages up to 3e[+]38"),
    "kl_coef": ([0.0, 40.0], [40.0, 0.0], [0.0, 0.0], 3e37, "kl_coef is 3e[+]37"),
    "scores": ([-3e38, 3e38], [3e38, -3e38], [0.0, 0.0], FAR, "scores up to 3e[+]38"),
}


@each_backend
@pytest.mark.parametrize("policy", ["raise", "drop"])
@pytest.mark.parametrize("case", OVER)
def test_an_infinite_loss_of_finite_inputs_is_an_error(
    case: str, policy: str, backend: str
) -> None:
    *inputs, o, named = OVER[case]
    s, old, A = (torch.tensor(v) for v in inputs)
    if isinstance(o, float):
        o = ContrastiveObjective(kl_coef=o)
    call = lambda *x: branch_policy_loss(*x, objective=o, nonfinite=policy, backend=backend)  # type: ignore[arg-type]
    if policy == "drop":  # also beside a branch that is rightly left out
        s, old, A = (torch.cat([v, torch.tensor([NAN])]) for v in (s, old, A))
    with pytest.raises(NonFiniteError, match=named) as caught:
        runs(lambda: call(s, old, A))
    assert "out of the range of torch.float32, though the inputs are finite" in str(caught.value)
    wide = runs(lambda: call(s.double(), old.double(), A.double()))
    assert wide.loss.isfinite() and wide.score_grad.isfinite().all()
    with pytest.raises(NonFiniteError, match="out of the range"):  # from a compiled graph as well
        torch.compile(call, backend="aot_eager", fullgraph=True)(s, old, A)
    torch.compiler.reset()


def test_the_issue_of_a_wide_clamp() -> None:
    s, old = torch.zeros(2), torch.tensor([0.0, 300.0])
    A = torch.tensor([-1e6, 1e6])
    with pytest.raises(NonFiniteError, match=r"log_ratio_clamp 80\), advantages up to 1e[+]06"):
        branch_policy_loss(s, old, A, objective=FAR)
    r = branch_policy_loss(s.double(), old.double(), A.double(), objective=FAR)
    # One branch e^80 above the old policy, its advantage negative: not clipped. Of the other, whose
    # ratio is about 1/2, the advantage gives half of it.
    expected = (math.exp(80) * 1e6 - 0.5e6) / 2
    assert r.loss.item() == pytest.approx(expected, rel=1e-12)


def test_an_overflow_on_a_gpu_shows_in_check() -> None:
    from kvpo_kernels import BranchPolicyLoss
    from kvpo_kernels.reference import branch_policy_loss as reference

    args = (torch.zeros(2), torch.tensor([0.0, 300.0]), torch.tensor([-1e6, 1.0]), None)
    for drop in (False, True):
        numbers = reference.forward(*args, 0.1, 0.2, 0.0, 80.0, 0.0, 1.0, 1.0, drop)
        with pytest.raises(NonFiniteError, match="though the inputs are finite: loss = inf"):
            BranchPolicyLoss(numbers, 2, 1.0, "old", None).check()


@each_backend
def test_no_clip_at_all_is_the_same_everywhere(backend: str) -> None:
    """GPU kernels take float32 numbers: a bound beyond them must not become NaN."""
    s, old, A = torch.tensor([0.5, -1.0, 2.0]), torch.zeros(3), torch.tensor([1.0, -1.0, 2.0])
    loss = lambda high: runs(
        lambda: (
            branch_policy_loss(
                s, old, A, objective=ContrastiveObjective(clip_range_high=high), backend=backend
            ).numbers
        )
    )
    assert torch.equal(loss(1e300), loss(1e6)) and loss(1e300).isfinite().all()


@each_backend
def test_a_gradient_that_overflows_its_dtype_is_an_error(backend: str) -> None:
    if backend == "cpu":
        pytest.skip("takes no float16")
    pred = torch.tensor([[[10.0]], [[-10.0]]], dtype=torch.float16, requires_grad=True)
    args = (torch.zeros(2, 1, 1).half(), torch.ones(1), torch.tensor([-100.0, -100.0]))
    A = torch.tensor([1e6, -1e6])
    with pytest.raises(NonFiniteError, match=r"pred_grad is out of .*float16 in rows \[0, 1\]"):
        runs(lambda: tve_grpo_loss(pred, *args, A, backend=backend))
    fine = runs(lambda: tve_grpo_loss(pred, *args, A / 1e3, backend=backend))
    assert fine.pred_grad.isfinite().all() and fine.pred_grad.any()
    kappa = torch.tensor([1e5, 1e-5])
    with pytest.raises(NonFiniteError, match=r"the gradient is out of .* rows \[0\]: kappa is up"):
        runs(lambda: velocity_gradient(pred[:, 0], args[0][:, 0], 1.0, kappa, backend=backend))
    # Where nothing looks at once, `check` does.
    object.__setattr__(fine, "source", (pred, torch.full_like(pred, INF)))
    with pytest.raises(NonFiniteError, match="pred_grad is out of"):
        fine.check()


@each_backend
def test_energies_that_overflow_name_what_makes_them(backend: str) -> None:
    x, zero, s = torch.ones(2, 1, 4), torch.zeros(2, 1, 4), torch.zeros(2)
    energies = r"energies must be finite, got \[inf(, inf)?\] for branches \[(0, )?1\]: "
    for pred, weight, match in (
        (x, 1e39, energies + r"torch.float32 does not hold them, of step_weights up to 1e[+]39"),
        (1e25 * x, 1.0, energies + r".* residuals up to 1e[+]25"),
        (torch.stack([x[0], x[1] * INF]), 1.0, energies + "pred is not finite there"),
    ):
        weights = torch.tensor([weight], dtype=torch.float64)
        with pytest.raises(NonFiniteError, match=match):
            runs(lambda p=pred, w=weights: tve_grpo_loss(p, zero, w, s, s, backend=backend))


def test_fused_advantages_that_overflow_are_named() -> None:
    far = torch.tensor([1.0, 2.0, -1e4], dtype=torch.float16)
    with pytest.raises(NonFiniteError, match=r"fused advantage must be finite, got \[-inf\] .*2"):
        fuse_advantages(far, local_weight=1e3, mode="none", clamp=None)
    assert fuse_advantages(far, local_weight=1e3, mode="none").tolist() == [2.5, 2.5, -2.5]


# Energies handed over as scores
@each_backend
def test_energies_turn_their_sign_inside(backend: str) -> None:
    g = torch.Generator().manual_seed(2)
    e, old, ref = torch.rand(3, 5, generator=g)
    A = torch.randn(5, generator=g)
    leaf, scores = e.clone().requires_grad_(), (-e).requires_grad_()
    by_energy = runs(
        lambda: branch_policy_loss(
            energies=leaf, old_energies=old, advantages=A, ref_energies=ref, backend=backend
        )
    )
    by_score = branch_policy_loss(scores, -old, A, -ref, backend=backend)
    assert torch.equal(by_energy.numbers, by_score.numbers)
    assert by_energy.kl_reference == "given"
    by_energy.loss.backward()
    by_score.loss.backward()
    assert torch.equal(leaf.grad, -scores.grad)
    assert torch.equal(by_energy.score_grad, by_score.score_grad)
    mixed = branch_policy_loss(scores, advantages=A, old_energies=old, ref_scores=-ref)
    assert torch.equal(mixed.loss, branch_policy_loss(scores, -old, A, -ref).loss)

    pred, target, w = torch.randn(5, 2, 7, generator=g), torch.zeros(5, 2, 7), torch.ones(2)
    a = tve_grpo_loss(pred, target, w, advantages=A, old_energies=old, ref_energies=ref)
    b = tve_grpo_loss(pred, target, w, -old, A, -ref)
    assert torch.equal(a.numbers, b.numbers) and a.kl_reference == "given"
    same = tve_grpo_loss(pred, target, w, advantages=A, old_energies=b.energies)
    assert torch.equal(same.ratio, torch.ones(5))


def test_wrong_energies_are_named_as_they_were_given() -> None:
    s, nan = torch.zeros(2), torch.tensor([0.0, NAN])
    refuses(
        r"^energies must be finite, got \[nan\] for branches \[1\]",
        lambda: branch_policy_loss(energies=nan, old_scores=s, advantages=s),
    )
    for name in ("old_energies", "ref_energies"):
        given = {"old_energies": s, name: nan}
        refuses(
            rf"^{name} must be finite, got \[nan\] for branches \[1\]",
            lambda given=given: branch_policy_loss(s, advantages=s, **given),
        )
        dropped = branch_policy_loss(s, advantages=s, nonfinite="drop", **given)  # type: ignore[arg-type]
        assert dropped.dropped == 1
    with pytest.warns(UserWarning, match="old_energies requires grad") as seen:
        branch_policy_loss(s, advantages=s, old_energies=s.clone().requires_grad_())
    assert [Path(w.filename) for w in seen] == [Path(__file__)]


def test_energies_for_scores_are_suspected() -> None:
    x = (torch.ones(3, 1, 4), torch.zeros(3, 1, 4), torch.tensor([0.5]))
    A = torch.tensor([1.0, 0.0, -1.0])
    e = tve_grpo_loss(*x, advantages=A, old_energies=torch.ones(3)).energies
    for old, ref, name in ((e, None, "old"), (-e, e, "ref")):
        for call in (
            lambda old=old, ref=ref: tve_grpo_loss(*x, old, A, ref),
            lambda old=old, ref=ref: branch_policy_loss(-e, old, A, ref),
            # The other way round: scores handed over as energies.
            lambda old=old, ref=ref: branch_policy_loss(
                -e, advantages=A, old_energies=-old, ref_energies=None if ref is None else -ref
            ),
        ):
            with pytest.warns(UserWarning, match=f"{name}_scores are all positive, 0.5 to") as seen:
                call()
            assert [Path(w.filename) for w in seen] == [Path(__file__)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for scores in (-e, e, torch.tensor([-1.0, 0.0, 1.0])):  # any will do for a softmax
            branch_policy_loss(scores, -e, A, -e)
            branch_policy_loss(e, scores, A)
            branch_policy_loss(torch.tensor([-1.0, 0.0, 1.0]), scores, A)


# 30: what torch wraps around a call
def _calls() -> dict[str, tuple[Callable[[Tensor], Tensor], Tensor]]:
    g = torch.Generator().manual_seed(0)
    pred, target = torch.randn(2, 3, 2, 40, generator=g)
    old, A = torch.randn(2, 3, generator=g)
    w = torch.rand(2, generator=g)

    def accumulated(p: Tensor) -> Tensor:
        acc = TrajectoryEnergies(3)
        acc.add(p[:, 0], target[:, 0], 0.5)
        return acc.energies

    return {
        "energies": (lambda p: trajectory_velocity_energy(p, target, w), pred),
        "policy": (lambda s: branch_policy_loss(s, old, A).loss, old + 0.1),
        "fused": (lambda p: tve_grpo_loss(p, target, w, old, A).loss, pred),
        "gradient": (lambda p: velocity_gradient(p[:, 0], target[:, 0], 0.5, A), pred),
        "accumulated": (accumulated, pred),
    }


each_call = pytest.mark.parametrize("name", _calls())


@each_call
def test_autocast_and_inference_mode_change_no_bit(name: str) -> None:
    call, x = _calls()[name]
    expected = call(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(call(x), expected)
    with torch.inference_mode():
        assert torch.equal(call(x), expected)


def test_a_sum_made_in_inference_mode_goes_on_outside() -> None:
    with torch.inference_mode():
        energies = TrajectoryEnergies(2)
        energies.add(torch.zeros(2, 5), torch.ones(2, 5), 0.5)
    energies.add(torch.zeros(2, 5), torch.ones(2, 5), 0.5, branches=np.array([1, 0]))
    assert energies.energies.tolist() == [1.0, 1.0]


def test_a_gradient_belongs_to_its_owner() -> None:
    scores = torch.randn(4, requires_grad=True)
    r = branch_policy_loss(scores, torch.zeros(4), torch.randn(4))
    kappa = r.score_grad.clone()
    r.loss.backward()
    scores.grad.zero_()  # as an optimizer does
    assert kappa.any() and torch.equal(r.score_grad, kappa)


def test_numbers_out_of_range_are_named() -> None:
    far = torch.tensor([1.0, 2.0], dtype=torch.float16)
    refuses(r"advantage must be finite", lambda: anchor_advantages(far, 0.0, [1e6]))
    refuses(
        r"float64 does not hold at steps \[1\]",
        lambda: velocity_step_weights([1.0, 1e-200], sigma_floor=0.0),
    )
    refuses(r"safe must be a bool, got 'no'", lambda: branch_policy_loss(far, far, far, safe="no"))


@each_call
@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp", "dual"])
def test_function_transforms_are_refused(name: str, transform: str) -> None:
    call, x = _calls()[name]

    def dual() -> Tensor:
        with forward_ad.dual_level():
            return call(forward_ad.make_dual(x, x))

    transformed = {
        "vmap": lambda: torch.func.vmap(call)(torch.stack([x, x])),
        "grad": lambda: torch.func.grad(lambda y: call(y).sum())(x),
        "jvp": lambda: torch.func.jvp(call, (x,), (x,)),
        "dual": dual,
    }[transform]
    refuses("torch.func transforms .* would lose the gradient", transformed, RuntimeError)
    assert call(x).isfinite().all()  # nothing of it is left


@each_call
def test_fake_tensors_have_the_shapes(name: str) -> None:
    call, x = _calls()[name]
    expected = call(x)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = call(mode.from_tensor(x))
    assert (fake.shape, fake.dtype) == (expected.shape, expected.dtype)


@pytest.mark.parametrize("name", ["energies", "policy", "fused", "gradient"])
def test_an_exported_program_gives_the_same(name: str) -> None:
    call, x = _calls()[name]

    class Module(torch.nn.Module):
        def forward(self, y: Tensor) -> Tensor:
            return call(y)

    program = torch.export.export(Module(), (x,))
    assert torch.equal(program.module()(x), call(x))


def test_sharded_tensors_are_refused(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/s", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for call, x in _calls().values():
            with pytest.raises((RuntimeError, TypeError), match=r"DTensor|sharding"):
                call(distribute_tensor(x, mesh, [Shard(0)]))
    finally:
        dist.destroy_process_group()
