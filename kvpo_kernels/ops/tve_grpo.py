"""Energies, the loss of their Gibbs policy, and the gradient for the predictions, in one op."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from kvpo_kernels import registry
from kvpo_kernels.errors import DtypeError, NonFiniteError, ShapeError
from kvpo_kernels.ops.branch_policy_loss import (
    BranchPolicyLoss,
    ContrastiveObjective,
    GradientOverRanks,
    Nonfinite,
    branch_policy_loss,
    check_gradient,
    scalars_of,
)
from kvpo_kernels.ops.policy_checks import (
    check_numbers,
    check_scalars,
    checked_scores,
    count_of,
)
from kvpo_kernels.ops.ranks import announce_failure, check_member
from kvpo_kernels.ops.velocity_energy import (
    Problem,
    check_trajectories,
    checked_weights,
    energy_gradient,
    refuse_overflow,
    trajectory_velocity_energy,
    why_not_cpu,
    why_not_triton,
)
from kvpo_kernels.registry import Backend

OP = "tve_grpo"


@dataclass(frozen=True, eq=False)
class TveGrpoLoss(BranchPolicyLoss):
    """`BranchPolicyLoss` with the energies that the scores came from."""

    numbers: Tensor
    """`[7 + 5 G]`: as in `BranchPolicyLoss`, then the energies."""

    @property
    def pred_grad(self) -> Tensor | None:
        """`[G, S, ...]`, d(loss)/d(pred) in its dtype, None where `pred` needs no gradient.

        `pred.backward(r.pred_grad)` does what `r.loss.backward()` does, without the detour through
        the loss. Not to be written to: the latter hands out the same memory.
        """
        return None if self.source is None else self.source[1]

    @property
    def energies(self) -> Tensor:
        """`[G]`, float32 (float64 for float64 input), detached; the scores are their negatives."""
        return self._per_branch(4)

    def check(self) -> None:
        """Raise NonFiniteError if loss, score or prediction gradient is not finite; waits."""
        super().check()
        if self.pred_grad is not None:
            refuse_overflow(self.pred_grad, "pred_grad")


def _why_not_cuda(p: Problem) -> str | None:
    if why := registry.why_not_cuda(p.device):
        return why
    if p.dtype not in (torch.float32, torch.bfloat16):
        return f"takes float32 and bfloat16, got {p.dtype}"
    return None


BACKENDS: tuple[Backend[Problem], ...] = (
    Backend("cpu", "kvpo_kernels.backends.native.tve_grpo", why_not_cpu),
    Backend("triton", "kvpo_kernels.backends.triton.tve_grpo", why_not_triton),
    Backend("cuda", "kvpo_kernels.backends.cuda.tve_grpo", _why_not_cuda),  # not measured yet
    Backend("reference", "kvpo_kernels.reference.tve_grpo", lambda p: None),
)


def tve_grpo_loss(
    pred: Tensor,
    target: Tensor,
    step_weights: Tensor,
    old_scores: Tensor | None = None,
    advantages: Tensor | None = None,
    ref_scores: Tensor | None = None,
    *,
    old_energies: Tensor | None = None,
    ref_energies: Tensor | None = None,
    objective: ContrastiveObjective = ContrastiveObjective(),  # noqa: B008 (frozen)
    safe: bool = True,
    grad_steps: Tensor | Sequence[bool] | None = None,
    group: dist.ProcessGroup | None = None,
    gradient: GradientOverRanks = "sum",
    nonfinite: Nonfinite = "raise",
    backend: str | None = None,
) -> TveGrpoLoss:
    r"""Loss of the branches' Gibbs policy, straight from their predictions.

    `branch_policy_loss(-trajectory_velocity_energy(pred, target, step_weights), ...)`, but the
    gradient for `pred` is made along with the loss, while the inputs are in the cache: it is
    `pred_grad`, and the backward of `loss` costs one scale, nothing where it is 1 on a CPU.

        d(loss)/d(pred[g, s]) = -2 * weight[g, s] * score_grad[g] * (pred - target)[g, s] / N

    Args:
        pred: `[G, S, ...]`, as in `trajectory_velocity_energy`; the only differentiable argument.
        target: as `pred`.
        step_weights: `[S]`, or `[G, S]` as in `trajectory_velocity_energy`.
        old_scores: `[G]`, float32 (float64 for float64 predictions), as in `branch_policy_loss`.
        advantages: `[G]`, as `old_scores`.
        ref_scores: `[G]`, as `old_scores`, or None for the old policy.
        old_energies: in place of `old_scores`, their negative: the `energies` of a result.
        ref_energies: in place of `ref_scores`, their negative.
        objective: as in `branch_policy_loss`.
        safe: as in `branch_policy_loss`.
        grad_steps: `[S]` bool, the block-steps that carry gradient (all count in the energies);
            None for all. A tensor on the device of `pred`, or a sequence.
        group: as in `branch_policy_loss`; `pred` and the rest are the rank's own branches.
        gradient: as in `branch_policy_loss`: "mean" where the ranks' gradients are averaged, as
            `DistributedDataParallel` does; `pred_grad` is then times the number of ranks too.
        nonfinite: as in `branch_policy_loss`.
        backend: a name in `BACKENDS`; None takes the first that can run.

    Returns:
        `TveGrpoLoss`. Deterministic, for any number of threads.

    Raises:
        ShapeError, DtypeError: naming the argument.
        ArgumentError, NonFiniteError, GroupError: as in `branch_policy_loss`; a gradient that
            overflows the dtype of `pred` is looked for as well.
        BackendUnavailable: not the named backend can run the call.

    Source: KVPO (arXiv:2605.14278), the released trainer's objective.
    """
    if group is not None:
        return _over_group(
            pred,
            target,
            step_weights,
            old_scores,
            advantages,
            ref_scores,
            old_energies,
            ref_energies,
            objective=objective,
            safe=safe,
            grad_steps=grad_steps,
            group=group,
            gradient=gradient,
            nonfinite=nonfinite,
            backend=backend,
        )
    check_gradient(gradient)
    scalars = scalars_of(objective, safe, nonfinite)
    branches = count_of(old_scores, old_energies, advantages)
    check_trajectories(pred, target, branches)
    weights = checked_weights(step_weights, pred, branches)
    if branches is not None and branches != pred.shape[0]:
        raise ShapeError(
            f"pred must be [{branches}, S, ...] like the old policy's scores and the advantages,"
            f" got {list(pred.shape)}"
        )
    grad_weights = weights if grad_steps is None else _masked(weights, grad_steps)
    score_dtype = torch.float64 if pred.dtype is torch.float64 else torch.float32
    like = (pred.device, score_dtype, pred.shape[0])
    old = checked_scores("old_", old_scores, old_energies, like, scalars.drop, 4)
    advantages = check_scalars("advantages", advantages, *like, 3)
    ref = None
    if ref_scores is not None or ref_energies is not None:
        ref = checked_scores("ref_", ref_scores, ref_energies, like, scalars.drop, 4)
    chosen = registry.select(OP, BACKENDS, Problem(pred.device.type, pred.dtype), backend).name
    needs_grad = pred.requires_grad and torch.is_grad_enabled()
    numbers, grad = _forward(
        pred.detach(),
        target,
        weights,
        grad_weights,
        old,
        advantages,
        ref,
        *scalars,
        needs_grad,
        chosen,
    )
    source = (pred, grad) if needs_grad else None
    reference: Literal["given", "old"] = "old" if ref is None else "given"
    return TveGrpoLoss(numbers, pred.shape[0], scalars.scale, reference, source)


def _over_group(
    pred: Tensor,
    target: Tensor,
    step_weights: Tensor,
    old_scores: Tensor | None,
    advantages: Tensor | None,
    ref_scores: Tensor | None,
    old_energies: Tensor | None,
    ref_energies: Tensor | None,
    *,
    objective: ContrastiveObjective,
    safe: bool,
    grad_steps: Tensor | Sequence[bool] | None,
    group: dist.ProcessGroup,
    gradient: GradientOverRanks,
    nonfinite: Nonfinite,
    backend: str | None,
) -> TveGrpoLoss:
    """The same from its three parts: the G scalars of other ranks come between the two passes."""
    check_member(group)
    try:
        check_gradient(gradient)
        scalars_of(objective, safe, nonfinite)
        branches = count_of(old_scores, old_energies, advantages)
        check_trajectories(pred, target, branches)
        weights = checked_weights(step_weights, pred, branches)
        grad_weights = weights if grad_steps is None else _masked(weights, grad_steps)
        energies = trajectory_velocity_energy(pred.detach(), target, weights, backend=backend)
    except Exception:  # whatever it is, the other ranks wait for this one: tell them
        announce_failure(group)
        raise
    r = branch_policy_loss(
        -energies,
        old_scores,
        advantages,
        ref_scores,
        old_energies=old_energies,
        ref_energies=ref_energies,
        objective=objective,
        safe=safe,
        group=group,
        gradient=gradient,
        nonfinite=nonfinite,
    )
    source = None
    if pred.requires_grad and torch.is_grad_enabled():
        grad = energy_gradient(pred.detach(), target, grad_weights, -r.score_grad, backend)
        source = (pred, grad)
    numbers = torch.cat([r.numbers, energies])
    return TveGrpoLoss(numbers, r.num_branches, r.scale, r.kl_reference, source)


def _masked(weights: Tensor, grad_steps: Tensor | Sequence[bool]) -> Tensor:
    if isinstance(grad_steps, Tensor):
        mask = grad_steps
        if mask.is_meta and not weights.is_meta:
            raise DtypeError(f"grad_steps must be on {weights.device} like pred, got meta")
    else:
        try:
            mask = torch.as_tensor(grad_steps, device="cpu")
        except (TypeError, ValueError, RuntimeError):
            raise DtypeError(f"grad_steps must hold bools, got {grad_steps!r}") from None
    if mask.dtype is not torch.bool:
        raise DtypeError(f"grad_steps must be bool, got {mask.dtype}")
    if mask.shape != weights.shape[-1:]:
        raise ShapeError(f"grad_steps must be {list(weights.shape[-1:])}, got {list(mask.shape)}")
    return torch.where(mask.to(weights.device), weights, 0.0)


def _check_energies(energies: Tensor, pred: Tensor, target: Tensor, weights: Tensor) -> None:
    """Say which input energies that are not finite come from; the policy's check names branches."""
    if not weights.isfinite().all():
        raise NonFiniteError(f"step_weights must be finite, got {weights.tolist()}")
    bad = (~energies.isfinite()).nonzero().flatten()
    if not len(bad):
        return
    what = f"energies must be finite, got {energies[bad].tolist()} for branches {bad.tolist()}"
    for name, x in (("pred", pred), ("target", target)):
        if not x[bad].isfinite().all():
            raise NonFiniteError(f"{what}: {name} is not finite there")
    raise NonFiniteError(
        f"{what}: {energies.dtype} does not hold them, of step_weights up to"
        f" {float(weights.abs().max()):.3g} and residuals up to"
        f" {float((pred[bad].double() - target[bad].double()).abs().max()):.3g}"
    )


