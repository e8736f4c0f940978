"""The contrastive policy loss over the branches of one prompt, and its closed-form gradient."""

import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from kvpo_kernels import registry
from kvpo_kernels.errors import (
    ArgumentError,
    ConfigError,
    DtypeError,
    GroupError,
    NonFiniteError,
    ShapeError,
)
from kvpo_kernels.ops.policy_checks import (
    check_agreed,
    check_numbers,
    check_scalars,
    checked_scores,
    count_of,
    not_finite,
    one_of,
    turned,
)
from kvpo_kernels.ops.ranks import (
    AGREED,
    all_gather_header,
    announce_failure,
    check_member,
    meeting_place,
)
from kvpo_kernels.registry import Backend

OP = "branch_policy_loss"
Nonfinite = Literal["raise", "drop"]
GradientOverRanks = Literal["sum", "mean"]


_FLOAT32_MAX = torch.finfo(torch.float32).max
_NO_CLIP = 1e36  # above every ratio, exp(80)


@dataclass(frozen=True)
class ContrastiveObjective:
    """What is optimised once the branches have scores and advantages.

    Defaults are those of the released configurations of KVPO (arXiv:2605.14278). With the ratio
    `r = pi / pi_old` of a branch and its advantage `A`:

        loss = scale * (-mean(min(r A, clip(r, 1 - low, 1 + high) A)) + kl_coef * KL(pi || pi_ref))

    `docs/objective.md` derives its gradient.
    """

    clip_range_low: float = 0.1
    """`low`, in [0, 1]: with A < 0, a ratio below `1 - low` has no gradient. The release clips to
    [0.9, 1.2]: a branch may lose less probability in a step than it may gain. PPO's clip
    (arXiv:1707.06347), with two bounds."""

    clip_range_high: float = 0.2
    """`high`, >= 0: with A > 0, a ratio above `1 + high` has no gradient. The release's 0.2."""

    kl_coef: float = 10.0
    """>= 0 and in the range of float32, weight of the discrete KL over the branches,
    `KL = sum_g pi[g] (log(pi[g] + 1e-10) - log pi_ref[g])`. The release's `kl_coef`, 10."""

    protect: Literal["mechanism_1", "mechanism_2"] = "mechanism_2"
    """`scale` of an unsafe group, in which no branch beats the anchor: 0 with mechanism_1, 1/2 with
    mechanism_2, the release's; there the anchor is one more outcome whose probability is 1/2
    whatever the branches do. 1 for safe groups."""

    log_ratio_clamp: float = 20.0
    """In (0, 80]: `r = exp(clamp(log pi - log pi_old, -this, this))`, without gradient beyond it.
    The release's 20: a policy that has moved e^20 away cannot overflow."""

    min_update_entropy_ratio: float = 0.0
    """In [0, 1]: `skip` is set where the entropy is above `log(G) (1 - this)`: a policy that does
    not tell its branches apart has nothing to teach. The release's 0 never skips."""

    def __post_init__(self) -> None:
        """Refuse values that would train something else than what was meant."""
        wrong = []
        for name in (f.name for f in fields(self) if f.name != "protect"):
            value = getattr(self, name)
            if (
                isinstance(value, bool)
                or not isinstance(value, (int, float))
                or not math.isfinite(value)
            ):
                raise ConfigError(f"{name} must be a finite number, got {value!r}")
            object.__setattr__(self, name, float(value))
        low, high = self.clip_range_low, self.clip_range_high
        if not 0 <= low <= 1:
            wrong.append(f"clip_range_low must be in [0, 1], got {low}")
        if high < 0:  # so the bounds cannot cross: 1 - low <= 1 <= 1 + high
            wrong.append(f"clip_range_high must be >= 0, got {high}")
        if self.kl_coef < 0:
            wrong.append(f"kl_coef must be >= 0, got {self.kl_coef}")
        if self.kl_coef > _FLOAT32_MAX:  # GPU kernels take their numbers in float32
            wrong.append(f"kl_coef must be at most {_FLOAT32_MAX:.3g}, got {self.kl_coef}")
        if self.protect not in ("mechanism_1", "mechanism_2"):
            wrong.append(f"protect must be 'mechanism_1' or 'mechanism_2', got {self.protect!r}")
        if not 0 < self.log_ratio_clamp <= 80:  # exp(80) is still finite in float32
            wrong.append(f"log_ratio_clamp must be in (0, 80], got {self.log_ratio_clamp}")
        if not 0 <= self.min_update_entropy_ratio <= 1:
            wrong.append(
                f"min_update_entropy_ratio must be in [0, 1], got {self.min_update_entropy_ratio}"
            )
        if wrong:
            raise ConfigError("; ".join(wrong))


