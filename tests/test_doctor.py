"""`doctor` and `explain`: what they say is what a call does."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kvpo_kernels import branch_policy_loss, doctor, explain, registry
from kvpo_kernels.__main__ import main
from kvpo_kernels.errors import BackendUnavailable, ConfigError

CUDA_MISSING = (
    None if registry.HAS_CUDA_KERNELS else "the CUDA module is not built: there was no nvcc"
)


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


def test_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kvpo_kernels", "doctor"], capture_output=True, text=True, check=True
    )
    assert "backends for float32 on cpu" in done.stdout
