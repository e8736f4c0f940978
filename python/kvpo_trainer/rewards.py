"""The three rewards, and a judge that no reward knows.

VQ, visual quality: does each frame look like some digit? MQ, motion quality: is the motion smooth?
TA, text alignment: the prompt's digit, moving as the prompt says. VQ and TA use a classifier that
was trained on writers the generator never saw. The judge has another architecture, other writers
and another way to measure motion, and is for evaluation only: what improves under the rewards but
not under the judge has learned to please the rewards.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvpo_trainer.data import DIRECTIONS, SPEEDS, DataConfig, Prompt, digit_bank, place

NO_DIGIT = 10  # the classifier's class of blurs, mixtures, noise and empty frames
HEADS = ("vq", "mq", "ta")
DIGIT_INK = 8.0  # first Fourier amplitude of the faintest digit; those of the data set have 9.6 on
FAINTEST = 0.6  # of a digit's ink, what classifier and judge are trained to know it by


@dataclass(frozen=True)
class RewardConfig:
    """Weights of the three heads in the advantage."""

    vq: float = 0.5
    mq: float = 0.5
    ta: float = 1.0

    @property
    def weights(self) -> list[float]:
        """In the order of `HEADS`."""
        return [self.vq, self.mq, self.ta]


class DigitClassifier(nn.Module):
    """Ten digits and "no digit", from a frame of a torus."""

    def __init__(self) -> None:
        super().__init__()
        conv = lambda i, o: nn.Conv2d(i, o, 3, padding=1, padding_mode="circular")
        self.first, self.second, self.third = conv(1, 24), conv(24, 48), conv(48, 64)
        self.out = nn.Linear(128, NO_DIGIT + 1)

    def forward(self, frames: Tensor) -> Tensor:
        """Logits `[n, 11]` of frames `[n, canvas, canvas]` in [-1, 1]."""
        h = F.relu(self.first(frames[:, None]))
        h = F.max_pool2d(F.relu(self.second(h)), 2)
        h = F.relu(self.third(h))
        logits: Tensor = self.out(torch.cat([h.amax((-1, -2)), h.mean((-1, -2))], dim=1))
        return logits


class DigitJudge(nn.Module):
    """Ten digits from a frame that is first centred on its ink; a plain perceptron."""

    def __init__(self, canvas: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(canvas * canvas, 128), nn.GELU(), nn.Linear(128, 64), nn.GELU(),
            nn.Linear(64, 10),
        )  # fmt: skip

    def forward(self, frames: Tensor) -> Tensor:
        """Logits `[n, 10]` of frames `[n, canvas, canvas]` in [-1, 1]."""
        logits: Tensor = self.net(_centred(_ink(frames)).flatten(1))
        return logits


@dataclass(frozen=True)
class Rewards:
    """Per video `[B]`; higher is better, each in [0, 1]."""

    vq: Tensor
    mq: Tensor
    ta: Tensor

    def stack(self) -> Tensor:
        """`[3, B]` in the order of `HEADS`."""
        return torch.stack([self.vq, self.mq, self.ta])


class RewardModel(nn.Module):
    """The classifier behind VQ and TA, and the motion measure behind MQ and TA."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = DigitClassifier()

    @torch.no_grad()
    def forward(
        self, videos: Tensor, prompts: Sequence[Prompt], first_frame: int, data: DataConfig
    ) -> Rewards:
        """Rewards of clips.

        Args:
            videos: `[B, T, canvas, canvas]` in [-1, 1].
            prompts: B of them.
            first_frame: absolute index of each clip's first frame: when the turn may have come.
        """
        B, T = videos.shape[:2]
        p = self.classifier(videos.flatten(0, 1)).softmax(-1).view(B, T, -1)
        digits = torch.tensor([prompt.digit for prompt in prompts])
        asked = p.gather(2, digits[:, None, None].expand(B, T, 1))[..., 0].mean(1)
        velocity, ink = phase_velocity(videos)
        jerk = (velocity[:, 1:] - velocity[:, :-1]).norm(dim=-1)
        # A step counts as motion if something is there, in both frames, and is not where it was.
        there = (ink / DIGIT_INK).clamp(max=1)
        there = torch.minimum(there[:, 1:], there[:, :-1]).amin(-1)
        moves = there * (1 - torch.exp(-velocity.square().sum(-1) / (2 * 0.25**2)))
        targets = target_velocities(prompts, first_frame, T, data).float()
        miss = (velocity[:, None] - targets).square().sum(-1).amin(1)
        return Rewards(
            vq=p[..., :NO_DIGIT].amax(-1).mean(1),
            # A jerk of one pixel per frame^2 is .6.
            mq=(torch.exp(-jerk.square() / 2) * torch.minimum(moves[:, 1:], moves[:, :-1])).mean(1),
            ta=0.5 * asked + 0.5 * torch.exp(-miss / (2 * 0.5**2)).mean(1),
        )


