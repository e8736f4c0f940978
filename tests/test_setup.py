"""Installing without a compiler: nothing is built, and it is said, then and by `doctor`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvpo_kernels import registry

ROOT = Path(__file__).parent.parent


def build(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "build", "--build-base", str(tmp_path / "build")]
    return subprocess.run(
        [*command, "--build-lib", str(tmp_path / "lib")],
        cwd=ROOT,
        env={**os.environ, "PATH": str(tmp_path), "CXX": "", **environment},
        capture_output=True,
        text=True,
    )


def test_without_a_compiler_it_installs_and_says_so(tmp_path: Path) -> None:
    done = build(tmp_path)
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    assert "NO C++ COMPILER FOUND" in said and "Install g++ and reinstall" in said
    package = tmp_path / "lib" / "kvpo_kernels"
    assert (package / "registry.py").exists() and not list(package.glob("_native.*.so"))
    for module, name in (("_native", "native"), ("_cuda", "CUDA")):
        why = registry.why_not_built(module, package)
        assert why == f"the {name} module is not built: there was no C++ compiler"


def test_a_native_build_that_was_asked_for_fails_without_a_compiler(tmp_path: Path) -> None:
    done = build(tmp_path, KVPO_BUILD_NATIVE="ON")
    assert done.returncode != 0
    refused = build(tmp_path, KVPO_BUILD_NATIVE="maybe")
    assert "KVPO_BUILD_NATIVE must be AUTO, ON or OFF, got 'maybe'" in refused.stderr


@pytest.mark.parametrize(
    ("environment", "native", "cuda"),
    [
        ({"KVPO_BUILD_NATIVE": "OFF"}, "KVPO_BUILD_NATIVE was OFF", "KVPO_BUILD_NATIVE was OFF"),
        ({"KVPO_BUILD_CUDA": "OFF"}, "there was no C++ compiler", "KVPO_BUILD_CUDA was OFF"),
    ],
)
def test_what_was_turned_off_is_to_blame(
    environment: dict[str, str], native: str, cuda: str, tmp_path: Path
) -> None:
    assert build(tmp_path, **environment).returncode == 0
    package = tmp_path / "lib" / "kvpo_kernels"
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
