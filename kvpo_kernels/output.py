"""Standard output that a reader may leave, or that may not take every character or any more."""

import contextlib
import os
import sys
from collections.abc import Callable
from typing import Any, TextIO

READER_GONE = 141  # 128 + SIGPIPE, as a shell reports of other programs
NOT_WRITTEN = 2


class Ended(BaseException):
    """Nothing more can be told. Not an `Exception`: no part of a command has failed."""


class Told:
    """Takes the place of `sys.stdout`; what the encoding lacks becomes a question mark.

    Args:
        stream: the true one; None where the process has none.
        go_on: what is told is not all that the command is for: it goes on untold. Else the first
            failed write ends it by `Ended`.
    """

    def __init__(self, stream: TextIO | None, go_on: bool) -> None:
        self.stream, self.go_on = stream, go_on
        self.error: OSError | None = None
        self.encoding = getattr(stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        plain = text.encode(self.encoding, "replace").decode(self.encoding)
        self._try(lambda stream: stream.write(plain))
        return len(text)

    def flush(self) -> None:
        self._try(lambda stream: stream.flush())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)  # isatty, fileno and what else libraries ask for

    def _try(self, act: Callable[[TextIO], object]) -> None:
        if self.error is not None:
            return
        try:
            if self.stream is None:
                raise OSError("it is closed")
            act(self.stream)
        except OSError as error:
            self.error = error
            if not self.go_on:
                raise Ended from error


def run(command: Callable[[], int], go_on: bool = False) -> int:
    """Run a command that prints; returns its exit status, or that of an output it cannot have.

    Where the reader has gone (`| head`) that is 141 and nothing is said; where nothing more can be
    written, as on a full disk, it is 2 and said on standard error.

    Args:
        command: returns its exit status, or raises SystemExit.
        go_on: as for `Told`.
    """
    told = Told(sys.stdout, go_on)
    with contextlib.redirect_stdout(told):
        try:
            status = command()
            told.flush()
        except Ended:
            pass
        except SystemExit:
            with contextlib.suppress(Ended):
                told.flush()
            if told.error is None:
                raise
    if told.error is None:
        return status
    if told.stream is not None:
        # Or the interpreter would try once more to write what is left, and complain.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), told.stream.fileno())
    if isinstance(told.error, BrokenPipeError):
        return READER_GONE
    say(f"standard output cannot be written: {told.error}")
    return NOT_WRITTEN


def say(text: str) -> None:
    """A line on standard error, if that can be had."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            print(f"kvpo_kernels: {text}", file=sys.stderr, flush=True)
