"""`doctor` and `explain`: what they say is what a call does."""

import subprocess
import sys

import pytest
import torch

from kvpo_kernels import doctor, explain, registry
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


def test_without_the_native_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "HAS_NATIVE", False)
    report = doctor.report()
    assert "not built: the kernels need a C++ compiler" in report
    for op in doctor.OPS:
        reasons = explain(op)
        assert reasons["cpu"] == "the native module is not built" and reasons["reference"] is None


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
