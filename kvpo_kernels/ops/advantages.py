"""Advantages of branches over their anchor, from rewards: a handful of numbers, no kernel."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from kvpo_kernels.errors import ConfigError, DtypeError, ShapeError

STD_EPSILON = 1e-8  # added to the anchored deviation; a fusion deviation up to it is not divided by

Nonfinite = Literal["raise", "drop"]


def anchor_advantages(
    rewards: Tensor,
    anchor_rewards: Tensor | Sequence[float] | float,
    component_weights: Tensor | Sequence[float] | None = None,
    *,
    nonfinite: Nonfinite = "raise",
) -> Tensor:
    r"""Advantage of each branch over the unperturbed anchor, summed over reward components.

        A[g] = sum_c weight[c] * (r[c, g] - anchor[c]) / (std(r[c, :], anchor[c]) + 1e-8)

    The standard deviation is the unbiased one over the G branches and the anchor, so a single
    branch is legal and all rewards equal give exactly 0. Computed in float64.

    Args:
        rewards: `[C, G]`, or `[G]` for one component; float.
        anchor_rewards: `[C]`, or a number for one component.
        component_weights: `[C]`; 1 for each if None.
        nonfinite: "raise" names the branches whose reward is NaN or infinite (reads the values: on
            a GPU this waits for them). "drop" leaves such branches out of the statistics, without
            reading anything, and gives them the advantage NaN, which the losses take as a branch to
            drop. A non-finite anchor reward drops all.

    Returns:
        `[G]` in the dtype of `rewards`, not differentiable.

    Raises:
        ShapeError, DtypeError: naming the argument.
        ShapeError: a reward is not finite; names component and branches.

    Source: KVPO (arXiv:2605.14278), the released trainer's anchor advantage.
    """
    _check_policy(nonfinite)
    _check_floating("rewards", rewards)
    if rewards.ndim not in (1, 2) or rewards.numel() == 0:
        raise ShapeError(f"rewards must be [C, G] or [G] and not empty, got {list(rewards.shape)}")
    r = rewards.detach().double()
    r = r if r.ndim == 2 else r[None]
    C = r.shape[0]
    anchor = _vector("anchor_rewards", anchor_rewards, C, r.device)
    weights = torch.ones(C, dtype=torch.float64, device=r.device)
    if component_weights is not None:
        weights = _vector("component_weights", component_weights, C, r.device)
    if nonfinite == "raise":
        if not bool(weights.isfinite().all()):
            raise ShapeError(f"component_weights must be finite, got {weights.tolist()}")
        for c in range(C):
            _refuse_nonfinite(f"rewards[{c}]" if C > 1 else "rewards", r[c])
        if not bool(anchor.isfinite().all()):
            raise ShapeError(f"anchor_rewards must be finite, got {anchor.tolist()}")

    else:  # a branch that one component cannot judge leaves the statistics of all
        r = torch.where(r.isfinite().all(0), r, torch.nan)

    advantage = torch.zeros_like(r[0])
    for c in range(C):
        group = torch.cat([r[c], anchor[c : c + 1]])
        deviation = _finite_variance(group, correction=1).sqrt()
        advantage += weights[c] * (r[c] - anchor[c]) / (deviation + STD_EPSILON)
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
        nonfinite: as in `anchor_advantages`; under "drop" a NaN stays NaN and the others'
            statistics leave it out.

    Returns:
        `[G]` in the dtype of `local`, computed in float64, not differentiable.

    Raises:
        ConfigError: an unknown mode, a weight that is not finite, a clamp that is not positive.
        ShapeError, DtypeError: naming the argument, and the branches that are not finite.

    Source: KVPO (arXiv:2605.14278), the released trainer's fusion of reward signals.
    """
    _check_policy(nonfinite)
    if mode not in ("std", "zscore", "none"):
        raise ConfigError(f"mode must be 'std', 'zscore' or 'none', got {mode!r}")
    if clamp is not None and not clamp > 0:
        raise ConfigError(f"clamp must be > 0 or None, got {clamp}")
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
        if not abs(weight) < float("inf"):
            raise ConfigError(f"{name.rstrip('_')}_weight must be finite, got {weight}")
        if nonfinite == "raise":
            _refuse_nonfinite(name, value)
        term = weight * _normalised(value.detach().double(), mode)
        fused = term if fused is None else fused + term
    assert fused is not None
    if clamp is not None:
        fused = fused.clamp(-clamp, clamp)
    return fused.to(local.dtype)


def _normalised(x: Tensor, mode: str) -> Tensor:
    if mode == "none":
        return x
    deviation = _finite_variance(x, correction=0).sqrt()
    if mode == "zscore":
        x = x - _finite_mean(x)
    return torch.where(deviation > STD_EPSILON, x / deviation, x)


def _finite_mean(x: Tensor) -> Tensor:
    """Mean of the finite entries, as a shift of one of them: exact where all are equal."""
    finite = x.isfinite()
    origin = torch.where(finite, x, torch.inf).amin()
    shift = torch.where(finite, x - origin, 0.0).sum() / finite.sum()
    return origin + shift


def _finite_variance(x: Tensor, correction: int) -> Tensor:
    finite = x.isfinite()
    squares = torch.where(finite, x - _finite_mean(x), 0.0).square().sum()
    return squares / (finite.sum() - correction).clamp_min(1)


def _check_policy(nonfinite: str) -> None:
    if nonfinite not in ("raise", "drop"):
        raise ConfigError(f"nonfinite must be 'raise' or 'drop', got {nonfinite!r}")


def _check_floating(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise DtypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if not value.is_floating_point():
        raise DtypeError(f"{name} must be a floating-point tensor, got {value.dtype}")


def _refuse_nonfinite(name: str, value: Tensor) -> None:
    bad = (~value.isfinite()).nonzero().flatten().tolist()
    if bad:
        values = [float(value[g]) for g in bad]
        raise ShapeError(f"{name} must be finite, got {values} for branches {bad}")


def _vector(
    name: str, value: Tensor | Sequence[float] | float, size: int, device: torch.device
) -> Tensor:
    vector = torch.as_tensor(value, dtype=torch.float64).detach().to(device, non_blocking=True)
    vector = vector[None] if vector.ndim == 0 and size == 1 else vector
    if vector.shape != (size,):
        raise ShapeError(f"{name} must be [{size}], got {list(vector.shape)}")
    return vector
