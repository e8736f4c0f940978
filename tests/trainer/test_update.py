import copy
import fnmatch
import functools
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from kvpo_trainer.data import all_prompts, tokenize
from kvpo_trainer.generator import Generator, History
from kvpo_trainer.rewards import RewardModel
from kvpo_trainer.rollout import Rollout, accumulate_gradient, replay, roll_out
from kvpo_trainer.sampling import SIGMAS
from kvpo_trainer.update import KvpoConfig, Trainer
from torch.utils.checkpoint import checkpoint

from kvpo_kernels import ContrastiveObjective, HistoryRouting, branch_policy_loss

CONFIG = KvpoConfig(prompts_per_step=2, learning_rate=1e-3, routing=HistoryRouting(num_branches=3))
PROMPTS = all_prompts()[::9]


@pytest.fixture
def reward_model() -> RewardModel:
    torch.manual_seed(1)
    return RewardModel()


def trainer_of(
    generator: Generator, reward_model: RewardModel, config: KvpoConfig = CONFIG, seed: int = 0
) -> Trainer:
    return Trainer(copy.deepcopy(generator), reward_model, PROMPTS, config, seed)


@pytest.mark.parametrize("history", ["float32", "int8", "float8"])
def test_the_ratio_is_one_right_after_a_sync_and_not_later(
    generator: Generator, reward_model: RewardModel, history: History
) -> None:
    generator.history = history
    trainer = trainer_of(generator, reward_model)
    deviations = [trainer.step().metrics["ratio_deviation"] for _ in range(4)]
    assert deviations[0] == deviations[2] == 0.0
    assert deviations[1] > 0 and deviations[3] > 0
    pages = {"float32": torch.float32, "int8": torch.int8, "float8": torch.float8_e4m3fn}
    assert trainer.old.new_pool(1).k(0).dtype is pages[history]


@pytest.mark.parametrize("protect", ["mechanism_1", "mechanism_2"])
def test_only_the_first_mechanism_skips_a_step_without_a_safe_prompt(
    generator: Generator,
    reward_model: RewardModel,
    protect: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = replace(CONFIG, objective=ContrastiveObjective(protect=protect))
    trainer = trainer_of(generator, reward_model, config)
    trainer.step()  # from here on momentum moves the weights even without a gradient
    advantages_of = trainer._advantages
    unsafe = lambda *a: (advantages_of(*a)[0], [False, False])
    monkeypatch.setattr(trainer, "_advantages", unsafe)
    before, skipped = copy.deepcopy(trainer.policy.state_dict()), trainer.skipped_updates
    trainer.step()
    still = all(torch.equal(before[k], v) for k, v in trainer.policy.state_dict().items())
    assert still == (protect == "mechanism_1")
    assert trainer.skipped_updates - skipped == (protect == "mechanism_1")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"variant": "memflow", "nearest_frames": 3}, "routing.variant must be longlive"),
        ({"block_frames": 2}, "routing.block_frames must be 3"),
        ({"sink_frames": 6}, "routing.sink_frames must be 3"),
        ({"window_frames": 18}, "routing.window_frames must be 12"),
        ({"nearest_frames": 9}, "routing.nearest_frames must be below 9, or nothing is routed"),
        ({"first_chunks": 0}, "no eligible start"),
        ({"num_branches": 40}, "num_branches = 40, but no more than 14 branches are different"),
        ({"nearest_frames": 8, "selection": "independent", "num_branches": 18}, "more than 10"),
        ({"nearest_frames": 8, "selection": "balanced", "num_branches": 18}, "more than 10"),
        ({"nearest_frames": 0, "cache_frames": 24}, "no more than 1 branches"),
    ],
)
def test_routings_that_the_generator_does_not_have(
    generator: Generator, reward_model: RewardModel, changes: dict[str, object], match: str
) -> None:
    config = replace(CONFIG, routing=replace(CONFIG.routing, **changes))
    with pytest.raises(ValueError, match=match):
        trainer_of(generator, reward_model, config)


