"""Velocity energies and their gradient: pred and target are read once by each.

A chunk of a block-step is one program. The last program of a branch adds its chunks up, in one
order whoever is last, and the last of all may go on with what needs every branch: see
`tve_grpo.py`. Only counters are atomic; who comes last sets them back, so that nothing has to be
launched to do it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvpo_kernels.backends.triton.branch_policy_loss import store_policy

CHUNK = 4096
_SUMMED = 1024


@triton.jit
def _residual(pred, target, row, chunk, N, CHUNK: tl.constexpr):
    n = chunk * CHUNK + tl.arange(0, CHUNK)
    at = row.to(tl.int64) * N + n
    p = tl.load(pred + at, mask=n < N, other=0.0).to(tl.float32)
    t = tl.load(target + at, mask=n < N, other=0.0).to(tl.float32)
    return p - t, at, n < N


@triton.jit
def energies_kernel(
    pred, target, weights, partials, arrived, energies, numbers, old_scores, advantages, ref_scores,
    grad_weights, coefficients, objective, N, S, G, chunks, weights_stride,
    DROP: tl.constexpr, POLICY: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr,
    CHUNK: tl.constexpr, SUMMED: tl.constexpr,
):  # fmt: skip
    """Energies `[G]`; with POLICY also the numbers of the loss and the gradient's coefficients."""
    program = tl.program_id(0)
    row = program // chunks
    g = row // S
    d, _, _ = _residual(pred, target, row, program % chunks, N, CHUNK)
    tl.store(partials + program, tl.sum(d * d))
    tl.debug_barrier()  # the sum is written before it is counted
    per_branch = S * chunks
    if tl.atomic_add(arrived + g, 1, sem="acq_rel") == per_branch - 1:
        tl.store(arrived + g, 0)
        energy = tl.zeros([SUMMED], tl.float64)
        for first in range(0, per_branch, SUMMED):
            i = first + tl.arange(0, SUMMED)
            # Past L1: other programs wrote them.
            part = tl.load(
                partials + g * per_branch + i, mask=i < per_branch, other=0.0, cache_modifier=".cg"
            )
            step = g * weights_stride + i // chunks
            w = tl.load(weights + step, mask=i < per_branch, other=0.0)
            energy += part.to(tl.float64) * w
        tl.store(energies + g, tl.sum(energy) / N)
        if POLICY:
            tl.debug_barrier()
            if tl.atomic_add(arrived + G, 1, sem="acq_rel") == G - 1:
                tl.store(arrived + G, 0)
                branch = tl.arange(0, BLOCK_G)
                e = tl.load(energies + branch, mask=branch < G, other=0.0, cache_modifier=".cg")
                score_grad = store_policy(
                    numbers, -e.to(tl.float64), old_scores, advantages, ref_scores, objective, G,
                    DROP, BLOCK_G,
                )  # fmt: skip
                # Rounded as the caller sees it: the two-pass form then gives the same bits.
                kappa = score_grad.to(tl.float32).to(tl.float64)
                step = tl.arange(0, BLOCK_S)[None, :]
                inside = (branch < G)[:, None] & (step < S)
                own = grad_weights + branch[:, None] * weights_stride + step
                w = tl.load(own, mask=inside, other=0.0)
                tl.store(
                    coefficients + branch[:, None] * S + step,
                    (-2.0 * kappa[:, None] * w / N).to(tl.float32),
                    mask=inside,
                )


@triton.jit
def gradient_kernel(pred, target, coefficients, grad, N, chunks, CHUNK: tl.constexpr):
    """`coefficient * (pred - target)`; exact zeros where the coefficient is 0."""
    row = tl.program_id(0) // chunks
    coefficient = tl.load(coefficients + row)
    d, at, inside = _residual(pred, target, row, tl.program_id(0) % chunks, N, CHUNK)
    value = tl.where(coefficient == 0.0, 0.0, d * coefficient)
    tl.store(grad + at, value.to(grad.dtype.element_ty), mask=inside)


def forward(pred: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Return `energy [G]`, float32."""
    energies = pred.new_empty(pred.shape[0], dtype=torch.float32)
    launch_energies(pred, target, weights, energies)
    return energies


def launch_energies(
    pred: Tensor,
    target: Tensor,
    weights: Tensor,
    energies: Tensor,
    policy: tuple[object, ...] | None = None,
    drop: bool = False,
) -> None:
    """Fill `energies`, and what `policy` holds: numbers, inputs, coefficients, options."""
    G, S = pred.shape[:2]
    N = pred.shape[2:].numel()
    chunks = triton.cdiv(N, CHUNK)
    partials = pred.new_empty(G * S * chunks, dtype=torch.float32)
    with torch.cuda.device_of(pred):
        arrived = _counters(G + 1, pred.device)
        energies_kernel[(G * S * chunks,)](
            pred.contiguous(),
            target.contiguous(),
            weights.contiguous(),
            partials,
            arrived,
            energies,
            *(policy or [energies] * 6 + [((0.0, 0.0),) * 7]),
            N,
            S,
            G,
            chunks,
            0 if weights.ndim == 1 else S,
            DROP=drop,
            POLICY=policy is not None,
            BLOCK_G=triton.next_power_of_2(max(2, G)),
            BLOCK_S=triton.next_power_of_2(S),
            CHUNK=CHUNK,
            SUMMED=_SUMMED,
            num_warps=4,
        )


_zeros: dict[tuple[torch.device, int], Tensor] = {}


def _counters(count: int, device: torch.device) -> Tensor:
    """At least so many zeros, the current stream's own; a launch leaves them zeros."""
    stream = 0
    if device.type == "cuda":
        # The replays of a graph may run beside anything: it needs counters of its own.
        if torch.cuda.is_current_stream_capturing():
            return torch.zeros(count, dtype=torch.int32, device=device)
        stream = torch.cuda.current_stream(device).cuda_stream
    zeros = _zeros.get((device, stream))
    if zeros is None or len(zeros) < count:
        zeros = torch.zeros(max(count, 256), dtype=torch.int32, device=device)
        _zeros[device, stream] = zeros
    return zeros


def backward(pred: Tensor, target: Tensor, weights: Tensor, grad_energy: Tensor) -> Tensor:
    """Return the gradient for pred, contiguous."""
    coefficients = 2 * grad_energy.double()[:, None] * weights / pred.shape[2:].numel()
    return launch_gradient(pred, target, coefficients.float())


def launch_gradient(pred: Tensor, target: Tensor, coefficients: Tensor) -> Tensor:
    """Return `coefficients [G, S] * (pred - target)`."""
    N = pred.shape[2:].numel()
    chunks = triton.cdiv(N, CHUNK)
    grad = pred.new_empty(pred.shape)
    with torch.cuda.device_of(pred):
        gradient_kernel[(coefficients.numel() * chunks,)](
            pred.contiguous(),
            target.contiguous(),
            coefficients,
            grad,
            N,
            chunks,
            CHUNK=CHUNK,
            num_warps=4,
        )
    return grad
