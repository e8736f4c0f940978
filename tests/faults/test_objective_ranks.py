"""Branches spread over processes: one result for all, one error for all, and no process waits.

Fault case 47, and a process that is gone in the middle (52).
"""

import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from kvpo_kernels import ContrastiveObjective, branch_policy_loss, tve_grpo_loss
from kvpo_kernels.errors import KvpoError

SHARES = {2: (3, 1), 3: (1, 4, 2), 4: (2, 1, 3, 1)}
"""Processes -> branches of each, never evenly."""


def _share(rank: int, world: int) -> slice:
    first = sum(SHARES[world][:rank])
    return slice(first, first + SHARES[world][rank])


def _problem(world: int) -> tuple[Tensor, ...]:
    G = sum(SHARES[world])
    g = torch.Generator().manual_seed(5)
    pred, target = torch.randn(2, G, 2, 30, generator=g)
    old, A, ref = 0.1 * torch.randn(3, G, generator=g) - torch.tensor([[1.0], [0.0], [1.0]])
    return pred, target, torch.tensor([0.5, 0.4]), old, A, ref


def _join(rank: int, world: int, store: str, seconds: float) -> dist.ProcessGroup:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=seconds),
    )
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def _on_rank(rank: int, world: int, store: str, out: str) -> None:
    group = _join(rank, world, store, 30)
    pred, target, weights, *scores = _problem(world)
    mine, odd = _share(rank, world), rank == world - 1
    p = pred[mine].requires_grad_()
    own = [x[mine] for x in scores]
    r = tve_grpo_loss(p, target[mine], weights, *own, group=group)
    s = -r.energies.requires_grad_()
    s.retain_grad()
    b = branch_policy_loss(s, *own, group=group)
    if odd:  # no other takes part: a backward that communicates would wait for them
        (2 * r.loss).backward()
        b.loss.backward()
        dist.barrier()
    else:
        dist.barrier()
        (2 * r.loss).backward()
        b.loss.backward()

    messages = []
    wrong: list[dict[str, Any]] = [  # what only one rank sees
        {"nonfinite": "ignore" if odd else "raise"},
        {"objective": "mechanism_1" if odd else ContrastiveObjective()},
        {"backend": "cudnn" if odd else None},
        {"safe": "False" if odd else True},
    ]
    differ: list[dict[str, Any]] = [
        {"objective": ContrastiveObjective(kl_coef=1.0 + odd)},
        {"safe": not odd},
        {"ref_scores": own[2] if odd else None},
        {"nonfinite": "drop" if odd else "raise"},
        {"dtype": torch.float64 if odd else torch.float32},
        {"scores": torch.zeros(0) if odd else None},
        {"scores": torch.full((SHARES[world][rank],), float("nan")) if odd else None},
        {"device": "meta" if odd else "cpu"},
        *wrong,
    ]
    for case in differ:
        dtype = case.pop("dtype", torch.float32)
        x = case.pop("scores", None)
        to = (case.pop("device", "cpu"), dtype)
        x = r.energies.detach() if x is None else x
        try:
            branch_policy_loss(x.to(*to), own[0].to(*to), own[1].to(*to), group=group, **case)
            messages.append("no error")
        except KvpoError as e:
            messages.append(str(e))
    bad = target[mine][..., :1] if odd else target[mine]
    for case in ({"target": bad}, *wrong):  # before the energies, which are this rank's own
        at = case.pop("target", target[mine])
        try:
            tve_grpo_loss(p.detach(), at, weights, *own, group=group, **case)
            messages.append("no error")
        except KvpoError as e:
            messages.append(str(e))
    if rank:
        alone = dist.new_group([0])
        with pytest.raises(KvpoError, match="this process is not a rank of `group`"):
            branch_policy_loss(*own, group=alone)
    else:
        dist.new_group([0])
    torch.save(
        {
            "loss": r.loss.detach(),
            "grad": p.grad,
            "numbers": r.numbers,
            "score_grad": r.score_grad,
            "s_grad": s.grad,
            "messages": messages,
        },
        f"{out}/{rank}.pt",
    )
    dist.destroy_process_group()