def one_graph_scores(policy: Generator, rollout: Rollout, steps: int) -> torch.Tensor:
    """The scores as one differentiable expression, in the contexts of a replay."""
    contexts = replay(policy, rollout, 1.0).tables
    G = rollout.noisy.shape[0] // len(rollout.prompts)
    text = policy.encode_text(tokenize(rollout.prompts)).repeat_interleave(G, dim=0)
    score = torch.zeros(rollout.noisy.shape[0])
    for k, table in enumerate(contexts):
        first = rollout.start_frame + 3 * k
        for s, sigma in enumerate(SIGMAS):
            x = rollout.noisy[:, k, s]
            with torch.set_grad_enabled(s < steps):
                x0 = x - sigma * policy.stream(x, sigma, text, first, rollout.pool, table)
                residual = (x0 - rollout.x0[:, k, s]).square().mean((-2, -1))
            score = score - 0.5 * residual
    return score


@pytest.mark.parametrize("checkpointed", [False, True], ids=("stored", "checkpointed"))
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_two_passes_give_the_gradient_of_one_graph(
    generator: Generator, rows: int, checkpointed: bool
) -> None:
    """For any micro-batch of branches; the context passes come between the block-steps."""
    rollout = roll_out(
        generator,
        PROMPTS[:1],
        CONFIG.routing,
        seed=0,
        seed_context=0,
        rng=torch.Generator().manual_seed(1),
    )
    policy = copy.deepcopy(generator)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(torch.randn(p.shape) * 0.02)  # away from the old policy: the ratio is not 1
    advantages = torch.tensor([1.5, -0.5, -2.0])
    with torch.no_grad():
        old = one_graph_scores(generator, rollout, 0)

    scores = one_graph_scores(policy, rollout, 2)
    branch_policy_loss(scores, old, advantages).loss.backward()
    expected = [p.grad.clone() for p in policy.parameters() if p.grad is not None]
    policy.zero_grad()

    if checkpointed:
        stream = functools.partial(checkpoint, policy.stream, use_reentrant=False)
        policy.stream = stream  # type: ignore[method-assign]
    micro = [slice(i, i + rows) for i in range(0, 3, rows)]
    parts = [
        replace(
            rollout,
            noisy=rollout.noisy[m],
            x0=rollout.x0[m],
            context_noise=rollout.context_noise[m],
        )
        for m in micro
    ]
    passes = [replay(policy, part, 1.0) for part in parts]
    energies = torch.cat([p.energies.energies for p in passes])
    torch.testing.assert_close(-energies, scores.detach(), rtol=1e-6, atol=0)
    score_grad = branch_policy_loss(-energies, old, advantages).score_grad
    for m, part, first in zip(micro, parts, passes, strict=True):
        accumulate_gradient(policy, part, first, score_grad[m], gradient_steps=2, sigma_floor=1.0)
    got = [p.grad for p in policy.parameters() if p.grad is not None]
    assert len(got) == len(expected) > 20
    scale = max(float(e.abs().max()) for e in expected)
    for g, e in zip(got, expected, strict=True):
        # Float32: the sums over block-steps run in another order.
        torch.testing.assert_close(g, e, rtol=1e-5, atol=1e-5 * scale)


def test_training_goes_on_bit_for_bit_from_a_state(
    generator: Generator, reward_model: RewardModel
) -> None:
    straight = trainer_of(generator, reward_model)
    straight.step()  # in the middle of a window: old and policy differ
    tensors = {name: value.clone() for name, value in straight.tensors().items()}
    counters = straight.counters()
    torch.manual_seed(99)
    other = copy.deepcopy(generator)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    resumed = trainer_of(other, reward_model)
    resumed.restore(tensors, counters)
    after = [t.step().metrics for t in (straight, resumed)]
    assert {k: v for k, v in after[0].items() if "seconds" not in k} == {
        k: v for k, v in after[1].items() if "seconds" not in k
    }
    for name, value in straight.tensors().items():
        assert torch.equal(value, resumed.tensors()[name]), name


def test_a_state_that_does_not_fit_is_refused(
    generator: Generator, reward_model: RewardModel
) -> None:
    trainer = trainer_of(generator, reward_model)
    tensors, counters = trainer.tensors(), trainer.counters()
    with pytest.raises(ValueError, match="seed 1, not 0"):
        trainer.restore(tensors, counters | {"seed": 1})
    with pytest.raises(ValueError, match="policy/position"):
        trainer.restore({k: v for k, v in tensors.items() if k != "policy/position"}, counters)


