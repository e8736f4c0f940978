"""How far a command is."""

import sys
import time
from types import TracebackType
from typing import Any

from tqdm import tqdm

LINE_SECONDS = 10.0
"""Between two lines in a file."""


class Progress:
    """How far something is: a bar on a terminal, elsewhere a line now and then.

    Args:
        what: that is being done.
        unit: of the counting, in the singular.
        total: how many there will be, if that is known.
        done: how many of them were done before.
    """

    def __init__(self, what: str, unit: str, total: int | None, done: int = 0) -> None:
        self._what, self._unit, self._total, self._done = what, unit, total, done
        self._here, self._values = 0, ""
        self._started = time.monotonic()
        self._told, self._told_at = 0, -LINE_SECONDS
        self._bar: Any = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=done, desc=what, unit=unit)

    def step(self, **values: float) -> None:
        """One more is done; values to show with it."""
        self._here += 1
        self._values = "".join(f", {name} {value:.3f}" for name, value in values.items())
        if self._bar is not None:
            self._bar.set_postfix_str(self._values.removeprefix(", "), refresh=False)
            self._bar.update()
        elif time.monotonic() - self._started - self._told_at >= LINE_SECONDS:
            self._tell()

    def _tell(self) -> None:
        seconds = time.monotonic() - self._started
        self._told, self._told_at = self._here, seconds
        total = "" if self._total is None else f" of {self._total}"
        print(
            f"{self._what}: {self._unit} {self._done + self._here}{total}, {seconds:.0f} s,"
            f" {seconds / self._here:.2f} s each{self._values}",
            file=sys.stderr,
            flush=True,
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._here > self._told:
            self._tell()
