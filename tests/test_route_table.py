"""RouteTable: what it accepts, what it refuses, and that a refused update changes nothing."""

import pytest
import torch

from kvpo_kernels import RouteTable
from kvpo_kernels.errors import DtypeError, ShapeError


def test_ragged_lists_are_padded_at_the_tail() -> None:
    table = RouteTable([[4, 2], [], [0, 1, 3]], num_slots=5)
    assert table.slots.tolist() == [[4, 2, -1], [-1, -1, -1], [0, 1, 3]]
    assert table.slots.dtype is torch.int32 and table.slots.is_contiguous()
    assert (table.num_rows, table.capacity, table.num_slots) == (3, 3, 5)
    assert table.tolist() == [[4, 2], [], [0, 1, 3]]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_tensor_keeps_its_capacity(dtype: torch.dtype) -> None:
    table = RouteTable(torch.tensor([[1, 0, -1], [2, -1, -1]], dtype=dtype), num_slots=3)
    assert table.slots.tolist() == [[1, 0, -1], [2, -1, -1]]


def test_no_rows_and_no_slots() -> None:
    assert RouteTable([], num_slots=0).slots.shape == (0, 0)
    assert RouteTable([[], []], num_slots=0).slots.shape == (2, 0)


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ([[0], [1, 2, 3, 4, 5, 41]], r"route\[branch=1, slot=5\] = 41 not in \[0, 33\)"),
        ([[33]], r"route\[branch=0, slot=0\] = 33 not in \[0, 33\)"),
        ([[-1]], r"= -1 not in"),
        ([[-(2**31)]], r"not in \[0, 33\)"),
        ([[7, 3, 7]], r"route\[branch=0, slot=2\] = 7 repeats slot=0"),
        (torch.tensor([[1, -1, 2]]), r"slot=1\] = -1: padding is allowed at the tail only"),
        (torch.tensor([1, 2]), r"routes must be \[B, R\]"),
    ],
)
def test_bad_values_name_branch_slot_value_and_limit(lists, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        RouteTable(lists, num_slots=33)


@pytest.mark.parametrize(
    "lists", [[[0.0]], [[True]], torch.tensor([[0.5]]), torch.tensor([[True]])]
)
def test_slots_must_be_integers(lists) -> None:
    with pytest.raises(DtypeError):
        RouteTable(lists, num_slots=4)


def test_tensor_on_another_device_is_refused() -> None:
    with pytest.raises(DtypeError, match=r"meta.*cpu"):
        RouteTable(torch.zeros(1, 1, dtype=torch.int64, device="meta"), num_slots=4)


def test_duplicates_on_request() -> None:
    assert RouteTable([[7, 7]], num_slots=8, allow_duplicates=True).tolist() == [[7, 7]]


def test_update_is_in_place_and_all_or_nothing() -> None:
    table = RouteTable([[0, 1], [2, 3]], num_slots=4)
    address = table.slots.data_ptr()
    table.update([[3], [1, 0]])
    assert table.tolist() == [[3], [1, 0]] and table.slots.data_ptr() == address
    for bad in ([[0], [9]], [[0]], [[0, 1, 2], [3]], [[0], [1, 1]]):
        with pytest.raises(ShapeError):
            table.update(bad)
        assert table.tolist() == [[3], [1, 0]]


def test_slots_are_visible_to_the_compiler() -> None:
    table = RouteTable([[0, 2]], num_slots=4)
    double = torch.compile(lambda t: t.slots * 2, fullgraph=True, backend="eager")
    assert double(table).tolist() == [[0, 4]]
