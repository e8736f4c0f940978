"""`doctor` and `explain`: what they say is what a call does."""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch

from kvpo_kernels import branch_policy_loss, doctor, explain, registry
from kvpo_kernels.__main__ import main
from kvpo_kernels.errors import BackendUnavailable, ConfigError

CUDA_MISSING = None if registry.HAS_CUDA_KERNELS else registry.WHY_NO_CUDA_KERNELS


@pytest.mark.parametrize("op", doctor.OPS)
def test_the_first_that_can_run_is_the_one_taken(op: str) -> None:
    module = doctor.OPS[op]
    reasons = explain(op)
    first = next(name for name, why in reasons.items() if why is None)
    problem = module.Problem(**{k: doctor.TYPICAL[k] for k in module.Problem.__annotations__})
    assert registry.select(op, module.BACKENDS, problem, None).name == first
    for name, why in reasons.items():
        if why is not None:
            with pytest.raises(BackendUnavailable, match=name):
                registry.select(op, module.BACKENDS, problem, name)


def test_reasons_are_those_of_the_problem() -> None:
    assert explain("tve_grpo", dtype=torch.float64) == {
        "cpu": "takes float32 and bfloat16, got torch.float64",
        "triton": "takes float32, bfloat16 and float16, got torch.float64",
        "cuda": CUDA_MISSING or "takes tensors of an NVIDIA GPU, got cpu",
        "reference": None,
    }
    assert "head" in str(explain("routed_attention", head_size=17)["cpu"])


def test_wrong_questions_are_errors() -> None:
    with pytest.raises(ConfigError, match="op must be one of routed_attention"):
        explain("attention")
    with pytest.raises(ConfigError, match="tve_grpo has no head_size"):
        explain("tve_grpo", head_size=64)


