"""Checks of arguments that several modules share."""

import operator
from typing import Any

import torch
from torch import Tensor

from kvpo_kernels.errors import DtypeError, KvpoError, RangeError


def integer(
    name: str, value: Any, least: int | None = 0, error: type[KvpoError] = RangeError
) -> int:
    """The value as an int; whatever has `__index__` is one, a bool is not.

    Raises:
        DtypeError: it is none.
        error: it is below `least`.
    """
    if type(value) is not int:
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise DtypeError(f"{name} must be an int, got {value!r}")
        try:
            value = operator.index(value)
        except TypeError:
            raise DtypeError(f"{name} must be an int, got {value!r}") from None
    if least is not None and value < least:
        raise error(f"{name} must be at least {least}, got {value}")
    return int(value)


def number(name: str, value: Any) -> float:
    """The value as a float; a bool is none.

    Raises:
        DtypeError: it is none.
    """
    if type(value) is float:
        return value
    try:
        if isinstance(value, (bool, str)):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        got = repr(value) if not isinstance(value, Tensor) else f"a tensor {list(value.shape)}"
        raise DtypeError(f"{name} must be a number, got {got}") from None


def tensors(**arguments: Any) -> None:
    """Check that what is named is a tensor.

    Raises:
        DtypeError: it is none.
    """
    for name, value in arguments.items():
        if not isinstance(value, Tensor):
            raise DtypeError(f"{name} must be a tensor, got {type(value).__name__}")


def numbers_of(name: str, value: Any) -> Tensor:
    """A tensor, a number or a sequence of such, in float64.

    Raises:
        DtypeError: it is none.
    """
    try:
        return torch.as_tensor(value, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        raise DtypeError(f"{name} must hold numbers, got {value!r}") from None
