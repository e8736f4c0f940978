"""Why a compiled module is missing, by what its build wrote down."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvpo_kernels import registry

ROOT = Path(__file__).parent.parent


def build(tmp_path: Path, **environment: str) -> Path:
    """The package as setup.py makes it where no compiler is on the path."""
    command = [sys.executable, "setup.py", "build", "--build-base", str(tmp_path / "build")]
    subprocess.run(
        [*command, "--build-lib", str(tmp_path / "lib")],
        cwd=ROOT,
        env={**os.environ, "PATH": str(tmp_path), "CXX": "", **environment},
        capture_output=True,
        check=True,
    )
    return tmp_path / "lib" / "kvpo_kernels"


@pytest.mark.parametrize(
    ("environment", "native", "cuda"),
    [
        ({}, "there was no C++ compiler", "there was no C++ compiler"),
        ({"KVPO_BUILD_NATIVE": "OFF"}, "KVPO_BUILD_NATIVE was OFF", "KVPO_BUILD_NATIVE was OFF"),
        ({"KVPO_BUILD_CUDA": "OFF"}, "there was no C++ compiler", "KVPO_BUILD_CUDA was OFF"),
    ],
)
def test_what_was_turned_off_is_to_blame(
    environment: dict[str, str], native: str, cuda: str, tmp_path: Path
) -> None:
    package = build(tmp_path, **environment)
    assert registry.why_not_built("_native", package) == f"the native module is not built: {native}"
    assert registry.why_not_built("_cuda", package) == f"the CUDA module is not built: {cuda}"


def test_other_reasons_for_a_missing_module(tmp_path: Path) -> None:
    record = {"KVPO_BUILD_NATIVE": "AUTO", "KVPO_BUILD_CUDA": "AUTO", "compiler": True}
    for found, why in ((False, ": there was no nvcc"), (True, ", or was removed")):
        (tmp_path / "_build.json").write_text(json.dumps(record | {"nvcc": found}))
        assert registry.why_not_built("_cuda", tmp_path) == f"the CUDA module is not built{why}"
    for damaged in ("", "[]", "{}", "null"):
        (tmp_path / "_build.json").write_text(damaged)
        unknown = "the CUDA module is not built, and nothing tells why"
        assert registry.why_not_built("_cuda", tmp_path).startswith(unknown)
    (tmp_path / "_cuda.cpython-39-darwin.so").touch()
    assert registry.why_not_built("_cuda", tmp_path) == (
        "the CUDA module is not built for this Python: there is _cuda.cpython-39-darwin.so"
    )