def test_without_the_native_module(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    why = "the native module is not built"
    monkeypatch.setattr(registry, "HAS_NATIVE", False)
    monkeypatch.setattr(registry, "WHY_NO_NATIVE", why)
    monkeypatch.setattr(registry, "TRITON_INTERPRETS", False)
    monkeypatch.setattr(registry, "_TOLD", set())
    report = doctor.report()
    assert f"{why}: the kernels need a C++ compiler" in report
    for op in doctor.OPS:
        reasons = explain(op)
        assert reasons["cpu"] == why and reasons["reference"] is None

    scores = torch.zeros(3)
    call = lambda **o: branch_policy_loss(scores, scores, scores, **o)
    call(backend="reference")  # by name: nothing to tell
    assert not caplog.records
    with caplog.at_level("WARNING"):
        for _ in range(2):
            call()
    (record,) = caplog.records
    assert record.getMessage().startswith(
        f"branch_policy_loss runs on the reference, which is slow (cpu: {why}; triton: "
    )
    with pytest.raises(BackendUnavailable, match=f"cpu: {why}"):
        call(backend="cpu")


@pytest.mark.parametrize(
    ("why", "advice"),
    [
        (": KVPO_BUILD_NATIVE was OFF", "Without that, `pip install"),
        (" for this Python: there is x.so", "With this Python, `pip install"),
        (": there was no C++ compiler", "Install g++"),
    ],
)
def test_advice_fits_the_reason(why: str, advice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "HAS_NATIVE", False)
    monkeypatch.setattr(registry, "WHY_NO_NATIVE", f"the native module is not built{why}")
    (line,) = re.findall(r"^native module .*$", doctor.report(), flags=re.MULTILINE)
    assert why in line and advice in line and ("g++" in line) == ("g++" in advice)


def test_cuda_kernels_that_are_not_there(tmp_path: Path) -> None:
    """In a package of its own: turned off, for another Python, or no module at all."""
    package = tmp_path / "kvpo_kernels"
    skipped = shutil.ignore_patterns("__pycache__", "_cuda.*.so", "_build.json")
    shutil.copytree(Path(doctor.__file__).parent, package, ignore=skipped)
    code = (
        "import json; from kvpo_kernels import doctor, explain;"
        "print(json.dumps([doctor.facts()['CUDA kernels'],"
        " explain('tve_grpo', device='cuda')['cuda']]))"
    )
    build = {"KVPO_BUILD_NATIVE": "AUTO", "KVPO_BUILD_CUDA": "OFF", "compiler": True, "nvcc": True}
    for name, content, why in (
        ("_build.json", json.dumps(build), "the CUDA module is not built: KVPO_BUILD_CUDA was OFF"),
        (f"_cuda{EXTENSION_SUFFIXES[0]}", "no module", "the CUDA module does not load: "),
    ):
        (package / name).write_text(content)
        done = subprocess.run(
            [sys.executable, "-S", "-c", code],  # without the finder of an editable installation
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        )
        fact, reason = json.loads(done.stdout)
        assert fact == reason and fact.startswith(why), fact


def test_a_native_module_that_does_not_load_is_none(tmp_path: Path) -> None:
    """As one that was built for another machine: found, and no module."""
    package = tmp_path / "kvpo_kernels"
    shutil.copytree(Path(doctor.__file__).parent, package, ignore=lambda *_: {"__pycache__"})
    (native,) = package.glob("_native.*.so")
    native.write_bytes(b"no module")
    code = (
        "import torch, kvpo_kernels as k; z = torch.zeros(2); k.branch_policy_loss(z, z, z);"
        "print(k.explain('tve_grpo')['cpu'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "the native module does not load: " in done.stdout
    assert done.stderr.count("branch_policy_loss runs on the reference") == 1


def test_the_environment_names_a_backend() -> None:
    """KVPO_BACKEND means what the argument means: it never falls back."""
    code = (
        "import torch, kvpo_kernels as k; z = torch.zeros(2)\n"
        "try: k.branch_policy_loss(z, z, z); print('ran')\n"
        "except k.BackendUnavailable as e: print(e)\n"
        "k.branch_policy_loss(z, z, z, backend='reference')"
    )
    for name, expected in (
        ("reference", "ran"),
        ("", "ran"),
        ("triton", "triton: takes cuda tensors"),
        ("odd", "odd: unknown; the table has cpu, triton, reference"),
    ):
        env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=env | {"KVPO_BACKEND": name},
            capture_output=True,
            text=True,
            check=True,
        )
        assert expected in done.stdout, name


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for op in doctor.OPS:
        assert op in out
    assert torch.__version__.partition("+")[0] in out and "runs, chosen" in out
    with pytest.raises(SystemExit):
        main(["doctor", "--nonsense"])


def test_json_has_every_reason(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == 1 and found["facts"] == doctor.facts()
    page = (Path(__file__).parent.parent / "docs" / "commands.md").read_text()
    for key in (*found, *found["facts"], *found["backends"][0]):
        assert f"`{key}`" in page, key
    rows = iter(found["backends"])
    for dtype in (torch.float32, torch.bfloat16):
        for op, module in doctor.OPS.items():
            known = {"device": "cpu", "dtype": dtype}
            fields = module.Problem.__annotations__
            reasons = explain(op, **{k: v for k, v in known.items() if k in fields})
            first = next(name for name, why in reasons.items() if why is None)
            for name, why in reasons.items():
                assert next(rows) == {
                    "device": "cpu",
                    "dtype": str(dtype).removeprefix("torch."),
                    "op": op,
                    "backend": name,
                    "runs": why is None,
                    "chosen": name == first,
                    "reason": why,
                }
    if not torch.cuda.is_available():
        assert next(rows, None) is None


@pytest.mark.parametrize("name", ["reference", "triton", "nonsense"])
def test_chosen_is_what_the_environment_names(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "DEFAULT_BACKEND", name)
    monkeypatch.setattr(registry, "TRITON_INTERPRETS", False)
    chosen = [row for row in doctor.verdicts() if row["chosen"] and row["device"] == "cpu"]
    assert len(chosen) == (2 * len(doctor.OPS) if name == "reference" else 0)
    assert {row["backend"] for row in chosen} <= {name}


def test_a_version_that_is_not_the_installed_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "__version__", "9.9")
    for installed, says in (("9.9", "9.9"), ("1.0", "9.9, but 1.0 is what pip installed (")):
        monkeypatch.setattr(doctor.metadata, "version", lambda name, v=installed: v)
        assert doctor.facts()["kvpo_kernels"].startswith(says)


def test_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kvpo_kernels", "doctor"], capture_output=True, text=True, check=True
    )
    assert "backends for float32 on cpu" in done.stdout
