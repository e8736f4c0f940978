"""Runs the Gluon kernels of a module on the CPU: their arithmetic and their protocol of barriers.

Not a simulator of a GPU: layouts, registers and memory fences are ignored. What it does check it
checks without mercy. Shared memory begins as NaN. Partitions are threads. A matrix product reads
its operands when it is waited for, the last moment that hardware might, so a buffer handed back too
early shows; a copy by TMA writes at once, fills what lies outside the tensor with zeros and never
writes there; a barrier that nobody completes is an error after `PATIENCE` seconds.
"""

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.language import constexpr

PATIENCE = 60.0
_program = SimpleNamespace(ids=(0, 0, 0), grid=(1, 1, 1))
_outstanding = threading.local()


class Pointer:
    """An address into a contiguous tensor, or a tensor of addresses."""

    def __init__(self, data: Tensor, offset: Any = 0) -> None:
        self.data, self.offset = data, offset

    def __add__(self, offset: Any) -> "Pointer":
        return Pointer(self.data, self.offset + offset)


class Shared:
    """A piece of shared memory."""

    def __init__(self, data: Tensor) -> None:
        self.data, self.shape, self.dtype = data, data.shape, data.dtype
        self.index = lambda i: Shared(self.data[int(i)])
        self.slice = lambda start, length, dim=0: Shared(self.data.narrow(dim, start, length))
        self.reshape = lambda shape: Shared(self.data.view(shape))
        self.permute = lambda order: Shared(self.data.permute(order))
        self.load = lambda layout: self.data.clone()
        self.store = lambda value: self.data.copy_(value)


