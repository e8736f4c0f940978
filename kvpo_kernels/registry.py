"""Which backend runs a call: a static, ordered table per op, and one pure function over it.

Nothing registers itself at import time and nothing is monkey-patched: to see every choice there
is, read the `BACKENDS` tuple of the op. A named backend never falls back to another.
"""

import importlib
import importlib.machinery
import importlib.util
import json
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, Final, Generic, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from kvpo_kernels.errors import BackendUnavailable

Problem = TypeVar("Problem")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Backend(Generic[Problem]):
    """One implementation of one op.

    `why_not(problem)` returns None when the backend can run the problem, else a short reason. It
    sees only metadata, so it also works on fake tensors. The module is imported on first use and
    has the functions the op calls (`forward`, `backward`).
    """

    name: str
    module: str
    why_not: Callable[[Problem], str | None]

    def load(self) -> ModuleType:
        """Import the implementation; the second time, a dictionary's look-up."""
        return sys.modules.get(self.module) or importlib.import_module(self.module)


def select(
    op: str, backends: tuple[Backend[Problem], ...], problem: Problem, name: str | None
) -> Backend[Problem]:
    """Return the named backend, or the first one in the table that can run the problem.

    `name=None` means the environment variable KVPO_BACKEND where it is set. A fall back to the
    reference is logged, once for the same reasons.

    Raises:
        BackendUnavailable: with the reason of every backend that was asked.
    """
    if _in_function_transform():
        lost = "torch.func transforms (vmap, grad, jvp) and forward-mode AD would lose the gradient"
        raise BackendUnavailable(op, {b.name: lost for b in backends})
    name = name if name is not None else DEFAULT_BACKEND
    asked = backends if name is None else tuple(b for b in backends if b.name == name)
    if not asked:
        known = ", ".join(b.name for b in backends)
        raise BackendUnavailable(op, {str(name): f"unknown; the table has {known}"})
    reasons: dict[str, str] = {}
    for backend in asked:
        why = backend.why_not(problem)
        if why is None:
            if name is None and backend.name == "reference" and not torch.compiler.is_compiling():
                _tell_once(op, reasons)
            return backend
        reasons[backend.name] = why
    raise BackendUnavailable(op, reasons)


def _tell_once(op: str, reasons: dict[str, str]) -> None:
    text = "; ".join(f"{name}: {why}" for name, why in reasons.items())
    if (op, text) not in _TOLD:
        _TOLD.add((op, text))
        log.warning("%s runs on the reference, which is slow (%s)", op, text)


_TOLD: Final[set[tuple[str, str]]] = set()


def _in_function_transform() -> bool:
    """The operators have no rule for these, and would take their inputs for constants."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def register(name: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Give the operator `name`, defined before, its kernel and its shapes; return how to call it.

    The call goes through the dispatcher where somebody watches that: a tracer, a compiler, a mode,
    a profiler, a tensor subclass. Else it is the kernel itself, 5 to 10 us sooner, for the ops
    have no autograd of their own there and the kernel is the same on every device.
    """
    torch.library.impl(name, ("cpu", "cuda"), kernel)
    torch.library.register_fake(name, fake)
    namespace, _, op_name = name.partition("::")
    op = getattr(getattr(torch.ops, namespace), op_name).default

    def call(*args: Any) -> Any:
        return op(*args) if _watched(args) else kernel(*args)

    return call


def each_once(*tensors: Tensor | None) -> list[Tensor | None]:
    """For `apply` of an autograd.Function: torch.compile does not take one tensor twice."""
    if not torch.compiler.is_compiling():
        return list(tensors)
    once: list[Tensor | None] = []
    for t in tensors:
        twice = t is not None and any(t is other for other in once)
        once.append(t.view(t.shape) if t is not None and twice else t)
    return once


def _watched(args: tuple[Any, ...]) -> bool:
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._autograd._profiler_enabled()
        or torch._C._get_tracing_state() is not None
        or not _PLAIN.issuperset(map(type, args))
        or args[0].is_meta
        or _promised(args)
    )


def _promised(args: tuple[Any, ...]) -> bool:
    """Whether some tensor's memory is not what it stands for: the dispatcher will make it so."""
    for a in args:  # noqa: SIM110 - half the time of `any`
        if type(a) in _TENSORS and (a.is_neg() or a._is_zerotensor()):
            return True
    return False


_TENSORS: Final = frozenset((Tensor, Parameter))
_PLAIN: Final = _TENSORS | {float, int, bool, str, type(None)}


