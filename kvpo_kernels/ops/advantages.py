"""Advantages of branches over their anchor, from rewards: a handful of numbers, no kernel."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from kvpo_kernels.checks import number, numbers_of
from kvpo_kernels.errors import ConfigError, DtypeError, NonFiniteError, ShapeError

STD_EPSILON = 1e-8  # added to the anchored deviation; a fusion deviation up to it is not divided by
ROUNDINGS = 4
"""Deviations up to this many epsilons of the dtype, times the largest magnitude, are rounding.

Values that differ by their last bits only, up to m steps to either side, lie in a range of
`2 m epsilon max|x|` at most. The unbiased deviation of a range is at most `1 / sqrt(2)` of it (two
values; half of it for many), so 4 covers two steps to either side of any group, and leaves a spread
of eight steps or more alone.
"""

StdFloor = Tensor | Sequence[float] | float | None

Nonfinite = Literal["raise", "drop"]


def anchor_advantages(
    rewards: Tensor,
    anchor_rewards: Tensor | Sequence[float] | float,
    component_weights: Tensor | Sequence[float] | None = None,
    *,
    std_floor: StdFloor = None,
    nonfinite: Nonfinite = "raise",
) -> Tensor:
    r"""Advantage of each branch over the unperturbed anchor, summed over reward components.

        A[g] = sum_c weight[c] * (r[c, g] - anchor[c]) / (std(r[c, :], anchor[c]) + 1e-8)

    The standard deviation is the unbiased one over the G branches and the anchor, so a single
    branch is legal and all rewards equal give exactly 0. Computed in float64.

    Rewards that are equal but for rounding would be told apart by their noise, which dividing by
    its deviation makes as large as any difference. So, for each component: where the deviation is
    at most `std_floor`, its term is exactly 0; where only that of the branches is, without the
    anchor, they all get the term of their mean. Beyond it nothing changes to a bit.

    Args:
        rewards: `[C, G]`, or `[G]` for one component; float.
        anchor_rewards: `[C]`, or a number for one component.
        component_weights: `[C]`; 1 for each if None.
        std_floor: deviation up to which rewards count as equal, in their units: `[C]`, or a number
            for all components. None takes `4 epsilon max|r|` of each component and its anchor, with
            the machine epsilon of `rewards` (or of the anchor, if it is a coarser tensor): two
            roundings to either side. Give it where rewards are noisier than their dtype, as those
            of a half-precision model that were widened. 0 is the released code.
        nonfinite: "raise" names the branches whose reward is NaN or infinite (reads the values: on
            a GPU this waits for them). "drop" leaves such branches out of the statistics, without
            reading anything, and gives them the advantage NaN, which the losses take as a branch to
            drop. A non-finite anchor reward drops all.

    Returns:
        `[G]` in the dtype of `rewards`, not differentiable.

    Raises:
        ShapeError, DtypeError: naming the argument.
        ConfigError: `std_floor` is negative or not finite.
        NonFiniteError: a reward, an anchor or a weight is not finite, or an advantage would not be;
            names component and branches.

    Source: KVPO (arXiv:2605.14278), the released trainer's anchor advantage.
    """
    _check_policy(nonfinite)
    _check_floating("rewards", rewards)
    if rewards.ndim not in (1, 2) or rewards.numel() == 0:
        raise ShapeError(f"rewards must be [C, G] or [G] and not empty, got {list(rewards.shape)}")
    r = rewards.detach().double()
    r = r if r.ndim == 2 else r[None]
    C = r.shape[0]
    _check_components(rewards, anchor_rewards)
    anchor = _vector("anchor_rewards", anchor_rewards, C, r.device)
    weights = torch.ones(C, dtype=torch.float64, device=r.device)
    if component_weights is not None:
        weights = _vector("component_weights", component_weights, C, r.device)
    if nonfinite == "raise":
        if not bool(weights.isfinite().all()):
            raise NonFiniteError(f"component_weights must be finite, got {weights.tolist()}")
        for c in range(C):
            _refuse_nonfinite(f"rewards[{c}]" if C > 1 else "rewards", r[c])
        if not bool(anchor.isfinite().all()):
            raise NonFiniteError(f"anchor_rewards must be finite, got {anchor.tolist()}")

    else:  # a branch that one component cannot judge leaves the statistics of all
        r = torch.where(r.isfinite().all(0), r, torch.nan)

    floors = _floors(std_floor, C, r.device)
    advantage = torch.zeros_like(r[0])
    for c in range(C):
        group = torch.cat([r[c], anchor[c : c + 1]])
        if floors is not None:
            floor = own_floor = floors[c]
        else:
            floor = _rounding(group, rewards, anchor_rewards)
            own_floor = _rounding(r[c], rewards)
        same = _finite_deviation(r[c], correction=1) <= own_floor
        branches = torch.where(same & r[c].isfinite(), _finite_mean(r[c]), r[c])
        deviation = _finite_deviation(group, correction=1)
        term = weights[c] * (branches - anchor[c]) / (deviation + STD_EPSILON)
        advantage += torch.where((deviation <= floor) & term.isfinite(), 0.0, term)
    result = torch.where(advantage.isfinite(), advantage, torch.nan).to(rewards.dtype)
    if nonfinite == "raise":
        _refuse_nonfinite("advantage", result)  # of finite rewards, but out of the dtype's range
    return result


def fuse_advantages(
    local: Tensor,
    global_: Tensor | None = None,
    local_weight: float = 1.0,
    global_weight: float = 0.5,
    mode: Literal["std", "zscore", "none"] = "std",
    clamp: float | None = 2.5,
    *,
    std_floor: float | None = None,
    nonfinite: Nonfinite = "raise",
) -> Tensor:
    """Normalise the local and the global advantages over the branches, add and clamp them.

        fused = clamp(local_weight * norm(local) + global_weight * norm(global_), -clamp, clamp)

    Args:
        local: `[G]` advantages from rewards of the perturbed window.
        global_: `[G]` advantages from rewards of the whole video; None leaves the term out.
        local_weight: weight of the local term.
        global_weight: weight of the global term.
        mode: "std" divides by the population standard deviation over the branches, which keeps the
            sign against the anchor; "zscore" also subtracts the mean; "none" does neither. A
            deviation of at most 1e-8 is not divided by.
        clamp: limit of the absolute value; None for no limit.
        std_floor: deviation up to which advantages count as equal, dimensionless: it is not divided
            by either, and "zscore" gives exactly 0. None takes `4 epsilon max|A|` of each term, in
            its dtype, as in `anchor_advantages`; 0 is the released code.
        nonfinite: as in `anchor_advantages`; under "drop" a NaN stays NaN and the others'
            statistics leave it out.

    Returns:
        `[G]` in the dtype of `local`, computed in float64, not differentiable.

    Raises:
        ConfigError: an unknown mode, a weight that is not finite, a clamp that is not positive, a
            floor that is negative or not finite.
        ShapeError, DtypeError: naming the argument.
        NonFiniteError: an advantage is not finite, or a fused one would not be; names the branches.

    Source: KVPO (arXiv:2605.14278), the released trainer's fusion of reward signals.
    """
    _check_policy(nonfinite)
    if mode not in ("std", "zscore", "none"):
        raise ConfigError(f"mode must be 'std', 'zscore' or 'none', got {mode!r}")
    if clamp is not None and not number("clamp", clamp) > 0:
        raise ConfigError(f"clamp must be > 0 or None, got {clamp}")
    _check_floating("local", local)
    floors = _floors(std_floor, 1, local.device)
    terms = [("local", local, local_weight)]
    if global_ is not None:
        terms.append(("global_", global_, global_weight))
    fused: Tensor | None = None
    for name, value, weight in terms:
        _check_floating(name, value)
        if value.ndim != 1 or value.shape != local.shape or value.numel() == 0:
            want = "[G] with G >= 1" if name == "local" else f"{list(local.shape)} like local"
            raise ShapeError(f"{name} must be {want}, got {list(value.shape)}")
        if value.device != local.device:
            raise DtypeError(f"{name} must be on {local.device} like local, got {value.device}")
        weight_name = f"{name.rstrip('_')}_weight"
        if not math.isfinite(number(weight_name, weight)):
            raise ConfigError(f"{weight_name} must be finite, got {weight}")
        if nonfinite == "raise":
            _refuse_nonfinite(name, value)
        wide = value.detach().double()
        floor = floors[0] if floors is not None else _rounding(wide, value)
        term = weight * _normalised(wide, mode, floor)
        fused = term if fused is None else fused + term
    assert fused is not None
    if clamp is not None:
        fused = fused.clamp(-clamp, clamp)
    fused = fused.to(local.dtype)
    if nonfinite == "raise":
        _refuse_nonfinite("the fused advantage", fused)  # of finite ones, but out of the range
    return fused


def _normalised(x: Tensor, mode: str, floor: Tensor) -> Tensor:
    if mode == "none":
        return x
    deviation = _finite_deviation(x, correction=0)
    if mode == "zscore":
        centred = x - _finite_mean(x)
        x = torch.where((deviation <= floor) & x.isfinite(), 0.0, centred)
    return torch.where(deviation > floor.clamp_min(STD_EPSILON), x / deviation, x)


def _rounding(x: Tensor, *given: object) -> Tensor:
    """Deviation of the finite values that rounding to the coarsest dtype among `given` may make.

    Below the normal numbers steps become no smaller: in float16 they are 6e-8 there.
    """
    dtypes = [y.dtype for y in given if isinstance(y, Tensor) and y.is_floating_point()]
    coarsest = max(map(torch.finfo, dtypes), key=lambda info: info.eps)
    largest = torch.where(x.isfinite(), x, 0.0).abs().amax()
    return ROUNDINGS * coarsest.eps * largest.clamp_min(coarsest.smallest_normal)


def _floors(std_floor: StdFloor, components: int, device: torch.device) -> Tensor | None:
    if std_floor is None:
        return None
    floors = numbers_of("std_floor", std_floor)
    if floors.device.type == "cpu" and not bool(((floors >= 0) & floors.isfinite()).all()):
        raise ConfigError(f"std_floor must be >= 0 and finite, got {std_floor}")
    if floors.ndim == 0:
        floors = floors.expand(components)
    return _vector("std_floor", floors, components, device)


def _finite_mean(x: Tensor) -> Tensor:
    """Mean of the finite entries, as a shift of one of them: exact where all are equal."""
    finite = x.isfinite()
    origin = torch.where(finite, x, torch.inf).amin()
    shift = torch.where(finite, x - origin, 0.0).sum() / finite.sum()
    return origin + shift


def _finite_deviation(x: Tensor, correction: int) -> Tensor:
    finite = x.isfinite()
    shift = torch.where(finite, x - _finite_mean(x), 0.0)
    # Squares of the far ends of float64 overflow; a power of two in front changes no other bit.
    largest = shift.abs().amax()
    unit = torch.where(largest > 2.0**500, 2.0**-600, torch.ones_like(largest))
    squares = (shift * unit).square().sum()
    return (squares / (finite.sum() - correction).clamp_min(1)).sqrt() / unit


def _check_policy(nonfinite: str) -> None:
    if nonfinite not in ("raise", "drop"):
        raise ConfigError(f"nonfinite must be 'raise' or 'drop', got {nonfinite!r}")


def _check_floating(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise DtypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if not value.is_floating_point():
        raise DtypeError(f"{name} must be a floating-point tensor, got {value.dtype}")


def _check_components(rewards: Tensor, anchor: object) -> None:
    """Blame rewards that lack the axis of the components, or have it last, not their anchor."""
    size = numbers_of("anchor_rewards", anchor).shape
    if len(size) != 1 or size[0] == (rewards.shape[0] if rewards.ndim == 2 else 1):
        return
    got = f"got {list(rewards.shape)}: anchor_rewards has {size[0]} components"
    if rewards.ndim == 1:
        raise ShapeError(f"rewards must be [C, G], {got}")
    if rewards.shape[1] == size[0]:
        raise ShapeError(f"rewards must be [C, G], {got}, the size of axis 1: transpose them")


def _refuse_nonfinite(name: str, value: Tensor) -> None:
    bad = (~value.isfinite()).nonzero().flatten().tolist()
    if bad:
        values = [float(value[g]) for g in bad]
        raise NonFiniteError(f"{name} must be finite, got {values} for branches {bad}")


def _vector(
    name: str, value: Tensor | Sequence[float] | float, size: int, device: torch.device
) -> Tensor:
    vector = numbers_of(name, value).detach().to(device, non_blocking=True)
    vector = vector[None] if vector.ndim == 0 and size == 1 else vector
    if vector.shape != (size,):
        raise ShapeError(f"{name} must be [{size}], got {list(vector.shape)}")
    return vector
