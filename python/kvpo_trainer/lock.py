"""One process to a run's folder.

The file `lock` is held by the operating system (`flock`), which lets go of it when the process
ends, however it ends and wherever it ran. What stands in it is a note for people: whose it is.
"""

import contextlib
import errno
import json
import logging
import os
import socket
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

if sys.platform == "win32":
    import msvcrt
else:
    try:
        import fcntl
    except ModuleNotFoundError:  # as in a browser
        fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)
_TAKEN = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EDEADLK)
_AWAY = 1 << 20  # Windows locks bytes against reading too: one that the note does not reach


class LockError(RuntimeError):
    """The folder is another's."""


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock at `path`; the file is gone afterwards.

    Where the file system knows no locks, a warning says so, and the note decides: a process that
    lives on this machine keeps its folder, whatever else the note says is taken to be over.

    Raises:
        LockError: a live process holds it, or the file is not a lock.
        OSError: the file cannot be made.
    """
    descriptor = _take(path)
    try:
        yield
    finally:
        if os.name == "nt":  # an open file cannot be removed there
            os.close(descriptor)
        with contextlib.suppress(OSError):
            path.unlink()
        if os.name != "nt":  # while it is held: nobody else's is removed
            os.close(descriptor)


def _take(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
        try:
            held = _hold(descriptor)
            holder = _holder(path)
            if held is False:
                raise LockError(_in_use(path, holder))
            if not _is_at(descriptor, path):  # removed by the one who let go of it
                os.close(descriptor)
                continue
            if held is None:
                if holder is not None and _lives_here(holder):
                    raise LockError(f"{_in_use(path, holder)}; if that is gone, remove {path}")
                log.warning(
                    "the file system of %s knows no locks: nothing but you keeps a second run%s"
                    " out of the folder",
                    path,
                    "" if holder is None else f" (as that of {_whose(holder)}, if it is not over)",
                )
            _note(descriptor)
            return descriptor
        except BaseException:
            with contextlib.suppress(OSError):
                os.close(descriptor)
            raise


def _hold(descriptor: int) -> bool | None:
    """Whether the lock is ours now; None where there are no locks."""
    try:
        if sys.platform == "win32":
            os.lseek(descriptor, _AWAY, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        elif fcntl is None:
            return None
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in _TAKEN else None
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _note(descriptor: int) -> None:
    own = {"pid": os.getpid(), "host": socket.gethostname(), "started": _started(os.getpid())}
    try:
        os.ftruncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.write(descriptor, json.dumps(own).encode())
    except OSError as error:  # a full disk; the lock holds without it
        log.warning("the lock says not whose it is: %s", error)


def _holder(path: Path) -> dict[str, Any] | None:
    """Whose lock it is; None if it does not say.

    Raises:
        LockError: the file is not one of ours.
    """
    try:
        text = path.read_bytes()
    except OSError:
        return None
    if not text.strip(b"\0 \n"):
        return None
    try:
        holder = json.loads(text)
        started = str(holder.get("started", ""))
        return {"pid": int(holder["pid"]), "host": str(holder["host"]), "started": started}
    except (ValueError, KeyError, TypeError, AttributeError):
        if text.startswith(b'{"pid"'):  # of a disk that was full, or a process that was killed
            return None
        raise LockError(
            f"{path} is not the lock of a run: is {path.parent} another's folder?"
        ) from None


def _whose(holder: Mapping[str, Any]) -> str:
    return f"process {holder['pid']} on {holder['host']}"


def _in_use(path: Path, holder: Mapping[str, Any] | None) -> str:
    return f"{path.parent} is in use by {_whose(holder) if holder else 'another process'}"


def _lives_here(holder: Mapping[str, Any]) -> bool:
    """A process of that number that started when the holder did: numbers come again."""
    if holder["host"] != socket.gethostname() or os.name != "posix":
        return False
    try:
        os.kill(holder["pid"], 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return not holder["started"] or holder["started"] == _started(holder["pid"])


def _started(pid: int) -> str:
    """When a process started, in ticks since the machine did; "" where that cannot be known."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[19].decode()
    except (OSError, IndexError):
        return ""