def reasons(backends: tuple[Backend[Problem], ...], problem: Problem) -> dict[str, str | None]:
    """Why each backend cannot run the problem, None for those that can, in order of preference."""
    return {b.name: b.why_not(problem) for b in backends}


def _version_of(*distributions: str) -> str:
    """Of the first that is installed; Triton comes under several names. Nothing is imported."""
    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "none"


def why_not_built(module: str, package: Path = Path(__file__).parent) -> str:
    """Why `_native` or `_cuda` is not in the package, by what setup.py wrote into `_build.json`."""
    text = f"the {'CUDA' if module == '_cuda' else 'native'} module is not built"
    own = {module + suffix for suffix in importlib.machinery.EXTENSION_SUFFIXES}
    found = {p.name for p in package.glob(f"{module}.*") if p.suffix in (".so", ".pyd")}
    if others := sorted(found - own):
        return f"{text} for this Python: there is {', '.join(others)}"
    try:
        build = json.loads((package / "_build.json").read_text(encoding="utf-8"))
        asked, asked_cuda = build["KVPO_BUILD_NATIVE"], build["KVPO_BUILD_CUDA"]
        compiler, nvcc = build["compiler"], build["nvcc"]
    except (OSError, ValueError, KeyError, TypeError):
        return (
            f"{text}, and nothing tells why; CMake needs -DKVPO_BUILD_CUDA=ON"
            if module == "_cuda"
            else text
        )
    if asked == "OFF":
        return f"{text}: KVPO_BUILD_NATIVE was OFF"
    if module == "_cuda" and asked_cuda == "OFF":
        return f"{text}: KVPO_BUILD_CUDA was OFF"
    if not compiler:
        return f"{text}: there was no C++ compiler"
    if module == "_cuda" and not nvcc:
        return f"{text}: there was no nvcc"
    return f"{text}, or was removed"


# Facts about this process, fixed at import. Constants, not cached functions: torch.compile ignores
# the cache and would trace the look-up.
HAS_NATIVE: Final = importlib.util.find_spec("kvpo_kernels._native") is not None
HAS_CUDA_KERNELS: Final = importlib.util.find_spec("kvpo_kernels._cuda") is not None
WHY_NO_NATIVE: Final = why_not_built("_native")
WHY_NO_CUDA_KERNELS: Final = why_not_built("_cuda")
HAS_TRITON: Final = importlib.util.find_spec("triton") is not None
TRITON_VERSION: Final = _version_of("triton", "pytorch-triton", "pytorch-triton-rocm")
HAS_FLASH_ATTN: Final = importlib.util.find_spec("flash_attn") is not None
TRITON_INTERPRETS: Final = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")
DEFAULT_BACKEND: Final = os.environ.get("KVPO_BACKEND") or None


def why_not_native(device: str) -> str | None:
    """Why no C++ kernel for the CPU can run on the device."""
    if device != "cpu":
        return f"takes cpu tensors, got {device}"
    if not HAS_NATIVE:
        return WHY_NO_NATIVE
    return _why_not_loaded("_native")


def why_not_cuda(device: str) -> str | None:
    """Why no CUDA C++ kernel can run on the device."""
    if not HAS_CUDA_KERNELS:
        return WHY_NO_CUDA_KERNELS
    if device != "cuda" or torch.version.hip is not None:
        return f"takes tensors of an NVIDIA GPU, got {device}"
    return why_not_cuda_module()


def why_not_cuda_module() -> str | None:
    """Why the CUDA module is not there, GPU or not."""
    return _why_not_loaded("_cuda") if HAS_CUDA_KERNELS else WHY_NO_CUDA_KERNELS


def _why_not_loaded(module: str) -> str | None:
    if not torch.compiler.is_compiling() and module not in _TRIED:
        _TRIED.add(module)
        try:
            importlib.import_module(f"kvpo_kernels.{module}")
        except ImportError as error:  # built for another Python, C++ library or processor
            kind = "CUDA" if module == "_cuda" else "native"
            _BROKEN[module] = f"the {kind} module does not load: {error}"
    return _BROKEN.get(module)


_TRIED: Final[set[str]] = set()
"""Compiled modules, at the first call that asks for them."""
_BROKEN: Final[dict[str, str]] = {}
"""Why some do not load. Graphs are guarded by this alone, and do not mind that one has loaded."""


def why_not_triton(device: str) -> str | None:
    """Why no Triton kernel can run on the device."""
    if not HAS_TRITON:
        return "triton is not installed"
    if device != "cuda" and not TRITON_INTERPRETS:
        return f"takes cuda tensors (others under TRITON_INTERPRET=1), got {device}"
    return None
