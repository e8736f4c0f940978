"""What goes into a branch policy loss and what comes out of it, checked on the host."""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from kvpo_kernels.errors import ArgumentError, DtypeError, NonFiniteError, ShapeError


def check_scalars(
    name: str,
    value: Any,
    device: torch.device,
    dtype: torch.dtype,
    size: int,
    stacklevel: int = 4,
) -> Tensor:
    """Check one `[G]` input against the scores and detach it: it is data of the rollout.

    Args:
        stacklevel: of the caller's caller that a warning points at, as in `warnings.warn`.
    """
    if not isinstance(value, Tensor):
        raise DtypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dtype is not dtype:
        raise DtypeError(f"{name} must be {dtype} like the scores, got {value.dtype}")
    if value.device != device:
        raise DtypeError(f"{name} must be on {device} like the scores, got {value.device}")
    if value.ndim != 1 or value.shape[0] != size:
        raise ShapeError(f"{name} must be [{size}], got {list(value.shape)}")
    tensor: Tensor = value
    if not tensor.requires_grad:
        return tensor
    if not torch.compiler.is_compiling():
        text = f"{name} requires grad; it is a constant here and detached"
        warnings.warn(text, stacklevel=stacklevel)
    return tensor.detach()


def one_of(policy: str, scores: Any, energies: Any) -> tuple[str, Any]:
    """Name and value of what was given for a policy: its scores or its energies."""
    if scores is not None and energies is not None:
        raise ArgumentError(f"give {policy}scores or {policy}energies, not both")
    return (f"{policy}scores", scores) if energies is None else (f"{policy}energies", energies)


def count_of(*inputs: Any) -> int | None:
    """The number of branches, if at least two of the inputs are `[G]` and no other disagrees."""
    sizes = [x.shape[0] for x in inputs if isinstance(x, Tensor) and x.ndim == 1]
    return sizes[0] if len(sizes) > 1 and all(n == sizes[0] for n in sizes) else None


def check_agreed(name: str, scores: Tensor, *inputs: Any) -> None:
    """Where the old policy and the advantages agree on another dtype or device, scores are odd."""
    others = [x for x in inputs if isinstance(x, Tensor)]
    for what in ("dtype", "device"):
        own, agreed = getattr(scores, what), [getattr(x, what) for x in others]
        fits = what == "device" or agreed[:1] in ([torch.float32], [torch.float64])
        if len(agreed) > 1 and agreed[0] == agreed[1] and agreed[0] != own and fits:
            raise DtypeError(
                f"{name} must be {'on ' if what == 'device' else ''}{agreed[0]} like the old"
                f" policy's and the advantages, got {own}"
            )


def checked_scores(
    policy: str,
    scores: Tensor | None,
    energies: Tensor | None,
    like: tuple[torch.device, torch.dtype, int],
    drop: bool,
    stacklevel: int = 5,
) -> Tensor:
    """The scores `[G]` of the old or the reference policy, from what was given; detached.

    Raises:
        ArgumentError: both are given, or neither.
        ShapeError, DtypeError: naming what was given.
    """
    name, value = one_of(policy, scores, energies)
    if value is None:
        raise ArgumentError(f"{policy}scores or {policy}energies must be given")
    value = check_scalars(name, value, *like, stacklevel)
    return value if energies is None else turned(name, value, drop)


def turned(name: str, energies: Tensor, drop: bool) -> Tensor:
    """Scores of energies that were given under this name; the kernels know of scores only."""
    readable = not torch.compiler.is_compiling() and type(energies) in (Tensor, Parameter)
    if readable and not drop and energies.device.type == "cpu":
        refuse_nonfinite(**{name: energies.detach()})
    return -energies


def refuse_nonfinite(**inputs: Tensor | None) -> None:
    """Raise NonFiniteError naming the inputs and branches that are not; reads the values."""
    wrong = []
    for name, value in inputs.items():
        if value is not None:
            bad = (~value.isfinite()).nonzero().flatten().tolist()
            if bad:
                wrong.append(f"{name} must be finite, got {value[bad].tolist()} for branches {bad}")
    if wrong:
        raise NonFiniteError("; ".join(wrong))


_STATISTICS = ("loss", "grpo_loss", "kl", "entropy", "clip_fraction", "skip", "dropped")


def not_finite(values: list[float], num_branches: int) -> list[str]:
    """The numbers of a result that are neither finite nor a dropped branch's, with their values."""
    if math.isfinite(sum(values)):
        return []
    G = num_branches
    wrong = [f"{n} = {v}" for n, v in zip(_STATISTICS, values, strict=False) if not _finite(v)]
    for row, name in enumerate(("score_grad", "ratio", "log_ratio")):
        for g in range(G):
            value = values[7 + row * G + g]
            if not _finite(value) and (row == 0 or values[7 + 3 * G + g]):
                wrong.append(f"{name}[{g}] = {value}")
    return wrong


_finite = math.isfinite


def check_numbers(
    numbers: Tensor,
    values: list[float],
    drop: bool,
    objective: Sequence[float],
    scores: Tensor | None,
    old_scores: Tensor,
    advantages: Tensor,
    ref_scores: Tensor | None,
) -> None:
    """Look at a result on the CPU: what is in the kernels' numbers, and what went into them.

    Args:
        values: of `numbers`.
        objective: as the kernels take it, `Scalars` from `clip_low` on.
        scores: None where they come from energies, the last of the numbers.

    Raises:
        NonFiniteError: an input is not finite, unless such are dropped; or a result of finite
            inputs is out of the range of the dtype.
    """
    G = len(old_scores)
    if wrong := not_finite(values, G):
        name, given = ("scores", scores) if scores is not None else ("energies", numbers[-G:])
        if not drop:
            refuse_nonfinite(
                **{name: given},
                old_scores=old_scores,
                advantages=advantages,
                ref_scores=ref_scores,
            )
        raise NonFiniteError(
            f"out of the range of {numbers.dtype}, though the inputs are finite:"
            f" {', '.join(wrong)}; ratios are up to {_largest(numbers[7 + G : 7 + 2 * G]):.3g}"
            f" (log_ratio_clamp {objective[3]:g}), advantages up to {_largest(advantages):.3g},"
            f" {name} up to {_largest(given):.3g}, kl_coef is {objective[2]:g}"
        )
    for policy, frozen in (("old", old_scores), ("ref", ref_scores)):
        if frozen is not None and min(others := frozen.tolist()) > 0:
            own = scores.tolist() if scores is not None else [-e for e in values[-G:]]
            _warn_of_energies(policy, others, own)


def _largest(x: Tensor) -> float:
    return float(torch.where(x.isfinite(), x, 0.0).abs().max())


def _warn_of_energies(policy: str, values: list[float], scores: list[float]) -> None:
    """Scores are negative energies; a softmax takes any, so this is no more than a suspicion."""
    if max(scores) < 0:
        warnings.warn(
            f"{policy}_scores are all positive, {min(values):.3g} to {max(values):.3g}, and the"
            f" scores all negative, from {min(scores):.3g}: a score is a negative energy."
            f" Hand energies over as {policy}_energies, and scores as {policy}_scores",
            stacklevel=6,
        )
