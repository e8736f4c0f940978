"""Angles of the 3-D rotary embedding: which turn a token's queries and keys get."""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from kvpo_kernels.checks import integer, number
from kvpo_kernels.errors import ConfigError, DtypeError, RangeError, ShapeError
from kvpo_kernels.ops.store_frames import under_fake_mode

Angles = tuple[Tensor, Tensor]


class _Block(NamedTuple):
    """What the angles of a block depend on, besides where it begins."""

    grid: tuple[int, int, int]
    head_dim: int
    theta: float
    wide: bool
    device: torch.device


class RopeTable:
    """Angles of the 3-D rotary embedding, as Wan splits them over a head.

    Of the c = D/2 pairs (2i, 2i+1) of a head the first c - 2*(c//3) turn with the absolute frame
    index, the next c//3 with the row and the last c//3 with the column, pair j of an axis with n
    pairs at frequency `theta ** (-j / n)`. Angles are computed in float64; their cosines and sines
    are kept in float32 (and in float64 for float64 input).

    A block's first frame is an int, or an int64 tensor of one value. In a compiled graph an int
    turns dynamic with its second value: two graphs, or three where blocks have one frame, since 0
    and 1 are constants to a compiler. A tensor takes one graph, and on a GPU nothing waits for its
    value: what a captured graph needs that is replayed for every block.

    Args:
        head_dim: D, even.
        max_frames: absolute frame indices below this can be rotated.
        max_height, max_width: size of the largest token grid.
        theta: 10000 in Wan.
        device: of the tables.
        in_place: `tokens` hands out the same memory for every block of a grid, filled for the one
            last asked for: what a captured CUDA graph reads. Ask for the next block, then replay.
            Compiled code and positions on a GPU have no use for it.

    Source: Su et al. (arXiv:2104.09864); the axis split of Wan (arXiv:2503.20314).
    """

    def __init__(
        self,
        head_dim: int,
        max_frames: int = 1024,
        max_height: int = 64,
        max_width: int = 64,
        theta: float = 10000.0,
        device: torch.device | str = "cpu",
        in_place: bool = False,
    ) -> None:
        head_dim = integer("head_dim", head_dim, None)
        if head_dim < 2 or head_dim % 2:
            raise RangeError(f"head_dim must be even and at least 2, got {head_dim}")
        if not 0 < number("theta", theta) < math.inf:
            raise ConfigError(f"theta must be positive and finite, got {theta}")
        max_frames = integer("max_frames", max_frames, 1)
        max_height = integer("max_height", max_height, 1)
        max_width = integer("max_width", max_width, 1)
        self.head_dim, self.theta = head_dim, theta
        self.limits = (max_frames, max_height, max_width)
        self._device = torch.device(device)
        self.in_place = in_place
        self._filled: dict[_Block, tuple[int, Angles]] = {}

    def tokens(
        self, first_frame: int | Tensor, grid: tuple[int, int, int], wide: bool = False
    ) -> Angles:
        """Cosines and sines `[frames * height * width, D / 2]` of a block's tokens.

        Kept for the next call with the same block, as every layer and step of it makes; not those
        of a position on a GPU, which are computed there.

        Raises:
            RangeError: a frame, row or column outside the table, named with its limit; of a
                position on a GPU the frame is not known, and not checked.
            DtypeError: a position that is neither an int nor an integer tensor of one value.
        """
        self._check(first_frame, grid)
        if torch.compiler.is_compiling():
            # Not traced: a compiler's own cosines have other bits, and a cache would be guarded.
            sizes = (*grid, self.head_dim, self.theta, wide, self._device)
            if isinstance(first_frame, Tensor):
                return _tokens_at(first_frame, self.limits[0], *sizes)  # type: ignore[no-any-return]
            return _tokens_of(first_frame, *sizes)  # type: ignore[no-any-return]
        block = _Block(grid, self.head_dim, self.theta, wide, self._device)
        # Real angles would not fit under a fake mode, and fake ones would fit none later.
        if under_fake_mode() or (isinstance(first_frame, Tensor) and not first_frame.is_cpu):
            return _computed(first_frame, block)
        if isinstance(first_frame, Tensor):
            first_frame = int(first_frame)
            self._check(first_frame, grid)
        made = _kept(first_frame, block)
        return self._fill(first_frame, block, made) if self.in_place else made

    @torch.inference_mode(False)
    def _fill(self, first_frame: int, block: _Block, made: Angles) -> Angles:
        if block not in self._filled:
            self._filled[block] = (first_frame, (made[0].clone(), made[1].clone()))
        held, memory = self._filled[block]
        if held != first_frame:
            for to, value in zip(memory, made, strict=True):
                to.copy_(value)
            self._filled[block] = (first_frame, memory)
        return memory

    def _check(self, first_frame: int | Tensor, grid: tuple[int, int, int]) -> None:
        if isinstance(first_frame, Tensor):
            kind = first_frame.dtype
            if kind.is_floating_point or kind.is_complex or kind is torch.bool:
                raise DtypeError(f"first_frame must hold an integer, got {kind}")
            if first_frame.numel() != 1:
                raise ShapeError(f"first_frame must be one value, got {list(first_frame.shape)}")
            first_frame = 0  # the value is checked where it is known
        if not isinstance(grid, (tuple, list)) or len(grid) != 3:
            raise ShapeError(f"grid must be (frames, height, width), got {grid!r}")
        if any(isinstance(n, (float, str)) for n in (first_frame, *grid)):
            raise DtypeError(f"first_frame and grid must be ints, got {first_frame} and {grid}")
        if min(grid) < 1:
            raise RangeError(f"grid must be at least (1, 1, 1), got {grid}")
        _check_frames(first_frame, grid[0], self.limits[0])
        for name, value, limit in (
            ("height", grid[1] - 1, self.limits[1]),
            ("width", grid[2] - 1, self.limits[2]),
        ):
            if value >= limit:
                raise RangeError(f"rope table: {name} {value} not in [0, {limit})")


