"""Trajectory velocity energies (TVE): how far predictions are from a recorded rollout."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kvpo_kernels import registry
from kvpo_kernels.checks import integer, number, numbers_of
from kvpo_kernels.errors import (
    ConfigError,
    ConstantError,
    DtypeError,
    NonFiniteError,
    RangeError,
    ShapeError,
)
from kvpo_kernels.registry import Backend

OP = "velocity_energy"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Problem(NamedTuple):
    """What a backend needs to know to accept or refuse a call."""

    device: str
    dtype: torch.dtype


def why_not_cpu(p: Problem) -> str | None:
    """Why the C++ kernels cannot run the problem."""
    if why := registry.why_not_native(p.device):
        return why
    if p.dtype not in (torch.float32, torch.bfloat16):
        return f"takes float32 and bfloat16, got {p.dtype}"
    return None


def why_not_triton(p: Problem) -> str | None:
    """Why the Triton kernels cannot run the problem."""
    if p.dtype is torch.float64:
        return "takes float32, bfloat16 and float16, got torch.float64"
    return registry.why_not_triton(p.device)


BACKENDS: tuple[Backend[Problem], ...] = (
    Backend("cpu", "kvpo_kernels.backends.native.velocity_energy", why_not_cpu),
    Backend("triton", "kvpo_kernels.backends.triton.velocity_energy", why_not_triton),
    Backend("reference", "kvpo_kernels.reference.velocity_energy", lambda p: None),
)


def trajectory_velocity_energy(
    pred: Tensor, target: Tensor, step_weights: Tensor, *, backend: str | None = None
) -> Tensor:
    r"""Weighted mean squared residual of each branch's predictions over its block-steps.

        energy[g] = sum_s weight[g, s] * mean((pred[g, s] - target[g, s])^2)

    The negative energy is the branch's score (log-weight): see `velocity_step_weights` for the
    weights that make it so. Deterministic, and a branch's energy does not depend on the others or
    on the number of threads.

    Args:
        pred: `[G, S, ...]`, S block-steps (blocks x denoise steps); float32, float64, bfloat16 or
            float16; x0 predictions or velocities of the policy. Differentiable.
        target: shape, dtype and device of `pred`: what the rollout recorded; a constant.
        step_weights: `[S]`, floating point, on the device of `pred`; a constant. `[G, S]` where
            branches differ in their windows: 0 for a block-step that a branch does not have, whose
            `pred` and `target` must then be finite.
        backend: a name in `BACKENDS`; None takes the first that can run.

    Returns:
        `[G]` float32, float64 for float64 input: 16-bit inputs are subtracted in float32. A branch
        with a NaN has the energy NaN, the others are not touched; the losses refuse or drop it.

    Raises:
        ShapeError, DtypeError: naming the argument. Nothing broadcasts.
        BackendUnavailable: not the named backend can run the call.

    Source: trajectory velocity energy of KVPO (arXiv:2605.14278).
    """
    check_trajectories(pred, target)
    weights = checked_weights(step_weights, pred)
    chosen = registry.select(OP, BACKENDS, Problem(pred.device.type, pred.dtype), backend).name
    if pred.requires_grad and torch.is_grad_enabled():
        return _VelocityEnergy.apply(*registry.each_once(pred, target, weights), chosen)  # type: ignore[no-untyped-call,no-any-return]
    return _forward(pred, target, weights, chosen)  # type: ignore[no-any-return]


def velocity_gradient(
    pred: Tensor,
    target: Tensor,
    weight: float | Tensor,
    kappa: Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    r"""Gradient of the loss for the predictions of one block-step, from d(loss)/d(scores).

        grad[b] = kappa[b] * d(score)/d(pred) = -2 * weight * kappa[b] * (pred - target)[b] / N

    With it the second pass of a replay goes back through one block-step at a time, without a graph
    over all of them: `pred.backward(velocity_gradient(...))`.

    Args:
        pred: `[b, ...]` predictions of b branches, N values each.
        target: as `pred`.
        weight: the block-step's weight in the energy; `[b]` where the branches' differ.
        kappa: `[b]`, floating point, on the device of `pred`: the rows of `score_grad`.
        backend: as in `trajectory_velocity_energy`.

    Returns:
        shape and dtype of `pred`, contiguous, not differentiable. A zero kappa gives exact zeros.

    Raises:
        ShapeError, DtypeError: naming the argument.
    """
    if not isinstance(kappa, Tensor):
        raise DtypeError(f"kappa must be a floating-point tensor, got {type(kappa).__name__}")
    branches = kappa.shape[0] if kappa.ndim == 1 else None
    weights = _weight_of_step(pred, target, weight, branches)
    if not kappa.is_floating_point():
        raise DtypeError(f"kappa must be a floating-point tensor, got {kappa.dtype}")
    if kappa.shape != pred.shape[:1]:
        raise ShapeError(f"kappa must be [{pred.shape[0]}], got {list(kappa.shape)}")
    if kappa.device != pred.device:
        raise DtypeError(f"kappa must be on {pred.device} like pred, got {kappa.device}")
    pred, target = pred.detach().unsqueeze(1), target.detach().unsqueeze(1)
    return energy_gradient(pred, target, weights, -kappa.detach().double(), backend).squeeze(1)


class TrajectoryEnergies:
    """Energies of G branches, summed one block-step at a time: the first pass of a replay.

    Calls may cover different branches and differ in size: each adds a mean over its own values, so
    ragged windows weigh right. Kept in float64; `energies` is `[G]` in `dtype`.
    """

    @torch.inference_mode(False)  # it outlives the mode in which it may be made
    def __init__(
        self,
        num_branches: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        num_branches = integer("num_branches", num_branches, 1)
        if dtype not in (torch.float32, torch.float64):
            raise DtypeError(f"dtype must be float32 or float64, got {dtype}")
        self.num_branches = num_branches
        self.dtype = dtype
        self._sum = torch.zeros(num_branches, dtype=torch.float64, device=device)

    @property
    def energies(self) -> Tensor:
        """`[G]`, a copy of what was added so far."""
        return self._sum.to(self.dtype, copy=True)

    def add(
        self,
        pred: Tensor,
        target: Tensor,
        weight: float | Tensor,
        branches: Sequence[int] | Tensor | None = None,
    ) -> None:
        """Add `weight * mean((pred - target)^2)` of one block-step to the energies.

        Args:
            pred: `[b, ...]`, predictions of b branches; not differentiated.
            target: as `pred`.
            weight: the block-step's weight; a tensor `[b]` where the branches' differ.
            branches: which of the G branches the rows are, without repetition; b = G rows in order
                if None. A list or a CPU tensor: its values are checked on the host.

        Raises:
            ShapeError, DtypeError: naming argument, row and limit; nothing was added.
        """
        weights = _weight_of_step(pred, target, weight)
        if pred.device != self._sum.device:
            raise DtypeError(f"pred must be on {self._sum.device}, got {pred.device}")
        rows, G = pred.shape[0], self.num_branches
        if branches is None:
            if rows != G:
                raise ShapeError(f"pred has {rows} rows: name the `branches`, there are {G}")
            index = list(range(G))
        else:
            index = _as_list(branches)
            _check_branches(index, rows, G)
        energy = trajectory_velocity_energy(
            pred.detach().unsqueeze(1), target.detach().unsqueeze(1), weights
        ).double()
        if branches is None:
            self._sum += energy
        else:
            named = torch.tensor(index, device="cpu").to(self._sum.device, non_blocking=True)
            self._sum.index_add_(0, named, energy)


def velocity_step_weights(
    sigmas: Tensor | Sequence[float],
    space: Literal["x0", "velocity"] = "x0",
    sigma_floor: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:
    r"""Weights that turn mean squared residuals into the energies of KVPO's branch policy.

    With `s = max(sigma, sigma_floor)` and the policy `softmax(-energy)`:

        space "x0":        weight = 1 / (2 s^2 temperature)              residuals of x0 predictions
        space "velocity":  weight = sigma^2 / (2 s^2 temperature)        residuals of velocities

    Since x0 = x_t - sigma * v, the residuals differ by the factor sigma and both spaces give the
    same energies. The released configuration has sigma_floor 1, that is, x0 residuals over 2; a
    floor of 0 is the plain velocity energy, v residuals over 2. The paper divides an energy without
    the 2 by its temperature tau: that is `temperature = tau / 2`.

    Args:
        sigmas: noise level of each block-step, dimensionless, > 0; any shape.
        space: what `pred` and `target` hold.
        sigma_floor: >= 0.
        temperature: > 0; a higher one makes the branches' probabilities more alike.

    Returns:
        float64, shape and device of `sigmas`.

    Raises:
        RangeError, NonFiniteError: a sigma, or the weight that it would give, is not positive and
            finite; names the steps.
        ConfigError: an unknown space, a bad floor or temperature.

    Source: KVPO (arXiv:2605.14278); the released trainer's log_prob_sigma_floor.
    """
    if space not in ("x0", "velocity"):
        raise ConfigError(f"space must be 'x0' or 'velocity', got {space!r}")
    if not 0 <= number("sigma_floor", sigma_floor) < math.inf:
        raise ConfigError(f"sigma_floor must be >= 0 and finite, got {sigma_floor}")
    if not 0 < number("temperature", temperature) < math.inf:
        raise ConfigError(f"temperature must be > 0 and finite, got {temperature}")
    sigma = numbers_of("sigmas", sigmas).detach()
    steps = _not_positive(sigma)
    if steps:
        values = [float(sigma[tuple(i) if isinstance(i, list) else i]) for i in steps]
        kind = RangeError if all(map(math.isfinite, values)) else NonFiniteError
        raise kind(f"sigmas must be > 0 and finite, got {values} at steps {steps}")
    weight = 0.5 / (sigma.clamp_min(sigma_floor).square() * temperature)
    weight = weight if space == "x0" else weight * sigma.square()
    steps = _not_positive(weight)
    if steps:
        raise RangeError(f"sigmas give weights that float64 does not hold at steps {steps}")
    return weight


def _not_positive(x: Tensor) -> list[int | list[int]]:
    """Where elements are not positive and finite: an index, or a list of them."""
    bad = (~((x > 0) & x.isfinite())).nonzero().tolist()
    return [i[0] if len(i) == 1 else i for i in bad]


def energy_gradient(
    pred: Tensor, target: Tensor, weights: Tensor, grad_energy: Tensor, backend: str | None
) -> Tensor:
    """Return d(sum_g grad_energy[g] energy[g])/d(pred) of checked `[G, S, ...]` trajectories.

    Raises:
        NonFiniteError: on the CPU, outside a compiled graph: it overflows, of finite inputs.
    """
    chosen = registry.select(OP, BACKENDS, Problem(pred.device.type, pred.dtype), backend).name
    grad: Tensor = _backward(pred, target, weights, grad_energy, chosen)
    if type(grad) is Tensor and grad.device.type == "cpu" and not torch.compiler.is_compiling():
        refuse_overflow(grad, "the gradient", grad_energy.tolist(), weights)
    return grad


def refuse_overflow(
    grad: Tensor, name: str, kappa: list[float] | None = None, weights: Tensor | None = None
) -> None:
    """Raise NonFiniteError where a gradient `[G, S, ...]` of finite inputs is not; reads values.

    Args:
        kappa: `[G]`, with `weights` `[S]` or `[G, S]` what makes it, `2 kappa weight residual / N`:
            a residual is at most twice the largest number of its dtype, so that few gradients need
            to be looked at. Without them the gradient itself is.
    """
    size = ""
    if kappa is not None and weights is not None and grad.ndim > 1:
        # Lists: for so few numbers an op of torch takes longer.
        a, b = max(map(abs, kappa)), max(map(abs, weights.flatten().tolist()))
        if 2 * a * b / grad.shape[2:].numel() <= 0.5 or not a < math.inf or not b < math.inf:
            return
        size = f": kappa is up to {a:.3g}, weights up to {b:.3g}"
    overflown = (~grad.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
    if overflown:
        raise NonFiniteError(
            f"{name} is out of the range of {grad.dtype} in rows {overflown}{size}"
        )


def check_trajectories(pred: Tensor, target: Tensor, branches: int | None = None) -> None:
    """Check `[G, S, ...]` predictions against their targets; metadata only.

    Args:
        branches: how many there are by the scores, if they say: tells which of the two is wrong.
    """
    for name, t in (("pred", pred), ("target", target)):
        if not isinstance(t, Tensor):
            raise DtypeError(f"{name} must be a tensor, got {type(t).__name__}")
        if t.layout is not torch.strided:
            raise DtypeError(f"{name} must be dense, got {t.layout}")
    if pred.dtype not in DTYPES:
        raise DtypeError(f"pred must be one of {DTYPES}, got {pred.dtype}")
    if pred.ndim < 2 or pred.numel() == 0:
        raise ShapeError(f"pred must be [G, S, ...] and not empty, got {list(pred.shape)}")
    _check_alike(pred, target, branches)
    if target.dtype is not pred.dtype:
        raise DtypeError(f"target must be {pred.dtype} like pred, got {target.dtype}")
    if target.device != pred.device:
        raise DtypeError(f"target must be on {pred.device} like pred, got {target.device}")
    if target.requires_grad:
        raise ConstantError("target requires grad, but it is a constant here: detach it")


def _check_alike(pred: Tensor, target: Tensor, branches: int | None) -> None:
    if target.shape == pred.shape:
        return
    p, t = list(pred.shape), list(target.shape)
    right = branches is not None and target.ndim > 0 and branches == t[0] and branches != p[0]
    if target.ndim > pred.ndim or right:
        raise ShapeError(f"pred must be {t} like target, got {p}")
    raise ShapeError(f"target must be {p} like pred, got {t}")


def checked_weights(step_weights: Tensor, pred: Tensor, branches: int | None = None) -> Tensor:
    """Check `[S]` weights against the predictions and return them in float64.

    Args:
        branches: how many there are by the scores, where the caller has any: tells which of pred
            and the weights is of another size.
    """
    if not isinstance(step_weights, Tensor):
        raise DtypeError(f"step_weights must be a tensor, got {type(step_weights).__name__}")
    if not step_weights.is_floating_point():
        raise DtypeError(f"step_weights must be a floating-point tensor, got {step_weights.dtype}")
    G, S = pred.shape[:2]
    last = step_weights.shape[-1] if step_weights.ndim else None
    per_branch = step_weights.ndim == 2 and step_weights.shape[0] == G
    # Not `in`, which a compiler takes for false where sizes are symbols.
    if last is None or last != S or not (step_weights.ndim == 1 or per_branch):
        raise ShapeError(_misfit(list(step_weights.shape), list(pred.shape), branches))
    if step_weights.device != pred.device:
        raise DtypeError(f"step_weights must be on {pred.device}, got {step_weights.device}")
    if step_weights.requires_grad:
        raise ConstantError("step_weights requires grad, but it is a constant here: detach it")
    return step_weights.double()


def _misfit(weights: list[int], pred: list[int], branches: int | None) -> str:
    """What to say where weights and predictions do not fit: an axis that pred lacks shows here."""
    G, S = pred[:2]
    per_branch = len(weights) == 2
    fits = f"step_weights must be [{S}] or [{G}, {S}], got {weights}"
    if not 1 <= len(weights) <= 2:
        return fits
    lacks = f"pred must be [G, S, ...], got {pred}: step_weights {weights} has {weights[-1]} steps,"
    if weights[-1] == G and branches != G and not (per_branch and weights[0] == G):
        lacks += " the size of axis 0; the axis of the branches is missing"
        return lacks if len(pred) == 2 or branches is not None else f"{lacks} (or else {fits})"
    if len(pred) == 2 and (not per_branch or weights[0] == G):
        return f"{lacks} but axis 1 is {S}; the axis of the block-steps is missing"
    return f"{fits}; or else pred, which must be [G, S, ...], got {pred}, lacks an axis"


def _weight_of_step(
    pred: Tensor, target: Tensor, weight: float | Tensor, branches: int | None = None
) -> Tensor:
    """Check one block-step `[b, ...]`. Its weight as `[1]`, or `[b, 1]` where branches differ."""
    for name, x in (("pred", pred), ("target", target)):
        if not isinstance(x, Tensor):
            raise DtypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if pred.ndim < 1 or pred.numel() == 0:
        raise ShapeError(f"pred must be [b, ...] and not empty, got {list(pred.shape)}")
    _check_alike(pred, target, branches)
    check_trajectories(pred.detach().unsqueeze(1), target.detach().unsqueeze(1))
    if isinstance(weight, Tensor) and weight.ndim > 0:
        if weight.shape != pred.shape[:1]:
            raise ShapeError(
                f"weight must be a float or [{pred.shape[0]}], got {list(weight.shape)}"
            )
        if not weight.is_floating_point():
            raise DtypeError(f"weight must be a floating-point tensor, got {weight.dtype}")
        if weight.device.type == "cpu" and not bool(weight.isfinite().all()):
            raise NonFiniteError(f"weight must be finite, got {weight.tolist()}")
        return weight.detach().to(pred.device, torch.float64, non_blocking=True).unsqueeze(1)
    value = number("weight", weight)
    if not math.isfinite(value):
        raise NonFiniteError(f"weight must be finite, got {value}")
    # Filled, not copied: a copy from the host would wait for the device.
    return torch.full((1,), value, dtype=torch.float64, device=pred.device)


def _as_list(branches: Sequence[int] | Tensor) -> list[int]:
    if isinstance(branches, Tensor) and branches.ndim != 1:
        raise ShapeError(f"branches must be [b], got {list(branches.shape)}")
    try:
        return branches.tolist() if isinstance(branches, Tensor) else list(branches)
    except TypeError:
        got = type(branches).__name__
        raise DtypeError(f"branches must be a sequence of ints, got {got}") from None


def _check_branches(index: list[int], rows: int, num_branches: int) -> None:
    if len(index) != rows:
        raise ShapeError(f"branches must name the {rows} rows of pred, got {len(index)}")
    for row, branch in enumerate(index):
        index[row] = branch = integer(f"branches[{row}]", branch, None)
        if not 0 <= branch < num_branches:
            raise RangeError(f"branches[{row}] = {branch} not in [0, {num_branches})")
        if branch in index[:row]:
            raise RangeError(f"branches[{row}] = {branch} is named twice")


torch.library.define(
    "kvpo::velocity_energy_forward",
    "(Tensor pred, Tensor target, Tensor weights, str backend) -> Tensor",
)
torch.library.define(
    "kvpo::velocity_energy_backward",
    "(Tensor pred, Tensor target, Tensor weights, Tensor grad_energy, str backend) -> Tensor",
)
_MODULES = {b.name: b for b in BACKENDS}


def _forward_impl(pred: Tensor, target: Tensor, weights: Tensor, backend: str) -> Tensor:
    return _MODULES[backend].load().forward(pred, target, weights)  # type: ignore[no-any-return]


def _backward_impl(
    pred: Tensor, target: Tensor, weights: Tensor, grad_energy: Tensor, backend: str
) -> Tensor:
    return _MODULES[backend].load().backward(pred, target, weights, grad_energy)  # type: ignore[no-any-return]


def _forward_fake(pred: Tensor, target: Tensor, weights: Tensor, backend: str) -> Tensor:
    return pred.new_empty(pred.shape[0], dtype=torch.promote_types(pred.dtype, torch.float32))


def _backward_fake(pred: Tensor, *_: object) -> Tensor:
    return pred.new_empty(pred.shape)


_forward = registry.register("kvpo::velocity_energy_forward", _forward_impl, _forward_fake)
_backward = registry.register("kvpo::velocity_energy_backward", _backward_impl, _backward_fake)


class _VelocityEnergy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pred, target, weights, backend):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(pred, target, weights)
        ctx.backend = backend
        return _forward(pred, target, weights, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_energy):  # type: ignore[no-untyped-def]
        grad = _backward(*ctx.saved_tensors, grad_energy, ctx.backend)
        return grad, None, None, None
