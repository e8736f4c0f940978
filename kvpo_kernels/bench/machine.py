"""What a number depends on, and the rates it is held against."""

import datetime
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kvpo_kernels import doctor
from kvpo_kernels.bench.timing import interleaved


def facts(device: str) -> dict[str, str]:
    """Of every record: device, driver, versions, commit, date."""
    known = doctor.facts()
    name = torch.cuda.get_device_name() if device == "cuda" else known["processor"]
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return {
        "device": name,
        "driver": _first_line(query) if device == "cuda" else "none",
        "torch": known["torch"],
        "triton": known["triton"],
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def commit() -> str:
    """Of the source; KVPO_COMMIT says it where the source comes without its repository."""
    here = str(Path(__file__).parent)
    return os.environ.get("KVPO_COMMIT") or _first_line(["git", "-C", here, "rev-parse", "HEAD"])


def rates(device: str, dtype: torch.dtype) -> dict[str, float]:
    """TFLOP/s of a large matrix product on random data and TB/s, read and written, of a copy."""
    n, mib = (8192, 1024) if device == "cuda" else (1024, 64)
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    source = torch.randn(mib << 18, device=device)
    target = torch.empty_like(source)
    calls: dict[str, Callable[[], object]] = {
        "gemm": lambda: a @ b,
        "copy": lambda: target.copy_(source),
    }
    times = interleaved(calls, device=device, quick=True)
    return {
        "gemm_tflops": 2 * n**3 / times["gemm"].median_ms / 1e9,
        "copy_tbps": 2 * source.nbytes / times["copy"].median_ms / 1e9,
    }


def peak_extra_bytes(call: Callable[[], Any]) -> int:
    """The most GPU memory that a call holds beyond what was there and what it returns."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    tensors = result if isinstance(result, tuple) else (result,)
    returned: int = sum(t.nbytes for t in tensors)
    return max(0, peak - before - returned)


def _first_line(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.splitlines()[0].strip()
