"""The reward heads and the judge order obvious cases right, on the shipped models."""

import math
from dataclasses import replace

import pytest
import torch
from kvpo_trainer.data import DataConfig, Prompt, digit_bank, make_clips, split_prompts
from kvpo_trainer.rewards import (
    DIGIT_INK,
    HEADS,
    best_shift,
    phase_velocity,
    target_velocities,
    train_reward_models,
)
from kvpo_trainer.weights import Weights, load_weights
from torch import Tensor

N = 24


@pytest.fixture(scope="module")
def weights() -> Weights:
    return load_weights()


@pytest.fixture(scope="module")
def real(weights: Weights) -> tuple[list[Prompt], Tensor]:
    prompts = split_prompts()[1][:N]
    rng = torch.Generator().manual_seed(0)
    return prompts, make_clips(prompts, weights.config.data, rng).videos


def scores(weights: Weights, videos: Tensor, prompts: list[Prompt]) -> dict[str, float]:
    data = weights.config.data
    rewards = weights.reward_model(videos, prompts, 0, data).stack()
    assert rewards.shape == (len(HEADS), videos.shape[0])
    assert (rewards >= 0).all() and (rewards <= 1).all()
    judged = weights.judge(videos, prompts, 0, data)
    return {h: float(r.mean()) for h, r in zip(HEADS, rewards, strict=True)} | {
        k: float(v.mean()) for k, v in judged.items()
    }


def test_real_videos_score_high(weights: Weights, real: tuple[list[Prompt], Tensor]) -> None:
    got = scores(weights, real[1], real[0])
    # Speeds hold in 65 % of the segments only, hence TA and the judge's motion below 1.
    assert got["vq"] > 0.8 and got["mq"] > 0.9 and got["ta"] > 0.6
    assert got["judge_digit"] > 0.7 and got["judge_motion"] > 0.5


