"""A run folder and the loop that fills it: lock, metrics, checkpoints, signals.

<out>/config.yaml  metrics.jsonl  evaluation.json  checkpoints/  report.html
"""

import contextlib
import fcntl
import json
import logging
import math
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from kvpo_kernels.errors import KvpoError
from kvpo_trainer.checkpoint import (
    CheckpointError,
    latest_checkpoint,
    remove_leftovers,
    save_checkpoint,
)
from kvpo_trainer.config import RunConfig, differences, dump_yaml, to_mapping
from kvpo_trainer.update import StepResult, Trainer

log = logging.getLogger(__name__)
_MAX_TEXT = 2000  # characters of one metric
_SAVE_FAILURES = 3  # in a row, until the run gives up


class RunError(RuntimeError):
    """The run cannot start or go on."""


class Interrupted(Exception):
    """A signal asked to stop; the state has been saved."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by signal {number}")
        self.exit_code = 128 + number


@contextlib.contextmanager
def run_folder(out: Path) -> Iterator[Path]:
    """Make and lock a run's folder.

    Raises:
        RunError: the folder cannot be written, or another live process has it.
    """
    lock = out / "lock"
    try:
        out.mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(out):
            _take_lock(lock)
    except OSError as error:
        raise RunError(f"cannot write to {out}: {error}") from error
    try:
        remove_leftovers(out / "checkpoints")
        yield out
    finally:
        lock.unlink(missing_ok=True)


def write_metrics(path: Path, metrics: Mapping[str, Any]) -> None:
    """Append one JSON line: always parseable, numbers that are not finite as strings."""
    line = json.dumps({str(k): _plain(v) for k, v in metrics.items()}, allow_nan=False)
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All lines that are whole; what a kill cut short or a disk damaged is left out."""
    rows = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict):
                rows.append(row)
    return rows


def train_loop(
    trainer: Trainer,
    out: Path,
    config: RunConfig,
    on_step: Callable[[StepResult], None],
) -> int:
    """Steps until the iterations or minutes are over; returns how many were done here.

    The resolved configuration is recorded first: a run that is refused before leaves no trace.

    SIGTERM and SIGINT let the step finish, save and raise `Interrupted`; a second one ends the
    process at once.

    Raises:
        Interrupted: after a signal.
        RunError: a rollout's numbers are refused, as where the policy has diverged; several saves
            in a row failed, or the last one.
    """
    (out / "config.yaml").write_text(dump_yaml(config))
    started, done, failures = time.perf_counter(), 0, 0
    limit = config.train.minutes * 60 or math.inf
    longest = 0.0
    with _signals() as stop:
        while trainer.step_index < config.train.iterations:
            before = time.perf_counter()
            if before - started + longest > limit:
                break
            try:
                result = trainer.step()
            except KvpoError as error:
                raise RunError(f"rollout {trainer.step_index + 1}: {error}") from error
            longest = max(longest, time.perf_counter() - before)
            done += 1
            try:
                write_metrics(out / "metrics.jsonl", result.metrics)
            except OSError as error:
                log.error("metrics not written, training goes on: %s", error)
            on_step(result)
            if stop:
                break
            if trainer.step_index % config.train.save_every == 0:
                failures = 0 if _save(trainer, out, config) else failures + 1
            if failures >= _SAVE_FAILURES:
                raise RunError(f"{failures} checkpoints in a row could not be written; see the log")
        if done and not _save(trainer, out, config):
            raise RunError("the last checkpoint could not be written; see the log")
        if stop:
            raise Interrupted(stop[0])
    return done


def resume(trainer: Trainer, out: Path, config: RunConfig, strict: bool) -> bool:
    """Take up the newest checkpoint of a folder; False if there is none.

    Metrics after that checkpoint are dropped: they will come again.

    Raises:
        RunError: the run has another configuration, but for its length and surroundings, or began
            with other weights.
    """
    checkpoint = latest_checkpoint(out / "checkpoints", strict)
    if checkpoint is None:
        return False
    ran, asked = (
        {k: v for k, v in mapping.items() if k not in ("train", "threads")}
        for mapping in (checkpoint.config, to_mapping(config))
    )
    changed = differences(ran, asked)
    if changed:
        raise RunError(
            f"{out} was run with another configuration, go on with --config"
            f" {out / 'config.yaml'}; it has, and is asked for: {'; '.join(changed)}"
        )
    for name, value in trainer.initial.state_dict().items():
        began = checkpoint.tensors.get(f"initial/{name}", value)
        if began.shape == value.shape and not torch.equal(began, value):
            raise RunError(f"{out} began with other weights: pass the same --weights")
    trainer.restore(checkpoint.tensors, checkpoint.counters)
    path = out / "metrics.jsonl"
    rows = [row for row in read_metrics(path) if row.get("step", 0) <= trainer.step_index]
    kept = path.with_suffix(".tmp")
    kept.unlink(missing_ok=True)
    kept.touch()
    for row in rows:
        write_metrics(kept, row)
    kept.replace(path)  # a kill here loses no metrics
    return True


def _save(trainer: Trainer, out: Path, config: RunConfig) -> bool:
    try:
        save_checkpoint(
            out / "checkpoints",
            trainer.tensors(),
            trainer.counters(),
            to_mapping(config),
            config.train.keep_checkpoints,
        )
    except CheckpointError as error:
        log.error("checkpoint not saved, training goes on: %s", error)
        return False
    return True


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """A list that the first SIGTERM or SIGINT puts its number into."""
    received: list[int] = []
    before: dict[signal.Signals, Any] = {}

    def note(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        for which in before:
            signal.signal(which, signal.SIG_DFL)  # the next one ends the process

    with contextlib.suppress(ValueError):  # only the main thread may set handlers
        for which in (signal.SIGTERM, signal.SIGINT):
            before[which] = signal.signal(which, note)
    try:
        yield received
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)


@contextlib.contextmanager
def _one_at_a_time(out: Path) -> Iterator[None]:
    """Only one process looks at the lock and takes it: two could find the same stale one."""
    descriptor = os.open(out, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems cannot
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _take_lock(lock: Path) -> None:
    own = {"pid": os.getpid(), "host": socket.gethostname(), "started": _started(os.getpid())}
    for _ in range(2):
        try:
            descriptor = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            holder = _holder(lock)
            if holder is not None and (holder["host"] != own["host"] or _alive(holder)):
                raise RunError(
                    f"{lock.parent} is in use by process {holder['pid']} on {holder['host']};"
                    f" if that is gone, remove {lock}"
                ) from None
            lock.unlink(missing_ok=True)  # its process is gone
            continue
        with os.fdopen(descriptor, "w") as file:
            json.dump(own, file)
        return
    raise RunError(f"cannot take {lock}")


def _holder(lock: Path) -> dict[str, Any] | None:
    """Whose lock it is; None if it is gone, or was left empty.

    Raises:
        RunError: the file is not one of ours.
    """
    try:
        text = lock.read_text()
    except OSError:
        return None
    if not text:
        return None
    try:
        holder = json.loads(text)
        started = str(holder.get("started", ""))
        return {"pid": int(holder["pid"]), "host": str(holder["host"]), "started": started}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise RunError(
            f"{lock} is not the lock of a run: is {lock.parent} another's folder?"
        ) from None


def _alive(holder: Mapping[str, Any]) -> bool:
    """A process of that number that started when the holder did: numbers come again."""
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return not holder["started"] or holder["started"] == _started(holder["pid"])


def _started(pid: int) -> str:
    """When a process started, in ticks since the machine did; "" where that cannot be known."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, str):
        return value[:_MAX_TEXT]
    return value
