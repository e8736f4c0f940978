"""A Wan-shaped causal transformer with random weights; how it attends is the caller's.

Also the rotation as Wan computes it: row by row, angles put together from one table per axis, and a
complex product in float64.

Shape letters: B rows, N tokens of a block, T tokens of a frame, M model dimension, H heads, D head
size, P values of a token.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kvpo_kernels import RopeTable
from kvpo_kernels.cost.sizes import GeneratorSize

PATCH = 4  # latents of a token, 2 x 2

Attend = Callable[[int, nn.Module, Tensor, Tensor, Tensor], Tensor]
"""(layer, its weights, q, k, v `[B, N, H, D]` before norm and rotation) -> `[B, N, H, D]`."""


class Block(nn.Module):
    """The weights of one layer and what surrounds its self-attention."""

    def __init__(self, size: GeneratorSize) -> None:
        super().__init__()
        M = size.dim
        self.heads = (size.heads, size.head_dim)
        self.q, self.k, self.v, self.o = (nn.Linear(M, M) for _ in range(4))
        self.cross_q, self.cross_k, self.cross_v, self.cross_o = (nn.Linear(M, M) for _ in range(4))
        self.ffn_in, self.ffn_out = nn.Linear(M, size.ffn), nn.Linear(size.ffn, M)
        self.q_norm, self.k_norm = (nn.Parameter(torch.ones(M)) for _ in range(2))
        self.modulation = nn.Parameter(torch.randn(6, M) * M**-0.5)

    def project(self, x: Tensor, mod: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = _modulated(x, mod[0], mod[1])
        q, k, v = (linear(h).unflatten(-1, self.heads) for linear in (self.q, self.k, self.v))
        return q, k, v

    def finish(
        self, x: Tensor, attended: Tensor, mod: Tensor, text: tuple[Tensor, Tensor]
    ) -> Tensor:
        x = x + mod[2] * self.o(attended.flatten(2))
        # All rows have one prompt: their tokens are the queries of one product.
        q = self.cross_q(F.layer_norm(x, x.shape[-1:])).flatten(0, 1)[None]
        k, v = text
        q = q.unflatten(-1, self.heads).transpose(1, 2)
        crossed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.cross_o(crossed).view(x.shape)
        h = _modulated(x, mod[3], mod[4])
        return x + mod[5] * self.ffn_out(F.gelu(self.ffn_in(h), approximate="tanh"))


class Transformer(nn.Module):
    """Predicts the velocity of a block's tokens."""

    def __init__(self, size: GeneratorSize) -> None:
        super().__init__()
        self.size = size
        values = PATCH * size.latent_channels
        self.patch_in, self.patch_out = nn.Linear(values, size.dim), nn.Linear(size.dim, values)
        self.time = nn.Sequential(
            nn.Linear(64, size.dim), nn.SiLU(), nn.Linear(size.dim, 6 * size.dim)
        )
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))

    def text(self, rng: torch.Generator) -> list[tuple[Tensor, Tensor]]:
        """Cross-attention keys and values of a random prompt per layer, cached as everyone does."""
        weight = self.patch_in.weight
        encoded = torch.randn(1, self.size.text_tokens, self.size.dim, generator=rng).to(weight)
        with torch.no_grad():
            return [
                tuple(  # type: ignore[misc]
                    linear(encoded).unflatten(-1, block.heads).transpose(1, 2)
                    for linear in (block.cross_k, block.cross_v)
                )
                for block in self.blocks
            ]

    def forward(
        self,
        x: Tensor,
        sigma: float | Tensor,
        text: list[tuple[Tensor, Tensor]],
        attend: Attend,
        checkpoint_layers: bool = False,
    ) -> Tensor:
        """Velocity `[B, N, P]` of noisy tokens `[B, N, P]`."""
        frequencies = torch.exp(torch.linspace(0, 6, 32, device=x.device))
        angles = sigma * frequencies
        features = torch.cat([angles.cos(), angles.sin()]).to(x.dtype)
        mod = self.time(features).view(6, -1)
        h = self.patch_in(x)
        for layer, block in enumerate(self.blocks):
            run = functools.partial(_layer, layer, block, text[layer], attend)
            if checkpoint_layers and torch.is_grad_enabled():
                h = checkpoint(run, h, mod, use_reentrant=False)
            else:
                h = run(h, mod)
        return self.patch_out(F.layer_norm(h, h.shape[-1:]))


def _layer(
    layer: int, block: Block, text: tuple[Tensor, Tensor], attend: Attend, x: Tensor, mod: Tensor
) -> Tensor:
    m = mod + block.modulation
    return block.finish(x, attend(layer, block, *block.project(x, m)), m, text)


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift


def axis_tables(
    rope: RopeTable, first_frame: int, grid: tuple[int, int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Complex rotations of frames, rows and columns, each `[n, pairs]`, float64."""
    pairs = rope.head_dim // 2
    wide = torch.complex(*rope.tokens(first_frame, grid, wide=True)).view(*grid, pairs)
    frame, height, width = wide.split([pairs - 2 * (pairs // 3), pairs // 3, pairs // 3], dim=-1)
    return frame[:, 0, 0], height[0, :, 0], width[0, 0]


def rope_float64(x: Tensor, grid: tuple[int, int, int], tables: tuple[Tensor, ...]) -> Tensor:
    """Row by row, angles assembled for each; all of it in float64 until the rows are together."""
    rows, tokens = [], grid[0] * grid[1] * grid[2]
    for row in x:
        pairs = torch.view_as_complex(row[:tokens].double().unflatten(-1, (-1, 2)))
        axes = [
            table.view([n if axis == i else 1 for i in range(3)] + [-1]).expand(*grid, -1)
            for axis, (table, n) in enumerate(zip(tables, grid, strict=True))
        ]
        turned = pairs * torch.cat(axes, dim=-1).view(tokens, 1, -1)
        rows.append(torch.cat([torch.view_as_real(turned).flatten(2), row[tokens:]]))
    return torch.stack(rows).to(x.dtype)
