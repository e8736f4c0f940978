"""Pretraining of the generator by flow matching under teacher forcing.

Only the sampler's four noise levels are trained. Half of the contexts are routed at random, so that
a routed context is nothing new to the generator; in the second part of training the history is
partly the generator's own predictions, as it will be when it samples.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kvpo_kernels import HistoryRouting, candidate_frames
from kvpo_trainer.data import DataConfig, all_prompts, make_clips, patchify, tokenize
from kvpo_trainer.generator import Contexts, Generator, GeneratorConfig
from kvpo_trainer.sampling import LOCAL_FRAMES, SIGMAS, SINK_FRAMES


@dataclass(frozen=True)
class PretrainConfig:
    """How long and how fast. The defaults made the shipped weights."""

    steps: int = 1400
    batch: int = 8
    learning_rate: float = 2e-3
    warmup_steps: int = 20
    decay_from: float = 0.6
    """Share of the steps after which the learning rate falls linearly."""
    self_context_from: float = 0.4
    """Share of the steps after which blocks of the history may be self-generated."""
    self_context: float = 0.5
    """Mean share of such blocks."""
    context_noise: float = 0.15
    """Largest noise level added to a clip's history."""
    routed_share: float = 0.5
    """Share of the blocks with a routed context."""
    ema: float = 0.99
    bfloat16: bool = True
    """Matrix products in bfloat16."""


LEVEL_SHARES = (0.15, 0.2, 0.3, 0.35)  # of the four noise levels among the trained blocks
SELF_LEVEL_SHARES = (0.1, 0.1, 0.2, 0.6)  # of those that make self-generated history


def normal_contexts(rows: int, data: DataConfig) -> Contexts:
    """Sink and local window of every block."""
    K, size = data.frames // data.block_frames, SINK_FRAMES + LOCAL_FRAMES
    frames = torch.zeros(rows, K, size, dtype=torch.int64)
    valid = torch.zeros(rows, K, size, dtype=torch.bool)
    for k in range(K):
        f = k * data.block_frames
        picks = [*range(min(SINK_FRAMES, f)), *range(max(SINK_FRAMES, f - LOCAL_FRAMES), f)]
        frames[:, k, : len(picks)] = torch.tensor(picks, dtype=torch.int64)
        valid[:, k, : len(picks)] = True
    return Contexts(frames, valid)


def training_contexts(rows: int, data: DataConfig, share: float, rng: torch.Generator) -> Contexts:
    """Normal contexts, a share of them replaced by what a branch of the released routing sees.

    That is the sink, frames drawn from those of a fork, and the previous frame; the block is any of
    those that the fork perturbs, so the frames are up to 30 old.
    """
    routing = HistoryRouting()
    n = routing.routed_frames
    contexts = normal_contexts(rows, data)
    for k in range(contexts.frames.shape[1]):
        f = k * data.block_frames
        forks = [f - p * data.block_frames for p in range(routing.perturbed_blocks)]
        pools = [candidate_frames(routing, fork) for fork in forks if fork >= routing.window_frames]
        pools = [pool for pool in pools if len(pool) >= n]
        if not pools:
            continue
        in_pool = torch.zeros(len(pools), f, dtype=torch.bool)
        for i, pool in enumerate(pools):
            in_pool[i, pool] = True
        which = torch.randint(len(pools), (rows,), generator=rng)
        draw = torch.rand(rows, f, generator=rng).where(in_pool[which], -1.0)
        old = draw.topk(n, dim=1).indices.sort(dim=1).values
        sink = torch.arange(SINK_FRAMES).expand(rows, -1)
        routed = torch.cat([sink, old, torch.full((rows, 1), f - 1)], dim=1)
        chosen = torch.rand(rows, generator=rng) < share
        contexts.frames[chosen, k] = routed[chosen]
        contexts.valid[chosen, k] = True
    return contexts


