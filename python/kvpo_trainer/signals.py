"""Signals that ask to end: by hand, of a closed terminal, of a scheduler that preempts."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

ASKING = tuple(
    signal.Signals[name]
    for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGBREAK")
    if name in signal.Signals.__members__
)
"""Those of them that this system has."""
_BURST_SECONDS = 0.5


class Interrupted(BaseException):
    """A signal asked to stop. Like KeyboardInterrupt it may come anywhere, and is no Exception."""

    def __init__(self, number: int, what: str = "") -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}{what}")
        self.exit_code = 128 + number


@contextlib.contextmanager
def on_first(act: Callable[[int], None]) -> Iterator[None]:
    """Calls `act` with the first signal's number; a second signal ends the process at once.

    A signal that the process was started to ignore, as SIGHUP by `nohup`, stays ignored. A terminal
    that closes may send SIGHUP twice, some schedulers send it right after SIGTERM: within half a
    second of the first it does not count.
    """
    before: dict[signal.Signals, Any] = {}
    first: list[float] = []

    def handle(number: int, _frame: FrameType | None) -> None:
        if first:
            if time.monotonic() - first[0] > _BURST_SECONDS:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        first.append(time.monotonic())
        for which in before:
            if which.name != "SIGHUP":
                signal.signal(which, signal.SIG_DFL)
        act(number)

    try:
        with contextlib.suppress(ValueError):  # only the main thread may set handlers
            for which in ASKING:
                # None is a handler that is not Python's, as of faulthandler.
                if signal.getsignal(which) not in (signal.SIG_IGN, None):
                    before[which] = signal.signal(which, handle)
        yield
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)


@contextlib.contextmanager
def noted() -> Iterator[list[int]]:
    """A list that the first signal puts its number into."""
    received: list[int] = []
    with on_first(received.append):
        yield received


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """The first signal raises `Interrupted`."""

    def stop(number: int) -> None:
        raise Interrupted(number)

    with on_first(stop):
        yield