def test_sign_and_shuffle_touch_the_advantages_only(
    generator: Generator, reward_model: RewardModel
) -> None:
    plain = trainer_of(generator, reward_model).step()
    negated = trainer_of(generator, reward_model, replace(CONFIG, reward_sign=-1)).step()
    mixed = trainer_of(generator, reward_model, replace(CONFIG, shuffle_advantages=True)).step()
    assert torch.equal(plain.rewards, negated.rewards) and torch.equal(plain.rewards, mixed.rewards)
    torch.testing.assert_close(negated.advantages, -plain.advantages)
    assert torch.equal(mixed.advantages.sort(1).values, plain.advantages.sort(1).values)


def test_branches_above_their_anchor_have_positive_advantages(
    generator: Generator, reward_model: RewardModel
) -> None:
    result = trainer_of(generator, reward_model).step()
    weights = torch.tensor(CONFIG.rewards.weights)
    totals = torch.einsum("c,cna->na", weights, result.rewards)
    assert result.advantages.shape == (2, 3)
    assert result.metrics["reward_branches"] == pytest.approx(float(totals[:, :-1].mean()))
    assert result.metrics["reward_anchor"] == pytest.approx(float(totals[:, -1].mean()))
    one_head = replace(CONFIG, rewards=replace(CONFIG.rewards, vq=1.0, mq=0.0, ta=0.0))
    result = trainer_of(generator, reward_model, one_head).step()
    above = result.rewards[0, :, :-1] > result.rewards[0, :, -1:]
    assert torch.equal(result.advantages > 0, above)


def test_only_the_policy_and_its_average_move(
    generator: Generator, reward_model: RewardModel
) -> None:
    trainer = trainer_of(generator, reward_model)
    trainer.step()
    start = dict(generator.named_parameters())
    moved = {
        owner: any(
            not torch.equal(p, start[name])
            for name, p in getattr(trainer, owner).named_parameters()
        )
        for owner in ("policy", "ema", "old", "initial")
    }
    assert moved == {"policy": True, "ema": True, "old": False, "initial": False}
    trainer.step()
    for a, b in zip(trainer.old.parameters(), trainer.policy.parameters(), strict=True):
        assert torch.equal(a, b)  # the second step ends the window


def test_the_page_names_metrics_that_there_are(
    generator: Generator, reward_model: RewardModel
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "trainer.md").read_text()
    section = page.split("## Metrics")[1]
    metrics = trainer_of(generator, reward_model).step().metrics
    names = re.findall(r"`([^`]+)`", section)
    assert len(names) == 10
    for name in names:
        assert any(fnmatch.fnmatch(metric, name) for metric in metrics), name
    for spread in ("reward_spread", "pixel_spread", "score_spread"):
        assert metrics[spread] > 0


def test_groups_with_nothing_to_tell_apart_are_counted(
    generator: Generator, reward_model: RewardModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(generator, reward_model)
    rewards_of = trainer._rewards

    def first_flat(*args: object) -> torch.Tensor:
        rewards = rewards_of(*args)
        rewards[:, 0] = 0.5
        return rewards

    monkeypatch.setattr(trainer, "_rewards", first_flat)
    result = trainer.step()
    assert result.metrics["zero_std_groups"] == result.metrics["equal_advantage_groups"] == 1
    assert not result.advantages[0].any() and result.advantages[1].any()

    trainer = trainer_of(generator, reward_model)
    monkeypatch.setattr(trainer, "_rewards", lambda *a: torch.full_like(rewards_of(*a), 0.5))
    result = trainer.step()
    assert result.metrics["zero_std_groups"] == 2 and result.metrics["clamped_share"] == 0
    # But for the 1e-10 in the logarithm of the KL, times its coefficient of 10.
    assert abs(result.metrics["loss"]) < 1e-8 and result.metrics["grad_norm"] < 1e-8

    tight = trainer_of(generator, reward_model, replace(CONFIG, advantage_clamp=1e-3)).step()
    size = tight.advantages.abs()
    assert tight.metrics["clamped_share"] == pytest.approx(float((size >= 1e-3).float().mean()))
    assert tight.metrics["clamped_share"] > 0
