"""A denoise step that is captured once and replayed: what changes from call to call lies in memory.

The host's launches of a step, dozens per layer, become one. Weights may be updated in
place between replays; the pool's pages, the routes, the angles, sigma and the input are read where
they were at the capture.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from kvpo_kernels import RopeTable, RouteTable

Velocity = Callable[[Tensor, Tensor, RouteTable, RopeTable, int], Tensor]
"""(x `[B, N, P]`, sigma `[1]`, routes, angles, first frame) -> `[B, N, P]`."""
Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]
"""Of a function of no arguments: what repeats its work, and where the result then lies."""


class CudaGraphs:
    """Captures that share their memory: each result is read before the next replay."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            function()  # kernels are compiled, libraries make their workspaces
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            result = function()
        return graph.replay, result


class DenoiseGraph:
    """One policy's velocities of `[B, N, P]`, rows with up to `capacity` frames of history.

    Args:
        velocity: launches the step; nothing in it may depend on values that the host reads.
        like: an input.
        capacity: frames of history of the longest row.
        num_slots: of the pool.
        rope: the angles, made `in_place`.
        grid: (frames, height, width) of a block.
        capture: how to capture, `CudaGraphs` on a GPU.
    """

    def __init__(
        self,
        velocity: Velocity,
        like: Tensor,
        capacity: int,
        num_slots: int,
        rope: RopeTable,
        grid: tuple[int, int, int],
        capture: Capture,
    ) -> None:
        self._velocity, self._capture, self._rope, self._grid = velocity, capture, rope, grid
        self._x = torch.empty_like(like, memory_format=torch.contiguous_format)
        self._sigma = torch.empty(1, device=like.device)
        rows = [list(range(capacity))] * len(like)  # the values come with each call
        self._table = RouteTable(rows, num_slots, like.device)
        self._captured: tuple[Callable[[], None], Tensor] | None = None

    @torch.no_grad()
    def __call__(self, x: Tensor, sigma: float, table: RouteTable, first_frame: int) -> Tensor:
        """The velocity, in memory that the next call writes to."""
        self._x.copy_(x)
        self._sigma.fill_(sigma)
        self._table.slots[:, : table.capacity].copy_(table.slots)
        self._table.slots[:, table.capacity :].fill_(-1)
        self._rope.tokens(first_frame, self._grid)
        if self._captured is None:
            inputs = (self._x, self._sigma, self._table, self._rope, first_frame)
            self._captured = self._capture(lambda: self._velocity(*inputs))
        replay, velocity = self._captured
        replay()
        return velocity
