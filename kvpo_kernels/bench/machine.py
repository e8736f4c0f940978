"""What a number depends on, and the rates it is held against."""

import ctypes
import datetime
import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kvpo_kernels import doctor
from kvpo_kernels.bench.case import Call, Yardstick, tensors
from kvpo_kernels.bench.timing import interleaved


def facts(device: str) -> dict[str, Any]:
    """Of every record: device, instruction set, threads, driver, versions, commit, date."""
    known = doctor.facts()
    name = torch.cuda.get_device_name() if device == "cuda" else known["processor"]
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return {
        "device": name,
        "instructions": instructions(device),
        "threads": torch.get_num_threads(),
        "driver": _first_line(query) if device == "cuda" else "none",
        "torch": known["torch"],
        "triton": known["triton"],
        "python": known["python"],
        "allocator": keep_memory(),
        "commit": commit(),
        "changed_files": changed_files(),
        "date": _now(),
    }


def environment(threads: int) -> dict[str, Any]:
    """What the numbers of a whole program depend on (`benchmarks/iteration.py` and its like)."""
    return {
        "date": _now(),
        "commit": commit(),
        "changed_files": changed_files(),
        "command": " ".join(["python", *sys.argv]),
        **doctor.facts(),
        "threads": threads,
    }


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def instructions(device: str) -> str:
    """What the kernels run on: `avx2`, `avx512_bf16`, `neon`, `sm_90`; bars are looked up by it."""
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        return f"sm_{major}{minor}"
    native, _ = doctor.native()
    return "none" if native is None else str(native.isa())


def commit() -> str:
    """Of the source; KVPO_COMMIT says it where the source comes without its repository."""
    here = str(Path(__file__).parent)
    return os.environ.get("KVPO_COMMIT") or _first_line(["git", "-C", here, "rev-parse", "HEAD"])


def changed_files() -> str:
    """Of the source, against that commit."""
    root = str(Path(__file__).resolve().parents[2])
    what = ["git", "-C", root, "status", "--porcelain", "--", "kvpo_kernels", "csrc", "benchmarks"]
    try:
        done = subprocess.run(what, capture_output=True, text=True)
    except OSError:  # no git
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"


@functools.cache
def keep_memory() -> str:
    """Have malloc neither map nor return memory; say so.

    An output above 32 MiB else comes from mmap in every allocation, and the page faults of its
    first touch outweigh the arithmetic of all candidates. A training step reuses its memory.
    """
    mmap_max, trim_threshold = -4, -1  # of malloc.h
    try:
        libc = ctypes.CDLL(None)
        if libc.mallopt(mmap_max, 0) and libc.mallopt(trim_threshold, -1):
            return "mmap_max=0 trim_threshold=-1"
    except (AttributeError, OSError, TypeError):  # another libc
        pass
    return "default"


def products(dtype: torch.dtype, device: str) -> dict[str, tuple[Call, float]]:
    """Name -> a call that multiplies and adds as fast as it can, and its operations.

    All that this machine can compute a product of this dtype with: on a processor without
    instructions for bfloat16, torch emulates its product, and float32's is the honest bound.
    """
    n = 8192 if device == "cuda" else 1024
    on_gpu = device == "cuda"
    found: dict[str, tuple[Call, float]] = {}
    for kind in {dtype} if on_gpu else dict.fromkeys((dtype, torch.float32)):
        a, b = torch.randn(2, n, n, device=device).to(kind)
        name = f"matrix product of torch, {str(kind).removeprefix('torch.')}"
        found[name] = (functools.partial(torch.matmul, a, b), 2.0 * n**3)
    native, _ = doctor.native()
    if native is not None and not on_gpu:
        has_pairs = native.isa() == "avx512_bf16"  # elsewhere the loop is that of float32
        for pairs in {False, dtype is torch.bfloat16 and has_pairs}:
            loop = functools.partial(
                native.peak_flops,
                pairs=pairs,
                threads=torch.get_num_threads(),
                iterations=300_000,  # about 2 ms
            )
            name = f"multiply-adds in registers, {'bfloat16 pairs' if pairs else 'float32'}"
            found[name] = (loop, loop())
    return found


@functools.cache
def peak(dtype: torch.dtype, device: str) -> tuple[str, Call, float, float]:
    """The fastest of `products`: its name, call, operations, and TFLOP/s."""
    found = products(dtype, device)
    calls: dict[str, Callable[[], object]] = {name: call for name, (call, _) in found.items()}
    times = interleaved(calls, device=device, quick=True)
    rates = {name: found[name][1] / times[name].median_ms / 1e9 for name in found}
    best = max(rates, key=lambda name: rates[name])
    return best, *found[best], rates[best]


def of_peak(dtype: torch.dtype, device: str) -> Yardstick:
    """For what is bound by arithmetic: as many operations at the best rate there is."""

    def make(work: Any) -> tuple[Call, float]:
        _, call, operations, _ = peak(dtype, device)
        return call, work.flops / operations

    about = "as many operations at the best rate that this machine has for the dtype"
    return Yardstick("peak", about, make)


def of_copy(device: str) -> Yardstick:
    """For what is bound by memory: a copy that reads and writes as many bytes."""

    def make(work: Any) -> tuple[Call, float]:
        source = torch.ones(max(1, work.bytes // 2), dtype=torch.int8, device=device)
        return functools.partial(torch.empty_like(source).copy_, source), 1.0

    return Yardstick("copy", "a copy that reads and writes as many bytes", make)


@functools.cache
def rates(device: str, dtype: torch.dtype) -> dict[str, Any]:
    """The machine's best TFLOP/s for a dtype, what has it, and TB/s, read and written, of a copy.

    `gemm_tflops` on a GPU is that of a large matrix product on random data.
    """
    name, _, _, tflops = peak(dtype, device)
    mib = 1024 if device == "cuda" else 64
    source = torch.randn(mib << 18, device=device)
    target = torch.empty_like(source)
    copy = interleaved({"copy": lambda: target.copy_(source)}, device=device, quick=True)["copy"]
    return {
        "gemm_tflops": tflops,
        "gemm": name,
        "copy_tbps": 2 * source.nbytes / copy.median_ms / 1e9,
    }


def peak_extra_bytes(call: Call, device: str = "cpu") -> int | None:
    """The most memory that a call holds beyond what was there and what it returns.

    On a GPU from torch's allocator. On Linux from the process's high-water mark, which is reset
    first, after freed memory has gone back to the system; elsewhere None.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = call()
        torch.cuda.synchronize()
        highest = torch.cuda.max_memory_allocated()
    else:
        try:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            before = _status_bytes("VmRSS")
        except (AttributeError, OSError, TypeError):
            return None
        result = call()
        highest = _status_bytes("VmHWM")
    return max(0, highest - before - sum(t.nbytes for t in tensors(result)))


def _status_bytes(field: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if field in x)
    return int(line.split()[1]) * 1024


def _first_line(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.splitlines()[0].strip()
