"""What a command tells: on terminals, in log files on full disks, through pipes that close.

Telling never ends a run. While `telling()` is in force, what cannot be written to standard output
or error is dropped, which is remembered, and what the stream's encoding lacks is written in ASCII:
prints, progress, log lines, warnings and help alike.
"""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO, cast

_ASCII = str.maketrans({"±": "+-", "·": "-", "“": '"', "”": '"', "…": "..."})


class Stream:
    """A text stream that drops what it cannot write."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.failure: Exception | None = None
        """The first one: something has been lost."""

    def write(self, text: str) -> int:
        """Write what can be written."""
        try:
            try:
                self._stream.write(text)
            except UnicodeEncodeError:
                encoding = self._stream.encoding
                plain = text.translate(_ASCII).encode(encoding, "backslashreplace")
                self._stream.write(plain.decode(encoding))
        except (OSError, ValueError) as error:  # ValueError: closed
            self.failure = self.failure or error
        return len(text)

    def flush(self) -> None:
        """Flush what can be flushed."""
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self.failure = self.failure or error

    def isatty(self) -> bool:
        """Whether a person looks on."""
        try:
            return self._stream.isatty()
        except ValueError:  # closed
            return False

    def finish(self) -> None:
        """Flush; what is still unwritten is given up, or Python would complain of it at its end."""
        failed, self.failure = self.failure, None
        self.flush()
        if self.failure is not None:
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)
        self.failure = failed or self.failure

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def telling() -> Iterator[None]:
    """Makes standard output and error such streams; on leaving says if output was lost."""
    if isinstance(sys.stdout, Stream) and isinstance(sys.stderr, Stream):
        yield
        return
    before = sys.stdout, sys.stderr
    with contextlib.ExitStack() as stack:
        # They are None where the process was started without. What then is written is lost, which
        # must be known: this takes none of it.
        nowhere = stack.enter_context(open(os.devnull, encoding="utf-8"))
        out, err = Stream(before[0] or nowhere), Stream(before[1] or nowhere)
        sys.stdout, sys.stderr = cast(TextIO, out), cast(TextIO, err)
        try:
            yield
        finally:
            out.finish()
            if out.failure is not None and not closed_by_reader(out.failure):
                print(f"kvpo-train: some output is lost: {out.failure}", file=sys.stderr)
            err.finish()
            sys.stdout, sys.stderr = before


def lost_output() -> Exception | None:
    """What kept some standard output from being written, a reader that left early aside."""
    if not isinstance(sys.stdout, Stream):
        return None
    sys.stdout.flush()
    failure = sys.stdout.failure
    return None if failure is None or closed_by_reader(failure) else failure


def closed_by_reader(error: Exception) -> bool:
    """As by `| head`: that is no failure."""
    return isinstance(error, OSError) and error.errno in (errno.EPIPE, errno.ESHUTDOWN)


def keep_standard_descriptors() -> None:
    """Open those of 0, 1 and 2 that are closed, or a checkpoint's file could be given the number.

    What native code then writes to standard error would be in the checkpoint.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
