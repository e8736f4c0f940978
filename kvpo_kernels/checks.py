"""Checks of arguments that several modules share."""

import operator
from typing import Any

from kvpo_kernels.errors import DtypeError, KvpoError, ShapeError


def integer(
    name: str, value: Any, least: int | None = 0, error: type[KvpoError] = ShapeError
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
