"""The memory of a frame pool: its pages on the device and in host memory, and copies between them.

What a slot means, and who may write to it, is `pool.py`'s.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from kvpo_kernels.history.route_table import size_may_differ


class Pages:
    """Keys and values of `num_slots` frames on a device and of `host_slots` more in host memory.

    All writing is through `.data`, a view with a version counter of its own: see `FramePool`.

    Args:
        num_slots: F; slots from F on are the host's, as `copy` takes them.
        num_layers: layers of the generator.
        page: `(T, H, D)`.
        dtype: of a page's elements.
        device: of the first F slots.
        scaled: whether each head of a page has a scale.
        host_slots: pinned where the device is a GPU.
    """

    @torch.inference_mode(False)  # a pool outlives the mode in which it may be made
    def __init__(
        self,
        num_slots: int,
        num_layers: int,
        page: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device | str,
        scaled: bool,
        host_slots: int,
    ) -> None:
        self.num_slots, self.host_slots = num_slots, host_slots
        target = torch.device(device)
        self.storage = torch.zeros(2, num_layers, num_slots, *page, dtype=dtype, device=target)
        """`[2, layers, F, T, H, D]`: keys, then values."""
        self.device = self.storage.device
        self.layers = _apart(self.storage)
        """By part (keys, values) and layer: `[F, T, H, D]`, as `storage`."""
        self.memory: tuple[int, int] | None = None
        """Addresses of the first byte of `storage` and past its last; None where it has none."""
        if type(self.storage) is Tensor and target.type != "meta":
            first = self.storage.data_ptr()
            self.memory = (first, first + self.storage.nbytes)
        self.scales: Tensor | None = None
        """`[2, layers, F, H]` float32."""
        if scaled:
            sizes = (2, num_layers, num_slots, page[1])
            self.scales = torch.ones(*sizes, dtype=torch.float32, device=target)
        self.layer_scales = None if self.scales is None else _apart(self.scales)
        """By part and layer: `[F, H]`, as `scales`."""
        host = "cpu" if target.type == "cuda" else target  # meta stays meta
        self.host = [
            torch.zeros(
                *t.shape[:2],
                host_slots,
                *t.shape[3:],
                dtype=t.dtype,
                device=host,
                pin_memory=target.type == "cuda" and host_slots > 0,
            )
            for t in self._device()
        ]
        """As `storage` and, where there are, `scales`."""
        # Of a GPU: where frames move, and slots whose move the compute stream has yet to wait for.
        self._mover: torch.cuda.Stream | None = None
        if target.type == "cuda":
            self._mover = torch.cuda.Stream(target)  # type: ignore[no-untyped-call]
            for tensor in self._device():  # a pool may die while frames still move
                tensor.record_stream(self._mover)
        self._moving: dict[int, torch.cuda.Event] = {}

    def renew(self) -> None:
        """Give every layer another version counter, before some slots are written to.

        A backward through a compiled graph has saved these very tensors, and reads other slots.
        """
        for parts in (self.layers, self.layer_scales or []):
            for row in parts:
                row[:] = [size_may_differ(layer.data, 0) for layer in row]

    @property
    def nbytes(self) -> int:
        """On the device."""
        return sum(t.nbytes for t in self._device())

    @property
    def host_nbytes(self) -> int:
        """In host memory."""
        return sum(t.nbytes for t in self.host)

    def copy(self, moves: Sequence[tuple[int, int]]) -> None:
        """From slot to slot of the device. One slot may go to several."""
        self.wait_for(slot for move in moves for slot in move)
        for tensor in self._device():
            for old, new in moves:
                tensor.data[:, :, new].copy_(tensor[:, :, old])

    def move(self, moves: dict[int, int]) -> None:
        """From slot to slot across device and host; on a GPU behind what was launched before."""
        if self._mover is None:
            self._move_now(moves)
            return
        self.wait_for(moves.values())
        self._mover.wait_stream(torch.cuda.current_stream(self.storage.device))
        with torch.cuda.stream(self._mover):
            self._move_now(moves)
            done = self._mover.record_event()
        for slot in (*moves, *moves.values()):
            if slot < self.num_slots:
                self._moving[slot] = done

    def wait_for(self, slots: Iterable[int]) -> None:
        """Let the current stream wait for moves of these slots; the host does not.

        Once for each move: a pool is read and written on one stream.
        """
        if self._moving:
            for slot in slots:
                done = self._moving.pop(slot, None)
                if done is not None:
                    torch.cuda.current_stream(self.storage.device).wait_event(done)

    def _device(self) -> list[Tensor]:
        return [self.storage] if self.scales is None else [self.storage, self.scales]

    def _move_now(self, moves: dict[int, int]) -> None:
        for on_device, on_host in zip(self._device(), self.host, strict=True):
            for old, new in moves.items():
                source, old_at = self._place(old, on_device, on_host)
                target, new_at = self._place(new, on_device, on_host)
                for part in range(2):  # piece by piece: contiguous ones need no staging
                    for layer in range(self.storage.shape[1]):
                        piece = source[part, layer, old_at]
                        target.data[part, layer, new_at].copy_(piece, non_blocking=True)

    def _place(self, slot: int, on_device: Tensor, on_host: Tensor) -> tuple[Tensor, int]:
        if slot < self.num_slots:
            return on_device, slot
        return on_host, slot - self.num_slots


def _apart(tensor: Tensor) -> list[list[Tensor]]:
    """`tensor[i, j]` for all i, j: the same memory, each in a storage of its own.

    They share no byte, and are not to look as if they did: views of one storage that is written to
    are one tensor to a compiler. Inductor copies it as a whole and, where a size is dynamic, puts
    it together wrongly (seen with torch 2.11 and 2.13).
    """
    if type(tensor) is not Tensor or tensor.device.type == "meta":  # no memory
        return [list(part.unbind()) for part in tensor.unbind()]
    memory, size = tensor.untyped_storage(), tensor[0, 0].nbytes
    shape, strides = tensor.shape[2:], tensor.stride()[2:]

    def part(first: int) -> Tensor:
        piece = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        piece.set_(memory[first : first + size], 0, shape, strides)
        return size_may_differ(piece, 0)

    at = range(0, tensor.nbytes, size)
    layers = tensor.shape[1]
    return [[part(first) for first in at[i * layers : (i + 1) * layers]] for i in range(2)]
