"""Moving handwritten digits: the videos, and the prompts that describe them.

A digit of 8x8 pixels (scikit-learn's copy of the UCI set) moves over a torus. The prompt names the
digit, two directions and a usual speed: "a 3 moves left slowly, then turns up". What one frame does
not show has to come from history: the speed, which changes between hidden segments (the prompt's
word holds for most, not all, of them), whether the turn has come, and which writer's digit it is.
Changes come between blocks, so that what is open about a block is a choice of few, and no blur.
"""

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
SPEEDS = {"slowly": 1, "quickly": 2}  # pixels per frame
WORDS = (
    "<none>",
    "a",
    *"0123456789",
    "moves",
    *DIRECTIONS,
    *SPEEDS,
    "then",
    "turns",
)
PROMPT_WORDS = 8
DIGIT_PIXELS = 8
_PATTERN = re.compile(
    rf"a ([0-9]) moves ({'|'.join(DIRECTIONS)}) ({'|'.join(SPEEDS)}),"
    rf" then turns ({'|'.join(DIRECTIONS)})"
)


@dataclass(frozen=True)
class DataConfig:
    """The videos. Lengths are frames, sizes are pixels."""

    frames: int = 57
    block_frames: int = 3
    canvas: int = 16
    patch: int = 4
    exemplars: int = 2
    """Writers per digit that the generator sees; the others train the reward models."""
    speed_match: float = 0.65
    """Share of the speed segments in which the prompt's word holds."""
    segment_blocks: tuple[int, int] = (4, 4)
    """Shortest and longest speed segment, in blocks."""
    turn_blocks: tuple[int, int] = (9, 9)
    """First and last block that the turn may come with."""

    @property
    def grid(self) -> tuple[int, int]:
        """Tokens of a frame: rows, columns."""
        return self.canvas // self.patch, self.canvas // self.patch

    @property
    def frame_tokens(self) -> int:
        """T, tokens per frame."""
        return self.grid[0] * self.grid[1]

    @property
    def patch_values(self) -> int:
        """Values per token."""
        return self.patch * self.patch


@dataclass(frozen=True)
class Prompt:
    """What a video is asked to show."""

    digit: int
    direction: str
    speed: str
    turn: str

    @property
    def text(self) -> str:
        """The sentence."""
        return f"a {self.digit} moves {self.direction} {self.speed}, then turns {self.turn}"

    @classmethod
    def parse(cls, text: str) -> "Prompt":
        """The prompt of a sentence.

        Raises:
            ValueError: the sentence is not of the form that the generator knows.
        """
        match = _PATTERN.fullmatch(text.strip())
        if match is None:
            raise ValueError(
                f"prompt {text!r} is not 'a <digit> moves <direction> <speed>, then turns"
                f" <direction>' with directions {', '.join(DIRECTIONS)} and speeds"
                f" {', '.join(SPEEDS)}"
            )
        digit, direction, speed, turn = match.groups()
        return cls(int(digit), direction, speed, turn)


def all_prompts() -> list[Prompt]:
    """Every prompt: 10 digits, 4 directions, 2 speeds, 2 turns to a side."""
    return [
        Prompt(digit, direction, speed, turn)
        for digit in range(10)
        for direction in DIRECTIONS
        for speed in SPEEDS
        for turn in DIRECTIONS
        if (direction in ("left", "right")) != (turn in ("left", "right"))
    ]


def split_prompts(held_out: int = 40, seed: int = 0) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts for training and, apart from them, for evaluation.

    Only KVPO holds prompts out: pretraining is to know every word in every place.
    """
    prompts = all_prompts()
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = [prompts[i] for i in order]
    return chosen[held_out:], chosen[:held_out]


def tokenize(prompts: Sequence[Prompt]) -> Tensor:
    """Word indices, int64 `[B, 8]`."""
    rows = [[WORDS.index(word) for word in re.findall(r"\w+", prompt.text)] for prompt in prompts]
    return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), PROMPT_WORDS)


@functools.cache
def digit_bank() -> tuple[tuple[Tensor, ...], ...]:
    """Per digit the images `[8, 8]` in [0, 1], in the data set's order."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32) / 16.0
    return tuple(
        tuple(image for image, label in zip(images, data.target, strict=True) if label == digit)
        for digit in range(10)
    )


