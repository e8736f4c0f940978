"""The iteration as today's trainers run it and ours are the same computation."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import iteration
import layer
import pooled_trainer
import tape
import todays_trainer
import trainers

from kvpo_kernels.cost.sizes import GeneratorSize

SMALL = GeneratorSize(2, 48, 3, 96, (2, 2), 1, 4)


def problem(micro_batch: int, checkpoint_layers: bool) -> trainers.Problem:
    sizes = (SMALL, 3, micro_batch, checkpoint_layers)
    return trainers.make_problem(*sizes, device="cpu", dtype=torch.float32)


@pytest.mark.parametrize(("micro_batch", "checkpoint_layers"), [(3, False), (2, True)])
def test_scores_and_gradients_agree(micro_batch: int, checkpoint_layers: bool) -> None:
    p = problem(micro_batch, checkpoint_layers)
    ours, today = (iteration.first_window(p, iteration.WAYS[way]) for way in ("ours", "today"))
    found = iteration.differences(ours, today)
    # float32 through two layers, three replays and a softmax; the benchmark allows 1e-3.
    assert max(found.values()) < 1e-4


def test_a_wrong_answer_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(todays_trainer, "window", lambda p, cache, end: cache[:, : p.tokens(3)])
    with pytest.raises(AssertionError):
        iteration.agree("cpu")


def test_ours_copies_waits_and_moves_less() -> None:
    p = problem(3, False)
    today, ours = (iteration.counts(p, way) for way in iteration.WAYS.values())
    assert ours["host_bytes"] == 0 < today["host_bytes"]
    assert ours["copied_bytes"] < today["copied_bytes"] / 50
    # Waits of ours: the gradient's norm and what is per rollout; of today's: two per layer.
    assert ours["syncs"] * 20 < today["syncs"]


def test_replayed_denoise_steps_are_the_launched_ones() -> None:
    p, found = problem(3, False), []
    for capture in (None, tape.capture):
        trainer = pooled_trainer.Pooled(p, capture)
        for synced in (True, False):  # the weights have moved: the second reads them in place
            trainer.iteration(iteration.Stopwatch(p.device), synced)
        found.append((trainer.scores, [w.grad for w in trainer.policy.parameters()]))
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_one_layer_of_both_agrees() -> None:
    records = layer.measure(layer.Layer(problem(3, False)), rounds=1)
    assert [r["case"] for r in records] == ["E1", "E2"]
