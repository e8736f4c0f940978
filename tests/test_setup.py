"""Installing without a compiler of ours: nothing is built, and it is said."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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


# What stands in for MSVC answers as `cl` does: its own banner and the preprocessed nothing.
@pytest.mark.parametrize("name", ["cl", "clang-cl", "c++"])
@pytest.mark.parametrize("named", [False, True])
def test_a_compiler_of_other_flags_is_none(tmp_path: Path, name: str, named: bool) -> None:
    compiler = tmp_path / name
    compiler.write_text("#!/bin/sh\necho '#line 1 \"nul\"'\necho Microsoft C++ 19.44 >&2\n")
    compiler.chmod(0o755)
    done = build(tmp_path, CXX=f"{name} /EHsc" if named else "")
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    assert "NO C++ COMPILER FOUND" in said and (f"CXX={name} /EHsc" in said) == named
    assert not list((tmp_path / "lib" / "kvpo_kernels").glob("_native.*.so"))


def test_no_compiler_will_do_on_windows() -> None:
    command = (
        "import runpy, sys, setuptools, setuptools.command.build_ext as _;"
        "sys.platform = 'win32'; setuptools.setup = lambda **_: None;"
        "print(runpy.run_path('setup.py')['why_not_native']())"
    )
    said = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert said.stdout == "THE NATIVE KERNELS ARE NOT FOR WINDOWS.\n", said.stderr


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_a_compiler_with_its_options_is_one(tmp_path: Path) -> None:
    # CMake is not on this path: that is as far as it gets.
    done = build(tmp_path, CXX=f"{shutil.which('g++')} -g0", KVPO_BUILD_CUDA="OFF")
    assert done.returncode != 0 and "NO C++ COMPILER FOUND" not in done.stdout + done.stderr


def test_a_native_build_that_was_asked_for_fails_without_a_compiler(tmp_path: Path) -> None:
    done = build(tmp_path, KVPO_BUILD_NATIVE="ON")
    assert done.returncode != 0
    refused = build(tmp_path, KVPO_BUILD_NATIVE="maybe")
    assert "KVPO_BUILD_NATIVE must be AUTO, ON or OFF, got 'maybe'" in refused.stderr
