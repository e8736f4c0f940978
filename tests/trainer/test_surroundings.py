"""What a run stands in: terminals, pipes, disks, locales, signals, locks. None of it ends a run."""

import contextlib
import errno
import io
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from kvpo_trainer import __main__ as entry
from kvpo_trainer import cli, console, lock, progress, report, session, signals, verify
from kvpo_trainer.checkpoint import latest_checkpoint
from kvpo_trainer.cli import main
from kvpo_trainer.data import DataConfig, Prompt, make_clips
from kvpo_trainer.files import write_whole
from kvpo_trainer.rewards import train_reward_models
from kvpo_trainer.session import read_metrics, write_metrics
from kvpo_trainer.update import Trainer
from kvpo_trainer.weights import load_weights

PROMPT = "a 3 moves left slowly, then turns up"
SMALL = [
    "kvpo.prompts_per_step=1",
    "kvpo.routing.num_branches=2",
    "train.evaluation_prompts=2",
    "train.iterations=2",
    "threads=1",
]
SETTINGS = [word for s in SMALL for word in ("--set", s)]


def train(weights: Path, out: Path, *more: str) -> list[str]:
    return ["train", "--weights", str(weights), "--out", str(out), *SETTINGS, *more]


def whole(out: Path, iterations: int = 2) -> None:
    """All that a run promises is there."""
    newest = latest_checkpoint(out / "checkpoints", strict=True)
    assert newest is not None and newest.counters["step_index"] == iterations
    assert [row["step"] for row in read_metrics(out / "metrics.jsonl")] == [1, 2]
    assert len(json.loads((out / "evaluation.json").read_bytes())) == 6
    assert "±" in (out / "report.html").read_text(encoding="utf-8")
    assert not (out / "lock").exists()


@contextlib.contextmanager
def stream(kind: str) -> Iterator[Any]:
    """A standard stream that cannot be written to."""
    if kind == "none":
        yield None
    elif kind == "closed":
        file = open(os.devnull, "w")  # noqa: SIM115
        file.close()
        yield file
    elif kind == "pipe":
        read, write = os.pipe()
        os.close(read)
        file = open(write, "w", buffering=1)  # noqa: SIM115
        yield file
        with contextlib.suppress(OSError):
            file.close()
    else:
        file = open("/dev/full", "w", buffering=1)  # noqa: SIM115
        yield file
        with contextlib.suppress(OSError):
            file.close()