torch.library.define(
    "kvpo::tve_grpo",
    "(Tensor pred, Tensor target, Tensor weights, Tensor grad_weights, Tensor old_scores,"
    " Tensor advantages, Tensor? ref_scores, float clip_low, float clip_high, float kl_coef,"
    " float log_ratio_clamp, float min_entropy_ratio, float scale, float branch_mass, bool drop,"
    " bool needs_grad, str backend) -> (Tensor, Tensor)",
)
_MODULES = {b.name: b for b in BACKENDS}


def _forward_impl(
    pred: Tensor,
    target: Tensor,
    weights: Tensor,
    grad_weights: Tensor,
    old_scores: Tensor,
    advantages: Tensor,
    ref_scores: Tensor | None,
    *options_and_backend: Any,
) -> tuple[Tensor, Tensor]:
    *options, backend = options_and_backend
    forward = _MODULES[backend].load().forward
    numbers: Tensor
    numbers, grad = forward(
        pred, target, weights, grad_weights, old_scores, advantages, ref_scores, *options
    )
    if numbers.device.type == "cpu":  # here, so that a compiled graph checks as well
        values, G, drop = numbers.tolist(), len(old_scores), options[-2]
        if not drop and not math.isfinite(sum(values)):
            _check_energies(numbers[-G:], pred, target, weights)
        given = (None, old_scores, advantages, ref_scores)
        check_numbers(numbers, values, drop, options, *given)
        if options[-1]:
            refuse_overflow(grad, "pred_grad", values[7 : 7 + G], grad_weights)
    return numbers, grad


def _forward_fake(
    pred: Tensor,
    target: Tensor,
    weights: Tensor,
    grad_weights: Tensor,
    old_scores: Tensor,
    advantages: Tensor,
    ref_scores: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    G, needs_grad = pred.shape[0], options[-2]
    dtype = torch.promote_types(pred.dtype, torch.float32)
    numbers = pred.new_empty(7 + 5 * G, dtype=dtype)
    return numbers, pred.new_empty(pred.shape if needs_grad else 0)


_forward = registry.register("kvpo::tve_grpo", _forward_impl, _forward_fake)
