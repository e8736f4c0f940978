"""Builds the torch-free native library with CMake, then packages the Python side.

Options (environment): KVPO_BUILD_NATIVE=AUTO|ON|OFF, CMAKE_ARGS. With AUTO, a machine without a
compiler gets an installation without the native module: the reference backend remains. A build that
fails although there is a compiler fails the installation.
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
MODE = os.environ.get("KVPO_BUILD_NATIVE", "AUTO")
if MODE not in ("AUTO", "ON", "OFF"):
    raise SystemExit(f"KVPO_BUILD_NATIVE must be AUTO, ON or OFF, got {MODE!r}")


def has_compiler() -> bool:
    """Whether CMake would find a C++ compiler: $CXX, or one under its usual names."""
    named = shlex.split(os.environ.get("CXX", ""))[:1]
    return any(map(shutil.which, named or ("c++", "g++", "clang++", "icpx", "cl")))


class CMakeExtension(Extension):
    """A module that CMake builds; setuptools only decides where it goes."""

    def __init__(self, name: str) -> None:
        super().__init__(name, sources=[])


class CMakeBuild(build_ext):
    """Configure, build and install into the folder setuptools asks for."""

    def build_extension(self, ext: Extension) -> None:
        if MODE == "AUTO" and not has_compiler():
            ext.optional = True  # setuptools then does not miss the file
            self.warn(
                "kvpo_kernels: NO C++ COMPILER FOUND. Installing without the native CPU kernels;"
                " the slower reference backend remains. Install g++ and reinstall to get them."
            )
            return
        import pybind11

        out = (Path.cwd() / self.get_ext_fullpath(ext.name)).parent.resolve()
        tmp = Path(self.build_temp).resolve()
        tmp.mkdir(parents=True, exist_ok=True)
        # --fresh: the cache of an earlier build names tools of a build environment that is gone.
        args = [
            "--fresh",
            "-GNinja",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DKVPO_PYTHON_OUTPUT={out}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        subprocess.run(["cmake", "-S", ROOT, "-B", tmp, *args], check=True)
        subprocess.run(["cmake", "--build", tmp, "--parallel"], check=True)


setup(
    packages=[
        *find_packages(include=["kvpo_kernels", "kvpo_kernels.*"]),
        *find_packages("python", include=["kvpo_trainer", "kvpo_trainer.*"]),
    ],
    package_dir={"kvpo_trainer": "python/kvpo_trainer"},
    package_data={
        "kvpo_kernels": ["py.typed", "_native.pyi"],
        "kvpo_trainer": ["py.typed", "weights/*", "configs/*.yaml"],
    },
    ext_modules=[] if MODE == "OFF" else [CMakeExtension("kvpo_kernels._native")],
    cmdclass={"build_ext": CMakeBuild},
)
