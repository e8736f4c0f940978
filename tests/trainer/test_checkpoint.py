"""Checkpoints: what happens to disks and processes, and what is read afterwards."""

import errno
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kvpo_trainer import checkpoint as module
from kvpo_trainer.checkpoint import (
    MANIFEST,
    STATE,
    CheckpointError,
    latest_checkpoint,
    load_checkpoint,
    load_tensors,
    remove_leftovers,
    save_checkpoint,
)
from safetensors.torch import save as serialize
from torch import Tensor


def state(step: int) -> dict[str, Tensor]:
    return {
        "policy/a": torch.full((64, 3), float(step)),
        "policy/b": torch.arange(5, dtype=torch.int64),
        "ema/a": torch.full((7,), float(step)).to(torch.bfloat16),
    }


def save(folder: Path, step: int, keep: int = 2) -> Path:
    return save_checkpoint(folder, state(step), {"step_index": step, "seed": 1}, {"x": 1}, keep)


def test_round_trip(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    read = load_checkpoint(path)
    assert read.counters == {"step_index": 3, "seed": 1} and read.config == {"x": 1}
    assert read.tensors.keys() == state(3).keys()
    for name, value in state(3).items():
        assert torch.equal(read.tensors[name], value) and read.tensors[name].dtype is value.dtype


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        save(tmp_path, step)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000002", "step-000010"]
    newest = latest_checkpoint(tmp_path)
    assert newest is not None and newest.counters["step_index"] == 10
    save(tmp_path, 10)  # once more, after a resume
    assert latest_checkpoint(tmp_path) is not None
    assert latest_checkpoint(tmp_path / "nothing") is None


@pytest.mark.parametrize("where", [0, 8, 100, -1])
def test_a_flipped_bit_is_seen_wherever_it_is(tmp_path: Path, where: int) -> None:
    path = save(tmp_path, 1) / STATE
    data = bytearray(path.read_bytes())
    data[where] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"{STATE}: sha256 differs"):
        load_checkpoint(path.parent)


@pytest.mark.parametrize("size", [0, 7, 8, 200])
def test_a_truncated_file_is_seen(tmp_path: Path, size: int) -> None:
    path = save(tmp_path, 1) / STATE
    whole = path.stat().st_size
    os.truncate(path, size)
    with pytest.raises(CheckpointError, match=f"{size} bytes, the manifest says {whole}"):
        load_checkpoint(path.parent)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "null",
        '{"format": 1, "files": 3}',
        '{"format": 1, "files": {"state.safetensors": {"bytes": "x", "sha256": ""}}}',
        "\x00\x01",
    ],
)
def test_a_damaged_manifest_is_seen(tmp_path: Path, text: str) -> None:
    path = save(tmp_path, 1)
    (path / MANIFEST).write_text(text)
    with pytest.raises(CheckpointError, match=rf"{MANIFEST}: no readable manifest"):
        load_checkpoint(path)


def test_another_format_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    manifest = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(CheckpointError, match="format 99, expected 2"):
        load_checkpoint(path)


