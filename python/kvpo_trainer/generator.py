"""A causal diffusion transformer with Wan-style blocks, small enough for a CPU.

One set of weights runs in two ways. Teacher forcing (pretraining): all blocks of a clip at once, a
clean stream whose keys and values are the history and a noisy stream that is denoised, gradients
through both. Streaming (rollout and replay): one block at a time, history in a `FramePool`, read in
place by `routed_attention`.

Shape letters: B rows (a row is one branch of one prompt), K blocks, N tokens of a block
(block_frames * T), P values of a token, H heads, D head size, M model dimension.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvpo_kernels import (
    FramePool,
    PreparedSlots,
    RopeTable,
    RouteTable,
    qk_norm_rope,
    routed_attention,
)
from kvpo_trainer.data import PROMPT_WORDS, WORDS, DataConfig


@dataclass(frozen=True)
class GeneratorConfig:
    """Sizes of the transformer."""

    dim: int = 96
    layers: int = 4
    heads: int = 3
    ffn_factor: int = 4
    rope_theta: float = 200.0
    """Wan has 10000 for 1024 positions; here there are 57 frames and 4 rows and columns."""


History = Literal["float32", "int8", "float8"]
"""What the keys and values of past frames are kept in."""
_PAGES = {"float32": None, "int8": torch.int8, "float8": torch.float8_e4m3fn}


@dataclass(frozen=True)
class Contexts:
    """Which frames each block of a clip attends to, besides itself, under teacher forcing."""

    frames: Tensor
    """int64 `[B, K, C]`, absolute frames; anything where `valid` is False."""
    valid: Tensor
    """bool `[B, K, C]`."""


class Block(nn.Module):
    """Self-attention over history, text cross-attention and a feed-forward net, modulated."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        M = config.dim
        self.heads, self.head_dim = config.heads, M // config.heads
        self.qkv = nn.Linear(M, 3 * M)
        self.out = nn.Linear(M, M)
        # Wan scales by 1; 1.5 lets attention pick single frames from the first step on.
        self.q_norm = nn.Parameter(torch.full((M,), 1.5))
        self.k_norm = nn.Parameter(torch.full((M,), 1.5))
        self.cross_q = nn.Linear(M, M)
        self.cross_kv = nn.Linear(M, 2 * M)
        self.cross_out = nn.Linear(M, M)
        self.ffn_in = nn.Linear(M, config.ffn_factor * M)
        self.ffn_out = nn.Linear(config.ffn_factor * M, M)
        # Rows: shift, scale and gate of attention, then of the feed-forward net.
        self.modulation = nn.Parameter(torch.zeros(6, M))
        nn.init.zeros_(self.cross_out.weight)
        with torch.no_grad():
            self.modulation[2], self.modulation[5] = 0.5, 0.5

    def project(self, x: Tensor, mod: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values `[..., H, D]` of tokens `[..., M]`, before norm and rotation."""
        h = _modulated(x, mod[..., 0, :], mod[..., 1, :])
        q, k, v = self.qkv(h).float().unflatten(-1, (3, self.heads, self.head_dim)).unbind(-3)
        return q, k, v

    def finish(self, x: Tensor, attended: Tensor, mod: Tensor, text: Tensor) -> Tensor:
        """The block's output from its attention `[..., H, D]`."""
        x = x + mod[..., 2, :] * self.out(attended.flatten(-2))
        x = x + self._cross(x, text)
        h = _modulated(x, mod[..., 3, :], mod[..., 4, :])
        return x + mod[..., 5, :] * self.ffn_out(F.gelu(self.ffn_in(h), approximate="tanh"))

    def _cross(self, x: Tensor, text: Tensor) -> Tensor:
        heads = (self.heads, self.head_dim)
        q = self.cross_q(F.layer_norm(x, x.shape[-1:])).flatten(1, -2)
        q = q.unflatten(-1, heads).transpose(1, 2)
        k, v = self.cross_kv(text).unflatten(-1, (2, *heads)).unbind(-3)
        out = F.scaled_dot_product_attention(q, k.transpose(1, 2), v.transpose(1, 2))
        result: Tensor = self.cross_out(out.transpose(1, 2).flatten(-2))
        return result.view(x.shape)


class Generator(nn.Module):
    """Predicts the velocity eps - x0 of one block, or of all blocks of a clip."""

    def __init__(self, config: GeneratorConfig, data: DataConfig) -> None:
        super().__init__()
        self.config, self.data = config, data
        self.history: History = "float32"
        M = config.dim
        self.head_dim = M // config.heads
        self.patch_in = nn.Linear(data.patch_values, M)
        self.position = nn.Parameter(torch.randn(data.frame_tokens, M) * 0.02)
        self.words = nn.Embedding(len(WORDS), M)
        self.word_position = nn.Parameter(torch.randn(PROMPT_WORDS, M) * 0.5)
        self.time_in = nn.Linear(64, M)
        self.time_out = nn.Linear(M, M)
        self.time_modulation = nn.Linear(M, 6 * M)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.head_modulation = nn.Parameter(torch.zeros(2, M))
        self.patch_out = nn.Linear(M, data.patch_values)
        for layer in (self.time_modulation, self.patch_out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        self._rope = RopeTable(
            self.head_dim,
            max_frames=1024,
            max_height=data.grid[0],
            max_width=data.grid[1],
            theta=config.rope_theta,
        )

    @property
    def block_tokens(self) -> int:
        """N."""
        return self.data.block_frames * self.data.frame_tokens

    def new_pool(self, num_slots: int) -> FramePool:
        """A frame pool for this generator's keys and values."""
        return FramePool(
            num_slots,
            self.data.frame_tokens,
            self.config.layers,
            self.config.heads,
            self.head_dim,
            dtype=torch.float32,
            page_dtype=_PAGES[self.history],
        )

    def encode_text(self, words: Tensor) -> Tensor:
        """Text tokens `[B, 8, M]` of word indices `[B, 8]`."""
        encoded: Tensor = self.words(words) + self.word_position
        return encoded

    def stream(
        self,
        x: Tensor,
        sigma: float,
        text: Tensor,
        first_frame: int,
        pool: FramePool,
        table: RouteTable,
        write_slots: PreparedSlots | None = None,
    ) -> Tensor:
        """Velocity of one block, its history read from the pool.

        Args:
            x: `[B, N, P]`, the noisy block.
            sigma: its noise level.
            text: `[B, 8, M]`, of `encode_text`.
            first_frame: absolute index of the block's first frame.
            table: the frames each row attends to besides its block.
            write_slots: `[B, block_frames]`, of `FramePool.prepare_write` or `advance`: the
                context pass, which writes the block's keys and values there and predicts nothing.

        Returns:
            `[B, N, P]`; empty for a context pass, which ends with the last layer's write.
        """
        grid = (self.data.block_frames, *self.data.grid)
        # Not `torch.full`, for which torch.compile takes every number as another constant.
        time, mod = self._time(torch.ones(x.shape[0], 1) * sigma)
        h = self._embed(x)
        for layer, block in enumerate(self._layers()):
            m = mod + block.modulation
            q, k, v = block.project(h, m)
            q, k = qk_norm_rope(
                q, k, block.q_norm, block.k_norm, self._rope, first_frame, grid=grid
            )
            if write_slots is not None and layer == self.config.layers - 1:
                pool.write(layer, write_slots, k, v)
                return x.new_empty(0)
            attended = routed_attention(
                *(q, pool.k(layer), pool.v(layer), table, k, v),
                k_scales=pool.k_scales(layer),
                v_scales=pool.v_scales(layer),
            )
            if write_slots is not None:  # after the layer's last look at what leaves
                pool.write(layer, write_slots, k, v)
            h = block.finish(h, attended, m, text)
        return self._head(h, time)

    def teacher_forced(
        self,
        clean: Tensor,
        noisy: Tensor,
        sigmas: Tensor,
        text: Tensor,
        clean_contexts: Contexts,
        noisy_contexts: Contexts,
    ) -> Tensor:
        """Velocities of all blocks, each seeing the clean frames of its context and itself.

        Args:
            clean, noisy: `[B, K, N, P]`.
            sigmas: `[B, K]`, noise levels of `noisy`.
            clean_contexts: of the clean stream, which plays the context passes.
            noisy_contexts: of the noisy one.

        Returns:
            `[B, K, N, P]` float32.
        """
        B, K, N, _ = clean.shape
        frames, heads = K * self.data.block_frames, self.config.heads
        grid = (frames, *self.data.grid)
        time, mod_noisy = self._time(sigmas)
        _, mod_clean = self._time(torch.zeros_like(sigmas))
        # One modulation per block, broadcast over its tokens.
        mod = torch.cat([mod_clean, mod_noisy])[:, :, None]
        x = self._embed(torch.cat([clean, noisy]))
        both = torch.cat([text, text])
        picks = [_Pick(c, self.data) for c in (clean_contexts, noisy_contexts)]
        for layer, block in enumerate(self._layers()):
            m = mod + block.modulation
            q, k, v = (t.flatten(1, 2) for t in block.project(x, m))
            q, k = qk_norm_rope(q, k, block.q_norm, block.k_norm, self._rope, 0, grid=grid)
            # The clean stream ends with its keys and values of the last layer.
            streams = (0, 1) if layer < self.config.layers - 1 else (1,)
            parts = []
            for stream in streams:
                own = slice(stream * B, (stream + 1) * B)
                parts.append(picks[stream].attend(q[own], k[own], v[own], k[:B], v[:B], heads, K))
            kept = slice(streams[0] * B, 2 * B)
            attended = torch.cat(parts).unflatten(1, (K, N))
            x = block.finish(x[kept], attended, m[kept], both[kept])
        return self._head(x, time[:, :, None])

    def _layers(self) -> Iterator[Block]:
        for block in self.blocks:
            assert isinstance(block, Block)
            yield block

    def _embed(self, x: Tensor) -> Tensor:
        frames = x.shape[-2] // self.data.frame_tokens
        embedded: Tensor = self.patch_in(x).float() + self.position.repeat(frames, 1)
        return embedded

    def _time(self, sigmas: Tensor) -> tuple[Tensor, Tensor]:
        """Embedding `[..., M]` and modulation `[..., 6, M]` of noise levels `[...]`."""
        frequencies = 1.5 * torch.exp(torch.linspace(0, 6, 32))
        angles = sigmas[..., None] * frequencies
        features = torch.cat([angles.cos(), angles.sin()], dim=-1)
        time = self.time_out(F.silu(self.time_in(features))).float()
        modulation = self.time_modulation(F.silu(time)).float()
        return time, modulation.unflatten(-1, (6, self.config.dim))

    def _head(self, x: Tensor, time: Tensor) -> Tensor:
        shift, scale = (time[..., None, :] + self.head_modulation).unbind(-2)
        velocity: Tensor = self.patch_out(_modulated(x, shift, scale)).float()
        return velocity


class _Pick:
    """Gathers the contexts of one stream and attends to them; the mask is shared by the layers."""

    def __init__(self, contexts: Contexts, data: DataConfig) -> None:
        B, K = contexts.frames.shape[:2]
        T = data.frame_tokens
        own = torch.ones(B, K, data.block_frames * T, dtype=torch.bool)
        self.mask = torch.cat([contexts.valid.repeat_interleave(T, dim=-1), own], -1)
        self.mask = self.mask.flatten(0, 1)[:, None, None]
        self.row = torch.arange(B)[:, None, None]
        self.frames, self.T = contexts.frames, T

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, k_clean: Tensor, v_clean: Tensor, heads: int, K: int
    ) -> Tensor:
        """`[B, K * N, H, D]`; block j sees the clean frames of its context, then itself."""

        def keys(own: Tensor, clean: Tensor) -> Tensor:
            pages = clean.flatten(2).unflatten(1, (-1, self.T)).flatten(2)  # [B, frames, T * H * D]
            history = pages[self.row, self.frames].unflatten(-1, (self.T, -1)).flatten(2, 3)
            joined = torch.cat([history, own.flatten(2).unflatten(1, (K, -1))], dim=2)
            return joined.flatten(0, 1).unflatten(-1, (heads, -1)).transpose(1, 2)

        queries = q.unflatten(1, (K, -1)).flatten(0, 1).transpose(1, 2)
        with _full_precision():
            out = F.scaled_dot_product_attention(
                queries, keys(k, k_clean), keys(v, v_clean), attn_mask=self.mask
            )
        return out.transpose(1, 2).unflatten(0, (-1, K)).flatten(1, 2)


@contextmanager
def _full_precision() -> Iterator[None]:
    # torch's masked bfloat16 attention is slower than its float32 one on a CPU.
    with torch.autocast("cpu", enabled=False):
        yield


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift


def parameter_count(generator: nn.Module) -> int:
    """Number of trained values."""
    return sum(math.prod(p.shape) for p in generator.parameters())
