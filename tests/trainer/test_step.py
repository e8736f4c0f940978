"""`Trainer.step` against the method written out once more: plain torch, one graph, no shortcuts."""

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from kvpo_trainer import update
from kvpo_trainer.data import DataConfig, all_prompts, tokenize
from kvpo_trainer.generator import Generator
from kvpo_trainer.rewards import RewardConfig, RewardModel
from kvpo_trainer.rollout import Rollout
from kvpo_trainer.update import KvpoConfig, StepResult, Trainer
from torch import Tensor

from kvpo_kernels import ContrastiveObjective, HistoryRouting
from kvpo_kernels.errors import ShapeError

SIGMAS, CONTEXT = (1.0, 0.9375, 5 / 6, 0.625), 0.00498
BASE = KvpoConfig(
    prompts_per_step=2,
    learning_rate=1e-3,
    routing=HistoryRouting(num_branches=3),
    rewards=RewardConfig(0.7, 0.4, 1.1),
)
CONFIGS = {  # no key that matters has its default in all of them
    "local": replace(
        BASE, weight_decay=0.1, ema=0.9, max_grad_norm=1e-3, warmup_steps=3, advantage_clamp=1.1
    ),
    "global": replace(
        BASE,
        local_weight=0.8,
        global_weight=0.5,
        sigma_floor=0.7,
        gradient_steps=3,
        reward_sign=-1,
        fusion="zscore",
        kl_reference="old",
        objective=ContrastiveObjective(clip_range_low=1e-5, clip_range_high=2e-5, kl_coef=3.0),
    ),
    "mechanism_1": replace(
        BASE,
        rollouts_per_sync=3,
        gradient_steps=1,
        objective=ContrastiveObjective(protect="mechanism_1"),
    ),
}


def scores_of(policy: Generator, rollout: Rollout, floor: float, gradient_steps: int) -> Tensor:
    """`[n, G]`, minus the energies of a replay whose history is its own predictions."""
    n = len(rollout.prompts)
    G, K = rollout.noisy.shape[0] // n, rollout.noisy.shape[1]
    timelines = [t for prefix in rollout.prefixes for t in prefix.fork(G)]
    text = lambda: policy.encode_text(tokenize(rollout.prompts)).repeat_interleave(G, 0)
    total: Any = 0.0
    for k in range(K):
        first = rollout.plans[0].start_frame + 3 * k
        table = rollout.pool.routes([t.window(3, 6) for t in timelines])
        for step, sigma in enumerate(SIGMAS):
            with torch.set_grad_enabled(step < gradient_steps):
                x = rollout.noisy[:, k, step]
                x0 = x - sigma * policy.stream(x, sigma, text(), first, rollout.pool, table)
                squares = (x0 - rollout.x0[:, k, step]).double().square().flatten(1).mean(1)
            total = total - squares / (2 * max(sigma, floor) ** 2)
        if k + 1 < K:
            with torch.no_grad():
                for timeline in timelines:
                    timeline.append(3)
                slots = rollout.pool.prepare_write(timelines, first, 3)
                x = (1 - CONTEXT) * x0 + CONTEXT * rollout.context_noise[:, k]
                policy.stream(x, 0.0, text(), first, rollout.pool, table, write_slots=slots)
    for timeline in timelines:
        timeline.release()
    return total.view(n, G)


def advantages_of(
    config: KvpoConfig, reward_model: RewardModel, result: StepResult, data: DataConfig
) -> tuple[Tensor, list[bool]]:
    """By the formulas, from the videos."""
    rollout = result.rollout
    judged = [(rollout.chunk, rollout.chunk_first_frame, config.local_weight)]
    if config.global_weight:
        assert rollout.videos is not None
        judged.append((rollout.videos, 0, config.global_weight))
    weights = torch.tensor([0.7, 0.4, 1.1], dtype=torch.float64)[:, None]
    n, A = rollout.chunk.shape[:2]
    rows = [prompt for prompt in rollout.prompts for _ in range(A)]
    rewards = [
        config.reward_sign
        * reward_model(videos.flatten(0, 1), rows, first, data).stack().view(3, n, A).double()
        for videos, first, _ in judged
    ]
    fused, safe = [], []
    for i in range(n):
        sum_of_terms = torch.zeros(A - 1, dtype=torch.float64)
        for r, (_, _, weight) in zip(rewards, judged, strict=True):
            x = r[:, i]
            a = (weights * (x[:, :-1] - x[:, -1:]) / (x.std(1, keepdim=True) + 1e-8)).sum(0)
            if config.fusion == "zscore":
                a = a - a.mean()
            sum_of_terms += weight * a / a.std(unbiased=False)
        fused.append(sum_of_terms.clamp(-config.advantage_clamp, config.advantage_clamp))
        totals = [(weights * r[:, i]).sum(0) for r in rewards]
        safe.append(any(bool((t[:-1] > t[-1]).any()) for t in totals))
    return torch.stack(fused), safe


