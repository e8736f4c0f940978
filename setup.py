"""Builds the torch-free native library with CMake, then packages the Python side.

Options (environment): KVPO_BUILD_NATIVE=AUTO|ON|OFF, KVPO_BUILD_CUDA=AUTO|ON|OFF, CMAKE_ARGS. With
AUTO, a machine without a compiler that takes GCC's flags gets an installation without the native
modules: the reference backend remains, and Triton on a GPU. A build that fails although there is
such a compiler fails the installation.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
MODE = os.environ.get("KVPO_BUILD_NATIVE", "AUTO")
CUDA = os.environ.get("KVPO_BUILD_CUDA", "AUTO")
for option, value in (("KVPO_BUILD_NATIVE", MODE), ("KVPO_BUILD_CUDA", CUDA)):
    if value not in ("AUTO", "ON", "OFF"):
        raise SystemExit(f"{option} must be AUTO, ON or OFF, got {value!r}")


def takes_gcc_flags(*command: str) -> bool:
    """Whether it is there and says that it is GCC or like it: MSVC's `cl` and `clang-cl` do not."""
    if shutil.which(command[0]) is None:
        return False
    asked = [*command, "-dM", "-E", "-x", "c++", os.devnull]
    done = subprocess.run(asked, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    return done.returncode == 0 and "#define __GNUC__ " in done.stdout


def why_not_native() -> str | None:
    """Why the native kernels cannot be built here, or None."""
    if sys.platform == "win32":
        return "THE NATIVE KERNELS ARE NOT FOR WINDOWS."
    named = shlex.split(os.environ.get("CXX", ""))  # CMake looks there first, then for these
    candidates = [named] if named else [["c++"], ["g++"], ["clang++"], ["icpx"]]
    if not any(takes_gcc_flags(*command) for command in candidates):
        what = f"CXX={shlex.join(named)} is none that" if named else "nothing"
        return (
            f"NO C++ COMPILER FOUND: {what} takes the flags of GCC."
            " Install g++ and reinstall to get them."
        )
    return None


def cuda_compiler() -> str | None:
    """The nvcc that CMake gets: $CUDACXX, on the path, or where its installer puts it."""
    if CUDA == "OFF":
        return None
    found = map(shutil.which, (os.environ.get("CUDACXX", "nvcc"), "/usr/local/cuda/bin/nvcc"))
    compiler = next(filter(None, found), None)
    if compiler is None and CUDA == "ON":
        raise SystemExit("KVPO_BUILD_CUDA is ON, but there is no nvcc: set CUDACXX")
    return compiler


class RecordedBuild(build_py):
    """Also writes down what was asked for and found, so that `doctor` can say what is missing."""

    def run(self) -> None:
        super().run()
        build = {
            "KVPO_BUILD_NATIVE": MODE,
            "KVPO_BUILD_CUDA": CUDA,
            "compiler": why_not_native() is None,
            "nvcc": cuda_compiler() is not None,
        }
        lib = "." if self.editable_mode else self.build_lib
        (Path(lib) / "kvpo_kernels" / "_build.json").write_text(json.dumps(build) + "\n")


class CMakeExtension(Extension):
    """A module that CMake builds; setuptools only decides where it goes."""

    def __init__(self, name: str) -> None:
        super().__init__(name, sources=[])


class CMakeBuild(build_ext):
    """Configure once, then build each module into the folder setuptools asks for."""

    configured = False

    def build_extension(self, ext: Extension) -> None:
        if MODE == "AUTO" and (reason := why_not_native()):
            ext.optional = True  # setuptools then does not miss the file
            self.warn(
                "kvpo_kernels: installing without the native CPU kernels; the slower reference"
                f" backend remains. {reason}"
            )
            return
        out = (Path.cwd() / self.get_ext_fullpath(ext.name)).parent.resolve()
        tmp = Path(self.build_temp).resolve()
        if not self.configured:
            self.configure(tmp, out)
            self.configured = True
        module = ext.name.rpartition(".")[2]
        subprocess.run(["cmake", "--build", tmp, "--parallel", "--target", module], check=True)

    def configure(self, tmp: Path, out: Path) -> None:
        import pybind11

        nvcc = cuda_compiler()
        tmp.mkdir(parents=True, exist_ok=True)
        # --fresh: the cache of an earlier build names tools of a build environment that is gone.
        args = [
            "--fresh",
            "-GNinja",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DKVPO_PYTHON_OUTPUT={out}",
            *(["-DKVPO_BUILD_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}"] if nvcc else []),
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        subprocess.run(["cmake", "-S", ROOT, "-B", tmp, *args], check=True)


MODULES = ["kvpo_kernels._native", *(["kvpo_kernels._cuda"] if cuda_compiler() else [])]

setup(
    packages=[
        *find_packages(include=["kvpo_kernels", "kvpo_kernels.*"]),
        *find_packages("python", include=["kvpo_trainer", "kvpo_trainer.*"]),
    ],
    package_dir={"kvpo_trainer": "python/kvpo_trainer"},
    package_data={
        "kvpo_kernels": ["py.typed", "_native.pyi", "_cuda.pyi"],
        "kvpo_trainer": ["py.typed", "weights/*", "configs/*.yaml"],
    },
    ext_modules=[] if MODE == "OFF" else [CMakeExtension(name) for name in MODULES],
    cmdclass={"build_ext": CMakeBuild, "build_py": RecordedBuild},
)
