"""What works on this machine, and why the rest does not: `python -m kvpo_kernels doctor`."""

import argparse
import importlib
import importlib.util
import json
import os
import platform
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import torch

from kvpo_kernels import __version__, registry
from kvpo_kernels.errors import ConfigError
from kvpo_kernels.ops import (
    branch_policy_loss,
    norm_rope,
    routed_attention,
    store_frames,
    tve_grpo,
    velocity_energy,
)

OPS: Final[dict[str, Any]] = {
    op.OP: op
    for op in (
        routed_attention,
        norm_rope,
        store_frames,
        velocity_energy,
        branch_policy_loss,
        tve_grpo,
    )
}
# A call of a training step; what `explain` assumes where it is told nothing else.
TYPICAL: Final[dict[str, object]] = {
    "device": "cpu",
    "dtype": torch.float32,
    "head_size": 128,
    "needs_grad": True,
    "capability": None,
    "aligned": True,
    "page_dtype": None,
}


def explain(op: str, **problem: object) -> dict[str, str | None]:
    """Why each backend of an op can or cannot run a problem; nothing is run or allocated.

    Args:
        op: "routed_attention", "norm_rope", "store_frames", "velocity_energy",
            "branch_policy_loss" or "tve_grpo".
        **problem: what the op's backends look at, the fields of its `Problem`: `device` ("cpu" or
            "cuda"), `dtype`, and for some ops `head_size` (D), `needs_grad`, `capability` (CUDA's,
            `(major, minor)`), `aligned` and `page_dtype` (of a quantized pool). What is left out is
            that of a typical call: float32 on the CPU, heads of 128, with gradients; on "cuda",
            this machine's GPU.

    Returns:
        Backend name -> None where it can run, else the reason why not, in order of preference: the
        first None is what `backend=None` takes.

    Raises:
        ConfigError: an unknown op, or a field that the op's backends do not look at.

    Example:
        >>> explain("routed_attention", dtype=torch.float64)["cpu"]
        'takes float32, bfloat16 and float16, got torch.float64'
    """
    if op not in OPS:
        raise ConfigError(f"op must be one of {', '.join(OPS)}, got {op!r}")
    module = OPS[op]
    fields = list(module.Problem.__annotations__)
    unknown = [name for name in problem if name not in fields]
    if unknown:
        raise ConfigError(f"{op} has no {', '.join(unknown)}: its problems have {fields}")
    values = {name: problem.get(name, TYPICAL[name]) for name in fields}
    if values["device"] == "cuda" and "capability" not in problem and "capability" in fields:
        values["capability"] = _capability()
    return registry.reasons(module.BACKENDS, module.Problem(**values))


def _capability() -> tuple[int, int] | None:
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return None
    return torch.cuda.get_device_capability()


def verdicts() -> list[dict[str, Any]]:
    """Every backend of every op for typical calls on the devices of this machine.

    Returns:
        Rows with `device`, `dtype`, `op`, `backend`, in order of preference within an op; `runs`;
        `chosen`, whether a call that names no backend takes it; `reason` why it does not run, else
        None.
    """
    rows = []
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for device in devices:
        dtypes = (torch.float32, torch.bfloat16) if device == "cpu" else (torch.bfloat16,)
        for dtype in dtypes:
            for op, module in OPS.items():
                given = {"device": device, "dtype": dtype}
                fields = module.Problem.__annotations__
                reasons = explain(op, **{k: v for k, v in given.items() if k in fields})
                asked = (registry.DEFAULT_BACKEND,) if registry.DEFAULT_BACKEND else reasons
                taken = next((n for n in asked if reasons.get(n, "unknown") is None), None)
                rows += [
                    {
                        "device": device,
                        "dtype": _dtype(dtype),
                        "op": op,
                        "backend": name,
                        "runs": why is None,
                        "chosen": name == taken,
                        "reason": why,
                    }
                    for name, why in reasons.items()
                ]
    return rows


def report() -> str:
    """Versions, processor, GPU, native module, and a table of backends for each op, as text."""
    lines = ["kvpo_kernels doctor", ""]
    lines += [f"{name:14} {value}" for name, value in facts().items()]
    of, last = "", ""
    for row in verdicts():
        title = f"backends for {row['dtype']} on {row['device']}, in order of preference"
        if title != of:
            lines += ["", title]
            of, last = title, ""
        verdict = row["reason"] or ("runs, chosen" if row["chosen"] else "runs")
        name = "" if row["op"] == last else row["op"]
        lines.append(f"  {name:20} {row['backend']:12} {verdict}")
        last = row["op"]
    return "\n".join(lines)


def as_json() -> dict[str, Any]:
    """The same for programs: `{"schema": 1, "facts": facts(), "backends": verdicts()}`."""
    return {"schema": 1, "facts": facts(), "backends": verdicts()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report; returns 0."""
    parser = argparse.ArgumentParser(
        prog="python -m kvpo_kernels doctor",
        description=__doc__,
        epilog="example: python -m kvpo_kernels doctor --json > doctor.json",
    )
    parser.add_argument("--json", action="store_true", help="for programs; see docs/commands.md")
    args = parser.parse_args(arguments)
    print(json.dumps(as_json(), indent=1) if args.json else report())
    return 0


def processor() -> str:
    """The processor's name, as the operating system gives it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def native() -> tuple[ModuleType | None, str]:
    """Return the native module and what it was built with, or None and why it is missing."""
    if why := registry.why_not_native("cpu"):
        again = "`pip install --force-reinstall --no-deps` kvpo_kernels again"
        if "KVPO_BUILD_NATIVE" in why:
            return None, f"{why}. Without that, {again}"
        if "for this Python" in why:
            return None, f"{why}. With this Python, {again}"
        return None, (
            f"{why}: the kernels need a C++ compiler when kvpo_kernels is"
            f" installed. Install g++, then {again}"
        )
    module = importlib.import_module("kvpo_kernels._native")
    threads = "OpenMP" if module.WITH_OPENMP else "no OpenMP: kernels run on one thread"
    return module, f"{module.__file__} ({threads})"


def facts() -> dict[str, str]:
    """Versions, processor, native module and GPU of this process."""
    module, how = native()
    found = {
        "kvpo_kernels": _own_version(),
        "python": f"{platform.python_version()} ({sys.platform}, {platform.machine()})",
        **{name: _version(name) for name in ("torch", "triton", "numpy")},
        "processor": f"{processor()}, {os.cpu_count()} logical cores",
        "threads": str(torch.get_num_threads()),
        "native module": how,
    }
    if module is not None:
        found["instructions"] = f"{module.isa()} chosen, compiled for {', '.join(module.ISAS)}"
    found["CUDA kernels"] = registry.why_not_cuda_module() or "built"
    found["GPU"] = _gpu()
    found["KVPO_BACKEND"] = registry.DEFAULT_BACKEND or "not set: each call takes the first"
    return found


def _gpu() -> str:
    if not torch.cuda.is_available():
        built = "this torch is built for it" if torch.version.cuda else "this torch is a CPU build"
        return f"none that torch can use ({built})"
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()}, sm_{major}{minor}, CUDA {torch.version.cuda}"


def _own_version() -> str:
    """Of the code that runs, which need not be what is installed beside it."""
    installed = _version("kvpo_kernels")
    if installed == __version__:
        return __version__
    if installed[0].isdigit():
        installed = f"but {installed} is what pip installed"
    return f"{__version__}, {installed} ({Path(__file__).parent})"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        found = importlib.util.find_spec(package) is not None
        return "from a source folder, not installed" if found else "not installed"


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
