"""What a history of 8 bits changes: attention, energies and rewards of the trainer, and memory.

The shipped generator samples held-out prompts with the same noise over a float32 history and over
quantized ones; the branches of the same rollouts are then replayed over each, from the same prefix.

Run: `python benchmarks/quantized_history.py [--quick]` writes JSON under benchmarks/results/.
"""

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from kvpo_trainer.data import split_prompts
from kvpo_trainer.evaluation import Evaluation, evaluate, paired_difference
from kvpo_trainer.generator import Generator, History
from kvpo_trainer.rewards import RewardConfig
from kvpo_trainer.rollout import Rollout, replay, roll_out
from kvpo_trainer.weights import load_weights
from torch import Tensor

from kvpo_kernels import FramePool, HistoryRouting, RouteTable, quantize_frames, routed_attention
from kvpo_kernels.bench.machine import environment

RESULTS = Path(__file__).resolve().parent / "results"
PAGES = {"int8": torch.int8, "float8": torch.float8_e4m3fn}
HISTORIES: tuple[History, ...] = ("float32", "int8", "float8")


def attention_error() -> dict[str, float]:
    """Of the output, relative to its size: random frames in bfloat16, 12 of 1,560 tokens."""
    rng = torch.Generator().manual_seed(0)
    pools = torch.randn(2, 9, 1560, 2, 128, generator=rng).bfloat16()
    q, k, v = torch.randn(3, 1, 512, 2, 128, generator=rng).bfloat16()
    table = RouteTable([list(range(9))], 9)
    exact = routed_attention(*(t.double() for t in (q, *pools)), table, k.double(), v.double())
    errors = {"bfloat16": routed_attention(q, *pools, table, k, v)}
    for name, page in PAGES.items():
        (k_pool, k_scales), (v_pool, v_scales) = (quantize_frames(p, page) for p in pools)
        scales = {"k_scales": k_scales, "v_scales": v_scales}
        errors[name] = routed_attention(q, k_pool, v_pool, table, k, v, **scales)
    return {n: float((e - exact).square().mean().sqrt() / exact.std()) for n, e in errors.items()}


def memory_ratio() -> float:
    """Bytes of a quantized pool over those of a bfloat16 one, at the size of Wan-1.3B."""
    sizes = (2, 1560, 30, 12, 128)
    small = FramePool(*sizes, page_dtype=torch.int8, device="meta")
    return small.stats().bytes / FramePool(*sizes, device="meta").stats().bytes


def rewards(generator: Generator, prompts: int, seed: int) -> dict[History, Evaluation]:
    """The same prompts and noise over each history."""
    weights, held_out = load_weights(), split_prompts()[1]
    found: dict[History, Evaluation] = {}
    for history in HISTORIES:
        generator.history = history
        found[history] = evaluate(
            generator,
            weights.reward_model,
            weights.judge,
            RewardConfig(),
            held_out[:prompts],
            seed,
        )
    return found


def scores(generator: Generator, rollouts: list[Rollout], history: History) -> Tensor:
    """`[rollouts * prompts, G]`, the negative energies over prefixes rounded to the history."""
    generator.history = history
    found = []
    for rollout in rollouts:
        n = len(rollout.prompts)
        moved = rollout if history == "float32" else _with_prefix_in(generator, rollout)
        found.append(-replay(generator, moved, 1.0).energies.energies.view(n, -1))
    return torch.cat(found)


def _with_prefix_in(generator: Generator, rollout: Rollout) -> Rollout:
    """The rollout with its prefixes in a new pool of the generator's history."""
    old = rollout.pool
    pool = generator.new_pool(old.num_slots)
    prefixes = []
    for prefix in rollout.prefixes:
        slots = [prefix.slot(f) for f in prefix.resident_frames]
        copy = pool.timeline()
        copy.append(prefix.num_frames)
        for layer in range(old.num_layers):
            copy.write(layer, prefix.resident_frames[0], old.k(layer)[slots], old.v(layer)[slots])
        prefixes.append(copy)
    return replace(rollout, pool=pool, prefixes=prefixes)


def compared(exact: Tensor, other: Tensor) -> dict[str, float]:
    """How far scores are off, beside how far branches of a prompt are apart, which trains."""
    center = lambda x: x - x.mean(1, keepdim=True)
    off, apart = center(other) - center(exact), center(exact)
    both = torch.stack([center(exact).flatten(), center(other).flatten()])
    probability = torch.softmax(other, 1) - torch.softmax(exact, 1)
    return {
        "relative": float((other - exact).abs().mean() / exact.abs().mean()),
        "off_over_apart": float(off.square().mean().sqrt() / apart.square().mean().sqrt()),
        "correlation": float(torch.corrcoef(both)[0, 1]),
        "largest_probability_change": float(probability.abs().max()),
    }


def measure(quick: bool) -> dict[str, Any]:
    """All of it."""
    shipped = load_weights()
    generator = shipped.generator
    prompts, seeds, count = (4, 1, 1) if quick else (40, 3, 6)
    evaluations = [rewards(generator, prompts, 12345 + s) for s in range(seeds)]
    train = split_prompts()[0]
    generator.history = "float32"
    rollouts = []
    for i in range(count):
        rng = torch.Generator().manual_seed(i)
        some = train[4 * i : 4 * i + 4]
        context = (i + 1) * 1_000_003
        rollouts.append(
            roll_out(generator, some, HistoryRouting(), seed=0, seed_context=context, rng=rng)
        )
    exact = scores(generator, rollouts, "float32")
    result: dict[str, Any] = {
        "environment": environment(torch.get_num_threads()),
        "weights": shipped.checksum,
        "attention_error": attention_error(),
        "memory_ratio": memory_ratio(),
        "prompts": prompts * seeds,
        "branches": int(exact.numel()),
        "histories": {},
    }
    for history in HISTORIES[1:]:
        joined = lambda h, name: torch.cat([e[h].scores[name] for e in evaluations])
        differences = {}
        for name in evaluations[0]["float32"].scores:
            d = paired_difference(joined(history, name), joined("float32", name))
            differences[name] = {"mean": d.mean, "half_width": d.half_width}
        pixels = torch.cat([e[history].videos - e["float32"].videos for e in evaluations])
        result["histories"][history] = {
            "reward_differences": differences,
            "pixel_rms": math.sqrt(float(pixels.square().mean())),
            "scores": compared(exact, scores(generator, rollouts, history)),
        }
    if seeds > 1:  # the yardstick of the pixels: another noise
        other = evaluations[1]["float32"].videos - evaluations[0]["float32"].videos
        result["pixel_rms_of_another_noise"] = math.sqrt(float(other.square().mean()))
        spread = torch.stack([e["float32"].scores["reward"] for e in evaluations]).std(0).mean()
        result["reward_std_over_noise"] = float(spread)
    return result


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few prompts; writes nothing")
    options = parser.parse_args()
    result = measure(options.quick)
    print(json.dumps(result, indent=1))
    if not options.quick:
        commit = result["environment"]["commit"][:10]
        path = RESULTS / f"quantized-history-{commit}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(path)


if __name__ == "__main__":
    main()
