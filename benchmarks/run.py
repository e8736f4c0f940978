"""Every benchmark of this machine: a table, and JSON under benchmarks/results/.

Run: `make bench`, or `python benchmarks/run.py [--quick] [--threads N] [--only NAME] [--out FILE]`.

Each benchmark runs in a process of its own; one that fails is reported, and the others go on. The
exit status is 1 if one failed or a bar was missed.
"""

import argparse
import datetime
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from harness import ROOT, Record, line, records

from kvpo_kernels import doctor
from kvpo_kernels.bench import machine

HERE = Path(__file__).resolve().parent
BENCHMARKS = ("routed_attention", "tve_grpo", "norm_rope", "store_frames")


def environment(threads: int) -> dict[str, Any]:
    """What the numbers depend on."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": machine.commit(),
        "changed_files": _changed_files(),
        "command": " ".join(["python", *sys.argv]),
        **doctor.facts(),
        "threads": threads,
    }


def _changed_files() -> str:
    what = ["git", "-C", str(ROOT), "status", "--porcelain", "--", "kvpo_kernels", "csrc"]
    try:
        done = subprocess.run([*what, "benchmarks"], capture_output=True, text=True)
    except OSError:  # no git
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def main() -> int:
    """Run, print, write; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer shapes and rounds")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", choices=BENCHMARKS, action="append")
    parser.add_argument("--out", type=Path, help="of the JSON; default results/cpu-<commit>.json")
    args = parser.parse_args()
    facts = environment(args.threads)
    print(f"{facts['processor']}, {args.threads} threads, torch {facts['torch']}")
    rows: list[Record] = []
    failed: dict[str, str] = {}
    for name in args.only or BENCHMARKS:
        try:
            found = records(HERE / f"bench_{name}.py", args.quick, args.threads)
        except (subprocess.CalledProcessError, ValueError, IndexError) as error:
            failed[name] = str(error)
            print(f"{name} FAILED: {error}", flush=True)
            continue
        rows += found
        print("\n".join(map(line, found)), flush=True)
    out = args.out or HERE / "results" / f"cpu-{facts['commit'][:10]}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    result = {"environment": facts, "records": rows, "failed": failed}
    out.write_text(json.dumps(result, indent=1) + "\n")
    checks = [c for r in rows for c in r["checks"]]
    missed = sum(not c["holds"] for c in checks)
    print(f"{len(checks) - missed} of {len(checks)} bars hold, {len(failed)} failed; {out}")
    return 1 if missed or failed else 0


if __name__ == "__main__":
    sys.exit(main())
