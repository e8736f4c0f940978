"""The commands, end to end on tiny models: files, exit codes, resume, signals, locks."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from kvpo_trainer import checkpoint as checkpoints
from kvpo_trainer import session
from kvpo_trainer.checkpoint import latest_checkpoint
from kvpo_trainer.cli import main
from kvpo_trainer.config import load_config, of_weights, to_mapping
from kvpo_trainer.weights import SHIPPED, load_weights, save_weights
from PIL import Image

SMALL = [
    "kvpo.prompts_per_step=1",
    "kvpo.routing.num_branches=2",
    "kvpo.warmup_steps=1",
    "train.evaluation_prompts=2",
    "train.save_every=1",
    "threads=1",
]


def options(*settings: str) -> list[str]:
    return [word for s in (*SMALL, *settings) for word in ("--set", s)]


def train(weights: Path, out: Path, *settings: str, more: tuple[str, ...] = ()) -> int:
    command = ["train", "--weights", str(weights), "--out", str(out), *more]
    return main([*command, *options(*settings)])


def steps(out: Path) -> list[float]:
    return [row["step"] for row in session.read_metrics(out / "metrics.jsonl")]


def test_train_writes_all_it_promises(
    tiny_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, figure = tmp_path / "run", tmp_path / "figures" / "f.png"
    code = train(tiny_weights, out, "train.iterations=2", more=("--figure", str(figure)))
    printed = capsys.readouterr().out
    assert code == 0
    assert steps(out) == [1, 2]
    for line in (out / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert {"vq_branches", "reward_anchor", "kl", "grad_norm", "zero_std_groups"} <= set(row)
    evaluation = json.loads((out / "evaluation.json").read_text())
    for row in evaluation:
        assert row["change"] == pytest.approx(row["after"] - row["before"], abs=1e-6)
        assert f"{row['change']:+.4f}" in printed
    assert str(out / "report.html") in printed and "kvpo-train verify" in printed
    assert (out / "report.html").stat().st_size > 10_000
    assert not (out / "lock").exists()
    with Image.open(figure) as image:
        assert image.format == "PNG" and min(image.size) > 300
    newest = latest_checkpoint(out / "checkpoints", strict=True)
    assert newest is not None and newest.counters["step_index"] == 2
    # What it trained is what it saved, and it differs from where it began.
    before = load_weights(tiny_weights).generator.state_dict()
    assert any(not torch.equal(newest.tensors[f"policy/{k}"], v) for k, v in before.items())
    assert all(torch.equal(newest.tensors[f"initial/{k}"], v) for k, v in before.items())

    command = ["evaluate", "--weights", str(tiny_weights), "--checkpoint", str(out), *options()]
    assert main(command) == 0
    scored = capsys.readouterr().out
    assert f"{next(r['after'] for r in evaluation if r['measure'] == 'reward'):.3f}" in scored


def test_resume_is_bit_identical(tiny_weights: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(tiny_weights, whole, "train.iterations=3") == 0
    assert train(tiny_weights, parts, "train.iterations=1") == 0
    assert train(tiny_weights, parts, "train.iterations=3", more=("--resume",)) == 0
    a, b = (latest_checkpoint(p / "checkpoints", strict=True) for p in (whole, parts))
    assert a is not None and b is not None and a.counters == b.counters
    assert a.tensors.keys() == b.tensors.keys()
    for name, value in a.tensors.items():
        assert torch.equal(value, b.tensors[name]), name
    timed = ("seconds_rollout", "seconds_update")
    rows = [
        [{k: v for k, v in row.items() if k not in timed} for row in session.read_metrics(path)]
        for path in (whole / "metrics.jsonl", parts / "metrics.jsonl")
    ]
    assert rows[0] == rows[1]


def test_resume_of_a_finished_run_leaves_it_as_it_is(
    tiny_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert train(tiny_weights, out, "train.iterations=1") == 0
    report = (out / "report.html").read_bytes()
    assert train(tiny_weights, out, "train.iterations=1", more=("--resume",)) == 0
    assert "nothing left to do: all 1 rollouts are done" in capsys.readouterr().out
    assert (out / "report.html").read_bytes() == report
    (out / "report.html").unlink()  # as where the run was killed before it
    assert train(tiny_weights, out, "train.iterations=1", more=("--resume",)) == 0
    assert (out / "report.html").exists()


def test_resume_from_other_weights_is_refused(
    tiny_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, other = tmp_path / "run", tmp_path / "weights"
    assert train(tiny_weights, out, "train.iterations=1") == 0
    weights = load_weights(tiny_weights)
    next(weights.generator.parameters()).data += 1e-3
    parts = (weights.generator, weights.reward_model, weights.judge, weights.config)
    save_weights(other, *parts)
    assert load_weights(other).checksum != weights.checksum
    assert train(other, out, "train.iterations=2", more=("--resume",)) == 2
    assert "began with other weights: pass the same --weights" in capsys.readouterr().err
    (out / "weights.json").unlink()  # as of an earlier version: the generator's still show
    assert train(other, out, "train.iterations=2", more=("--resume",)) == 2
    assert "began with other weights: pass the same --weights" in capsys.readouterr().err
    assert steps(out) == [1]
    session.record_weights(out, tmp_path / "gone", "0")
    assert main(["train", "--out", str(out), "--resume"]) == 2
    assert f"the weights that {out} began with, --weights: " in capsys.readouterr().err


def test_a_policy_that_diverges_is_named_with_its_rollout(
    tiny_weights: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "run"
    options = ("kvpo.learning_rate=1e30", "train.iterations=9")
    assert train(tiny_weights, out, *options) == 2
    assert re.search(
        r"rollout [2-9]: prompt \d \('a \d moves .*'\): .* must be finite, got .* for branch",
        capsys.readouterr().err,
    )


def test_resume_after_damage(
    tiny_weights: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "run"
    assert train(tiny_weights, out, "train.iterations=2") == 0
    os.truncate(out / "checkpoints/step-000002/state.safetensors", 100)
    assert train(tiny_weights, out, "train.iterations=2", more=("--strict-resume",)) == 2
    assert steps(out) == [1, 2]
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "cut sho')  # a kill in the middle of a line
    (out / "checkpoints/step-000009.tmp-1").mkdir()
    assert train(tiny_weights, out, "train.iterations=3", more=("--resume",)) == 0
    assert "DAMAGED CHECKPOINT" in caplog.text
    assert steps(out) == [1, 2, 3]
    assert not list((out / "checkpoints").glob("*.tmp-*"))


def test_a_run_is_not_overwritten(
    tiny_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert train(tiny_weights, out, "train.iterations=1") == 0
    assert train(tiny_weights, out, "train.iterations=1") == 2
    assert "holds a run: pass --resume, or another --out" in capsys.readouterr().err
    assert steps(out) == [1]


def test_sample(tiny_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["sample", "--weights", str(tiny_weights), "--out", str(tmp_path / "gifs")]
    prompts = ["a 3 moves left slowly, then turns up", "a 7 moves up quickly, then turns right"]
    assert main([*command, *prompts]) == 0
    paths = sorted((tmp_path / "gifs").glob("*.gif"))
    assert len(paths) == 2
    with Image.open(paths[0]) as image:
        assert image.n_frames == 57
    assert main([*command, "a 3 jumps"]) == 2
    assert "prompt 'a 3 jumps' is not" in capsys.readouterr().err


def test_pretrain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvpo_trainer import cli
    from kvpo_trainer.rewards import train_reward_models

    monkeypatch.setattr(cli, "train_reward_models", lambda d, s: train_reward_models(d, s, steps=2))
    tiny = ["data.canvas=8", "generator.dim=32", "generator.layers=1", "generator.heads=2"]
    tiny += ["pretrain.steps=3", "pretrain.batch=2", "pretrain.self_context_from=0.5", "threads=1"]
    settings = [word for s in tiny for word in ("--set", s)]
    for name in ("one", "two"):
        assert main(["pretrain", "--out", str(tmp_path / name), *settings]) == 0
    one, two = (load_weights(tmp_path / name) for name in ("one", "two"))
    assert one.config.generator.dim == 32 and one.config.data.canvas == 8
    for a, b in zip(one.generator.parameters(), two.generator.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("command", "match"),
    [
        (["train", "--out", "x", "--set", "kvpo.lr=1"], "unknown key kvpo.lr"),
        (["train", "--out", "x", "--config", "nothing.yaml"], "cannot read nothing.yaml"),
        (["train", "--out", "x", "--weights", "nowhere"], "nowhere"),
        (["evaluate", "--weights", "nowhere"], "nowhere"),
    ],
)
def test_errors_are_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: list[str],
    match: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(command) == 2
    error = capsys.readouterr().err
    assert match in error and error.startswith("kvpo-train: ") and "Traceback" not in error


def test_a_run_goes_on_with_its_own_configuration_only(
    tiny_weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, threads = tmp_path / "run", []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)  # two would take long
    own = (
        "kvpo.reward_sign=-1",
        "kvpo.rewards.ta=5",
        "kvpo.learning_rate=1e-3",
        "history=int8",
    )
    assert train(tiny_weights, out, *own, "train.iterations=1") == 0
    report = (out / "report.html").read_bytes()
    differing = ("kvpo.reward_sign=1", "history=int8", "kvpo.ema=0.5")
    assert train(tiny_weights, out, *differing, more=("--resume",)) == 2
    error = capsys.readouterr().err
    assert "kvpo.ema: 0.99, 0.5; kvpo.reward_sign: -1, 1" in error
    assert str(out / "config.yaml") in error
    assert "history" not in error.partition("asked for")[2]
    assert steps(out) == [1] and (out / "report.html").read_bytes() == report
    # What is not said again is the run's own: configuration and weights. Length and threads may
    # change, and are the run's own as well.
    resume = ["train", "--out", str(out), "--resume"]
    assert main(resume) == 0
    assert "nothing left to do: all 1 rollouts are done" in capsys.readouterr().out
    assert main([*resume, "--set", "train.iterations=2", "--set", "threads=2"]) == 0
    assert threads == [1, 1, 1, 2]
    assert main([*resume, *options(*own, "train.iterations=3")]) == 0
    assert steps(out) == [1, 2, 3]
    newest = latest_checkpoint(out / "checkpoints", strict=True)
    assert newest is not None
    asked = load_config(None, [*SMALL, *own, "train.iterations=3"])
    made = load_weights(tiny_weights).config
    assert newest.config == to_mapping(of_weights(asked, made))

    def scored(*settings: str, more: tuple[str, ...] = ()) -> str:
        command = ["evaluate", "--checkpoint", str(out), *more]
        capsys.readouterr()
        assert main([*command, *options(*settings)]) == 0
        return capsys.readouterr().out

    # A run is judged as it was trained, if the command line does not say otherwise.
    assert scored() == scored("kvpo.rewards.ta=5", "history=int8")
    assert scored() != scored("kvpo.rewards.ta=3")
    assert scored() != scored(more=("--average",))
    assert main(["evaluate", "--weights", str(tiny_weights), "--average", *options()]) == 2
    assert "--average is of a run" in capsys.readouterr().err
    shipped = ["--weights", str(SHIPPED)]
    assert main(["evaluate", "--checkpoint", str(out), *shipped, *options()]) == 2
    error = capsys.readouterr().err
    assert "(--weights)?" in error and len(error) < 600


@pytest.mark.parametrize(
    ("setting", "more", "match"),
    [
        ("generator.layers=9", (), "generator.layers = 9 is not what the weights were made with"),
        ("seed=1", ("--figure", "figure.txt"), "--figure must name a .png, .svg or .pdf file"),
        ("kvpo.routing.window_frames=18", (), "routing.window_frames must be 12"),
    ],
)
def test_refused_before_anything_is_evaluated(
    tiny_weights: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    setting: str,
    more: tuple[str, ...],
    match: str,
) -> None:
    assert train(tiny_weights, tmp_path / "run", setting, more=more) == 2
    printed = capsys.readouterr()
    assert match in printed.err and "evaluating" not in printed.out


def test_a_folder_in_use(
    tiny_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    with session.run_folder(out):
        assert train(tiny_weights, out, "train.iterations=1") == 2
        assert f"in use by process {os.getpid()} on {socket.gethostname()}" in (
            capsys.readouterr().err
        )
        assert (out / "lock").exists()
    # A lock whose process is gone is taken over.
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (out / "lock").write_text(json.dumps({"pid": gone.pid, "host": socket.gethostname()}))
    with session.run_folder(out):
        assert json.loads((out / "lock").read_text())["pid"] == os.getpid()
    # So is that of a process whose number another one has by now, even this one.
    own = {"pid": os.getpid(), "host": socket.gethostname(), "started": "1"}
    (out / "lock").write_text(json.dumps(own))
    with session.run_folder(out):
        assert json.loads((out / "lock").read_text())["started"] != "1"
    (out / "lock").write_text("a file of somebody else")
    with (
        pytest.raises(session.RunError, match="is not the lock of a run"),
        session.run_folder(out),
    ):
        pass
    assert (out / "lock").read_text() == "a file of somebody else"
    # What a killed container has left, or a full disk, keeps nobody out.
    another = json.dumps({"pid": os.getpid(), "host": "another-machine", "started": ""})
    for note in (another, another[:20], ""):
        (out / "lock").write_text(note)
        with session.run_folder(out):
            assert json.loads((out / "lock").read_text())["host"] == socket.gethostname()
    assert not (out / "lock").exists()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(session.RunError, match="cannot write to"),
        session.run_folder(tmp_path / "file" / "run"),
    ):
        pass


def test_saves_that_fail(
    tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, caplog
) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "_write", full)
    assert train(tiny_weights, tmp_path / "run", "train.iterations=9") == 2
    assert "3 checkpoints in a row could not be written" in capsys.readouterr().err
    assert steps(tmp_path / "run") == [1, 2, 3]  # it went on after the first two
    assert caplog.text.count("training goes on") == 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops(tiny_weights: Path, tmp_path: Path, number: int) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "kvpo_trainer", "train", "--weights", str(tiny_weights)]
    command += ["--out", str(out), *options("train.iterations=1000", "train.save_every=1000")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 100
        while not steps(out):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(number)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + number
    assert b"--resume goes on" in error and b"Traceback" not in error
    newest = latest_checkpoint(out / "checkpoints", strict=True)
    assert newest is not None and newest.counters["step_index"] == steps(out)[-1]
    assert not (out / "lock").exists()


def test_metrics_are_always_json(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    session.write_metrics(path, {"a": float("nan"), "b": float("-inf"), "c": "x" * 9999, "step": 1})
    (row,) = session.read_metrics(path)
    assert row["a"] == "nan" and row["b"] == "-inf" and len(row["c"]) == 2000


def test_without_the_extra_it_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['tqdm'] = None; from kvpo_trainer.__main__ import main;"
        "sys.exit(main())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "tqdm is not installed; pip install 'kvpo_kernels[train]'" in done.stderr