@dataclass(frozen=True)
class Clips:
    """Videos with what is hidden in them."""

    videos: Tensor
    """`[B, frames, canvas, canvas]`, -1 background, 1 ink."""
    speeds: Tensor
    """int64 `[B, frames]`, pixels per frame; of frame 0, of the step that did not happen."""


def make_clips(prompts: Sequence[Prompt], config: DataConfig, generator: torch.Generator) -> Clips:
    """Draw a video for each prompt."""
    B, T = len(prompts), config.frames
    bank = digit_bank()
    writer = torch.randint(config.exemplars, (B,), generator=generator).tolist()
    digit = torch.stack([bank[p.digit][w] for p, w in zip(prompts, writer, strict=True)])

    low, high = config.segment_blocks
    block = torch.arange(T) // config.block_frames
    segments = -(-T // (low * config.block_frames))
    ends = torch.randint(low, high + 1, (B, segments), generator=generator).cumsum(1)
    segment = (block[None, :, None] >= ends[:, None, :]).sum(-1)
    holds = torch.rand(B, segments, generator=generator) < config.speed_match
    holds[:, 0] = True  # the first segment keeps the prompt's word
    usual = torch.tensor([SPEEDS[p.speed] for p in prompts])[:, None]
    speeds = torch.where(holds, usual, 3 - usual).gather(1, segment)

    first, last = config.turn_blocks
    turn = torch.randint(first, last + 1, (B, 1), generator=generator)
    before = torch.tensor([DIRECTIONS[p.direction] for p in prompts])[:, None]
    after = torch.tensor([DIRECTIONS[p.turn] for p in prompts])[:, None]
    heading = torch.where((block[None] >= turn)[..., None], after, before)
    steps = heading * speeds[..., None]
    start = (config.canvas - DIGIT_PIXELS) // 2
    corner = start + steps.cumsum(1) - steps[:, :1]
    return Clips(place(digit, corner, config.canvas) * 2 - 1, speeds)


def place(digit: Tensor, corner: Tensor, canvas: int) -> Tensor:
    """Digits on a torus.

    Args:
        digit: `[B, 8, 8]`.
        corner: int64 `[B, T, 2]`, row and column of the upper left pixel, in any range.

    Returns:
        `[B, T, canvas, canvas]`.
    """
    margin = canvas - DIGIT_PIXELS
    padded = torch.nn.functional.pad(digit, (0, margin, 0, margin))
    pixel = torch.arange(canvas)
    row = (pixel - corner[..., :1]) % canvas
    column = (pixel - corner[..., 1:]) % canvas
    which = torch.arange(digit.shape[0])[:, None, None, None]
    return padded[which, row[:, :, :, None], column[:, :, None, :]]


def patchify(videos: Tensor, config: DataConfig) -> Tensor:
    """`[..., frames, canvas, canvas]` to tokens `[..., frames * T, patch_values]`."""
    rows, columns = config.grid
    cut = videos.unflatten(-1, (columns, config.patch)).unflatten(-3, (rows, config.patch))
    return cut.transpose(-3, -2).flatten(-2).flatten(-4, -2)


def unpatchify(tokens: Tensor, config: DataConfig) -> Tensor:
    """The inverse of `patchify`."""
    rows, columns = config.grid
    cut = tokens.unflatten(-2, (-1, rows, columns)).unflatten(-1, (config.patch, config.patch))
    return cut.transpose(-3, -2).flatten(-4, -3).flatten(-2)
