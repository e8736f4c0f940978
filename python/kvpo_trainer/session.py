"""A run folder and the loop that fills it: lock, metrics, checkpoints, signals.

<out>/config.yaml  weights.json  metrics.jsonl  evaluation.json  checkpoints/  report.html
"""

import contextlib
import errno
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from kvpo_kernels.errors import KvpoError
from kvpo_trainer.checkpoint import (
    CheckpointError,
    latest_checkpoint,
    newest_config,
    remove_leftovers,
    save_checkpoint,
)
from kvpo_trainer.config import (
    ConfigurationError,
    RunConfig,
    differences,
    dump_yaml,
    from_mapping,
    to_mapping,
)
from kvpo_trainer.files import write_whole
from kvpo_trainer.lock import LockError, locked
from kvpo_trainer.signals import Interrupted, noted
from kvpo_trainer.update import StepResult, Trainer

log = logging.getLogger(__name__)
_MAX_TEXT = 2000  # characters of one metric
_SAVE_FAILURES = 3  # in a row, until the run gives up


class RunError(RuntimeError):
    """The run cannot start or go on."""


@contextlib.contextmanager
def run_folder(out: Path) -> Iterator[Path]:
    """Make and lock a run's folder.

    Raises:
        RunError: the folder cannot be written, or another live process has it.
    """
    with contextlib.ExitStack() as stack:
        try:
            out.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(out / "lock"))
        except OSError as error:
            raise RunError(f"cannot write to {out}: {error}") from error
        except LockError as error:
            raise RunError(str(error)) from error
        remove_leftovers(out / "checkpoints")
        yield out


def write_metrics(path: Path, metrics: Mapping[str, Any]) -> None:
    """Append one JSON line: always parseable, numbers that are not finite as strings.

    Raises:
        OSError: the file is as it was, no part of a line is left in it.
    """
    data = _line(metrics).encode()
    with path.open("ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        try:
            if file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        except BaseException:
            file.truncate(end)
            raise


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

    A signal that asks to end (`signals.ASKING`) lets the step finish, saves and raises
    `Interrupted`; a second one ends the process at once. What is kept is written before `on_step`,
    which only tells: what it raises is logged, once. Metrics that a full disk does not take are
    written when it does.

    Raises:
        Interrupted: after a signal.
        RunError: a rollout's numbers are refused, as where the policy has diverged; several saves
            in a row failed, or the last one.
    """
    _record(out / "config.yaml", dump_yaml(config))
    started, done, failures = time.perf_counter(), 0, 0
    limit = config.train.minutes * 60 or math.inf
    longest, shown = 0.0, True
    unwritten: list[Mapping[str, Any]] = []
    with noted() as stop:
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
            unwritten.append(result.metrics)
            _write_all(out / "metrics.jsonl", unwritten)
            if not stop and trainer.step_index % config.train.save_every == 0:
                failures = 0 if _save(trainer, out, config) else failures + 1
            try:
                on_step(result)
            except Exception as error:
                if shown:
                    log.warning("progress cannot be shown, training goes on: %r", error)
                shown = False
            if stop:
                break
            if failures >= _SAVE_FAILURES:
                raise RunError(f"{failures} checkpoints in a row could not be written; see the log")
        if done and not _save(trainer, out, config):
            raise RunError("the last checkpoint could not be written; see the log")
        if stop:
            raise Interrupted(stop[0], "; the state is saved, --resume goes on")
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
        {k: v for k, v in to_mapping(c).items() if k not in ("train", "threads")}
        for c in (from_mapping(RunConfig, checkpoint.config), config)
    )
    changed = differences(ran, asked)
    if changed:
        raise RunError(
            f"{out} goes on with its own configuration ({out / 'config.yaml'}), of which --resume"
            " may change train.* and threads only; it has, and is asked for:"
            f" {'; '.join(changed)}"
        )
    for name, value in trainer.initial.state_dict().items():
        began = checkpoint.tensors.get(f"initial/{name}", value)
        if began.shape == value.shape and not torch.equal(began, value):
            raise RunError(f"{out} began with other weights: pass the same --weights")
    trainer.restore(checkpoint.tensors, checkpoint.counters)
    path = out / "metrics.jsonl"
    rows = [row for row in read_metrics(path) if row.get("step", 0) <= trainer.step_index]
    _record(path, "".join(_line(row) for row in rows))  # a kill here loses no metrics
    return True


def stored_config(out: Path) -> dict[str, Any] | None:
    """The configuration of a folder's newest checkpoint that has one; None without any.

    Raises:
        ConfigurationError: it is of another version.
    """
    config = newest_config(out / "checkpoints")
    try:
        return None if config is None else to_mapping(from_mapping(RunConfig, config))
    except ConfigurationError as error:
        raise ConfigurationError(f"{out} was run by another version: {error}") from error


def record_weights(out: Path, folder: Path | None, checksum: str) -> None:
    """Note what a run began with: weights in a folder, or those that come along (None)."""
    where = None if folder is None else str(folder.resolve())
    _record(out / "weights.json", json.dumps({"folder": where, "checksum": checksum}) + "\n")


def recorded_weights(out: Path) -> tuple[Path | None, str] | None:
    """What `record_weights` has noted; None where it has not."""
    try:
        record = json.loads((out / "weights.json").read_bytes())
        folder = record["folder"]
        return None if folder is None else Path(str(folder)), str(record["checksum"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _record(path: Path, text: str) -> None:
    """Write a file that may hold this already, as on a disk that has become full since."""
    try:
        there = path.read_bytes()
    except OSError:
        there = None
    if there != text.encode():
        write_whole(path, text)


def _write_all(path: Path, rows: list[Mapping[str, Any]]) -> None:
    """Appends rows and removes them from the list; those that cannot be written stay in it."""
    try:
        while rows:
            write_metrics(path, rows[0])
            del rows[0]
    except OSError as error:
        log.error("metrics of %d rollouts not written, training goes on: %s", len(rows), error)


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


def _line(metrics: Mapping[str, Any]) -> str:
    return json.dumps({str(k): _plain(v) for k, v in metrics.items()}, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, str):
        return value[:_MAX_TEXT]
    return value
