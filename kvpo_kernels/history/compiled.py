"""Writes to a pool inside compiled graphs: who may write, and that it was written, at run time.

A graph is traced once and serves many pools; what a timeline holds is known when it runs. So the
bookkeeping is part of operators, which find their slots by a ticket: a tensor, for the compiler
takes a Python number for a constant until it has seen another.
"""

from collections.abc import Callable
from itertools import count
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from kvpo_kernels.errors import PoolError
from kvpo_kernels.history.memory import pool_of, refuse_plain_slots
from kvpo_kernels.ops.store_frames import check_offsets

if TYPE_CHECKING:
    from kvpo_kernels.history.slots import PreparedSlots

_TICKETS: "WeakValueDictionary[int, PreparedSlots]" = WeakValueDictionary()
_NUMBERS = count()
_MEMORY = ("k_pool", "v_pool", "k_scales", "v_scales")


def ticket_of(slots: "PreparedSlots") -> Tensor:
    """A number under which operators find the slots for as long as they live, int64 `[]`."""
    number = next(_NUMBERS)
    _TICKETS[number] = slots
    return torch.tensor(number, dtype=torch.int64, device="cpu")


def _holder(ticket: Tensor) -> "PreparedSlots":
    slots = _TICKETS.get(int(ticket))
    if slots is None:
        raise PoolError("slots that this graph was to write to are gone: hand them in again")
    return slots


# `checked_slots` returns what the write then takes, so that it comes first. The others name as
# written what they are about: nothing that writes is dropped or moved past a read.
torch.library.define(
    "kvpo::checked_slots", "(Tensor? ticket, Tensor slots, Tensor[] memory) -> Tensor"
)
torch.library.define(
    "kvpo::write_frames",
    "(Tensor ticket, int layer, Tensor k, Tensor v, Tensor(a!) k_pool, Tensor(b!) v_pool,"
    " Tensor(c!)? k_scales, Tensor(d!)? v_scales) -> ()",
)
torch.library.define("kvpo::mark_written", "(Tensor ticket, int layer, Tensor(a!) k_pool) -> ()")


def _check(slots: "PreparedSlots", memory: dict[str, Tensor | None]) -> None:
    # Where nobody puts writes back in place (aot_eager) they are copies, which are no pool's.
    slots.check(**{n: t for n, t in memory.items() if t is not None and pool_of(t) is not None})


def _checked_impl(ticket: Tensor | None, slots: Tensor, memory: list[Tensor]) -> Tensor:
    named: dict[str, Tensor | None] = dict(zip(_MEMORY, memory, strict=False))
    if ticket is None:
        refuse_plain_slots(named)
    else:
        _check(_holder(ticket), named)
    return slots.clone()


def _checked_fake(ticket: Tensor | None, slots: Tensor, memory: list[Tensor]) -> Tensor:
    return slots.new_empty(slots.shape)


def _write_impl(ticket: Tensor, layer: int, k: Tensor, v: Tensor, *memory: Tensor | None) -> None:
    slots = _holder(ticket)
    _check(slots, dict(zip(_MEMORY, memory, strict=True)))
    slots.pool._store(slots, k, v, memory)
    slots.pool._mark(layer, slots)


def _write_fake(
    ticket: Tensor, layer: int, k: Tensor, v: Tensor, k_pool: Tensor, v_pool: Tensor, *_: object
) -> None:
    check_offsets({"k_pool": k_pool, "v_pool": v_pool})


def _mark_impl(ticket: Tensor, layer: int, k_pool: Tensor) -> None:
    slots = _holder(ticket)
    _check(slots, {"k_pool": k_pool})
    slots.pool._mark(layer, slots)


def _operator(name: str, impl: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    torch.library.impl(f"kvpo::{name}", ("cpu", "cuda"), impl)
    torch.library.register_fake(f"kvpo::{name}", fake)
    return getattr(torch.ops.kvpo, name).default


checked_slots = _operator("checked_slots", _checked_impl, _checked_fake)
write_frames = _operator("write_frames", _write_impl, _write_fake)
mark_written = _operator("mark_written", _mark_impl, lambda *_: None)