class Scalars(NamedTuple):
    """The numbers of an objective as the kernels take them, in the order of the schema."""

    clip_low: float
    clip_high: float
    kl_coef: float
    log_ratio_clamp: float
    min_entropy_ratio: float
    scale: float
    branch_mass: float
    drop: bool


def scalars_of(objective: ContrastiveObjective, safe: bool, nonfinite: str) -> Scalars:
    """Resolve the protection: an unsafe mechanism_2 leaves the branches half of the mass.

    The other half is the anchor's: `softmax([log pi, 0])` gives it 1/2 whatever pi is, with zero
    gradient, so the protection is a constant factor.
    """
    if not isinstance(objective, ContrastiveObjective):
        raise ConfigError(
            f"objective must be a ContrastiveObjective, got {type(objective).__name__}"
        )
    if not isinstance(safe, bool):  # "False" is true, and a tensor would wait for its device
        raise ConfigError(f"safe must be a bool, got {safe!r}")
    if nonfinite not in ("raise", "drop"):
        raise ConfigError(f"nonfinite must be 'raise' or 'drop', got {nonfinite!r}")
    unsafe_scale = 0.0 if objective.protect == "mechanism_1" else 0.5
    unsafe_mass = 1.0 if objective.protect == "mechanism_1" else 0.5
    return Scalars(
        objective.clip_range_low,
        min(objective.clip_range_high, _NO_CLIP),
        objective.kl_coef,
        objective.log_ratio_clamp,
        objective.min_update_entropy_ratio,
        1.0 if safe else unsafe_scale,
        1.0 if safe else unsafe_mass,
        nonfinite == "drop",
    )


@dataclass(frozen=True, eq=False)
class BranchPolicyLoss:
    """A loss and what it was made of. Tensors on the scores' device, in their dtype.

    Only `loss` is differentiable. It and the properties are made when asked for, from `numbers`.
    With a group and `gradient="mean"`, what is a gradient here is times the number of ranks.
    """

    numbers: Tensor
    """`[7 + 4 G]`: loss, GRPO term, KL, entropy, clip fraction, skip, number of dropped branches;
    then per branch the score gradient, ratio, log-ratio, and 1 where its inputs are finite."""

    num_branches: int
    """G, of this rank where a group was given."""

    scale: float
    """Factor of the protection: 1, 1/2 or 0."""

    kl_reference: Literal["given", "old"]
    """"old" where no `ref_scores` were given: the KL is then taken against the old policy."""

    source: tuple[Tensor, Tensor] | None
    """What `loss` is differentiable towards and its gradient; None where nothing needs one."""

    _loss: Tensor | None = field(default=None, init=False, repr=False)

    @property
    def loss(self) -> Tensor:
        """`[]`, `scale * (grpo_loss + kl_coef * kl)`; over all ranks where a group was given."""
        if self.source is None:
            return self.numbers[0]
        # Kept by hand: `cached_property` takes a lock before Python 3.12, which a compiler cannot.
        if self._loss is None:
            x, grad = self.source
            with torch.enable_grad():  # as where it was made, even if first looked at elsewhere
                loss = LossWithGradient.apply(x, self.numbers, grad)  # type: ignore[no-untyped-call]
            object.__setattr__(self, "_loss", loss)
        return self._loss  # type: ignore[return-value]

    @property
    def score_grad(self) -> Tensor:
        """`[G]`, d(loss)/d(scores); sums to 0 over all branches."""
        return self._per_branch(0)

    @property
    def ratio(self) -> Tensor:
        """`[G]`, exp of the clamped log-ratio; NaN for a dropped branch."""
        return self._per_branch(1)

    @property
    def log_ratio(self) -> Tensor:
        """`[G]`, log pi - log pi_old, not clamped; NaN for a dropped branch."""
        return self._per_branch(2)

    @property
    def grpo_loss(self) -> Tensor:
        """`[]`, the clipped policy term, without `scale`."""
        return self.numbers[1]

    @property
    def kl(self) -> Tensor:
        """`[]`, KL(policy || reference) in nats, without `scale` and `kl_coef`."""
        return self.numbers[2]

    @property
    def entropy(self) -> Tensor:
        """`[]`, nats: H(pi), or `H(pi)/2 + log(2)/2` for an unsafe group under mechanism_2."""
        return self.numbers[3]

    @property
    def clip_fraction(self) -> Tensor:
        """`[]`, share of the ratios outside `[1 - low, 1 + high]`."""
        return self.numbers[4]

    @property
    def skip(self) -> Tensor:
        """`[]`, bool: the entropy rule asks to skip this update."""
        return self.numbers[5] != 0

    @property
    def dropped(self) -> Tensor:
        """`[]`, int64: how many branches `nonfinite="drop"` left out."""
        return self.numbers[6].long()

    def _per_branch(self, row: int) -> Tensor:
        return self.numbers.narrow(0, 7 + row * self.num_branches, self.num_branches)

    def check(self) -> None:
        """Raise NonFiniteError if the loss or a gradient is not finite; waits for a GPU."""
        values = self.numbers.tolist()
        if not (wrong := not_finite(values, self.num_branches)):
            return
        finite = values[7 + 3 * self.num_branches :][: self.num_branches]
        bad = [g for g, is_finite in enumerate(finite) if not is_finite]
        if bad and not math.isfinite(values[0]):
            raise NonFiniteError(
                f"the loss is {values[0]}: score or energy, old score, reference score or "
                f"advantage is not finite for branches {bad}"
            )
        raise NonFiniteError(
            f"out of the range of {self.numbers.dtype}, though the inputs are finite:"
            f" {', '.join(wrong)}"
        )


