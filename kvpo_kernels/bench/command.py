"""The kernels against the strongest baselines, on this machine."""

import argparse
import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from kvpo_kernels import explain
from kvpo_kernels.bench import catalogue, machine, picture
from kvpo_kernels.bench.case import Case
from kvpo_kernels.bench.measurement import Measurement

EPILOG = """\
x2.50 beside a baseline: its median time is 2.50 times the median of ours, over the same rounds, in
which all candidates of a case take turns. Beside "peak", "copy" or "read" stands the share that
ours reaches of that bound. `--list` explains the cases and the baselines.

example: python -m kvpo_kernels bench --quick --op tve_grpo --out records.json
"""


def main(arguments: Sequence[str] | None = None, prog: str = "python -m kvpo_kernels bench") -> int:
    """Measure, print a table, write JSON and a picture; 1 where a part failed, or missed its bar.

    A record has at least: op, part, case, dtype, shape, backend, ours_ms, ours_min_ms, baseline,
    baseline_ms, ratio (baseline_ms / ours_ms, medians of the same rounds), rounds, useful_tflops,
    fraction and fraction_of (share of that yardstick), gemm_tflops (the best rate of this machine
    for the dtype; `gemm` says of what), flops, bytes, copy_tbps, peak_extra_bytes, checks (against
    bars), device, instructions, threads, driver, torch, triton, commit, date.
    """
    parser = argparse.ArgumentParser(
        prog=prog,
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--op", choices=catalogue.OPS, action="append", help="default: every op")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    parser.add_argument("--backend", action="append", help="default: the one a call would take")
    parser.add_argument("--threads", type=int, help="of the CPU; default: torch's")
    parser.add_argument("--quick", action="store_true", help="each op's main case, few rounds")
    parser.add_argument("--small", action="store_true", help="sizes at which only results matter")
    parser.add_argument("--list", action="store_true", help="explain the cases; measure nothing")
    parser.add_argument("--bars", action="store_true", help="exit with 1 where a bar is missed")
    parser.add_argument("--out", type=Path, help="write the records as JSON")
    parser.add_argument("--add", action="store_true", help="to those that --out has already")
    parser.add_argument(
        "--plot", type=Path, help="draw achieved rates as .png, .svg, .pdf; needs matplotlib"
    )
    args = parser.parse_args(arguments)
    ops = list(dict.fromkeys(args.op or catalogue.OPS))
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here; `python -m kvpo_kernels doctor`")
    if args.threads is not None and args.threads < 1:
        parser.error(f"--threads must be at least 1, got {args.threads}")
    known = {op: list(explain(op)) for op in ops}
    for name in args.backend or ():
        if not any(name in backends for backends in known.values()):
            listed = "; ".join(f"{op} has {', '.join(backends)}" for op, backends in known.items())
            parser.error(f"--backend {name}: unknown; {listed}")
    there: dict[str, list[dict[str, Any]]] = {"records": [], "failures": []}
    if args.add and args.out is None:
        parser.error("--add goes with --out: it is the file that records are added to")
    if args.out and args.out.is_dir():
        parser.error(f"--out {args.out}: is a folder")
    if args.add and args.out.exists():
        try:
            there = json.loads(args.out.read_text())
            [*there["failures"], *(r["part"] for r in there["records"])]
        except (OSError, ValueError, KeyError, TypeError):
            parser.error(f"--add: {args.out} has no records of this version of the command")
    if args.plot:
        asked = [{"op": op} for op in ops if not args.backend or {*args.backend} & {*known[op]}]
        if why := picture.why_not(there["records"] + asked):
            parser.error(f"--plot: {why}; leave out --op, or add --op {picture.OP}")
        try:
            why = picture.why_not_to(args.plot)
        except ImportError:
            parser.error("--plot needs matplotlib: pip install 'kvpo_kernels[bench]'")
        if why:
            parser.error(f"--plot {args.plot}: {why}")
    if args.list:
        print(f"{catalogue.explained(args.device, ops)}\n{EPILOG}", end="")
        return 0
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    print(header(args.device), flush=True)
    if args.small:
        print("small sizes: results are checked, times mean nothing")
    records: list[dict[str, Any]] = []
    failures: list[dict[str, str]] = []
    for case, backend in chosen(ops, args.device, args.backend, known, args.quick, args.small):
        what = f"{case.group}, {backend or 'default'}"
        try:
            found = Measurement(case, backend, quick=args.quick or args.small).time()
            failures += [{"part": f"{what}, {r}", "error": e} for r, e in found.failures.items()]
            new = found.records()
        except Exception as error:  # the other cases still tell something
            new = []
            failures.append({"part": what, "error": f"{type(error).__name__}: {error}"})
        records += new
        if args.out:  # after each case: what is measured is kept, whatever comes
            write(args.out, there["records"] + records, there["failures"] + failures)
        print(block(new), end="", flush=True)
        if args.device == "cuda":
            with contextlib.suppress(RuntimeError):  # an error of a kernel stays
                torch.cuda.empty_cache()
    for failure in failures:
        print(f"FAILED {failure['part']}: {failure['error'][:300]}")
    checks = [c for r in records for c in r["checks"]]
    missed = [c for c in checks if not c["holds"]]
    if checks:
        print(f"{len(checks) - len(missed)} of {len(checks)} bars hold")
    elif args.bars:
        print(f"no bars for these cases on {machine.instructions(args.device)}: only measured")
    print(EPILOG, end="")
    if args.plot:
        if why := picture.why_not(there["records"] + records):
            print(f"no picture: {why}")
        else:
            picture.draw(there["records"] + records, args.plot)
    return 1 if failures or (args.bars and missed) else 0


def chosen(
    ops: Sequence[str],
    device: str,
    backends: Sequence[str] | None,
    known: dict[str, list[str]],
    quick: bool,
    small: bool,
) -> Iterator[tuple[Case, str | None]]:
    """What is measured. A backend is passed over for ops, and dtypes, that it is not made for."""
    for op in ops:
        for backend in dict.fromkeys(backends or (None,)):
            if backend is not None and backend not in known[op]:
                print(f"{op} has no backend {backend}; it has {', '.join(known[op])}")
                continue
            cases = list(catalogue.cases(op, device, small))
            if quick:
                cases = [c for c in cases if c.name == cases[0].name and c.dtype is QUICK_DTYPE]
            able = [c for c in cases if backend is None or c.reasons()[backend] is None]
            for case in able or cases[:1]:  # the first then says why it cannot
                yield case, backend


QUICK_DTYPE = torch.bfloat16


def header(device: str) -> str:
    """Machine and yardsticks."""
    facts = machine.facts(device)
    lines = [
        f"{facts['device']}, {facts['instructions']}, {facts['threads']} threads,"
        f" torch {facts['torch']}, triton {facts['triton']}, commit {facts['commit'][:10]}"
    ]
    dtypes = (torch.float32, torch.bfloat16) if device == "cpu" else (torch.bfloat16,)
    for dtype in dtypes:
        rates = machine.rates(device, dtype)
        name = str(dtype).removeprefix("torch.")
        lines.append(f"peak, {name}: {rates['gemm_tflops']:.3g} TFLOP/s ({rates['gemm']})")
    lines.append(f"copy: {rates['copy_tbps']:.3g} TB/s read and written")
    return "\n".join(lines)


def block(records: Sequence[dict[str, Any]]) -> str:
    """A case as text: ours, then a line per row that it is held against."""
    if not records:
        return ""
    r = records[0]
    share = "" if r["fraction"] is None else f", {r['fraction']:.2f} of {r['fraction_of']}"
    lines = [
        f"{r['op']} {r['part']} {r['case']} {r['dtype']} ({r['about']})",
        f"  {r['backend']:20} {r['ours_ms']:9.3f} ms  {r['useful_tflops']:.3g} TFLOP/s,"
        f" {r['tbps']:.3g} TB/s{share}",
    ]
    for r in records:
        if r["baseline"] != r["backend"]:
            verdicts = "".join(f"  {verdict(c, r['baseline'])}" for c in r["checks"])
            value = f"{r['ratio']:6.2f}" if r["yardstick"] else f"x{r['ratio']:5.2f}"
            text = f"  {r['baseline']:20} {r['baseline_ms']:9.3f} ms  {value}{verdicts}"
            lines.append(f"{text}  {r['baseline_about']}")
    return "\n".join(lines) + "\n"


def verdict(check: dict[str, Any], row: str) -> str:
    """Of a bar; a value that is not the row's ratio is said first."""
    what = "" if check["what"] == row else f"{check['what']} {check['value']:.2f} "
    return f"{what}(bar {check['bar']:.2f}{'' if check['holds'] else ', MISSED'})"


def write(path: Path, records: list[dict[str, Any]], failures: list[dict[str, str]]) -> None:
    """As JSON, whole or not at all: the process may be killed at any time.

    What is no file of its own (a device, a pipe, a link) is written into and stays what it is.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"records": records, "failures": failures}, indent=1) + "\n"
    if path.is_symlink() or (path.exists() and not path.is_file()):
        path.write_text(text)
        return
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        temporary.write_text(text)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
