"""Launcher of the CUDA kernel: energies, policy loss and gradient in one cooperative launch.

Two launches where the differences of all block-steps do not fit into shared memory.
"""

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack  # type: ignore[attr-defined]

from kvpo_kernels import _cuda


def forward(
    pred: Tensor,
    target: Tensor,
    weights: Tensor,
    grad_weights: Tensor,
    old_scores: Tensor,
    advantages: Tensor,
    ref_scores: Tensor | None,
    *options: float | bool,
) -> tuple[Tensor, Tensor]:
    """Return `(numbers [7 + 5 G], grad)`; grad is empty if not needed."""
    *objective, needs_grad = options
    G, S = pred.shape[:2]
    chunks = -(-pred.shape[2:].numel() // _cuda.CHUNK)
    pred, target = pred.contiguous(), target.contiguous()
    grad = torch.empty_like(pred) if needs_grad else pred.new_empty(0)
    numbers = old_scores.new_empty(7 + 5 * G)
    inputs = (weights.flatten(), grad_weights.flatten(), old_scores, advantages)
    with torch.cuda.device(pred.device):
        _cuda.tve_grpo(  # type: ignore[call-arg]
            to_dlpack(pred),
            to_dlpack(target),
            *(to_dlpack(x.contiguous()) for x in inputs),
            to_dlpack((old_scores if ref_scores is None else ref_scores).contiguous()),
            *objective,
            to_dlpack(numbers),
            to_dlpack(grad) if needs_grad else None,
            to_dlpack(pred.new_empty(G * S * chunks, dtype=torch.float64)),
            to_dlpack(pred.new_empty(G, S, dtype=torch.float32)),
            to_dlpack(pred.new_empty(1, dtype=torch.int32)),
            torch.cuda.current_stream(pred.device).cuda_stream,
        )
    return numbers, grad
