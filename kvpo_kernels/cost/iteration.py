"""Counts of one KVPO training iteration on one GPU: operations, bytes and memory, by phase.

Over this library (frame pool, branches in one batch, two passes) and as today's trainers do it
(rolling caches, copied whole, saved to the host). Multiply-adds count as two operations. Facts
about the method and today's trainers: the KVPO paper (arXiv:2605.14278) and its released code.
"""

import math
from dataclasses import dataclass
from typing import Literal

from kvpo_kernels.cost.sizes import GeneratorSize
from kvpo_kernels.errors import ConfigError
from kvpo_kernels.history.planning import HistoryRouting, eligible_starts

Train = Literal["lora", "full"]
Way = Literal["today", "ours"]
History = Literal["bfloat16", "int8", "float8"]
SINK, LOCAL, CACHE = 3, 6, 33
ELEMENT = 2  # bytes of bfloat16


@dataclass(frozen=True)
class Run:
    """What is trained, how, and on how many GPUs."""

    size: GeneratorSize
    branches: int = 8
    frames: int = 147
    """Latent frames of a video."""
    gpus: int = 1
    """Branches are spread over them; where there are more GPUs than branches, prompts as well."""
    train: Train = "lora"
    lora_rank: int = 256
    gradient_steps: int = 2
    """Denoise steps of a block that carry gradient."""
    micro_batch: int = 1
    """Branches whose activations one backward holds."""
    checkpoint_layers: bool = True
    """Keep only the inputs of layers, compute their insides again."""
    history: History = "bfloat16"
    """What our pool keeps keys and values in; 8 bits halve it."""
    whole_video: bool = False
    """Whether branches go on to the end of the video, for a global reward."""

    def __post_init__(self) -> None:
        for name in ("branches", "frames", "gpus", "lora_rank", "micro_batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.gradient_steps <= self.size.denoise_steps:
            raise ConfigError(
                f"gradient_steps must be in [0, {self.size.denoise_steps}], got"
                f" {self.gradient_steps}"
            )
        if not self.starts:
            raise ConfigError(f"no block of a video of {self.frames} frames can be perturbed")

    @property
    def routing(self) -> HistoryRouting:
        """The released routing with this many branches."""
        return HistoryRouting(num_branches=self.branches)

    @property
    def starts(self) -> list[int]:
        """Frames at which an iteration may fork, all alike."""
        return eligible_starts(self.routing, self.frames)

    @property
    def prompts_at_once(self) -> int:
        """Groups of GPUs that each have a prompt of their own."""
        return max(1, self.gpus // self.branches)

    @property
    def own_branches(self) -> int:
        """Of the GPU that has most: the others wait for it."""
        return math.ceil(self.branches / min(self.gpus, self.branches))

    @property
    def parameters(self) -> int:
        """Of the blocks' linear layers."""
        M = self.size.dim
        return self.size.layers * (8 * M * M + 2 * M * self.size.ffn)

    @property
    def lora_parameters(self) -> int:
        """Of adapters on all linear layers of the blocks."""
        M = self.size.dim
        return self.size.layers * self.lora_rank * (8 * 2 * M + 2 * (M + self.size.ffn))

    @property
    def frame_bytes(self) -> int:
        """Keys and values of one frame, all layers."""
        return 2 * self.size.layers * self.size.frame_tokens * self.size.dim * ELEMENT


@dataclass(frozen=True)
class Work:
    """Of one phase, on one GPU."""

    linear: float = 0.0
    """Operations of matrix products with weights."""
    attention: float = 0.0
    """Operations of self- and cross-attention."""
    memory: float = 0.0
    """Bytes read and written on the device besides those of the products."""
    host: float = 0.0
    """Bytes between host and device."""
    forwards: float = 0.0
    """Forwards of one block of one branch, those of a backward included."""

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.linear + other.linear,
            self.attention + other.attention,
            self.memory + other.memory,
            self.host + other.host,
            self.forwards + other.forwards,
        )

    def times(self, n: float) -> "Work":
        """The same n times."""
        return Work(
            n * self.linear, n * self.attention, n * self.memory, n * self.host, n * self.forwards
        )


def forward(run: Run, adapters: bool = True) -> Work:
    """One block of one branch in a full window; the initial policy has no adapters."""
    s, N = run.size, run.size.block_frames * run.size.frame_tokens
    M, keys = s.dim, (SINK + LOCAL + s.block_frames) * s.frame_tokens
    # q, k, v, o; of the cross-attention q and o, its keys and values are cached; feed-forward
    linear = 8 * N * M * M + 4 * N * M * M + 4 * N * M * s.ffn
    if run.train == "lora" and adapters:
        linear += 2 * N * run.lora_rank * (6 * 2 * M + 2 * (M + s.ffn))
    attention = 4 * N * keys * M + 4 * N * s.text_tokens * M
    # Norm, rotation and write of q, k, v; four residual and modulation passes; the activation.
    memory = ELEMENT * N * (6 * M + 4 * 3 * M + 2 * s.ffn)
    layers = s.layers
    return Work(layers * linear, layers * attention, layers * memory, 0.0, 1.0)


def backward(run: Run, every_key: bool) -> Work:
    """Of one block of one branch, recomputation not included; `every_key`: of the history too."""
    s, N = run.size, run.size.block_frames * run.size.frame_tokens
    one, keys = forward(run), (SINK + LOCAL + s.block_frames) * s.frame_tokens
    product = 2 * N * keys * s.dim  # of one of attention's matrix products
    live = s.block_frames * s.frame_tokens / keys
    # Scores, their gradient and the queries' over all keys; again and two more for live keys.
    self_attention = 5 * product if every_key else (3 + 4 * live) * product
    cross = 3 * 2 * N * s.text_tokens * s.dim  # its keys and values are constants
    weights = one.linear if run.train == "full" else 0.1 * one.linear  # of the adapters only
    return Work(one.linear + weights, s.layers * (self_attention + cross), 2 * one.memory, 0.0, 0.0)


def _waste(run: Run, rolls: int) -> float:
    """Bytes per forward that today's trainers move: clone, roll, join, rotation in float64."""
    s = run.size
    frame = s.frame_tokens * s.dim * ELEMENT
    clone = 2 * 2 * CACHE * frame
    roll = rolls * 2 * 2 * 2 * (CACHE - SINK - s.block_frames) * frame  # out of place, then back
    join = 2 * 2 * (SINK + LOCAL + s.block_frames) * frame
    turn = 2 * s.block_frames * frame * 17  # float64 twice as complex numbers
    return s.layers * (clone + roll + join + turn)


def phases(run: Run, way: Way) -> dict[str, Work]:
    """Work of one iteration, averaged over the starts it may have, by phase."""
    total: dict[str, Work] = {}
    for start in run.starts:
        for name, work in _phases_from(run, way, start).items():
            total[name] = total.get(name, Work()) + work.times(1 / len(run.starts))
    return total


def _blocks(run: Run, start: int) -> tuple[int, int]:
    """Blocks before the fork, and from it to the end of its chunk."""
    end = run.routing.chunk_frames
    while start >= end:
        end += run.routing.min_new_frames
    return start // run.size.block_frames, (min(end, run.frames) - start) // run.size.block_frames


def _phases_from(run: Run, way: Way, start: int) -> dict[str, Work]:
    steps = run.size.denoise_steps
    prefix, blocks = _blocks(run, start)
    rolled = (run.frames - start) // run.size.block_frames if run.whole_video else blocks
    today = way == "today"
    # The anchor is one row more, on the GPU with the fewest branches where these do not divide.
    rows = run.own_branches + (run.branches % min(run.gpus, run.branches) == 0)
    one = forward(run)
    per_block = steps + 1
    replays = run.own_branches * (per_block * blocks - 1)
    gradient = run.own_branches * run.gradient_steps * blocks
    cache = CACHE * run.frame_bytes

    sampling = replaying = Work()  # beyond the forward itself
    if today:
        first, later = _waste(run, rolls=2), _waste(run, rolls=0)
        sampling = Work(memory=(first + (per_block - 1) * later) / per_block)
        replaying = Work(memory=_waste(run, rolls=1))
    sampled, replayed = one + sampling, one + replaying
    result = {
        "prefix": sampled.times(per_block * prefix),
        "rollout": sampled.times(per_block * rolled * rows),
        "replay": replayed.times(replays),
        # Two rollouts share an old policy: in the first it is the current one.
        "replay, old": replayed.times(replays * (1.0 if today else 0.5)),
        "replay, initial": (forward(run, adapters=False) + replaying).times(replays),
    }
    recompute = 1 if today or not run.checkpoint_layers else 2
    step = replayed.times(recompute) + backward(run, every_key=today)
    result["gradient"] = step.times(gradient)
    if not today:  # contexts are made again, and not kept from the replay
        result["gradient"] += one.times(run.own_branches * (blocks - 1))
    if today:
        saved = Work(host=(rows + 4) * cache, memory=2 * (rows + 4) * cache)
        result["rollout"] += saved
        for name in ("replay", "replay, old", "replay, initial"):
            result[name] += Work(host=run.own_branches * cache, memory=4 * run.own_branches * cache)
    return result


def memory(run: Run, way: Way) -> dict[str, float]:
    """Bytes at the peak, by what they are for, on the GPU that has most branches."""
    s, G = run.size, run.own_branches
    N = s.block_frames * s.frame_tokens
    rows = G + 1
    if way == "ours":
        # Sink, candidates and the frames from there to the fork once; of each row its window, whose
        # oldest frames the block takes the slots of.
        perturbed = run.routing.block_frames * (run.routing.perturbed_blocks - 1)
        shared = min(max(run.starts), run.routing.cache_frames - perturbed)
        scales = 2 * s.layers * s.heads * 4
        small = run.frame_bytes / ELEMENT + scales
        frame = run.frame_bytes if run.history == "bfloat16" else small
        history = float((shared + rows * LOCAL) * frame)
        kept = min(run.micro_batch, G)
    else:
        # All replay caches until the backward, the cache of the rollout, one layer's clone.
        history = (G + 1) * CACHE * run.frame_bytes + CACHE * run.frame_bytes / s.layers
        kept = 1
    trained = run.lora_parameters if run.train == "lora" else run.parameters
    # Policy, old and initial: three copies, or one that three sets of adapters share.
    weights = run.parameters + 3 * trained if run.train == "lora" else 3 * trained
    # Of a layer: about 20 values of the model's width and 3 of the feed-forward's per token;
    # for the 1.3B model with adapters this is the 545 MB that a hook on saved tensors counts.
    layer = N * ELEMENT * (20 * s.dim + 3 * s.ffn)
    inputs = N * ELEMENT * s.dim
    recomputed = way == "ours" and run.checkpoint_layers
    activations = kept * (s.layers * inputs + layer if recomputed else s.layers * layer)
    latents = N * 4 * s.latent_channels * ELEMENT
    return {
        "weights": float(weights * ELEMENT),
        "gradients and optimizer": float(trained * (ELEMENT + 8)),
        "history": history,
        "activations": float(activations),
        # On the host today.
        "trajectories": float(2 * G * 6 * s.denoise_steps * latents) if way == "ours" else 0.0,
    }
