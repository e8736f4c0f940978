"""KVPO training: rollout by the old policy, rewards, replay, contrastive update."""

import contextlib
import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from kvpo_kernels import (
    ContrastiveObjective,
    HistoryRouting,
    anchor_advantages,
    branch_policy_loss,
    fuse_advantages,
)
from kvpo_kernels.errors import KvpoError
from kvpo_trainer.data import Prompt
from kvpo_trainer.generator import Generator
from kvpo_trainer.rewards import HEADS, RewardConfig, RewardModel
from kvpo_trainer.rollout import Rollout, accumulate_gradient, check_routing, replay, roll_out


@dataclass(frozen=True)
class KvpoConfig:
    """One KVPO training run. Defaults are the released configuration's where it has one."""

    prompts_per_step: int = 4
    learning_rate: float = 2.5e-5
    """The release trains LoRA weights of a 1.3 B model at 1e-5."""
    warmup_steps: int = 5
    """In rollouts; the release counts synchronisations."""
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    ema: float = 0.99
    """Of the average that `evaluate --average` and `sample --average` show; the release's is 0.999,
    for longer runs."""
    rollouts_per_sync: int = 2
    """Rollouts, each followed by an update, that share one old policy."""
    gradient_steps: int = 2
    """Denoise steps of each block that carry gradient; all four enter the energies."""
    sigma_floor: float = 1.0
    local_weight: float = 1.0
    global_weight: float = 0.0
    """Of the whole video's reward; 0.5 in the release. 0 saves generating the rest of the video."""
    advantage_clamp: float = 2.5
    fusion: Literal["std", "zscore", "none"] = "std"
    """How `fuse_advantages` normalises the local and the global advantages."""
    kl_reference: Literal["initial", "old"] = "initial"
    """What the KL is taken to; "old" saves a replay per rollout."""
    routing: HistoryRouting = field(default_factory=HistoryRouting)
    objective: ContrastiveObjective = field(default_factory=ContrastiveObjective)
    rewards: RewardConfig = field(default_factory=RewardConfig)
    reward_sign: int = 1
    """-1 trains towards the opposite: the other arm of the signed test."""
    shuffle_advantages: bool = False
    """Permute advantages within each prompt's branches: the control that must not learn."""


@dataclass(frozen=True)
class StepResult:
    """What one step did."""

    metrics: dict[str, float]
    rollout: Rollout
    rewards: Tensor
    """`[3, n, G + 1]`, local rewards by head, anchor last."""
    advantages: Tensor
    """`[n, G]`."""


@contextlib.contextmanager
def _about(index: int, prompt: Prompt) -> Iterator[None]:
    """Says which prompt of a rollout an op has refused."""
    try:
        yield
    except KvpoError as error:
        error.args = (f"prompt {index} ({prompt.text!r}): {error}",)
        raise


