"""Launcher of the C++ branch policy loss: a few hundred flops without torch's cost per op."""

from torch import Tensor

from kvpo_kernels import _native
from kvpo_kernels.backends.native.dlpack import view


def forward(
    scores: Tensor,
    old_scores: Tensor,
    advantages: Tensor,
    ref_scores: Tensor | None,
    *options: float | bool,
) -> Tensor:
    """Return the numbers `[7 + 4 G]`."""
    numbers = scores.new_empty(7 + 4 * len(scores))
    _native.branch_policy_loss(  # type: ignore[call-arg]
        scores.tolist(),
        old_scores.tolist(),
        advantages.tolist(),
        None if ref_scores is None else ref_scores.tolist(),
        *options,  # type: ignore[arg-type]
        view(numbers),
    )
    return numbers
