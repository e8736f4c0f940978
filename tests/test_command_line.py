"""`python -m kvpo_kernels` as a shell runs it: outputs that end, encodings, help, exit statuses."""

import importlib
import io
import json
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import kvpo_kernels
from kvpo_kernels import doctor, output
from kvpo_kernels.__main__ import main

ROOT = Path(__file__).parent.parent


def run(
    arguments: str, stdout: int, *, code: str = "", **environment: str
) -> subprocess.CompletedProcess[bytes]:
    start = ["-c", code] if code else ["-m", "kvpo_kernels"]
    return subprocess.run(
        [sys.executable, *start, *arguments.split()],
        cwd=ROOT,
        stdout=stdout,
        stderr=subprocess.PIPE,
        env=os.environ | environment,
    )


def without_reader(arguments: str, **options: str) -> subprocess.CompletedProcess[bytes]:
    read, write = os.pipe()
    os.close(read)
    try:
        return run(arguments, write, **options)
    finally:
        os.close(write)


@pytest.mark.parametrize("arguments", ["doctor", "plan --json", "plan --help"])
def test_a_reader_that_leaves(arguments: str) -> None:
    done = without_reader(arguments)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("arguments", ["doctor --json", "plan", "--version"])
def test_a_disk_that_is_full(arguments: str) -> None:
    with open("/dev/full", "wb") as full:
        done = run(arguments, full.fileno())
    assert done.returncode == 2
    (line,) = done.stderr.decode().splitlines()
    assert line.startswith("kvpo_kernels: standard output cannot be written: ")
    assert "No space left" in line


# What a command of several parts does: prints, keeps a file, and takes exceptions for failed parts.
PARTS = """
import sys
from pathlib import Path
from kvpo_kernels import bench, __main__
def parts(rest):
    for i in range(3):
        try:
            print("part", i, flush=True)
        except Exception as error:
            print("FAILED", error)
        Path("{folder}", "part-" + str(i)).touch()
    return 0
bench.main = parts
sys.exit(__main__.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(("options", "kept"), [("", 0), ("--out x", 3), ("--out=x", 3)])
def test_a_bench_goes_on_untold_for_its_file_only(tmp_path: Path, options: str, kept: int) -> None:
    code = PARTS.replace("{folder}", str(tmp_path))
    done = without_reader(f"bench {options}", code=code)
    assert (done.returncode, done.stderr) == (141, b"")
    assert len(list(tmp_path.iterdir())) == kept


def test_a_process_without_standard_output() -> None:
    command = f"{sys.executable} -m kvpo_kernels doctor >&-"
    done = subprocess.run(["sh", "-c", command], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr == "kvpo_kernels: standard output cannot be written: it is closed\n"


@pytest.mark.parametrize("encoding", ["ascii", "iso8859-2", "utf-8"])
def test_an_encoding_that_lacks_a_character(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "processor", lambda: "Name™ 日本 \ud800")
    expected = "Name™ 日本 ?" if encoding == "utf-8" else "Name? ?? ?"
    for arguments in (["doctor"], ["doctor", "--json"]):
        written = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding))
        assert main(arguments) == 0
        text = written.getvalue().decode(encoding)
        if arguments[1:]:
            assert json.loads(text)["facts"]["processor"].startswith("Name™ 日本 \ud800")
        else:
            assert expected in text


def test_in_a_plain_locale() -> None:
    environment = {"PYTHONIOENCODING": "", "LC_ALL": "C", "PYTHONUTF8": "0"}
    done = run("doctor", subprocess.PIPE, PYTHONCOERCECLOCALE="0", **environment)
    assert done.returncode == 0 and b"runs, chosen" in done.stdout, done.stderr


def test_interrupted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "report", interrupted)
    assert main(["doctor"]) == 130
    assert capsys.readouterr() == ("", "kvpo_kernels: interrupted\n")
    assert not isinstance(sys.stdout, output.Told)


@pytest.mark.parametrize(
    "arguments", ["", "doctr", "--nonsense", "doctor --nonsense", "doctor x", "plan --brnches 3"]
)
def test_what_is_not_known_is_refused(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments.split())
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("usage: python -m kvpo_kernels") and "error: " in err


@pytest.mark.parametrize("command", ["", "doctor", "plan", "bench"])
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*command.split(), "--help"])
    assert stopped.value.code == 0
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "example" in text and f"kvpo_kernels {command}".strip() in text.partition("example")[2]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"kvpo_kernels {kvpo_kernels.__version__}\n"


def test_the_version_has_one_source(tmp_path: Path) -> None:
    """setup.py reads it without torch, which no build environment has; a checkout needs no pip."""
    (tmp_path / "torch.py").write_text("raise ImportError('the build must not import torch')")
    path = os.pathsep.join([str(tmp_path), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    command = [sys.executable, "setup.py", "--version"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1:] == [kvpo_kernels.__version__], done.stderr
    code = "import kvpo_kernels; print(kvpo_kernels.__version__)"
    packages = os.pathsep.join(p for p in sys.path if "site-packages" in p)
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": packages},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == kvpo_kernels.__version__, done.stderr


def test_the_script_is_the_module() -> None:
    (target,) = re.findall(r'^kvpo-kernels = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    module, _, function = target.partition(":")
    assert getattr(importlib.import_module(module), function) is main


def test_all_is_every_public_name() -> None:
    modules = {m.name for m in pkgutil.iter_modules(kvpo_kernels.__path__)}
    public = {n for n in dir(kvpo_kernels) if not n.startswith("_")} - modules
    assert set(kvpo_kernels.__all__) == public | {"__version__"}
    assert len(kvpo_kernels.__all__) == len(set(kvpo_kernels.__all__))
    scope: dict[str, object] = {}
    exec("from kvpo_kernels import *", scope)
    assert scope.keys() >= set(kvpo_kernels.__all__)


def test_the_page_of_names_is_complete() -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \|", page, flags=re.MULTILINE)
    assert sorted(rows) == sorted(kvpo_kernels.__all__)
    for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        text = path.read_text()
        for names in re.findall(r"^from kvpo_kernels import (.+)$", text, flags=re.MULTILINE):
            assert {n.strip() for n in names.strip("()").split(",")} <= set(rows), path
