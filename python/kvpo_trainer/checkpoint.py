"""Checkpoints that survive what happens to disks: safetensors, a manifest, an atomic rename.

A checkpoint is a folder `step-NNNNNN` with `state.safetensors` and `manifest.json` (size and sha256
of the state, counters, configuration, versions, and its own sha256). It is written under another
name, flushed to disk and renamed, so that a folder of that name is complete or it was damaged
later, which the checksums show. Nothing is unpickled and no path is taken from a file's content.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

log = logging.getLogger(__name__)
STATE, MANIFEST, FORMAT = "state.safetensors", "manifest.json", 2
_MAX_HEADER = 4 << 20  # bytes; ours are a few kilobytes
MALFORMED = (
    OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError
)  # fmt: skip
"""What reading a manifest of any content can raise."""
_PICKLES = (".pt", ".pth", ".bin", ".pkl", ".ckpt")


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read or written; the message names the file."""


@dataclass(frozen=True)
class Checkpoint:
    """What was saved."""

    tensors: dict[str, Tensor]
    counters: dict[str, int]
    config: dict[str, Any]
    path: Path


def save_checkpoint(
    folder: Path,
    tensors: Mapping[str, Tensor],
    counters: Mapping[str, int],
    config: Mapping[str, Any],
    keep: int = 2,
) -> Path:
    """Write `folder/step-<step_index>` and remove all but the newest `keep` up to it.

    Later ones are removed too: a run comes back to an earlier step only when they are damaged.

    Raises:
        CheckpointError: no space, no permission; what was there before is untouched.
    """
    final = folder / f"step-{counters['step_index']:06d}"
    temporary = folder / f"{final.name}.tmp-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        state = save({name: t.detach().contiguous() for name, t in tensors.items()})
        free = shutil.disk_usage(folder).free
        if free < 2 * len(state):
            raise CheckpointError(f"{folder}: {free} bytes free, {2 * len(state)} wanted")
        manifest = {
            "format": FORMAT,
            "files": {STATE: {"bytes": len(state), "sha256": hashlib.sha256(state).hexdigest()}},
            "counters": dict(counters),
            "config": dict(config),
            "torch": torch.__version__,
        }
        manifest["sha256"] = _digest(manifest)
        # The same again, as at the end of a run: to replace it would leave a moment without it.
        if not _holds(final, manifest):
            temporary.mkdir()
            _write(temporary / STATE, state)
            _write(temporary / MANIFEST, json.dumps(manifest, indent=1).encode())
            _sync_folder(temporary)
            if final.exists():
                shutil.rmtree(final)
            temporary.rename(final)
            _sync_folder(folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(f"cannot write {final}: {error}") from error
    found = _complete(folder)
    here = found.index(final)
    for other in (*found[: max(0, here + 1 - keep)], *found[here + 1 :]):
        shutil.rmtree(other, ignore_errors=True)
    return final


def load_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint folder, everything checked.

    Raises:
        CheckpointError: naming the file that is missing, truncated or changed.
    """
    counters, config, size, digest = _read_manifest(path / MANIFEST)
    return Checkpoint(load_tensors(path / STATE, size, digest), counters, config, path)


def _read_manifest(path: Path) -> tuple[dict[str, int], dict[str, Any], int, str]:
    """Counters, configuration, and size and checksum of the state."""
    try:
        manifest = json.loads(path.read_bytes())
        entry = manifest["files"][STATE]
        size, digest = int(entry["bytes"]), str(entry["sha256"])
        counters = {str(k): int(v) for k, v in manifest["counters"].items()}
        config = dict(manifest["config"])
        known = manifest["format"] == FORMAT
        whole = known and manifest.pop("sha256") == _digest(manifest)
    except MALFORMED as error:
        raise CheckpointError(f"{path}: no readable manifest ({error})") from error
    if not known:
        raise CheckpointError(f"{path}: format {manifest['format']}, expected {FORMAT}")
    if not whole:
        raise CheckpointError(f"{path}: sha256 differs: the file is damaged")
    return counters, config, size, digest


def load_tensors(
    path: Path, size: int | None = None, sha256: str | None = None
) -> dict[str, Tensor]:
    """Tensors of a safetensors file.

    Args:
        size, sha256: what the file must have, if given.

    Raises:
        CheckpointError: a pickle, or a damaged or hostile file.
    """
    if path.suffix in _PICKLES:
        raise CheckpointError(f"{path}: pickled checkpoints can run code; only safetensors is read")
    try:
        found = path.stat().st_size
        if size is not None and found != size:
            raise CheckpointError(f"{path}: {found} bytes, the manifest says {size}")
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise CheckpointError(f"{path}: sha256 differs from the manifest's: the file is damaged")
    if len(data) < 8 or not 2 <= struct.unpack("<Q", data[:8])[0] <= min(
        _MAX_HEADER, len(data) - 8
    ):
        raise CheckpointError(f"{path}: not a safetensors file (header length)")
    try:
        return load(data)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{path}: not a safetensors file ({error})") from error


def latest_checkpoint(folder: Path, strict: bool = False) -> Checkpoint | None:
    """The newest readable checkpoint, None if there is none at all.

    Args:
        strict: raise if the newest is damaged, instead of falling back with a loud log.
    """
    damaged: list[str] = []
    for path in reversed(_complete(folder)):
        try:
            return load_checkpoint(path)
        except CheckpointError as error:
            if strict:
                raise
            log.error("DAMAGED CHECKPOINT, falling back to the one before: %s", error)
            damaged.append(str(error))
    if damaged:
        raise CheckpointError("no checkpoint is readable: " + "; ".join(damaged))
    return None


def newest_config(folder: Path) -> dict[str, Any] | None:
    """The configuration in the newest readable manifest, None if there is none.

    The state beside it is not read: all checkpoints of a run have one configuration, but for the
    run's length and surroundings.
    """
    for path in reversed(_complete(folder)):
        with contextlib.suppress(CheckpointError):
            return _read_manifest(path / MANIFEST)[1]
    return None


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process left half-written."""
    for path in folder.glob("step-*.tmp-*") if folder.is_dir() else ():
        shutil.rmtree(path, ignore_errors=True)


def _complete(folder: Path) -> list[Path]:
    """Checkpoints by step: the names have six digits or more, and do not sort as text."""
    if not folder.is_dir():
        return []
    found = [p for p in folder.iterdir() if p.is_dir() and re.fullmatch(r"step-[0-9]+", p.name)]
    return sorted(found, key=lambda path: int(path.name[5:]))


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _holds(path: Path, manifest: Mapping[str, Any]) -> bool:
    """Whether an undamaged checkpoint with this manifest is there already."""
    try:
        load_checkpoint(path)
        there: Any = json.loads((path / MANIFEST).read_bytes())["sha256"]
    except (CheckpointError, *MALFORMED):
        return False
    return bool(there == manifest["sha256"])


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    if os.name == "nt":  # a folder cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