def _check_frames(first_frame: int, frames: int, limit: int) -> None:
    if first_frame < 0:
        raise RangeError(f"first_frame must be at least 0, got {first_frame}")
    if first_frame + frames > limit:
        raise RangeError(f"rope table: frame {first_frame + frames - 1} not in [0, {limit})")


@torch.inference_mode(False)  # they may be asked for again with gradients
def _computed(first_frame: int | Tensor, block: _Block) -> Angles:
    pairs = block.head_dim // 2
    where = first_frame.device if isinstance(first_frame, Tensor) else torch.device("cpu")
    float64 = {"dtype": torch.float64, "device": where}
    axes = []
    for axis, n in enumerate(block.grid):
        own = pairs // 3 if axis else pairs - 2 * (pairs // 3)
        position = torch.arange(n, **float64)  # type: ignore[call-overload]
        if axis == 0:
            position = position + first_frame
        index = torch.arange(own, **float64)  # type: ignore[call-overload]
        angle = position[:, None] * block.theta ** (-index / max(own, 1))
        shape = [1, 1, 1, own]
        shape[axis] = n
        axes.append(angle.view(shape).expand(*block.grid, own))
    angles = torch.cat(axes, dim=-1).reshape(-1, pairs)
    dtype = torch.float64 if block.wide else torch.float32
    return tuple(f().to(dtype).to(block.device) for f in (angles.cos, angles.sin))  # type: ignore[return-value]


# Blocks come in order: one that 64 others followed is not asked for again.
_kept = lru_cache(maxsize=64)(_computed)


# For compiled graphs. No autograd, no cache that a guard could see; what the two hand out is the
# caller's own, since a compiler may use its memory again.
_BLOCK = (
    "SymInt frames, SymInt height, SymInt width, SymInt head_dim, float theta, bool wide,"
    " Device device"
)
torch.library.define("kvpo::rope_tokens", f"(SymInt first_frame, {_BLOCK}) -> (Tensor, Tensor)")
torch.library.define(
    "kvpo::rope_tokens_at",
    f"(Tensor first_frame, SymInt max_frames, {_BLOCK}) -> (Tensor, Tensor)",
)


def _tokens_impl(first_frame: int, *block: object) -> Angles:
    cos, sin = _kept(first_frame, _block(*block))
    return cos.clone(), sin.clone()


def _tokens_at_impl(first_frame: Tensor, max_frames: int, *block: object) -> Angles:
    named = _block(*block)
    if first_frame.device.type != "cpu":
        return _computed(first_frame.reshape(()), named)
    _check_frames(int(first_frame), named.grid[0], max_frames)
    return _tokens_impl(int(first_frame), *block)


def _block(*values: object) -> _Block:
    frames, height, width, *others = values
    return _Block((frames, height, width), *others)  # type: ignore[arg-type]


def _tokens_fake(_: object, *block: object) -> Angles:
    b = _block(*block)
    shape = (b.grid[0] * b.grid[1] * b.grid[2], b.head_dim // 2)
    dtype = torch.float64 if b.wide else torch.float32
    cos, sin = (torch.empty(shape, dtype=dtype, device=b.device) for _ in range(2))
    return cos, sin


def _tokens_at_fake(first_frame: object, _: int, *block: object) -> Angles:
    return _tokens_fake(first_frame, *block)


_KEYS = "CompositeExplicitAutograd"  # one of them has no tensor to dispatch on
torch.library.impl("kvpo::rope_tokens", _KEYS, _tokens_impl)
torch.library.impl("kvpo::rope_tokens_at", _KEYS, _tokens_at_impl)
torch.library.register_fake("kvpo::rope_tokens", _tokens_fake)
torch.library.register_fake("kvpo::rope_tokens_at", _tokens_at_fake)
_tokens_of = torch.ops.kvpo.rope_tokens.default
_tokens_at = torch.ops.kvpo.rope_tokens_at.default