@pytest.mark.parametrize("kind", ["full", "pipe", "closed", "none"])
def test_a_run_does_not_need_to_tell(
    tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    out = tmp_path / "run"
    with stream(kind) as stdout, stream(kind) as stderr, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        patch.setattr(sys, "stderr", stderr)
        code = main(train(tiny_weights, out))
        assert sys.stdout is stdout and sys.stderr is stderr
    assert code == 0
    whole(out)


def pretrain_command(monkeypatch: pytest.MonkeyPatch, out: Path) -> list[str]:
    monkeypatch.setattr(cli, "train_reward_models", lambda d, s: train_reward_models(d, s, steps=2))
    tiny = ["data.canvas=8", "generator.dim=32", "generator.layers=1", "generator.heads=2"]
    tiny += ["pretrain.steps=2", "pretrain.batch=2", "threads=1"]
    return ["pretrain", "--out", str(out), *(word for s in tiny for word in ("--set", s))]


def verify_command(monkeypatch: pytest.MonkeyPatch, out: Path) -> list[str]:
    def run_all(command: Any, seeds: list[int], *_: Any) -> dict[tuple[str, int], dict[str, Any]]:
        print("arms run")
        one = {"weights": "w", "scores": {"reward": [0.1, 0.2]}}
        return {(arm, seed): one for arm in (*verify.ARMS, verify.START) for seed in seeds}

    monkeypatch.setattr(verify, "run_all", run_all)
    return ["verify", "--seeds", "2", "--out", str(out)]


def alphabet(raw: io.BytesIO, encoding: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(raw, encoding, write_through=True)


def test_every_command_keeps_its_result(
    tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a disk where the log has no place, and in a terminal of another alphabet."""
    weights = ["--weights", str(tiny_weights)]
    record = tmp_path / "d.json"
    diversity = ["diversity", *weights, *SETTINGS, "--rollouts", "1", "--record", str(record)]
    kept = {
        "sample": ["sample", *weights, "--out", str(tmp_path / "clips"), PROMPT],
        "diversity": diversity,
        "pretrain": pretrain_command(monkeypatch, tmp_path / "w"),
        "verify": verify_command(monkeypatch, tmp_path / "v"),
    }
    results = {
        "sample": lambda: next((tmp_path / "clips").glob("*.gif")),
        "diversity": lambda: record,
        "pretrain": lambda: tmp_path / "w" / "manifest.json",
        "verify": lambda: tmp_path / "v" / "summary.json",
    }
    for name, command in kept.items():
        with stream("full") as full, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", full)
            patch.setattr(sys, "stderr", errors := io.StringIO())
            code = main(command)
        assert code == (1 if name == "verify" else 0), name  # no gap is no signed test that holds
        assert "some output is lost: [Errno 28]" in errors.getvalue(), name
        assert results[name]().stat().st_size > 100, name

    # What is told and kept nowhere is a result that is lost, unless its reader has left.
    evaluate = ["evaluate", *weights, *SETTINGS]
    for kind, wanted in (("full", 2), ("none", 2), ("closed", 2), ("pipe", 0)):
        with stream(kind) as broken, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", broken)
            patch.setattr(sys, "stderr", errors := io.StringIO())
            assert main(evaluate) == wanted
        assert ("could not be written" in errors.getvalue()) == (wanted == 2)

    for encoding in ("ascii", "iso8859-2", "cp1251"):
        for command, code in ((evaluate, 0), (diversity, 0), (kept["verify"], 1)):
            raw = io.BytesIO()
            with monkeypatch.context() as patch:
                patch.setattr(sys, "stdout", out := alphabet(raw, encoding))
                assert main(command) == code
                assert sys.stdout is out
            text = raw.getvalue().decode(encoding)
            assert (" +- " in text) == (encoding != "cp1251") and "?" not in text


def test_train_in_another_alphabet(
    tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, out = io.BytesIO(), tmp_path / "běh-№1"
    stdout, stderr = alphabet(raw, "iso8859-2"), alphabet(io.BytesIO(), "ascii")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        patch.setattr(sys, "stderr", stderr)
        assert main(train(tiny_weights, out)) == 0
    whole(out)
    text = raw.getvalue().decode("iso8859-2")
    assert " +- " in text and "běh-\\u21161" in text


def run(command: list[str], **environment: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "kvpo_trainer", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, **environment},
    )


def test_processes(tiny_weights: Path, tmp_path: Path) -> None:
    """What only a process of its own shows: its end, its locale, descriptors that it lacks."""
    first, second = tmp_path / "été", tmp_path / "without"
    c = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    left = run(train(tiny_weights, first), **c, PYTHONIOENCODING="ascii")
    left.stdout.close()  # as by `| head -0`
    shell = 'exec "$0" -m kvpo_trainer "$@" <&- >&- 2>&-'
    without = subprocess.Popen(["sh", "-c", shell, sys.executable, *train(tiny_weights, second)])
    assert left.stderr.read().count(b"Traceback") == 0 and left.wait() == 0
    left.stderr.close()
    whole(first)
    assert without.wait() == 0
    whole(second)
    help_ = run(["--help"])
    help_.stdout.close()
    shown = run(["evaluate", "--weights", str(tiny_weights), *SETTINGS], **c)
    out, error = shown.communicate()
    assert shown.returncode == 0 and b"+-" in out and not error
    assert help_.stderr.read() == b"" and help_.wait() == 0
    help_.stderr.close()


def test_evaluation_is_kept_where_the_report_cannot_be(
    tiny_weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, figure = tmp_path / "run", tmp_path / "f.png"

    def full(path: Path, content: str | bytes) -> None:
        if path.suffix in (".html", ".png"):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write_whole(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(cli, "write_whole", full)
        assert main(train(tiny_weights, out, "--figure", str(figure))) == 2
    printed = capsys.readouterr()
    assert "paired change" in printed.out and "judge_motion" in printed.out
    assert f"could not be written: {out / 'report.html'}, {figure}" in printed.err
    assert (out / "evaluation.json").exists() and not (out / "report.html").exists()
    # Nor does a figure that cannot be drawn take anything with it.
    (out / "evaluation.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(report, "render", lambda *_: 1 / 0)
        assert main([*train(tiny_weights, out), "--resume"]) == 2
    assert "paired change" in capsys.readouterr().out and (out / "evaluation.json").exists()
    assert main([*train(tiny_weights, out), "--resume"]) == 0
    whole(out)


def test_a_disk_that_fills_and_empties(
    tiny_weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Metrics come when there is space again; what cannot be shown is not shown."""
    weights, config = load_weights(tiny_weights), cli.load_config(None, SMALL)
    prompts = [Prompt.parse(PROMPT)]
    trainer = Trainer(weights.generator, weights.reward_model, prompts, config.kvpo, 0)
    calls: list[int] = []

    def write(path: Path, metrics: dict[str, float]) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_metrics(path, metrics)

    def show(result: object) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(session, "write_metrics", write)
    with session.run_folder(tmp_path):
        assert session.train_loop(trainer, tmp_path, config, show) == 2
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
    assert caplog.text.count("metrics of 1 rollouts not written, training goes on") == 1
    assert caplog.text.count("progress cannot be shown, training goes on") == 1
    assert latest_checkpoint(tmp_path / "checkpoints", strict=True) is not None


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_files_are_whole_or_as_they_were(tmp_path: Path) -> None:
    path, table = tmp_path / "m.jsonl", tmp_path / "t.json"
    write_metrics(path, {"step": 1})
    write_whole(table, "old ±")
    with files_of_at_most(path.stat().st_size + 5):  # a part of the line would fit
        with pytest.raises(OSError, match=r"space|large"):
            write_metrics(path, {"step": 2, "more": "x" * 100})
        with pytest.raises(OSError, match="large"):
            write_whole(table, "x" * 1000)
    write_metrics(path, {"step": 3})
    assert [row["step"] for row in read_metrics(path)] == [1, 3]
    assert path.read_bytes().count(b"\n") == 2
    assert table.read_text(encoding="utf-8") == "old ±"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.jsonl", "t.json"]
    # A device stays one, a link a link.
    write_whole(Path(os.devnull), "x")
    assert not Path(os.devnull).is_file()
    (tmp_path / "link").symlink_to(table)
    write_whole(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and table.read_text() == "new"


def test_progress_in_a_file_comes_in_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(sys, "stderr", text := io.StringIO())
    with progress.Progress("KVPO", "rollout", 12, 2) as bar:
        for _ in range(6):
            now[0] += 4.0
            bar.step(vq=0.5)
    lines = text.getvalue().splitlines()
    assert "\r" not in text.getvalue()
    assert lines[0] == "KVPO: rollout 3 of 12, 4 s, 4.00 s each, vq 0.500"
    assert [line.split(",")[0] for line in lines] == [f"KVPO: rollout {i} of 12" for i in (3, 6, 8)]


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with console.telling(), progress.Progress("KVPO", "rollout", 2) as bar:
        bar.step(vq=0.5)
        bar.step(vq=0.25)
    assert "\r" in terminal.getvalue() and "2/2" in terminal.getvalue()
    assert "vq 0.250" in terminal.getvalue()


@pytest.mark.parametrize("number", signals.ASKING, ids=lambda number: number.name)
def test_any_signal_that_asks_to_end_saves(
    tiny_weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
) -> None:
    out, step = tmp_path / "run", Trainer.step

    def interrupted(self: Trainer) -> object:
        signal.raise_signal(number)
        return step(self)

    monkeypatch.setattr(Trainer, "step", interrupted)
    before = signal.getsignal(number)
    assert main(train(tiny_weights, out)) == 128 + number
    assert signal.getsignal(number) is before
    assert f"stopped by {number.name}; the state is saved, --resume goes on" in (
        capsys.readouterr().err
    )
    newest = latest_checkpoint(out / "checkpoints", strict=True)
    assert newest is not None and newest.counters["step_index"] == 1
    assert not (out / "lock").exists()


def test_a_signal_outside_of_training_ends_a_command_in_order(
    tiny_weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "run"
    monkeypatch.setattr(cli, "evaluate", lambda *_: signal.raise_signal(signal.SIGUSR1))
    assert main(train(tiny_weights, out)) == 128 + signal.SIGUSR1
    assert capsys.readouterr().err.splitlines()[-1] == "kvpo-train: stopped by SIGUSR1"
    assert not (out / "lock").exists()


SECOND = """
import os, signal, sys, time
from kvpo_trainer import signals
first, second, wait = signal.Signals[sys.argv[1]], signal.Signals[sys.argv[2]], float(sys.argv[3])
with signals.noted() as received:
    signal.raise_signal(first)
    time.sleep(wait)
    signal.raise_signal(second)
    print("still here", received)
"""


@pytest.mark.parametrize(
    ("first", "second", "wait", "lives"),
    [
        ("SIGTERM", "SIGTERM", 0, False),
        ("SIGUSR1", "SIGINT", 0, False),
        ("SIGHUP", "SIGTERM", 0, False),
        ("SIGHUP", "SIGHUP", 0, True),  # a terminal that closes sends it twice
        ("SIGTERM", "SIGHUP", 0, True),
        ("SIGHUP", "SIGHUP", 0.7, False),
    ],
)
def test_a_second_signal_ends_at_once(first: str, second: str, wait: float, lives: bool) -> None:
    command = [sys.executable, "-c", SECOND, first, second, str(wait)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == (0 if lives else -signal.Signals[second])
    assert done.stdout == (f"still here [{int(signal.Signals[first])}]\n" if lives else "")


def test_what_is_ignored_stays_ignored() -> None:
    """As SIGHUP under `nohup`."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.noted() as received:
            signal.raise_signal(signal.SIGHUP)
        assert received == [] and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


HOLD = """
import sys, time
from pathlib import Path
from kvpo_trainer.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_lock_lasts_as_long_as_its_process(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None and holder.stdout.readline()
        note = json.loads(path.read_text())
        # Neither a note that is gone nor one of elsewhere lets another in.
        for text in (json.dumps(note), json.dumps(note | {"host": "elsewhere"}), ""):
            path.write_text(text)
            with pytest.raises(lock.LockError, match="in use by"), lock.locked(path):
                pass
    finally:
        holder.kill()
        holder.communicate()
    assert path.exists()
    with lock.locked(path):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert not path.exists()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL])
def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    path = tmp_path / "lock"
    with lock.locked(path):
        assert "knows no locks" in caplog.text
        with pytest.raises(lock.LockError, match=f"process {os.getpid()} on .*, remove"):
            lock._take(path)
    path.write_text(json.dumps({"pid": 1, "host": "another-machine", "started": "1"}))
    with lock.locked(path):
        assert "as that of process 1 on another-machine, if it is not over" in caplog.text
    assert not path.exists()


def test_without_fcntl() -> None:
    """As on Windows and in a browser."""
    code = """
import sys, tempfile
from pathlib import Path
sys.modules["fcntl"] = None
from kvpo_trainer import cli, session
with tempfile.TemporaryDirectory() as folder, session.run_folder(Path(folder)):
    assert (Path(folder) / "lock").exists()
    print("in")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "in\n", done.stderr
    assert "knows no locks" in done.stderr


def test_idle_threads_sleep_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
    for own in names:
        environment = {own: "1"}
        monkeypatch.setattr(os, "environ", environment)
        entry.wait_without_spinning()
        assert environment == {own: "1"}
    environment.clear()
    entry.wait_without_spinning()
    assert environment["OMP_WAIT_POLICY"] == "passive" and int(environment["GOMP_SPINCOUNT"]) > 0


@pytest.mark.skipif(sys.platform != "linux", reason="of GNU's runtime")
def test_the_policy_reaches_the_runtime_and_the_version_is_told() -> None:
    own = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
    environment = {k: v for k, v in os.environ.items() if k not in own}
    done = subprocess.run(
        [sys.executable, "-m", "kvpo_trainer", "--version"],
        capture_output=True,
        env=environment | {"OMP_DISPLAY_ENV": "VERBOSE"},
    )
    out, error = done.stdout, done.stderr
    assert done.returncode == 0
    assert out.split()[0] == b"kvpo-train" and out.split()[1][:1].isdigit()
    assert b"OMP_WAIT_POLICY = 'PASSIVE'" in error and b"GOMP_SPINCOUNT = '3000'" in error


def test_help_has_examples_that_parse(capsys: pytest.CaptureFixture[str]) -> None:
    import shlex

    commands = ("train", "evaluate", "sample", "diversity", "verify", "pretrain", "verify-arm")
    for words in (["--help"], *([name, "--help"] for name in commands)):
        with pytest.raises(SystemExit) as end:
            main(words)
        assert end.value.code == 0
        text = " ".join(capsys.readouterr().out.split())
        assert "kvpo-train " in text.partition("example")[2], words
    for line in cli._EXAMPLES.splitlines()[1:-1]:
        command = line.partition("   ")[0] if "   " not in line.strip() else line.strip()
        command = command.split("     ")[0]
        cli._parser().parse_args(shlex.split(command)[1:])


def test_sample_says_what_it_does(
    tiny_weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["sample", "--weights", str(tiny_weights), "--out", str(tmp_path / "clips")]
    assert main([*command, PROMPT]) == 0
    assert "sampling 1 prompt\n" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "av", None)
    assert main([*command, "--format", "mp4", PROMPT]) == 2
    error = capsys.readouterr().err
    assert "pip install 'kvpo_kernels[video]' brings PyAV" in error and "Traceback" not in error
    assert not list((tmp_path / "clips").glob("*.mp4"))


def test_mp4(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    from kvpo_trainer.video import mp4

    (clip,) = make_clips(
        [Prompt.parse(PROMPT)], DataConfig(), torch.Generator().manual_seed(0)
    ).videos
    path = tmp_path / "c.mp4"
    path.write_bytes(mp4(clip[:, :15, :15], scale=5, milliseconds=120))
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="gray") for frame in container.decode(video=0)]
        assert len(frames) == 57 and frames[0].shape == (76, 76)
        assert float(container.duration) / 1e6 == pytest.approx(57 * 0.12, abs=0.15)
    ink = (clip[20, :15, :15] + 1) / 2 * 255
    shown = torch.tensor(frames[20][:75, :75]).float().unflatten(0, (15, 5)).unflatten(2, (15, 5))
    assert (shown.mean((1, 3)) - ink).abs().mean() < 6  # of 255: what the encoder loses


def test_every_text_file_is_utf8() -> None:
    """Whatever the locale: no file is opened in the locale's own encoding."""
    import ast

    for path in Path(cli.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            words = [a.value for a in node.args if isinstance(a, ast.Constant)]
            binary = any(isinstance(word, str) and "b" in word for word in words)
            named = any(keyword.arg == "encoding" for keyword in node.keywords)
            module = getattr(getattr(node.func, "value", None), "id", "")
            if name in ("read_text", "write_text") or (
                name in ("open", "fdopen") and not binary and module not in ("os", "Image", "av")
            ):
                assert named, f"{path}:{node.lineno}"


def test_numbers_of_options_are_those_of_the_configuration(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for text in ("1_0", "1:00", "ten"):
        with pytest.raises(SystemExit):
            main(["diversity", "--rollouts", text])
        assert f"argument --rollouts: {text!r} is not an integer" in capsys.readouterr().err