def loss_of(
    s: Tensor, old: Tensor, ref: Tensor, A: Tensor, safe: bool, o: ContrastiveObjective
) -> Tensor:
    log_pi = torch.log_softmax(s, 0)
    ratio = (log_pi - torch.log_softmax(old, 0)).clamp(-20, 20).exp()
    clipped = ratio.clamp(1 - o.clip_range_low, 1 + o.clip_range_high)
    grpo = -torch.minimum(ratio * A, clipped * A).mean()
    pi = log_pi.exp()
    kl = (pi * ((pi + 1e-10).log() - torch.log_softmax(ref, 0))).sum()
    scale = 1.0 if safe else {"mechanism_1": 0.0, "mechanism_2": 0.5}[o.protect]
    return scale * (grpo + o.kl_coef * kl)


class Adam:
    """AdamW with a linear warm-up over rollouts, written out."""

    def __init__(self, config: KvpoConfig, parameters: list[Tensor]) -> None:
        self.config, self.updates = config, 0
        self.first = [torch.zeros_like(p) for p in parameters]
        self.second = [torch.zeros_like(p) for p in parameters]

    def new_weights(self, step: int, weights: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
        c, found = self.config, []
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in grads))
        self.updates += 1
        rate = c.learning_rate * min(1.0, (step + 1) / c.warmup_steps)
        for w, g, a, b in zip(weights, grads, self.first, self.second, strict=True):
            g = g * min(1.0, c.max_grad_norm / (norm + 1e-6))
            a.mul_(0.9).add_(g, alpha=0.1)
            b.mul_(0.999).add_(g * g, alpha=0.001)
            mean, square = a / (1 - 0.9**self.updates), b / (1 - 0.999**self.updates)
            found.append(w * (1 - rate * c.weight_decay) - rate * mean / (square.sqrt() + 1e-8))
        return found