def training_loss(
    model: Generator, config: PretrainConfig, self_context: float, rng: torch.Generator
) -> tuple[Tensor, list[float]]:
    """The flow-matching loss of one batch, and the mean squared error of x0 per noise level."""
    data = model.data
    prompts = all_prompts()
    picks = torch.randint(len(prompts), (config.batch,), generator=rng).tolist()
    chosen = [prompts[i] for i in picks]
    clips = make_clips(chosen, data, rng)
    x = patchify(clips.videos, data).unflatten(1, (-1, model.block_tokens))
    text = model.encode_text(tokenize(chosen))
    B, K = x.shape[:2]
    clean_contexts = normal_contexts(B, data)
    contexts = training_contexts(B, data, config.routed_share, rng)

    def noised(shares: tuple[float, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        levels = torch.multinomial(torch.tensor(shares), B * K, True, generator=rng).view(B, K)
        sigma = torch.tensor(SIGMAS)[levels]
        eps = torch.randn(x.shape, generator=rng)
        wide = sigma[..., None, None]
        return levels, sigma, eps, (1 - wide) * x + wide * eps

    strength = torch.rand(B, 1, 1, 1, generator=rng) * config.context_noise
    history = x + torch.randn(x.shape, generator=rng) * strength
    if self_context > 0:
        with torch.no_grad():
            _, sigma, _, noisy = noised(SELF_LEVEL_SHARES)
            v = model.teacher_forced(history, noisy, sigma, text, clean_contexts, contexts)
            own = noisy - sigma[..., None, None] * v
        share = self_context * 2 * torch.rand(B, 1, generator=rng)
        use = torch.rand(B, K, generator=rng) < share
        history = torch.where(use[..., None, None], own, history)
    levels, sigma, eps, noisy = noised(LEVEL_SHARES)
    v = model.teacher_forced(history, noisy, sigma, text, clean_contexts, contexts)
    error = (v - (eps - x)).square().mean((-2, -1))
    squared = (error * sigma.square()).detach()
    by_level = [float(squared[levels == i].mean()) for i in range(len(SIGMAS))]
    return error.mean(), by_level


def pretrain(
    generator_config: GeneratorConfig,
    data: DataConfig,
    config: PretrainConfig,
    seed: int,
    on_step: Callable[[int, dict[str, float], Generator], None] | None = None,
) -> Generator:
    """Train a generator from a seed; returns its averaged weights.

    The same seed, thread count and machine give the same weights. `on_step(step, metrics, average)`
    is called after every step.
    """
    torch.manual_seed(seed)  # initial weights
    model = Generator(generator_config, data)
    average = Generator(generator_config, data)
    average.load_state_dict(model.state_dict())
    rng = torch.Generator().manual_seed(seed + 1)
    matrices = [p for n, p in model.blocks.named_parameters() if p.ndim == 2 and "modul" not in n]
    names = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in names]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(others, lr=0.0, weight_decay=0.0, betas=(0.9, 0.98))
    ]
    if hasattr(torch.optim, "Muon"):  # torch >= 2.9; twice as fast to the same loss here
        optimizers.append(
            torch.optim.Muon(
                matrices,
                lr=0.0,
                momentum=0.95,
                weight_decay=0.01,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    else:
        optimizers.append(torch.optim.AdamW(matrices, lr=0.0, weight_decay=0.01, betas=(0.9, 0.98)))
    start = time.perf_counter()
    for step in range(config.steps):
        done = step / config.steps
        decay = 1.0 if done < config.decay_from else (1 - done) / (1 - config.decay_from)
        rate = config.learning_rate * min(1.0, (step + 1) / config.warmup_steps) * decay
        own = config.self_context if done >= config.self_context_from else 0.0
        with torch.autocast("cpu", torch.bfloat16, enabled=config.bfloat16):
            loss, by_level = training_loss(model, config, own, rng)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        # The average follows quickly at first, when the weights still move far.
        keep = min(config.ema, (step + 1) / (step + 10))
        with torch.no_grad():
            for a, p in zip(average.parameters(), model.parameters(), strict=True):
                a.lerp_(p, 1 - keep)
        if on_step is not None:
            metrics = {"loss": loss.item(), "seconds": time.perf_counter() - start}
            metrics |= {f"x0_mse_{s:.3f}": m for s, m in zip(SIGMAS, by_level, strict=True)}
            on_step(step, metrics, average)
    return average