def test_vq_falls_with_blur_and_noise(weights: Weights, real: tuple[list[Prompt], Tensor]) -> None:
    prompts, videos = real
    blurred = torch.nn.functional.avg_pool2d(videos, 5, 1, 2, count_include_pad=False)
    noise = torch.rand(videos.shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
    best = scores(weights, videos, prompts)["vq"]
    for worse in (blurred, noise, -torch.ones_like(videos)):
        assert scores(weights, worse, prompts)["vq"] < best - 0.3


@pytest.mark.parametrize("level", [-1.0, 0.0, 1.0])
def test_one_grey_earns_nothing(
    weights: Weights, real: tuple[list[Prompt], Tensor], level: float
) -> None:
    got = scores(weights, torch.full_like(real[1], level), real[0])
    assert got["vq"] < 0.1 and got["mq"] < 0.01 and got["ta"] < 0.1


def test_mq_asks_for_a_motion(weights: Weights, real: tuple[list[Prompt], Tensor]) -> None:
    """A frozen clip has no jerk, and a clip that goes blank has none from there on."""
    prompts, videos = real
    best, half = scores(weights, videos, prompts), videos.shape[1] // 2
    frozen = scores(weights, videos[:, :1].expand_as(videos), prompts)
    assert frozen["mq"] < 0.01 and frozen["vq"] > 0.7
    stops = torch.cat([videos[:, :half], videos[:, half:][:, :1].expand(-1, half + 1, -1, -1)], 1)
    fades = torch.cat([videos[:, :half], -torch.ones_like(videos[:, half:])], 1)
    for clip in (stops, fades):
        # Half of the steps, to the few of the turn.
        assert scores(weights, clip, prompts)["mq"] == pytest.approx(best["mq"] / 2, abs=0.05)


def test_a_fainter_digit_is_still_one_until_it_is_none(
    weights: Weights, real: tuple[list[Prompt], Tensor]
) -> None:
    prompts, videos = real
    faint = {f: scores(weights, (videos + 1) * f - 1, prompts) for f in (1.0, 0.7, 0.5, 0.25)}
    assert faint[0.7]["vq"] > faint[1.0]["vq"] - 0.15 and faint[0.7]["mq"] > 0.9
    for head in ("vq", "mq", "ta"):
        by_ink = [f[head] for f in faint.values()]
        assert by_ink == sorted(by_ink, reverse=True)
        assert by_ink[-1] < by_ink[0] - 0.3


def test_mq_falls_with_jumps(weights: Weights, real: tuple[list[Prompt], Tensor]) -> None:
    prompts, videos = real
    order = torch.randperm(videos.shape[1], generator=torch.Generator().manual_seed(1))
    got, best = scores(weights, videos[:, order], prompts), scores(weights, videos, prompts)
    assert got["mq"] < best["mq"] - 0.5
    assert abs(got["vq"] - best["vq"]) < 1e-5  # it looks at frames one by one


@pytest.mark.parametrize(
    "wrong",
    [
        lambda p: Prompt((p.digit + 1) % 10, p.direction, p.speed, p.turn),
        lambda p: Prompt(p.digit, p.turn, p.speed, p.direction),
    ],
)
def test_ta_falls_with_another_prompt(
    weights: Weights, real: tuple[list[Prompt], Tensor], wrong
) -> None:
    prompts, videos = real
    best = scores(weights, videos, prompts)
    got = scores(weights, videos, [wrong(p) for p in prompts])
    assert got["ta"] < best["ta"] - 0.2
    assert abs(got["vq"] - best["vq"]) < 1e-6 and abs(got["mq"] - best["mq"]) < 1e-6


def test_motion_measures_agree_on_whole_pixels(real: tuple[list[Prompt], Tensor]) -> None:
    _, videos = real
    shift = best_shift(videos).float()
    velocity, amplitude = phase_velocity(videos)
    assert (velocity - shift).abs().max() < 0.05
    # The definition: the first coefficient of the sums over rows, and over columns.
    ink = (videos + 1) / 2
    for axis, other in ((0, -1), (1, -2)):
        first = torch.fft.fft(ink.sum(other), dim=-1)[..., 1].abs()
        torch.testing.assert_close(amplitude[..., axis], first)
    assert amplitude.min() > DIGIT_INK  # real digits are all there
    assert set(shift.abs().sum(-1).unique().tolist()) == {1.0, 2.0}


def test_targets_know_the_turn() -> None:
    data = DataConfig(turn_blocks=(2, 3))
    prompt = Prompt(3, "left", "quickly", "up")
    both = target_velocities([prompt], 0, 15, data)[0]
    assert both.shape == (2, 14, 2)
    # Steps into frames 1..5 are before any turn, those into frames 9.. after every turn.
    assert (both[:, :5] == torch.tensor([0, -2])).all()
    assert (both[:, 8:] == torch.tensor([-2, 0])).all()
    assert (both[0, 5:8] == torch.tensor([0, -2])).all()
    assert (both[1, 5:8] == torch.tensor([-2, 0])).all()
    later = target_velocities([prompt], 9, 4, data)[0]
    assert (later == torch.tensor([-2, 0])).all()


def test_judge_and_rewards_learn_from_different_writers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each model's pictures, as its training draws them: no picture in common, none the
    generator's."""
    from kvpo_trainer import rewards

    data, seen = DataConfig(), []
    draw = rewards._digit_batch
    monkeypatch.setattr(
        rewards, "_digit_batch", lambda bank, *rest: seen.append(bank) or draw(bank, *rest)
    )
    train_reward_models(data, steps=1)
    assert len(seen) == 2
    ids = [{id(image) for images in bank for image in images} for bank in seen]
    generators = {id(i) for images in digit_bank() for i in images[: data.exemplars]}
    assert not ids[0] & ids[1] and not ids[0] & generators and not ids[1] & generators
    assert min(map(len, ids)) > 700


def test_training_of_the_models_is_reproducible() -> None:
    one, two = (train_reward_models(DataConfig(canvas=8), seed=3, steps=3) for _ in range(2))
    other = train_reward_models(DataConfig(canvas=8), seed=4, steps=3)
    for a, b, c in zip(one, two, other, strict=True):
        for x, y, z in zip(a.parameters(), b.parameters(), c.parameters(), strict=True):
            assert torch.equal(x, y) and not torch.equal(x, z)


def moved(blob: Tensor, steps: list[list[int]]) -> Tensor:
    """A video `[1, T, H, W]` of a frame that is shifted by each step, (rows, columns)."""
    frames = [blob]
    for step in steps:
        frames.append(frames[-1].roll(step, (0, 1)))
    return torch.stack(frames)[None]


def test_mq_and_ta_are_their_formulas(weights: Weights, real: tuple[list[Prompt], Tensor]) -> None:
    prompt, blob = real[0][0], real[1][0, 0]
    data = replace(weights.config.data, turn_blocks=(2, 4))
    # One change of speed by a pixel among three.
    got = weights.reward_model(moved(blob, [[0, 1], [0, 1], [0, 2], [0, 2]]), [prompt], 0, data)
    assert float(got.mq) == pytest.approx((2 + math.exp(-0.5)) / 3, abs=1e-3)

    targets = target_velocities([prompt], 0, 21, data)[0]
    before, after = targets[0, 0], targets[0, -1]
    assert not torch.equal(before, after)
    assert torch.equal(before, targets[1, 0]) and torch.equal(after, targets[1, -1])
    for turn, hit in ((8, 1.0), (10, 1.0), (2, None), (18, None)):  # it may come from 6 to 12
        steps = [(before if f < turn else after).tolist() for f in range(20)]
        video = moved(blob, steps)
        ta = float(weights.reward_model(video, [prompt], 0, data).ta)
        p = weights.reward_model.classifier(video[0]).softmax(-1)[:, prompt.digit]
        motion = 2 * ta - float(p.detach().mean())
        assert motion == pytest.approx(1, abs=1e-3) if hit else motion < 0.9, turn