@pytest.mark.parametrize("name", CONFIGS)
def test_steps_are_the_method_written_out(
    name: str, generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, seed = CONFIGS[name], 7
    torch.manual_seed(1)
    reward_model, prompts = RewardModel(), all_prompts()[::9]
    trainer = Trainer(copy.deepcopy(generator), reward_model, prompts, config, seed)
    kept: dict[str, Any] = {}
    clip, roll_out = update.nn.utils.clip_grad_norm_, update.roll_out

    def before_clipping(parameters: Any, limit: float) -> Tensor:
        parameters = list(parameters)
        kept["grads"] = [p.grad.clone() for p in parameters]
        return clip(parameters, limit)

    def looked_at(policy: Generator, *args: Any, **options: Any) -> Rollout:
        kept["rolled by"] = copy.deepcopy(policy.state_dict())
        kept["options"] = options
        return roll_out(policy, *args, **options)

    monkeypatch.setattr(update.nn.utils, "clip_grad_norm_", before_clipping)
    monkeypatch.setattr(update, "roll_out", looked_at)
    old, initial = copy.deepcopy(generator), copy.deepcopy(generator)
    average = [p.detach().clone() for p in generator.parameters()]
    adam = Adam(config, [p.detach() for p in generator.parameters()])
    noises, unsafe, clipped = set(), 0, 0.0
    for step in range(4):
        policy = copy.deepcopy(trainer.policy)
        kept.pop("grads", None)
        result = trainer.step()
        rollout, metrics = result.rollout, result.metrics
        assert all(torch.equal(kept["rolled by"][k], v) for k, v in old.state_dict().items())
        assert kept["options"]["seed"] == seed
        assert kept["options"]["seed_context"] == (step + 1) * 1_000_003
        noises.add(rollout.noisy[0, 0, 0].sum().item())

        A, safe = advantages_of(config, reward_model, result, generator.data)
        # float32 rewards that nearly cancel in the differences.
        torch.testing.assert_close(result.advantages.double(), A, rtol=1e-3, atol=1e-3)
        assert metrics["safe_share"] == sum(safe) / 2
        unsafe += safe.count(False)
        A = result.advantages.double()
        scores = scores_of(policy, rollout, config.sigma_floor, config.gradient_steps)
        with torch.no_grad():
            before = scores_of(old, rollout, config.sigma_floor, 0)
            ref = before
            if config.kl_reference == "initial":
                ref = scores_of(initial, rollout, config.sigma_floor, 0)
        losses = [
            loss_of(scores[i], before[i], ref[i], A[i], safe[i], config.objective) for i in range(2)
        ]
        loss = torch.stack(losses).mean()
        assert metrics["loss"] == pytest.approx(float(loss), rel=1e-4, abs=1e-5)
        clipped += metrics["clip_fraction"]
        idle = config.objective.protect == "mechanism_1" and not any(safe)
        if idle:
            assert "grads" not in kept
        else:
            grads = torch.autograd.grad(loss, list(policy.parameters()))
            largest = max(float(g.abs().max()) for g in grads)
            for ours, g in zip(kept["grads"], grads, strict=True):
                # Two passes against one graph, in float32.
                torch.testing.assert_close(ours, g, rtol=0, atol=2e-4 * largest)
            weights = [p.detach() for p in policy.parameters()]
            expected = adam.new_weights(step, weights, kept["grads"])
            for w, e in zip(trainer.policy.parameters(), expected, strict=True):
                torch.testing.assert_close(w.detach(), e, rtol=0, atol=1e-6)
            for a, w, e in zip(
                average, trainer.policy.parameters(), trainer.ema.parameters(), strict=True
            ):
                a.mul_(config.ema).add_(w.detach(), alpha=1 - config.ema)
                torch.testing.assert_close(e, a, rtol=0, atol=1e-6)
        if (step + 1) % config.rollouts_per_sync == 0:
            old = copy.deepcopy(trainer.policy)
        for mine, theirs in ((old, trainer.old), (initial, trainer.initial)):
            assert all(map(torch.equal, mine.parameters(), theirs.parameters()))
    assert len(noises) == 4 and len({id(p) for p in (trainer.old, trainer.policy)}) == 2
    if name != "local":
        assert unsafe  # the protection was seen at work
    if name == "global":
        assert clipped > 0


def test_an_update_that_is_not_finite_or_not_wanted_is_skipped_and_counted(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    reward_model, prompts = RewardModel(), all_prompts()[::9]
    sure = ContrastiveObjective(min_update_entropy_ratio=0.999)  # any policy is less sure
    trainer = Trainer(
        copy.deepcopy(generator), reward_model, prompts, replace(BASE, objective=sure), 0
    )
    before = copy.deepcopy(trainer.policy.state_dict())
    assert trainer.step().metrics["skipped_updates"] == 1
    assert all(torch.equal(before[k], v) for k, v in trainer.policy.state_dict().items())

    trainer = Trainer(copy.deepcopy(generator), reward_model, prompts, BASE, 0)
    for bad in (math.nan, math.inf):
        norm = lambda parameters, limit, bad=bad: torch.tensor(bad)
        monkeypatch.setattr(update.nn.utils, "clip_grad_norm_", norm)
        trainer.step()
    assert trainer.skipped_updates == 2
    assert all(torch.equal(before[k], v) for k, v in trainer.policy.state_dict().items())
    other = Trainer(copy.deepcopy(generator), reward_model, prompts, BASE, 0)
    other.restore(trainer.tensors(), trainer.counters())
    assert other.skipped_updates == 2


def test_numbers_that_are_not_finite_are_named_with_their_prompt(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(copy.deepcopy(generator), RewardModel(), all_prompts()[::9], BASE, 0)
    rewards_of, scores_of = trainer._rewards, update.replay

    def spoilt(videos: Tensor, prompts: Any, first: int) -> Tensor:
        rewards = rewards_of(videos, prompts, first)
        rewards[2, 1, 0] = math.nan  # of the second prompt's first branch
        return rewards

    monkeypatch.setattr(trainer, "_rewards", spoilt)
    second = trainer._prompt(1).text
    with pytest.raises(ShapeError, match=rf"^prompt 1 \('{second}'\): rewards\[2\].*nan.*\[0\]$"):
        trainer.step()
    monkeypatch.setattr(trainer, "_rewards", rewards_of)

    def far(*args: Any) -> Any:
        replayed = scores_of(*args)
        replayed.energies._sum[4] = math.inf  # of the second prompt's second branch
        return replayed

    monkeypatch.setattr(update, "replay", far)
    with pytest.raises(
        ShapeError, match=rf"^prompt 1 \('{second}'\): scores.*inf.* branches? \[1\]"
    ):
        trainer.step()


def test_a_prompt_is_safe_where_some_branch_beats_the_anchor_locally_or_globally(
    generator: Generator,
) -> None:
    trainer = Trainer(copy.deepcopy(generator), RewardModel(), all_prompts()[::9], BASE, 0)
    better = torch.tensor([0.1, 0.2, 0.9, 0.5]).expand(3, 1, -1)  # two below the anchor, one above
    worse = torch.tensor([0.1, 0.2, 0.3, 0.5]).expand(3, 1, -1)
    for local, whole, safe in (
        (better, worse, True),
        (worse, better, True),
        (worse, worse, False),
        (better, None, True),
        (worse, None, False),
    ):
        assert trainer._advantages(all_prompts()[:1], local, whole)[1] == [safe]