class Trainer:
    """Trains a generator step by step; `tensors` and `counters` are all of its state."""

    def __init__(
        self,
        generator: Generator,
        reward_model: RewardModel,
        prompts: Sequence[Prompt],
        config: KvpoConfig,
        seed: int,
    ) -> None:
        check_routing(config.routing, generator.data)
        self.config, self.seed, self.prompts = config, seed, list(prompts)
        self.policy = generator
        self.reward_model = reward_model
        self.old, self.initial, self.ema = (copy.deepcopy(generator) for _ in range(3))
        for frozen in (self.old, self.initial, self.ema):
            frozen.requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            generator.parameters(), config.learning_rate, weight_decay=config.weight_decay
        )
        self.step_index = 0
        self.skipped_updates = 0

    def step(self) -> StepResult:
        """One rollout and one update."""
        config, started = self.config, time.perf_counter()
        # Everything random about a step follows from the seed and its index.
        rng = torch.Generator().manual_seed(self.seed * 1_000_003 + self.step_index)
        # Every prompt comes before any comes again.
        at = self.step_index * config.prompts_per_step
        prompts = [self._prompt(at + i) for i in range(config.prompts_per_step)]
        window = self.step_index // config.rollouts_per_sync
        rollout = roll_out(
            self.old,
            prompts,
            config.routing,
            seed=self.seed,
            # The release shares a plan context within a window; with one prompt set per rollout
            # that would repeat the fork, so each rollout has its own.
            seed_context=(self.step_index + 1) * 1_000_003,
            rng=rng,
            whole_video=config.global_weight > 0,
        )
        local = self._rewards(rollout.chunk, prompts, rollout.chunk_first_frame)
        whole = None if rollout.videos is None else self._rewards(rollout.videos, prompts, 0)
        advantages, safe = self._advantages(prompts, local, whole)
        if config.shuffle_advantages:
            order = torch.rand(advantages.shape, generator=rng).argsort(1)
            advantages = advantages.gather(1, order)
        rolled = time.perf_counter()

        n, G = advantages.shape
        current = replay(self.policy, rollout, config.sigma_floor)
        scores = -current.energies.energies.view(n, G)
        synced = self.step_index % config.rollouts_per_sync == 0
        old_scores = scores if synced else self._scores(self.old, rollout)
        if config.kl_reference == "old":
            ref_scores = old_scores
        elif window == 0 and synced:
            ref_scores = scores
        else:
            ref_scores = self._scores(self.initial, rollout)
        losses = []
        for i, prompt in enumerate(prompts):
            with _about(i, prompt):
                losses.append(
                    branch_policy_loss(
                        scores[i],
                        old_scores[i],
                        advantages[i],
                        ref_scores[i],
                        objective=config.objective,
                        safe=safe[i],
                    )
                )
        self.optimizer.zero_grad()
        norm = 0.0
        # Under the first mechanism unsafe groups have no gradient; momentum and decay are one too.
        idle = config.objective.protect == "mechanism_1" and not any(safe)
        if idle or any(bool(loss.skip) for loss in losses):
            self.skipped_updates += 1
        else:
            kappa = torch.stack([loss.score_grad for loss in losses]).flatten() / n
            accumulate_gradient(
                self.policy,
                rollout,
                current,
                kappa,
                gradient_steps=config.gradient_steps,
                sigma_floor=config.sigma_floor,
            )
            norm = self._update()
        self.step_index += 1
        if self.step_index % config.rollouts_per_sync == 0:
            self.old.load_state_dict(self.policy.state_dict())

        mean = lambda values: float(torch.stack(values).mean())
        metrics = {
            "step": float(self.step_index),
            "start_frame": float(rollout.start_frame),
            **{f"{head}_branches": float(local[c, :, :G].mean()) for c, head in enumerate(HEADS)},
            **{f"{head}_anchor": float(local[c, :, G].mean()) for c, head in enumerate(HEADS)},
            "reward_branches": float(self._total(local)[:, :G].mean()),
            "reward_anchor": float(self._total(local)[:, G].mean()),
            "reward_spread": float(self._total(local)[:, :G].std(1).mean()),
            "pixel_spread": float(rollout.chunk[:, :G, -rollout.new_frames :].std(1).mean()),
            "score_spread": float(scores.std(1).mean()),
            "loss": mean([loss.loss for loss in losses]),
            "kl": mean([loss.kl for loss in losses]),
            "entropy": mean([loss.entropy for loss in losses]),
            "clip_fraction": mean([loss.clip_fraction for loss in losses]),
            "ratio_deviation": mean([(loss.ratio - 1).abs().mean() for loss in losses]),
            "grad_norm": norm,
            "skipped_updates": float(self.skipped_updates),
            "safe_share": sum(safe) / n,
            # Groups whose rewards are all equal teach nothing.
            "zero_std_groups": float((local.amax(-1) == local.amin(-1)).all(0).sum()),
            # The clamp makes them equal where all branches are far below the anchor: no order.
            "equal_advantage_groups": float((advantages == advantages[:, :1]).all(1).sum()),
            "clamped_share": float((advantages.abs() >= config.advantage_clamp).float().mean()),
            "seconds_rollout": rolled - started,
            "seconds_update": time.perf_counter() - rolled,
        }
        return StepResult(metrics, rollout, local, advantages)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of the state, by name; references, not copies."""
        named = {"policy": self.policy, "old": self.old, "initial": self.initial, "ema": self.ema}
        state = {
            f"{owner}/{name}": value
            for owner, module in named.items()
            for name, value in module.state_dict().items()
        }
        for name, parameter in self.policy.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                state[f"optimizer/{key}/{name}"] = value
        return state

    def counters(self) -> dict[str, int]:
        """All numbers of the state; randomness follows from them and the seed."""
        return {
            "seed": self.seed,
            "step_index": self.step_index,
            "skipped_updates": self.skipped_updates,
        }

    def restore(self, tensors: Mapping[str, Tensor], counters: Mapping[str, int]) -> None:
        """Take over a state; training goes on bit for bit as if it had not stopped.

        Raises:
            ValueError: a tensor is missing, unknown or of another shape, or the seed differs.
        """
        if counters["seed"] != self.seed:
            raise ValueError(f"the state is of seed {counters['seed']}, not {self.seed}")
        wanted = {name: (value.shape, value.dtype) for name, value in self._expected().items()}
        given = {name: (value.shape, value.dtype) for name, value in tensors.items()}
        optional = {name for name in wanted if name.startswith("optimizer/")}
        moments = any(name.startswith("optimizer/") for name in given)
        required = set(wanted) if moments else set(wanted) - optional
        if set(given) != required:
            odd = sorted(set(given) ^ required)
            raise ValueError(f"tensors missing or unknown: {', '.join(odd[:5])}")
        for name, what in given.items():
            if what != wanted[name]:
                raise ValueError(f"tensor {name} is {what}, expected {wanted[name]}")
        owners = {"policy": self.policy, "old": self.old, "initial": self.initial, "ema": self.ema}
        for owner, module in owners.items():
            prefix = f"{owner}/"
            module.load_state_dict(
                {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
            )
        self.optimizer.state.clear()
        if moments:
            for name, parameter in self.policy.named_parameters():
                self.optimizer.state[parameter] = {
                    key: tensors[f"optimizer/{key}/{name}"].clone()
                    for key in ("step", "exp_avg", "exp_avg_sq")
                }
        self.step_index = counters["step_index"]
        self.skipped_updates = counters["skipped_updates"]

    def _expected(self) -> dict[str, Tensor]:
        state = {k: v for k, v in self.tensors().items() if not k.startswith("optimizer/")}
        for name, parameter in self.policy.named_parameters():
            state[f"optimizer/step/{name}"] = torch.zeros(())
            state[f"optimizer/exp_avg/{name}"] = parameter.detach()
            state[f"optimizer/exp_avg_sq/{name}"] = parameter.detach()
        return state

    def _prompt(self, index: int) -> Prompt:
        epoch, at = divmod(index, len(self.prompts))
        rng = torch.Generator().manual_seed(self.seed * 7919 + epoch)
        return self.prompts[int(torch.randperm(len(self.prompts), generator=rng)[at])]

    def _rewards(self, videos: Tensor, prompts: Sequence[Prompt], first_frame: int) -> Tensor:
        n, A = videos.shape[:2]
        rows = [prompt for prompt in prompts for _ in range(A)]
        rewards = self.reward_model(videos.flatten(0, 1), rows, first_frame, self.policy.data)
        return rewards.stack().view(len(HEADS), n, A)

    def _total(self, rewards: Tensor) -> Tensor:
        weights = torch.tensor(self.config.rewards.weights)
        return (weights[:, None, None] * rewards).sum(0)

    def _advantages(
        self, prompts: Sequence[Prompt], local: Tensor, whole: Tensor | None
    ) -> tuple[Tensor, list[bool]]:
        """Fused advantages `[n, G]`, and per prompt whether a branch beats the anchor."""
        config, sign = self.config, self.config.reward_sign

        def anchored(rewards: Tensor, i: int) -> Tensor:
            signed = sign * rewards[:, i]
            return anchor_advantages(signed[:, :-1], signed[:, -1], config.rewards.weights)

        rows, safe = [], []
        for i, prompt in enumerate(prompts):
            with _about(i, prompt):
                rows.append(
                    fuse_advantages(
                        anchored(local, i),
                        None if whole is None else anchored(whole, i),
                        config.local_weight,
                        config.global_weight,
                        config.fusion,
                        config.advantage_clamp,
                    )
                )
            totals = [sign * self._total(r)[i] for r in (local, whole) if r is not None]
            safe.append(any(bool((t[:-1] > t[-1]).any()) for t in totals))
        return torch.stack(rows), safe

    def _scores(self, policy: Generator, rollout: Rollout) -> Tensor:
        energies = replay(policy, rollout, self.config.sigma_floor).energies.energies
        return -energies.view(len(rollout.prompts), -1)

    def _update(self) -> float:
        config = self.config
        norm = float(nn.utils.clip_grad_norm_(self.policy.parameters(), config.max_grad_norm))
        if not norm < float("inf"):  # NaN too
            self.skipped_updates += 1
            return norm
        for group in self.optimizer.param_groups:
            warm = min(1.0, (self.step_index + 1) / max(1, config.warmup_steps))
            group["lr"] = config.learning_rate * warm
        self.optimizer.step()
        with torch.no_grad():
            for average, value in zip(self.ema.parameters(), self.policy.parameters(), strict=True):
                average.lerp_(value, 1 - config.ema)
        return norm
