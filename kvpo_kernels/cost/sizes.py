"""Shapes of the generators that KVPO trains, as data."""

from dataclasses import dataclass, fields

from kvpo_kernels.errors import ConfigError


@dataclass(frozen=True)
class GeneratorSize:
    """A streaming autoregressive video generator of Wan-style transformer blocks."""

    layers: int
    dim: int
    """M, model dimension, `heads * head_dim`."""
    heads: int
    ffn: int
    """Width of the feed-forward net."""
    grid: tuple[int, int]
    """Rows and columns of tokens of a frame, after patches of 2 x 2 latents."""
    latent_channels: int
    text_tokens: int
    block_frames: int = 3
    denoise_steps: int = 4

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if min(value if isinstance(value, tuple) else (value,)) < 1:
                raise ConfigError(f"{field.name} must be at least 1, got {value}")
        if self.dim % self.heads:
            raise ConfigError(f"dim must be a multiple of heads = {self.heads}, got {self.dim}")

    @property
    def head_dim(self) -> int:
        """D."""
        return self.dim // self.heads

    @property
    def frame_tokens(self) -> int:
        """T."""
        return self.grid[0] * self.grid[1]

    @property
    def latent_values(self) -> int:
        """N, latent values of a block: what one velocity energy averages over."""
        return self.block_frames * self.latent_channels * self.frame_tokens * 4


SIZES = {
    # The reference trainer's order of size: a CPU runs an iteration of it in seconds.
    "tiny": GeneratorSize(4, 96, 3, 384, (4, 4), 4, 8),
    # Wan 2.1 at 480p: https://github.com/Wan-Video/Wan2.1, wan/configs.
    "wan-1.3b": GeneratorSize(30, 1536, 12, 8960, (30, 52), 16, 512),
    "wan-14b": GeneratorSize(40, 5120, 40, 13824, (30, 52), 16, 512),
}
"""Generators by name."""