@pytest.mark.parametrize("world", SHARES)
def test_branches_over_ranks(world: int, tmp_path: Path) -> None:
    args = (world, str(tmp_path / "store"), str(tmp_path))
    mp.spawn(_on_rank, args=args, nprocs=world, join=True)
    ranks = [torch.load(tmp_path / f"{i}.pt") for i in range(world)]
    pred, target, weights, *scores = _problem(world)
    pred.requires_grad_()
    whole = tve_grpo_loss(pred, target, weights, *scores)
    (2 * whole.loss).backward()
    for i, r in enumerate(ranks):
        mine = _share(i, world)
        assert torch.equal(r["loss"], whole.loss.detach())
        assert torch.equal(r["grad"], pred.grad[mine])
        assert torch.equal(r["score_grad"], whole.score_grad[mine])
        assert torch.equal(r["s_grad"], whole.score_grad[mine])
        assert torch.equal(r["numbers"][:7], whole.numbers[:7])

    odd = world - 1
    last = list(range(len(whole.ratio)))[_share(odd, world)]
    same = [  # the same message on every rank
        "differ in kl_coef",
        "differ in scale",
        "differ in presence of ref_scores",
        "differ in nonfinite",
        "differ in dtype",
        None,
        f"scores must be finite, got {[float('nan')] * len(last)} for branches {last}",
        *[None] * 10,
    ]
    # What the odd rank says itself.
    own = {5: "scores must be [G]", 7: "scores are on meta", 12: "target must be"}
    for first in (8, 13):
        own[first] = "nonfinite must be 'raise' or 'drop', got 'ignore'"
        own[first + 1] = "objective must be a ContrastiveObjective, got str"
        own[first + 2] = "unknown; the table has"
        own[first + 3] = "safe must be a bool, got 'False'"
    assert all(len(r["messages"]) == len(same) for r in ranks)
    for i, text in enumerate(same):
        messages = [r["messages"][i] for r in ranks]
        if text is not None:
            assert set(messages) == {messages[0]} and text in messages[0], messages
        else:
            assert own[i] in messages[odd]
            assert all(f"ranks [{odd}]" in m for m in messages[:odd]), messages


def _one_is_killed(rank: int, world: int, store: str, out: str) -> None:
    from kvpo_kernels.ops import branch_policy_loss as module

    group = _join(rank, world, store, 20)
    scores = torch.zeros(SHARES[world][rank])
    branch_policy_loss(scores, scores, scores, group=group)  # all are there
    if rank == 1:
        gather = module.all_gather_header

        def then_die(*args: Any) -> Any:
            gather(*args)  # between the two collectives of a loss
            os.kill(os.getpid(), signal.SIGKILL)

        module.all_gather_header = then_die
    try:
        branch_policy_loss(scores, scores, scores, group=group)
        outcome = "no error"
    except Exception as e:
        outcome = f"{type(e).__name__}: {e}"
    Path(out, f"{rank}.txt").write_text(outcome)
    os._exit(0)  # the group cannot be taken down in order any more


def test_a_killed_rank_ends_the_others(tmp_path: Path) -> None:
    world = 3
    args = (world, str(tmp_path / "store"), str(tmp_path))
    spawn = mp.get_context("spawn")
    children = [spawn.Process(target=_one_is_killed, args=(r, *args)) for r in range(world)]
    try:
        for child in children:
            child.start()
        # The group's timeout of 20 s, and the start of three interpreters on a busy machine.
        end = time.monotonic() + 120
        for child in children:
            child.join(max(0.0, end - time.monotonic()))
        assert [c.exitcode for c in children] == [0, -signal.SIGKILL, 0]
    finally:
        for child in children:
            child.kill()
            child.join()
    assert not (tmp_path / "1.txt").exists()
    for rank in (0, 2):
        outcome = (tmp_path / f"{rank}.txt").read_text()
        assert "Error" in outcome, outcome
