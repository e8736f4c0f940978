"""The kernels against the strongest baselines, on this machine: `python -m kvpo_kernels bench`."""

import argparse
import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kvpo_kernels import explain
from kvpo_kernels.bench import machine, norm_rope, routed_attention, tve_grpo

OPS: dict[str, Any] = {
    "routed_attention": routed_attention,
    "tve_grpo": tve_grpo,
    "norm_rope": norm_rope,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a table, write JSON and a picture; 1 where a part failed.

    A record has at least: case (id of a bar), op, backend, shape, dtype, ours_ms, ours_min_ms,
    baseline, baseline_ms, ratio (baseline_ms / ours_ms, the median of the rounds'), useful_tflops,
    gemm_tflops, bytes, copy_tbps, peak_extra_bytes, device, driver, torch, triton, commit, date.
    """
    parser = argparse.ArgumentParser(
        prog="python -m kvpo_kernels bench",
        description=__doc__,
        epilog="example: python -m kvpo_kernels bench --quick --op tve_grpo --out records.json",
    )
    parser.add_argument("--op", choices=OPS, action="append", help="default: every op")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    parser.add_argument("--backend", action="append", help="default: the one a call would take")
    parser.add_argument("--quick", action="store_true", help="the main case, few rounds")
    parser.add_argument("--out", type=Path, help="write the records as JSON")
    parser.add_argument("--add", action="store_true", help="to those that --out has already")
    parser.add_argument("--plot", type=Path, help="draw achieved rates as PNG; needs matplotlib")
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here; `python -m kvpo_kernels doctor`")
    there: dict[str, list[dict[str, Any]]] = {"records": [], "failures": []}
    if args.add and args.out and args.out.exists():
        there = json.loads(args.out.read_text())
    facts = machine.facts(args.device)
    rates = machine.rates(args.device, torch.bfloat16)
    print(
        f"{facts['device']}, torch {facts['torch']}, triton {facts['triton']}: matrix product"
        f" {rates['gemm_tflops']:.3g} TFLOP/s, copy {rates['copy_tbps']:.3g} TB/s, bfloat16",
        flush=True,
    )
    records: list[dict[str, Any]] = []
    failures: list[dict[str, str]] = []
    for op in args.op or OPS:
        for backend in args.backend or [None]:
            if backend is not None and backend not in explain(op):
                continue
            chosen = OPS[op].parts(args.device, args.quick, backend, rates)
            for label, measure in chosen:
                what = f"{op}, {backend or 'default'}, {label}"
                try:
                    for record in measure():
                        if "failed" in record:
                            failures.append({"part": what, "error": record["failed"]})
                            continue
                        records.append(record | rates | facts)
                        print(line(records[-1]), flush=True)
                except Exception as error:  # the other parts still tell something
                    failures.append({"part": what, "error": f"{type(error).__name__}: {error}"})
                if args.out:  # after each part: what is measured is kept, whatever comes
                    write(args.out, there["records"] + records, there["failures"] + failures)
                if args.device == "cuda":
                    with contextlib.suppress(RuntimeError):  # an error of a kernel stays
                        torch.cuda.empty_cache()
    for failure in failures:
        print(f"FAILED {failure['part']}: {failure['error'][:300]}")
    if args.plot:
        plot(there["records"] + records, args.plot)
    return 1 if failures else 0


def write(path: Path, records: list[dict[str, Any]], failures: list[dict[str, str]]) -> None:
    """As JSON, whole or not at all: the process may be killed at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"records": records, "failures": failures}, indent=1) + "\n")
    temporary.replace(path)


def line(r: dict[str, Any]) -> str:
    """A record as a row of the table."""
    bar = (
        ""
        if r["bar"] is None
        else f"  bar {r['bar']:.2f} {'ok' if r['ratio'] >= r['bar'] else 'MISSED'}"
    )
    rate = f"{r['useful_tflops']:8.3g} TFLOP/s {r['useful_tflops'] / r['gemm_tflops']:5.2f} of GEMM"
    if r["op"] != "routed_attention":  # bound by memory
        rate = f"{r['tbps']:8.3g} TB/s    {r['tbps'] / r['copy_tbps']:5.2f} of copy"
    return (
        f"{r['case']:18} {r['backend']:10} {r['ours_ms']:9.3f} ms {rate}  x{r['ratio']:5.2f}"
        f" {r['baseline']}{bar}"
    )


def plot(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Useful TFLOP/s per case, ours and the baselines', under the rate of a matrix product.

    A baseline's rate counts the same useful operations in its own time.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    attention = [r for r in records if r["op"] == "routed_attention"]
    shown = [r for r in attention if "GEMM" not in r["case"] and r["case"] != "M1"]
    height = 1.2 + 0.42 * len(shown)
    figure, axes = pyplot.subplots(figsize=(9, height), layout="constrained")
    gemm = shown[0]["gemm_tflops"] if shown else 1.0
    for i, r in enumerate(shown):
        theirs = r["useful_tflops"] * r["ours_ms"] / r["baseline_ms"]
        axes.barh(i - 0.2, r["useful_tflops"], 0.38, color="#1f6f8b")
        axes.barh(i + 0.2, theirs, 0.38, color="#c9c9c9")
        axes.text(
            r["useful_tflops"],
            i - 0.2,
            f" {r['useful_tflops'] / gemm:.2f}",
            va="center",
            fontsize=8,
        )
    labels = [f"{r['case']} {r['backend']}\n{r['baseline']}" for r in shown]
    axes.set_yticks(range(len(shown)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.axvline(gemm, color="black", linewidth=0.8)
    axes.set_xlabel("useful TFLOP/s, ours (fraction of a matrix product's rate: line) and baseline")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
