"""Installing without a compiler: nothing is built, and it is said."""

import os
import subprocess
import sys
from pathlib import Path

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


def test_a_native_build_that_was_asked_for_fails_without_a_compiler(tmp_path: Path) -> None:
    done = build(tmp_path, KVPO_BUILD_NATIVE="ON")
    assert done.returncode != 0
    refused = build(tmp_path, KVPO_BUILD_NATIVE="maybe")
    assert "KVPO_BUILD_NATIVE must be AUTO, ON or OFF, got 'maybe'" in refused.stderr