class Judge(nn.Module):
    """Evaluation only: independent of `RewardModel` in architecture, data and motion measure."""

    def __init__(self, data: DataConfig) -> None:
        super().__init__()
        self.digits = DigitJudge(data.canvas)

    @torch.no_grad()
    def forward(
        self, videos: Tensor, prompts: Sequence[Prompt], first_frame: int, data: DataConfig
    ) -> dict[str, Tensor]:
        """Per video `[B]`: `judge_digit`, the probability of the prompt's digit, and
        `judge_motion`, the share of steps whose best whole-pixel shift is what the prompt says."""
        B, T = videos.shape[:2]
        p = self.digits(videos.flatten(0, 1)).softmax(-1).view(B, T, -1)
        digits = torch.tensor([prompt.digit for prompt in prompts])
        asked = p.gather(2, digits[:, None, None].expand(B, T, 1))[..., 0].mean(1)
        targets = target_velocities(prompts, first_frame, T, data)
        hit = (best_shift(videos)[:, None] == targets).all(-1).any(1)
        return {"judge_digit": asked, "judge_motion": hit.float().mean(1)}


def target_velocities(
    prompts: Sequence[Prompt], first_frame: int, frames: int, data: DataConfig
) -> Tensor:
    """What the prompt allows per step, int64 `[B, 2, frames - 1, 2]`: before and after the turn.

    Where the turn cannot have come, or must have, both entries are the same.
    """
    step = torch.arange(first_frame + 1, first_frame + frames)
    first, last = (block * data.block_frames for block in data.turn_blocks)
    both = []
    for prompt in prompts:
        speed = SPEEDS[prompt.speed]
        before = torch.tensor(DIRECTIONS[prompt.direction]) * speed
        after = torch.tensor(DIRECTIONS[prompt.turn]) * speed
        early = torch.where((step >= last)[:, None], after, before)
        late = torch.where((step < first)[:, None], before, after)
        both.append(torch.stack([early, late]))
    return torch.stack(both)


def phase_velocity(videos: Tensor) -> tuple[Tensor, Tensor]:
    """Motion of the ink by the turn of its first Fourier phase.

    Returns:
        Pixels per frame `[B, T - 1, 2]`, and the amplitudes `[B, T, 2]` that the phases belong to,
        in pixels of full ink: near 0 where nothing is seen, or no thing in one place.
    """
    phases = _phases(_ink(videos))
    turns = torch.angle(phases[:, 1:] * phases[:, :-1].conj())
    return -turns * videos.shape[-1] / (2 * math.pi), phases.abs()