def test_missing_files(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    (path / STATE).unlink()
    with pytest.raises(CheckpointError, match=f"cannot read .*{STATE}"):
        load_checkpoint(path)
    (path / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="no readable manifest"):
        load_checkpoint(path)


def test_a_damaged_newest_falls_back_loudly(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    os.truncate(tmp_path / "step-000002" / STATE, 10)
    read = latest_checkpoint(tmp_path)
    assert read is not None and read.counters["step_index"] == 1
    assert "DAMAGED CHECKPOINT" in caplog.text and "step-000002" in caplog.text
    with pytest.raises(CheckpointError, match="step-000002"):
        latest_checkpoint(tmp_path, strict=True)
    os.truncate(tmp_path / "step-000001" / STATE, 10)
    with pytest.raises(CheckpointError, match="no checkpoint is readable"):
        latest_checkpoint(tmp_path)


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch /tmp/kvpo-pickle-was-run",)


@pytest.mark.parametrize("name", ["state.pt", "state.bin", "state.pkl", "state.safetensors"])
def test_a_pickle_is_never_loaded(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError, match=r"can run code|not a safetensors file"):
        load_tensors(path)
    assert not Path("/tmp/kvpo-pickle-was-run").exists()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 8,
        (2**62).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"xx",
        (60).to_bytes(8, "little")
        + b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,999]}}    ',
        (71).to_bytes(8, "little")
        + b'{"a":{"dtype":"F32","shape":[9223372036854775808,0],"data_offsets":[0,0]}}'[:71],
        (74).to_bytes(8, "little")
        + b'{"a":{"dtype":"F32","shape":[9223372036854775808,0],"data_offsets":[0,0]}}',
        (63).to_bytes(8, "little")
        + b'{"a":{"dtype":"F8_E8M0","shape":[64],"data_offsets":[0,64]}}   '
        + bytes(64),
    ],
)
def test_hostile_headers(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        load_tensors(path)


@pytest.mark.parametrize("failing", [STATE, MANIFEST])
def test_a_full_disk_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    save(tmp_path, 1)
    write = module._write

    def full(path: Path, data: bytes) -> None:
        if path.name == failing:
            path.write_bytes(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, data)

    monkeypatch.setattr(module, "_write", full)
    with pytest.raises(CheckpointError, match=r"step-000002.*No space left"):
        save(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]
    assert load_checkpoint(tmp_path / "step-000001").counters["step_index"] == 1


def test_too_little_space_is_seen_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match="10 bytes free"):
        save(tmp_path, 1)
    assert not list(tmp_path.iterdir())


KILLED = """
import sys, torch
from pathlib import Path
from kvpo_trainer.checkpoint import save_checkpoint
step = int(sys.argv[2])
print("ready", flush=True)
while True:
    step += 1
    tensors = {"a": torch.full((100_000,), float(step))}
    save_checkpoint(Path(sys.argv[1]), tensors, {"step_index": step}, {})
"""


