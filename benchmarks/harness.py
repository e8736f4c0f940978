"""What every benchmark shares: a fresh process with a stated allocator, records, and their table.

A benchmark is a script with `measure(quick, threads) -> records`; `main` gives it its command line.
A record is a dict of plain values with at least `op`, `case`, `ours_ms` and `checks`: what was
compared, its value and the least value accepted.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from kvpo_kernels.bench.timing import Timing

Record = dict[str, Any]

# An output above 32 MiB comes from mmap in every allocation, and the page faults of its first touch
# then outweigh the arithmetic of all candidates. A training step reuses its memory, so we measure
# where malloc neither maps nor returns memory, for all candidates alike. malloc reads this when a
# process starts.
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
ROOT = Path(__file__).resolve().parent.parent


def allocator() -> str:
    """The setting of this process."""
    return " ".join(f"{k}={os.environ.get(k, 'unset')}" for k in ALLOCATOR)


def check(what: str, value: float, bar: float) -> dict[str, Any]:
    """A compared number, and whether it holds."""
    return {"what": what, "value": value, "bar": bar, "holds": value >= bar}


def record(
    op: str,
    case: str,
    shape: object,
    threads: int,
    ours: Timing,
    baselines: Mapping[str, Timing],
    checks: list[dict[str, Any]],
    **more: object,
) -> Record:
    """What one case of an op has measured; `more` is the op's own."""
    return {
        "op": op,
        "case": case,
        "shape": shape,
        "threads": threads,
        "ours_ms": ours.median_ms,
        "ours_min_ms": ours.min_ms,
        "baselines_ms": {name: t.median_ms for name, t in baselines.items()},
        **more,
        "checks": checks,
        "allocator": allocator(),
    }


def records(script: Path, quick: bool, threads: int) -> list[Record]:
    """Run a benchmark in a fresh process.

    Raises:
        subprocess.CalledProcessError: it failed; its error is on stderr.
    """
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, **ALLOCATOR, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, str(script), "--here", "--threads", str(threads)]
    done = subprocess.run(
        command + ["--quick"] * quick, env=env, check=True, stdout=subprocess.PIPE, text=True
    )
    rows: list[Record] = json.loads(done.stdout.splitlines()[-1])
    return rows


def line(r: Record) -> str:
    """One record as a row of the table."""
    checks = "  ".join(
        f"{c['what']} {c['value']:5.2f} (bar {c['bar']:.2f}{'' if c['holds'] else ', MISSED'})"
        for c in r["checks"]
    )
    return f"{r['op']:34} {r['case']:24} {r['ours_ms']:9.3f} ms  {checks}"


def main(script: str, doc: str, measure: Callable[[bool, int], list[Record]]) -> None:
    """The command line of one benchmark."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--here", action="store_true", help="measure in this process, print JSON")
    args = parser.parse_args()
    if args.here:
        torch.set_num_threads(args.threads)
        print(json.dumps(measure(args.quick, args.threads)))
        return
    for r in records(Path(script).resolve(), args.quick, args.threads):
        print(line(r))