class Descriptor:
    """A tensor in global memory and the box that is copied from or to it."""

    layout = None

    def __init__(self, tensor: Tensor, tokens: int) -> None:
        self.tensor, self.shape, self.dtype = tensor, tensor.shape, tensor.dtype
        self.block_shape = [1, tokens, 1, tensor.shape[3]]

    def box(self, at: list[Any]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """Where the part of the box that exists lies, in the tensor and in the box."""
        inside, part = [], []
        for first, length, limit in zip(at, self.block_shape, self.shape, strict=True):
            first = int(first)
            end = max(first, min(first + length, limit))
            inside.append(slice(first, end))
            part.append(slice(0, end - first))
        return tuple(inside), tuple(part)


class Barrier:
    """An mbarrier: a phase completes when all arrivals and all expected bytes are in."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.count = self.pending = self.bytes = self.phase = 0

    def update(self, arrivals: int = 0, transferred: int = 0) -> None:
        with self.changed:
            self.pending -= arrivals
            self.bytes += transferred
            assert self.pending >= 0, "more arrivals than the barrier was made for"
            if self.pending == 0 and self.bytes == 0:
                self.phase ^= 1
                self.pending = self.count
                self.changed.notify_all()

    def wait(self, parity: int) -> None:
        with self.changed:
            done = self.changed.wait_for(lambda: self.phase != parity, PATIENCE)
            assert done, "deadlock: nobody completes the barrier's phase"


class Barriers:
    """Some barriers side by side; a lone one is its own first."""

    def __init__(self, n: int) -> None:
        self.all = [Barrier() for _ in range(n)]
        self.index = lambda i: self.all[int(i)]


def _one(barrier: Any) -> Barrier:
    return barrier if isinstance(barrier, Barrier) else barrier.all[0]


def _init(barrier: Any, count: int) -> None:
    _one(barrier).count = _one(barrier).pending = count


def _copy_in(source: Descriptor, at: list[Any], barrier: Any, target: Shared) -> None:
    inside, part = source.box(at)
    box = torch.zeros(source.block_shape, dtype=source.dtype)
    box[part] = source.tensor[inside]
    target.data.copy_(box.view(target.data.shape))
    _one(barrier).update(transferred=-box.numel() * box.element_size())


def _copy_out(target: Descriptor, at: list[Any], source: Shared) -> None:
    inside, part = target.box(at)
    target.tensor[inside] = source.data.view(target.block_shape)[part]


class Product:
    """A matrix product that was begun; computed when it is waited for."""

    def __init__(self, a: Any, b: Shared, acc: Tensor, use_acc: bool) -> None:
        self.operands, self.result = (a, b, acc, use_acc), None

    def finish(self) -> None:
        a, b, acc, use_acc = self.operands
        left = a.data if isinstance(a, Shared) else a
        self.result = left.float() @ b.data.float() + (acc if use_acc else 0.0)


def _multiply(
    a: Any, b: Shared, acc: Tensor, *, use_acc: bool = True, is_async: bool = False
) -> Product:
    assert is_async and isinstance(acc, Tensor)
    _outstanding.list = [*getattr(_outstanding, "list", []), Product(a, b, acc, use_acc)]
    return _outstanding.list[-1]


def _wait_products(outstanding: int, deps: tuple[Product]) -> Tensor:
    running = _outstanding.list
    done, _outstanding.list = (
        running[: len(running) - outstanding],
        running[-outstanding or len(running) :],
    )
    for product in done:
        product.finish()
    (product,) = deps
    assert product.result is not None, "used before it was waited for"
    return product.result


def _partitions(functions: list[tuple[Callable[..., None], tuple]], *_: Any) -> None:
    failures: list[BaseException] = []

    def run(function: Callable[..., None], arguments: tuple) -> None:
        try:
            function(*arguments)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=f) for f in functions]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    if failures:
        raise failures[0]


def _load(at: Pointer, mask: Any = None, other: Any = 0) -> Tensor:
    flat = at.data.reshape(-1)
    index = torch.as_tensor(at.offset)
    mask = torch.ones_like(index, dtype=torch.bool) if mask is None else torch.as_tensor(mask)
    mask, index = torch.broadcast_tensors(mask, index)
    values = flat[torch.where(mask, index, 0).long()] if flat.numel() else torch.zeros(index.shape)
    return torch.where(
        mask,
        values,
        torch.as_tensor(
            other,
            dtype=torch.promote_types(values.dtype, torch.int32)
            if not values.is_floating_point()
            else values.dtype,
        ),
    )


def _store(at: Pointer, value: Tensor, mask: Tensor) -> None:
    mask, index = torch.broadcast_tensors(mask, torch.as_tensor(at.offset))
    at.data.view(-1)[index[mask].long()] = value[mask]


def _allocate(dtype: Any, shape: list[int], layout: Any) -> Any:
    if layout == "barrier":
        return Barriers(shape[0])
    return Shared(torch.full([int(n) for n in shape], math.nan, dtype=dtype))


_ANY = lambda *_, **__: None
_AS = torch.as_tensor
GL = SimpleNamespace(
    constexpr=constexpr,
    int32=torch.int32,
    int64=torch.int64,
    float32=torch.float32,
    NVMMADistributedLayout=_ANY,
    DotOperandLayout=_ANY,
    SliceLayout=_ANY,
    BlockedLayout=_ANY,
    allocate_shared_memory=_allocate,
    arange=lambda first, end, layout=None: torch.arange(first, end),
    cdiv=lambda a, b: (a + b - 1) // b,
    convert_layout=lambda value, layout: value,
    exp2=torch.exp2,
    full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
    load=_load,
    log2=torch.log2,
    max=lambda value, axis: value.amax(axis),
    maximum=lambda a, b: torch.maximum(_AS(a), _AS(b)),
    num_programs=lambda axis: _program.grid[axis],
    num_warps=lambda: 4,
    program_id=lambda axis: torch.tensor(_program.ids[axis]),
    static_range=range,
    store=_store,
    sum=lambda value, axis: value.sum(axis),
    warp_specialize=_partitions,
    where=lambda there, a, b: torch.where(_AS(there), a, b),
    zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
)
MBARRIER = SimpleNamespace(
    MBarrierLayout=lambda: "barrier",
    init=_init,
    expect=lambda barrier, n: _one(barrier).update(arrivals=1, transferred=n),
    wait=lambda barrier, parity: _one(barrier).wait(int(parity)),
    arrive=lambda barrier, count: (_one(barrier).update(arrivals=count), time.sleep(0)),
)
TMA = SimpleNamespace(
    async_copy_global_to_shared=_copy_in,
    async_copy_shared_to_global=_copy_out,
    store_wait=_ANY,
)


class Kernel:
    """A kernel that runs its programs one after the other."""

    def __init__(self, function: Callable[..., None]) -> None:
        self.function = function

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        def launch(*arguments: Any, num_warps: int, **constants: Any) -> None:
            arguments = tuple(Pointer(a) if isinstance(a, Tensor) else a for a in arguments)
            _program.grid = grid
            for x in range(grid[0]):
                for y in range(grid[1]):
                    for z in range(grid[2]):
                        _program.ids = (x, y, z)
                        self.function(*arguments, **constants)

        return launch


@contextmanager
def emulated(module: ModuleType) -> Iterator[None]:
    """Inside, the module's launchers take CPU tensors."""
    names: dict[str, Any] = {
        "gl": GL,
        "tma": TMA,
        "mbarrier": MBARRIER,
        "warpgroup_mma": _multiply,
        "warpgroup_mma_wait": _wait_products,
        "fence_async_shared": _ANY,
        "_described": Descriptor,
    }
    for name, value in vars(module).items():
        if isinstance(value, GluonJITFunction):
            names[name] = Kernel(value.fn) if name.endswith("_kernel") else value.fn
        elif isinstance(value, constexpr):
            names[name] = value.value
    with mock.patch.multiple(module, **names):
        yield
