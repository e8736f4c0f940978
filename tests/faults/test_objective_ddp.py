"""Gradients of a loss over ranks, as DistributedDataParallel hands them to the optimizer.

What is right is the gradient of one process that has all branches.
"""

import copy
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kvpo_kernels import (
    TrajectoryEnergies,
    branch_policy_loss,
    trajectory_velocity_energy,
    tve_grpo_loss,
    velocity_gradient,
)

SHARES = {2: (3, 1), 4: (1, 4, 2, 2)}
"""Processes -> branches of each, never evenly."""
STEPS, VALUES = 3, 20
WEIGHTS = torch.tensor([0.5, 0.4, 0.3], dtype=torch.float64)


def _problem(world: int) -> tuple[nn.Module, Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(7)
    G = sum(SHARES[world])
    normal = lambda *n: torch.randn(*n, generator=g, dtype=torch.float64)
    policy = nn.Linear(VALUES, VALUES, bias=True, dtype=torch.float64)
    with torch.no_grad():
        policy.weight.copy_(normal(VALUES, VALUES) / VALUES**0.5)
        policy.bias.copy_(normal(VALUES))
    z, target = normal(2, G, STEPS, VALUES)
    return policy, z, target, -0.7 + 0.1 * normal(G), normal(G)


def _one_pass(policy: nn.Module, z: Tensor, target: Tensor, old: Tensor, A: Tensor, **how: Any):
    tve_grpo_loss(policy(z), target, WEIGHTS, old, A, **how).loss.backward()


def _in_parts(policy: nn.Module, z: Tensor, target: Tensor, old: Tensor, A: Tensor, **how: Any):
    energies = trajectory_velocity_energy(policy(z), target, WEIGHTS)
    branch_policy_loss(energies=energies, old_scores=old, advantages=A, **how).loss.backward()


def _pred_grad(policy: nn.Module, z: Tensor, target: Tensor, old: Tensor, A: Tensor, **how: Any):
    pred = policy(z)
    pred.backward(tve_grpo_loss(pred, target, WEIGHTS, old, A, **how).pred_grad)


def _two_passes(policy: nn.Module, z: Tensor, target: Tensor, old: Tensor, A: Tensor, **how: Any):
    acc = TrajectoryEnergies(len(z), dtype=torch.float64)
    with torch.no_grad():
        for s in range(STEPS):
            acc.add(policy(z[:, s]), target[:, s], float(WEIGHTS[s]))
    kappa = branch_policy_loss(-acc.energies, old, A, **how).score_grad
    for s in range(STEPS):
        pred = policy(z[:, s])  # DDP averages after each backward; the mean is linear
        pred.backward(velocity_gradient(pred.detach(), target[:, s], float(WEIGHTS[s]), kappa))


FORMS = {f.__name__: f for f in (_one_pass, _in_parts, _pred_grad, _two_passes)}


def _gradients(policy: nn.Module) -> Tensor:
    grads = torch.cat([p.grad.flatten() for p in policy.parameters()])
    for p in policy.parameters():
        p.grad = None
    return grads


def _on_rank(rank: int, world: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    policy, *inputs = _problem(world)
    first = sum(SHARES[world][:rank])
    own = [x[first : first + SHARES[world][rank]] for x in inputs]
    group = dist.group.WORLD
    found = {}
    for name, form in FORMS.items():
        wrapped = DistributedDataParallel(copy.deepcopy(policy))
        form(wrapped, *own, group=group, gradient="mean")
        found[f"{name} mean"] = _gradients(wrapped)
        form(wrapped, *own, group=group)
        found[f"{name} of what is to be summed"] = _gradients(wrapped)
        alone = copy.deepcopy(policy)
        form(alone, *own, group=group, gradient="sum")
        found[f"{name} sum"] = _gradients(alone)
        dist.all_reduce(found[f"{name} sum"])
    # Prompts over pairs of ranks, and DDP over all: the mean over prompts.
    pairs = [dist.new_group([r, r + 1]) for r in range(0, world, 2)]
    wrapped = DistributedDataParallel(copy.deepcopy(policy))
    _one_pass(wrapped, *own, group=pairs[rank // 2], gradient="mean")
    found["pairs"] = _gradients(wrapped)
    messages = []
    for gradient in ("sum" if rank else "mean", "average"):
        try:
            branch_policy_loss(*(x[:, 0, 0] if x.ndim > 1 else x for x in own[1:]),
                               group=group, gradient=gradient)  # fmt: skip
            messages.append("no error")
        except ValueError as e:
            messages.append(str(e))
    torch.save((found, messages), f"{out}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("world", SHARES)
def test_ddp_has_the_gradient_of_one_process(world: int, tmp_path: Path) -> None:
    mp.spawn(_on_rank, args=(world, str(tmp_path / "store"), str(tmp_path)), nprocs=world)
    policy, *inputs = _problem(world)
    for name, form in FORMS.items():
        form(policy, *inputs)
        truth = _gradients(policy)
        assert truth.abs().max() > 0.01
        form(policy, *inputs, gradient="mean")  # without a group there is nothing to average
        assert torch.equal(_gradients(policy), truth)
        for rank in range(world):
            found, messages = torch.load(tmp_path / f"{rank}.pt")
            # Sums of float64 in another order.
            close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
            close(found[f"{name} mean"], truth)
            close(found[f"{name} sum"], truth)
            close(found[f"{name} of what is to be summed"], truth / world)
            values = [float(r == 0) for r in range(world)]
            assert messages[0] == f"ranks of the group differ in gradient: {values}"
            assert messages[1] == "gradient must be 'sum' or 'mean', got 'average'"
    prompts = []
    for r in range(0, world, 2):
        first, end = sum(SHARES[world][:r]), sum(SHARES[world][: r + 2])
        _one_pass(policy, *(x[first:end] for x in inputs))
        prompts.append(_gradients(policy))
    close(torch.load(tmp_path / "0.pt")[0]["pairs"], torch.stack(prompts).mean(0))