class Problem(NamedTuple):
    """What a backend needs to know to accept or refuse a call."""

    device: str


def why_not_cpu(p: Problem) -> str | None:
    """Why the C++ kernels cannot run the problem."""
    return registry.why_not_native(p.device)


def why_not_triton(p: Problem) -> str | None:
    """Why the Triton kernel cannot run the problem."""
    return registry.why_not_triton(p.device)


BACKENDS: tuple[Backend[Problem], ...] = (
    Backend("cpu", "kvpo_kernels.backends.native.branch_policy_loss", why_not_cpu),
    Backend("triton", "kvpo_kernels.backends.triton.branch_policy_loss", why_not_triton),
    Backend("reference", "kvpo_kernels.reference.branch_policy_loss", lambda p: None),
)


def branch_policy_loss(
    scores: Tensor | None = None,
    old_scores: Tensor | None = None,
    advantages: Tensor | None = None,
    ref_scores: Tensor | None = None,
    *,
    energies: Tensor | None = None,
    old_energies: Tensor | None = None,
    ref_energies: Tensor | None = None,
    objective: ContrastiveObjective = ContrastiveObjective(),
    safe: bool = True,
    group: dist.ProcessGroup | None = None,
    gradient: GradientOverRanks = "sum",
    nonfinite: Nonfinite = "raise",
    backend: str | None = None,
) -> BranchPolicyLoss:
    r"""Clipped policy loss with a KL penalty over the Gibbs policy `pi = softmax(scores)`.

        ratio[g] = exp(clamp(log pi[g] - log pi_old[g]))
        loss     = scale * ( -mean_g min(ratio A, clip(ratio) A)
                             + kl_coef * sum_g pi[g] (log(pi[g] + 1e-10) - log pi_ref[g]) )

    Evaluated in float64 with its gradient in closed form, so `loss.backward()` is one multiply.
    At `scores == old_scores` the ratio is exactly 1. Deterministic.

    Args:
        scores: `[G]`, float32 or float64, the negative energies (log-weights, dimensionless) of
            the branches; the only differentiable argument. G = 1 is legal, with zero gradient.
        old_scores: `[G]`, dtype and device of `scores`: of the policy that made the rollout. Where
            on the CPU all are positive and all `scores` negative, a warning asks whether they are
            energies.
        advantages: `[G]`, dtype and device of `scores`.
        ref_scores: `[G]`, as `old_scores`: of the KL reference, the initial policy. None takes the
            old policy, and the result's `kl_reference` says so.
        energies: in place of `scores`, their negative, and differentiable as they are; the result's
            `score_grad` is d(loss)/d(scores) all the same.
        old_energies: in place of `old_scores`, their negative.
        ref_energies: in place of `ref_scores`, their negative.
        objective: clip range, KL weight, protection.
        safe: whether some branch beats the anchor, locally or globally.
        group: process group over which the branches are spread, unevenly if need be; they
            concatenate in rank order. The G scalars are gathered, the backward is local; the loss
            and the scalar statistics are global, what is per branch is the rank's own. Each rank's
            gradient is of its own branches only: that of the loss is their sum over the ranks. Not
            traceable.
        gradient: what then happens to the gradients of the ranks. "sum": they are added up
            (`all_reduce`). "mean": they are averaged, as by `DistributedDataParallel` and FSDP:
            gradients, `score_grad` among them, are times the number of ranks of `group`, so that
            their mean is the gradient. Averaging "sum" leaves 1 / ranks of it. No effect without a
            group.
        nonfinite: "raise" refuses NaN and infinite inputs: on the CPU by a NonFiniteError naming
            argument and branches (also from inside a compiled graph); on a GPU, where looking would
            wait, the loss and the gradient become NaN for all branches and `check()` raises.
            "drop" removes such branches: they get zero gradient, the others are renormalised, and
            `dropped` counts them. With all dropped, the loss is 0.
        backend: a name in `BACKENDS`; None takes the first that can run.

    Raises:
        ShapeError, DtypeError: naming the argument; with a group, on every rank.
        ArgumentError: scores and energies of one policy are both given, or neither.
        NonFiniteError: as above; also where a result of finite inputs is out of the range of its
            dtype, on a GPU from `check()`.
        GroupError: ranks differ in what they must agree on, or this process is not one of them.
        BackendUnavailable: not the named backend can run the call.

    Source: KVPO (arXiv:2605.14278), the released trainer's objective.
    """
    given = _Given(scores, energies, old_scores, old_energies, advantages, ref_scores, ref_energies)
    if group is not None:
        return _over_group(given, objective, safe, group, gradient, nonfinite, backend)
    check_gradient(gradient)
    scalars = scalars_of(objective, safe, nonfinite)
    scores, old_scores, advantages, ref_scores = _checked(given, scalars.drop)
    chosen = registry.select(OP, BACKENDS, Problem(scores.device.type), backend).name
    numbers = _forward(scores.detach(), old_scores, advantages, ref_scores, *scalars, chosen)
    return _result(scores, numbers, scalars.scale, ref_scores)


