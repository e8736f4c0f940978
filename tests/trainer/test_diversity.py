"""The comparison of routed branches with branches of other noise."""

import json
import math
from pathlib import Path

import pytest
import torch
from kvpo_trainer import diversity
from kvpo_trainer.cli import main
from kvpo_trainer.config import RunConfig
from kvpo_trainer.data import all_prompts
from kvpo_trainer.generator import Generator
from kvpo_trainer.rewards import RewardConfig, RewardModel
from kvpo_trainer.rollout import roll_out

from kvpo_kernels import HistoryRouting

ROUTING, PROMPTS = HistoryRouting(num_branches=3), all_prompts()[::40]
assert len(PROMPTS) == 4


def test_other_noise_goes_on_from_the_same_prefix_in_the_normal_context(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    noises = []
    draw = diversity.draw_noise
    rng = torch.Generator().manual_seed(1)
    rollout = roll_out(generator, PROMPTS, ROUTING, seed=0, seed_context=1, rng=rng)
    before = rollout.pool.stats()

    def same_for_two(*args: object) -> torch.Tensor:
        noises.append(draw(*args))
        noises[-1][1] = noises[-1][0]  # two branches of the first prompt
        return noises[-1]

    monkeypatch.setattr(diversity, "draw_noise", same_for_two)
    videos = diversity.other_noise(generator, rollout, rng)
    assert videos.shape == rollout.chunk[:, :-1].shape
    old, new = videos.split((videos.shape[2] - rollout.new_frames, rollout.new_frames), dim=2)
    assert torch.equal(old, rollout.chunk[:, :-1, : old.shape[2]])
    assert torch.equal(new[0, 0], new[0, 1])
    assert not torch.equal(new[0, 0], new[0, 2]) and not torch.equal(new[1, 0], new[1, 1])
    assert rollout.pool.stats() == before  # nothing is kept

    # The normal context: with the anchor's own noise, the anchor's own frames.
    unrouted = HistoryRouting(num_branches=3, nearest_frames=9)
    recorded = []
    advance = diversity.advance_block

    def again(policy, text, pool, timelines, first, noise):
        recorded.append(first)
        return advance(policy, text, pool, timelines, first, noise)

    monkeypatch.setattr(diversity, "advance_block", again)
    kept = []
    from kvpo_trainer import rollout as module

    monkeypatch.setattr(module, "draw_noise", lambda *a: kept.append(draw(*a)) or kept[-1])
    rng = torch.Generator().manual_seed(2)
    plain = roll_out(generator, PROMPTS, unrouted, seed=0, seed_context=1, rng=rng)
    first = plain.start_frame // 3
    own = kept[0][:, first : first + plain.noisy.shape[1]].repeat_interleave(3, 0)
    monkeypatch.setattr(diversity, "draw_noise", lambda *a: own)
    same = diversity.other_noise(generator, plain, rng)
    # In batches of 12 and 16 rows: rounding.
    torch.testing.assert_close(same, plain.chunk[:, :-1], rtol=1e-4, atol=1e-4)
    assert recorded == list(range(plain.start_frame, plain.start_frame + 3 * len(recorded), 3))


def test_measures_are_deviations_over_branches(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    model, weights = RewardModel(), RewardConfig(0.7, 0.4, 1.1)
    rollouts = []
    roll = diversity.roll_out
    monkeypatch.setattr(
        diversity, "roll_out", lambda *a, **k: rollouts.append(roll(*a, **k)) or rollouts[-1]
    )
    found = diversity.measure(generator, model, weights, ROUTING, PROMPTS, 2, 3, seed=5)
    assert [r.prompts for r in rollouts] == [PROMPTS[:2], PROMPTS[2:], PROMPTS[:2]]
    assert len({float(r.noisy.sum()) for r in rollouts}) == 3
    for part in (found.routed, found.noise):
        assert all(len(part[m]) == 6 for m in diversity.MEASURES)
    assert found.routed["pixels"] != found.noise["pixels"]
    r = rollouts[1]
    rows = [p for p in r.prompts for _ in range(4)]
    scores = model(r.chunk.flatten(0, 1), rows, r.chunk_first_frame, generator.data)
    total = (0.7 * scores.vq + 0.4 * scores.mq + 1.1 * scores.ta).view(2, 4)
    for at in range(2):
        assert found.routed["reward"][2 + at] == pytest.approx(float(total[at, :3].std()), rel=1e-4)
        gap = float(total[at, 3] - total[at, :3].mean())
        assert found.cost["reward"][2 + at] == pytest.approx(gap, rel=1e-3, abs=1e-6)
        new = r.chunk[at, :3, -r.new_frames :].std(0).mean()
        assert found.routed["pixels"][2 + at] == pytest.approx(float(new), rel=1e-5)

    summary = diversity.summarise(found, RunConfig(), "w")
    values = torch.tensor(found.noise["mq"])
    mean = summary["noise"]["mq"]
    assert summary["groups"] == 6 and mean["mean"] == pytest.approx(float(values.mean()))
    assert mean["error"] == pytest.approx(float(values.std()) / math.sqrt(6))


def test_the_command(tiny_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    record = tmp_path / "new" / "diversity.json"
    arguments = ["diversity", "--weights", str(tiny_weights), "--rollouts", "1"]
    arguments += ["--set", "kvpo.routing.num_branches=2", "--set", "kvpo.prompts_per_step=2"]
    assert main([*arguments, "--config", "first_block", "--record", str(record)]) == 0
    shown, written = capsys.readouterr().out, json.loads(record.read_text())
    assert "2 groups of 2 branches" in shown and "perturbed_blocks 1" in shown
    assert written["config"]["kvpo"]["routing"]["nearest_frames"] == 3
    assert f"{written['cost']['vq']['mean']:.4f}" in shown
    for odd in (["--rollouts", "0"], ["--set", "kvpo.routing.variant=memflow"]):
        assert main([*arguments, *odd]) == 2