def test_kill_at_any_moment(tmp_path: Path) -> None:
    """SIGKILL at moments spread over many saves: what is left always loads, and is consistent."""
    last = 0
    for attempt in range(4):
        command = [sys.executable, "-c", KILLED, str(tmp_path), str(last)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline()
        while not list(tmp_path.glob(f"step-{last + 1:06d}")):  # one save at least
            assert process.poll() is None
            time.sleep(0.001)
        time.sleep(0.013 * attempt)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        remove_leftovers(tmp_path)
        assert not list(tmp_path.glob("*.tmp-*"))
        read = latest_checkpoint(tmp_path, strict=True)
        assert read is not None and read.counters["step_index"] > last
        last = read.counters["step_index"]
        assert (read.tensors["a"] == last).all()


def test_a_flipped_bit_in_the_manifest_is_seen_wherever_it_is(tmp_path: Path) -> None:
    """A counter that is wrong by one bit would resume at another step, or with another seed."""
    path = save(tmp_path, 1) / MANIFEST
    whole = path.read_bytes()
    for at in range(len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="step-000001"):
            load_checkpoint(path.parent)
    path.write_bytes(whole)
    assert load_checkpoint(path.parent).counters["step_index"] == 1


def rewritten(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """A manifest as someone would write it who knows how it is protected."""
    manifest = json.loads((path / MANIFEST).read_text())
    del manifest["sha256"]
    change(manifest)
    manifest["sha256"] = module._digest(manifest)
    (path / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", ["../outside.safetensors", "{tmp}/outside.safetensors"])
def test_no_path_of_a_manifest_is_opened(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "run"
    path, outside = save(folder, 1), save(tmp_path / "other", 9)
    shutil.copy(outside / STATE, tmp_path / "run" / "outside.safetensors")
    shutil.copy(outside / STATE, tmp_path / "outside.safetensors")
    entry = json.loads((outside / MANIFEST).read_text())["files"][STATE]
    name = name.format(tmp=tmp_path)
    rewritten(path, lambda m: m["files"].update({name: entry}))
    read = load_checkpoint(path)
    assert (read.tensors["policy/a"] == 1).all() and read.tensors.keys() == state(1).keys()
    rewritten(path, lambda m: m.update(files={name: entry}))
    with pytest.raises(CheckpointError, match="no readable manifest"):
        load_checkpoint(path)


@pytest.mark.parametrize("size", ["Infinity", "NaN", "null", '"x"', "[]", "1e400"])
def test_odd_numbers_in_a_manifest(tmp_path: Path, size: str) -> None:
    path = save(tmp_path, 1)
    rewritten(path, lambda m: m["files"][STATE].update(bytes="SIZE"))
    text = (path / MANIFEST).read_text().replace('"SIZE"', size)
    (path / MANIFEST).write_text(text)
    with pytest.raises(CheckpointError, match="no readable manifest"):
        load_checkpoint(path)
    (path / MANIFEST).write_text("[" * 200_000)
    with pytest.raises(CheckpointError, match="no readable manifest"):
        load_checkpoint(path)


def test_random_headers_are_read_or_refused(tmp_path: Path) -> None:
    """Damage without a checksum to show it: an error of ours or tensors, nothing else."""
    whole = serialize({"a": torch.arange(6.0).view(2, 3), "b": torch.zeros(0)})
    length = int.from_bytes(whole[:8], "little")
    rng, path, refused = random.Random(0), tmp_path / "x.safetensors", 0
    for _ in range(500):
        data = bytearray(whole)
        for _ in range(rng.choice([1, 1, 2, 4])):
            data[rng.randrange(8 + length)] = rng.choice(b'0123456789"{}[],:FIBU\x00\xff')
        path.write_bytes(data)
        try:
            tensors = load_tensors(path)
        except CheckpointError as error:
            refused += str(path) in str(error)
        else:
            assert all(isinstance(value, Tensor) for value in tensors.values())
    assert refused > 300


def test_the_same_step_again_never_leaves_a_moment_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path, 1, keep=1)
    before = path.stat().st_ino

    def killed(self: Path, target: Path) -> None:
        raise OSError(errno.EIO, "gone")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        assert save(tmp_path, 1, keep=1) == path  # nothing to do
        assert load_checkpoint(path).counters["step_index"] == 1
    assert path.stat().st_ino == before
    os.truncate(path / STATE, 10)
    save(tmp_path, 1, keep=1)  # a damaged one is replaced
    assert load_checkpoint(path).counters["step_index"] == 1
    save_checkpoint(tmp_path, state(1), {"step_index": 1, "seed": 1}, {"x": 2}, 1)
    assert load_checkpoint(path).config == {"x": 2}  # and one of another configuration


def test_steps_sort_as_numbers(tmp_path: Path) -> None:
    for step in (999_999, 1_000_000):
        save(tmp_path, step, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-1000000"]
    save(tmp_path, 1_000_001)
    newest = latest_checkpoint(tmp_path)
    assert newest is not None and newest.counters["step_index"] == 1_000_001


@pytest.mark.parametrize("keep", [1, 2])
def test_damaged_later_ones_do_not_push_out_good_ones(tmp_path: Path, keep: int) -> None:
    for step in (5, 9, 10):
        save(tmp_path, step, keep=9)
    for step in (9, 10):
        os.truncate(tmp_path / f"step-{step:06d}" / STATE, 10)
    fallen_back = latest_checkpoint(tmp_path)
    assert fallen_back is not None and fallen_back.counters["step_index"] == 5
    save(tmp_path, 6, keep=keep)
    names = ["step-000005", "step-000006"][-keep:]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    newest = latest_checkpoint(tmp_path, strict=True)
    assert newest is not None and newest.counters["step_index"] == 6


def test_what_is_no_checkpoint_is_not_taken_for_one(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "step-000009").write_text("a file")
    for name in ("step-", "step-000003.tmp-77", "step-abc", "step-\u0663", "other"):
        (tmp_path / name).mkdir()
    newest = latest_checkpoint(tmp_path, strict=True)
    assert newest is not None and newest.counters["step_index"] == 1
    save(tmp_path, 2, keep=1)
    assert (tmp_path / "other").exists() and (tmp_path / "step-000009").exists()
    remove_leftovers(tmp_path)
    assert not (tmp_path / "step-000003.tmp-77").exists() and (tmp_path / "step-abc").exists()


@pytest.mark.parametrize("call", ["fsync", "mkdir", "rename"])
def test_any_failing_call_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    save(tmp_path, 1)

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    with monkeypatch.context() as patch:
        patch.setattr(os if call == "fsync" else Path, call, fail)
        with pytest.raises(CheckpointError, match=r"step-000002.*quota"):
            save(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]
    save(tmp_path, 2)  # space again: nothing of the failure is in the way
    assert load_checkpoint(tmp_path / "step-000002").counters["step_index"] == 2