def _result(
    scores: Tensor, numbers: Tensor, scale: float, ref_scores: Tensor | None
) -> BranchPolicyLoss:
    G = scores.shape[0]
    needs_grad = scores.requires_grad and torch.is_grad_enabled()
    # A copy: the first backward makes it the gradient of the caller's tensor, who may change that.
    source = (scores, numbers[7 : 7 + G].clone()) if needs_grad else None
    return BranchPolicyLoss(numbers, G, scale, "old" if ref_scores is None else "given", source)


class LossWithGradient(torch.autograd.Function):
    """The loss `numbers[0]`, whose gradient for `x` is known already: the backward is one scale."""

    @staticmethod
    def forward(ctx, x, numbers, grad):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(grad)
        return numbers[0].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):  # type: ignore[no-untyped-def]
        (grad,) = ctx.saved_tensors
        # On the CPU it costs nothing to see that there is nothing to scale, and then the gradient
        # is handed on without a copy. The autograd engine clones it where the graph is kept.
        if (
            not torch.compiler.is_compiling()
            and type(grad_loss) is Tensor
            and grad_loss.device.type == "cpu"
            and grad_loss.item() == 1.0
        ):
            return grad, None, None
        return grad * grad_loss.to(grad.dtype), None, None


class _Given(NamedTuple):
    """The scores or energies as the caller gave them, unchecked."""

    scores: Tensor | None
    energies: Tensor | None
    old_scores: Tensor | None
    old_energies: Tensor | None
    advantages: Tensor | None
    ref_scores: Tensor | None
    ref_energies: Tensor | None


def check_gradient(gradient: str) -> None:
    """Raise ConfigError for what ranks cannot do with gradients."""
    if gradient not in ("sum", "mean"):
        raise ConfigError(f"gradient must be 'sum' or 'mean', got {gradient!r}")


