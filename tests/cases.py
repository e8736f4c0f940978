"""Named problems that tests share."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvpo_kernels.history.route_table import RouteTable


@dataclass(frozen=True)
class RoutedCase:
    """Shapes of one `routed_attention` call; letters as in `kvpo_kernels.ops.routed_attention`."""

    name: str
    B: int
    Q: int
    H: int
    D: int
    F: int
    T: int
    R: int
    L: int = 0
    kv_heads: int | None = None
    """None for as many as `H`."""
    ragged: bool = False
    """Row b attends to `(R + b) % (R + 1)` frames, so that one row has none."""
    repeats: bool = False
    """Slots are drawn with replacement."""

    def inputs(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        """Seeded `q, k_pool, v_pool, k_live, v_live`; frames that no row names are NaN."""
        rng = torch.Generator().manual_seed(0)
        heads = self.kv_heads or self.H
        q = torch.randn(self.B, self.Q, self.H, self.D, generator=rng)
        pool = torch.randn(2, self.F, self.T, heads, self.D, generator=rng)
        live = torch.randn(2, self.B, self.L, heads, self.D, generator=rng)
        named = {slot for row in self.slot_lists() for slot in row}
        pool[:, [slot for slot in range(self.F) if slot not in named]] = float("nan")
        return tuple(t.to(dtype) for t in (q, *pool, *live))

    def slot_lists(self) -> list[list[int]]:
        """The seeded routes."""
        rng = torch.Generator().manual_seed(1)
        rows = []
        for b in range(self.B):
            frames = (self.R + b) % (self.R + 1) if self.ragged else self.R
            if self.repeats:
                rows.append(torch.randint(self.F, (frames,), generator=rng).tolist())
            else:
                rows.append(torch.randperm(self.F, generator=rng)[:frames].tolist())
        return rows

    def table(self) -> RouteTable:
        """The routes as a table."""
        return RouteTable(self.slot_lists(), self.F, allow_duplicates=self.repeats)


ROUTED = (
    RoutedCase("one-token", B=1, Q=1, H=1, D=16, F=1, T=1, R=1),
    RoutedCase("live-only", B=2, Q=5, H=2, D=32, F=2, T=3, R=0, L=7),
    RoutedCase("routed-only", B=2, Q=9, H=2, D=32, F=6, T=5, R=3),
    RoutedCase("ragged", B=4, Q=7, H=2, D=64, F=8, T=6, R=3, L=5, ragged=True),
    RoutedCase("no-keys", B=4, Q=7, H=2, D=16, F=8, T=6, R=3, ragged=True),
    RoutedCase("repeated-frames", B=3, Q=4, H=1, D=16, F=3, T=2, R=6, L=2, repeats=True),
    RoutedCase("grouped-heads", B=2, Q=67, H=6, D=32, F=5, T=9, R=2, L=11, kv_heads=2),
    RoutedCase("odd-tiles", B=2, Q=65, H=1, D=96, F=4, T=97, R=2, L=99),
    RoutedCase("many-chunks", B=1, Q=130, H=1, D=128, F=4, T=195, R=2, L=200),
    RoutedCase("widest", B=1, Q=17, H=2, D=256, F=3, T=13, R=2, L=5),
    RoutedCase("half-pairs", B=2, Q=18, H=1, D=48, F=3, T=7, R=2, L=3),
)
