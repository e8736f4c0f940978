"""Which pool's memory a tensor lies in."""

from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from torch import Tensor

from kvpo_kernels.errors import DtypeError
from kvpo_kernels.history.route_table import has_no_memory

if TYPE_CHECKING:
    from kvpo_kernels.history.pool import FramePool

_POOLS: WeakValueDictionary[int, "FramePool"] = WeakValueDictionary()
"""Of the storage, by its address, in which a pool's pages or scales are."""


def register(pool: "FramePool") -> None:
    """Let `pool_of` know the memory of a pool."""
    for layer in range(pool.num_layers):
        for view in (f(layer) for f in (pool.k, pool.v, pool.k_scales, pool.v_scales)):
            if view is not None and not has_no_memory(view):
                _POOLS[view.untyped_storage().data_ptr()] = pool


def pool_of(tensor: Tensor) -> "FramePool | None":
    """The pool in whose memory the tensor lies, where there are addresses to tell it by."""
    return None if has_no_memory(tensor) else _POOLS.get(tensor.untyped_storage().data_ptr())


def refuse_plain_slots(written: dict[str, Tensor | None]) -> None:
    """Check that what plain numbers are to be written to is no `FramePool`'s.

    Raises:
        DtypeError: it is; names the argument.
    """
    for name, tensor in written.items():
        if tensor is not None and pool_of(tensor) is not None:
            raise DtypeError(
                f"{name} is of a FramePool: slots must be of its `prepare_write` or `advance`, got"
                " a tensor, which does not say whose frames it means"
            )