def best_shift(videos: Tensor) -> Tensor:
    """The whole-pixel shift that best explains each step, int64 `[B, T - 1, 2]`, on the torus."""
    n = videos.shape[-1]
    spectrum = torch.fft.rfft2(_ink(videos))
    match = torch.fft.irfft2(spectrum[:, 1:] * spectrum[:, :-1].conj(), s=(n, n))
    best = match.flatten(-2).argmax(-1)
    shift = torch.stack([best // n, best % n], dim=-1)
    return torch.where(shift > n // 2, shift - n, shift)


def train_reward_models(
    data: DataConfig, seed: int = 0, steps: int = 500
) -> tuple[RewardModel, Judge]:
    """Both models from a seed, each on writers of its own (about a minute)."""
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed + 1)
    rewards, judge = RewardModel(), Judge(data)
    for model, writers in ((rewards.classifier, 0), (judge.digits, 1)):
        bank = [images[data.exemplars :][writers::2] for images in digit_bank()]
        optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
        for step in range(steps):
            frames, labels = _digit_batch(bank, 96, data, rng)
            if writers == 0:
                frames, labels = _with_no_digits(frames, labels, rng)
            loss = F.cross_entropy(model(frames), labels)
            optimizer.zero_grad()
            loss.backward()
            for group in optimizer.param_groups:
                group["lr"] = 2e-3 * (1 - step / steps)
            optimizer.step()
    return rewards, judge


def _digit_batch(
    bank: Sequence[Sequence[Tensor]], n: int, data: DataConfig, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    labels = torch.randint(10, (n,), generator=rng)
    picks = torch.rand(n, generator=rng).tolist()
    images = torch.stack(
        [bank[d][int(u * len(bank[d]))] for d, u in zip(labels.tolist(), picks, strict=True)]
    )
    corner = torch.randint(data.canvas, (n, 1, 2), generator=rng)
    full = FAINTEST + (1 - FAINTEST) * torch.rand(n, 1, 1, generator=rng)
    frames = place(images * full, corner, data.canvas)[:, 0] * 2 - 1
    noise = torch.rand(n, 1, 1, generator=rng) * 0.3
    return frames + torch.randn(frames.shape, generator=rng) * noise, labels


def _with_no_digits(frames: Tensor, labels: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Adds what else a generator may show: mixtures, blurs, one grey, scattered ink, noise."""
    n = frames.shape[0] // 6
    mixed = (frames[:n] + frames[n : 2 * n].roll(5, -1)) / 2
    blurred = F.avg_pool2d(frames[:n, None], 5, 1, 2)[:, 0]
    level = (3 * torch.rand(n, 1, 1, generator=rng) - 2).clamp(min=-1)  # a third is empty
    strength = torch.rand(n, 1, 1, generator=rng) * 0.3
    flat = level + torch.randn(frames[:n].shape, generator=rng) * strength
    order = torch.rand(n, frames[0].numel(), generator=rng).argsort(1)
    scattered = frames[:n].flatten(1).gather(1, order).view_as(flat)
    noise = torch.rand(flat.shape, generator=rng) * 2 - 1
    none = torch.full((5 * n,), NO_DIGIT)
    return torch.cat([frames, mixed, blurred, flat, scattered, noise]), torch.cat([labels, none])


def _ink(videos: Tensor) -> Tensor:
    return ((videos + 1) / 2).clamp(0, 1)


def _phases(ink: Tensor) -> Tensor:
    """First Fourier coefficients of the ink, complex `[..., 2]`: along rows, along columns."""
    n = ink.shape[-1]
    wave = torch.exp(-2j * math.pi * torch.arange(n) / n)
    sums = (ink.sum(other_axis).to(wave.dtype) for other_axis in (-1, -2))
    return torch.stack([(s * wave).sum(-1) for s in sums], dim=-1)


def _centred(ink: Tensor) -> Tensor:
    """Each frame rolled so that its ink is centred, on the torus."""
    n = ink.shape[-1]
    phases, index = _phases(ink), torch.arange(n)
    rolled = ink
    for axis, phase in zip((-2, -1), phases.unbind(-1), strict=True):
        centre = (-torch.angle(phase) * n / (2 * math.pi)).round().long()
        source = (index + centre[:, None] - n // 2) % n
        shape = (-1, n, 1) if axis == -2 else (-1, 1, n)
        rolled = rolled.gather(axis, source.view(shape).expand_as(rolled))
    return rolled