def _checked(given: _Given, drop: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Scores, old scores, advantages and reference scores."""
    name, scores = one_of("", given.scores, given.energies)
    if scores is None:
        raise ArgumentError("scores or energies must be given")
    if not isinstance(scores, Tensor):
        raise DtypeError(f"{name} must be a tensor, got {type(scores).__name__}")
    if scores.dtype not in (torch.float32, torch.float64):
        raise DtypeError(f"{name} must be float32 or float64, got {scores.dtype}")
    if scores.ndim != 1 or scores.numel() == 0:
        raise ShapeError(f"{name} must be [G] with G >= 1, got {list(scores.shape)}")
    like = (scores.device, scores.dtype, scores.shape[0])
    check_agreed(name, scores, given.old_scores, given.old_energies, given.advantages)
    branches = count_of(given.old_scores, given.old_energies, given.advantages)
    if branches is not None and branches != scores.shape[0]:
        raise ShapeError(
            f"{name} must be [{branches}] like the old policy's and the advantages, got"
            f" {list(scores.shape)}"
        )
    old_scores = checked_scores("old_", given.old_scores, given.old_energies, like, drop)
    advantages = check_scalars("advantages", given.advantages, *like)
    ref_scores = None
    if given.ref_scores is not None or given.ref_energies is not None:
        ref_scores = checked_scores("ref_", given.ref_scores, given.ref_energies, like, drop)
    if given.energies is not None:
        scores = turned(name, scores, drop)
    return scores, old_scores, advantages, ref_scores


def _over_group(
    given: _Given,
    objective: ContrastiveObjective,
    safe: bool,
    group: dist.ProcessGroup,
    gradient: GradientOverRanks,
    nonfinite: Nonfinite,
    backend: str | None,
) -> BranchPolicyLoss:
    """Gather the branches of all ranks, evaluate them alike on each, keep the own ones."""
    check_member(group)
    try:
        check_gradient(gradient)
        scalars = scalars_of(objective, safe, nonfinite)
        scores, old_scores, advantages, ref_scores = _checked(given, scalars.drop)
        if scores.is_meta:
            raise DtypeError("scores are on meta, where there is nothing to gather")
        chosen = registry.select(OP, BACKENDS, Problem(scores.device.type), backend).name
    except Exception:  # whatever it is, the other ranks wait for this one: tell them
        announce_failure(group)
        raise
    device, count = meeting_place(group), scores.shape[0]
    agreed = [
        float(scores.dtype is torch.float64),
        float(ref_scores is not None),
        *(float(x) for x in scalars),
        float(objective.protect == "mechanism_2"),
        float(safe),
        float(gradient == "mean"),
    ]
    rows = all_gather_header([0.0, count, *agreed], group)
    failed = [r for r, row in enumerate(rows) if row[0]]
    if failed:
        raise GroupError(f"branch_policy_loss: ranks {failed} of the group have bad arguments")
    for i, name in enumerate(AGREED, start=2):
        values = [row[i] for row in rows]
        if len(set(values)) > 1:
            raise GroupError(f"ranks of the group differ in {name}: {values}")

    counts = [int(row[1]) for row in rows]
    inputs = [scores, old_scores, advantages] + ([] if ref_scores is None else [ref_scores])
    payload = torch.zeros(len(inputs), max(counts), dtype=torch.float64, device=device)
    payload[:, :count] = torch.stack([x.detach().double() for x in inputs]).to(device)
    parts = [torch.empty_like(payload) for _ in counts]
    dist.all_gather(parts, payload, group=group)
    gathered = torch.cat([p[:, :n] for p, n in zip(parts, counts, strict=True)], dim=1)
    everyone = gathered.to(scores.device, scores.dtype).unbind()
    ref = everyone[3] if ref_scores is not None else None
    numbers = _forward(*everyone[:3], ref, *scalars, chosen)
    first, G = sum(counts[: dist.get_rank(group)]), sum(counts)
    own = [numbers[7 + row * G + first :][:count] for row in range(4)]
    if gradient == "mean":
        own[0] = own[0] * len(counts)
    return _result(scores, torch.cat([numbers[:7], *own]), scalars.scale, ref_scores)


torch.library.define(
    "kvpo::branch_policy_loss",
    "(Tensor scores, Tensor old_scores, Tensor advantages, Tensor? ref_scores, float clip_low,"
    " float clip_high, float kl_coef, float log_ratio_clamp, float min_entropy_ratio, float scale,"
    " float branch_mass, bool drop, str backend) -> Tensor",
)
_MODULES = {b.name: b for b in BACKENDS}


def _forward_impl(
    scores: Tensor,
    old_scores: Tensor,
    advantages: Tensor,
    ref_scores: Tensor | None,
    *scalars_and_backend: Any,
) -> Tensor:
    *scalars, backend = scalars_and_backend
    forward = _MODULES[backend].load().forward
    numbers: Tensor = forward(scores, old_scores, advantages, ref_scores, *scalars)
    if numbers.device.type == "cpu":  # here, so that a compiled graph checks as well
        given = (scores, old_scores, advantages, ref_scores)
        check_numbers(numbers, numbers.tolist(), scalars[-1], scalars, *given)
    return numbers


def _forward_fake(
    scores: Tensor, old_scores: Tensor, advantages: Tensor, ref_scores: Tensor | None, *_: object
) -> Tensor:
    return scores.new_empty(7 + 4 * scores.shape[0])


_forward = registry.register("kvpo::branch_policy_loss", _forward_impl, _forward_fake)
