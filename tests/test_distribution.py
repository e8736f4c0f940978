"""What is handed on: the source distribution, what installs from it, and versions that agree."""

import importlib.metadata
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PACKAGES = ("kvpo_kernels/", "python/kvpo_trainer/")

# Run in the new environment: one attention of the kernels against its definition.
ATTENTION = """
import torch, kvpo_kernels
from kvpo_kernels import RouteTable, routed_attention
torch.manual_seed(0)
q, k, v = torch.randn(2, 24, 2, 32), *torch.randn(2, 4, 8, 2, 32)
table = RouteTable([[0, 2], [3, 1]], num_slots=4)
ours = routed_attention(q, k, v, table, backend="cpu")
theirs = routed_attention(q.double(), k.double(), v.double(), table, backend="reference")
print((ours - theirs).abs().max().item(), kvpo_kernels.__file__, sep=chr(10))
"""


def run(*command: object, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, **options)


def checked(*command: object, **options: object) -> str:
    done = run(*command, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def of_the_repository() -> set[str]:
    """Files that git has, or would take."""
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    if listed.returncode != 0:
        pytest.skip("not a checkout: there is nothing to compare with")
    return {name for name in listed.stdout.splitlines() if (ROOT / name).exists()}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sdist")
    command = (sys.executable, "setup.py", "-q", "egg_info", "--egg-base", out)
    checked(*command, "sdist", "--dist-dir", out, cwd=ROOT)
    return next(out.glob("*.tar.gz"))


def test_the_source_distribution_is_the_repository(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        files = {m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()}
    made = {name for name in files if name.startswith("kvpo_kernels.egg-info/")}
    assert files - made - {"PKG-INFO", "setup.cfg"} == of_the_repository()


def borrow(names: list[str], to: Path) -> None:
    """Link these installed packages, and what they need, into a folder."""
    found: set[str] = set()
    while names:
        name = canonicalize_name(names.pop())
        if name in found:
            continue
        found.add(name)
        package = importlib.metadata.distribution(name)
        assert package.files is not None
        for top in {file.parts[0] for file in package.files} - {"..", "__pycache__"}:
            (to / top).symlink_to(package.locate_file(top))
        for line in package.requires or []:
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                names.append(needed.name)


def test_it_installs_into_an_empty_environment(sdist: Path, tmp_path: Path) -> None:
    """With nothing there but what the package says that it needs; its build tools come from the
    index."""
    pytest.importorskip("kvpo_kernels._native", reason="no C++ compiler where this was installed")
    pip = (sys.executable, "-m", "pip")
    checked(sys.executable, "-m", "venv", "--without-pip", tmp_path / "env")
    python = tmp_path / "env" / "bin" / "python"
    tools = ("install", "--dry-run", "--no-deps", "pybind11", "cmake", "ninja")
    asked = run(*pip, "--python", python, *tools)
    if asked.returncode != 0:
        pytest.skip(f"no package index within reach: {asked.stderr.strip()[-300:]}")
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "CXX")}
    environment |= {"KVPO_BUILD_NATIVE": "ON", "KVPO_BUILD_CUDA": "OFF"}
    environment["CMAKE_ARGS"] = "-DCMAKE_CXX_FLAGS_RELEASE=-O0"  # a third of the time to compile

    checked(*pip, "wheel", "--no-deps", "-w", tmp_path, sdist, env=environment)
    wheel = next(tmp_path.glob("*.whl"))
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {name for name in names if name.startswith("kvpo_kernels/_native.")} - {
        "kvpo_kernels/_native.pyi"
    }
    about = {name for name in names if ".dist-info/" in name}
    ours = {n.removeprefix("python/") for n in of_the_repository() if n.startswith(PACKAGES)}
    ours.add("kvpo_kernels/_build.json")  # of the build itself, for `doctor`
    assert len(modules) == 1 and names - modules - about == ours
    assert any(name.endswith("/LICENSE") for name in about)

    site = Path(
        checked(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    )
    borrow(["torch", "numpy", "triton"], site)
    checked(*pip, "--python", python, "install", "--no-index", wheel, env=environment)
    error, where = checked(python, "-I", "-c", ATTENTION, cwd=tmp_path).split()
    assert Path(where).is_relative_to(site)
    assert float(error) < 1e-5  # float32 sums of 16 products of order 1
    checked(python, "-I", "-m", "kvpo_kernels", "doctor", cwd=tmp_path)


# A CPU build of torch 2.13.0, which the index does not have for Linux: without triton and CUDA.
CPU_BUILD = """
[[dependency-metadata]]
name = "torch"
version = "2.13.0"
requires-dist = [
    "filelock", "typing-extensions>=4.10.0", "setuptools", "sympy>=1.13.3", "networkx>=2.5.1",
    "jinja2", "fsspec>=0.8.5",
]
"""


@pytest.mark.parametrize("build", ["ordinary", "cpu"])
@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_constraints_resolve(python: str, build: str, tmp_path: Path) -> None:
    settings = tmp_path / "uv.toml"
    settings.write_text(CPU_BUILD if build == "cpu" else "")
    uv = (sys.executable, "-m", "uv", "pip", "compile", "-q", "--config-file", settings)
    uv += ("--no-python-downloads", "--only-binary", ":all:", "--no-annotate", "--no-header")
    uv += ("--python-version", python, "--python-platform", "x86_64-manylinux_2_28")
    asked = run(*uv, "-", input="ninja")
    if asked.returncode != 0 and "No module named" not in asked.stderr:
        pytest.skip(f"no package index within reach: {asked.stderr.strip()[-300:]}")
    text = checked(*uv, "-c", "constraints.txt", "--extra", "dev", "pyproject.toml", cwd=ROOT)
    chosen = dict(line.split("==") for line in text.splitlines())
    assert chosen["torch"] == "2.13.0"
    assert any(name.startswith("nvidia-") for name in chosen) == (build == "ordinary")
    pinned = {
        canonicalize_name(pin.name): str(pin.specifier).removeprefix("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
        for pin in [Requirement(line)]
        if pin.marker is None or pin.marker.evaluate({"python_version": python})
    }
    assert pinned.items() <= chosen.items()  # no pin of what nobody asks for
