"""`python -m kvpo_kernels plan`: does a run fit, and how long would an iteration take."""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvpo_kernels.cost.iteration import Run, Way, Work, memory, phases
from kvpo_kernels.cost.sizes import SIZES, GeneratorSize
from kvpo_kernels.errors import ConfigError

WAYS: tuple[Way, ...] = ("today", "ours")


@dataclass(frozen=True)
class Rates:
    """What a GPU achieves, and where each number is from."""

    gemm_tflops: float
    attention_tflops: float
    copy_tbps: float
    host_gbps: float
    origin: dict[str, str]

    def seconds(self, work: Work) -> float:
        """Nothing overlaps: an upper estimate of well-fed kernels, a lower one of others."""
        return (
            work.linear / self.gemm_tflops / 1e12
            + work.attention / self.attention_tflops / 1e12
            + work.memory / self.copy_tbps / 1e12
            + work.host / self.host_gbps / 1e9
        )


# None was measured with this library: no GPU has run it yet.
H200 = Rates(
    gemm_tflops=550.0,
    attention_tflops=487.0,
    copy_tbps=4.3,
    host_gbps=8.0,
    origin={
        "gemm_tflops": "0.7 of the 788 that 8192^3 bfloat16 reaches on an H200; 0.7 is assumed",
        "attention_tflops": "published: a plain Triton kernel on an H100, head size 128",
        "copy_tbps": "a device copy on an H200",
        "host_gbps": "assumed: pageable memory over PCIe",
    },
)


def rates_from(path: Path) -> dict[str, float]:
    """Medians of a `python -m kvpo_kernels bench --out` file.

    Raises:
        ConfigError: the file has no record of a GPU.
    """
    try:
        records = json.loads(path.read_text())["records"]
        main = [r for r in records if _is_main(r) and r["driver"] != "none"]
        names = ("useful_tflops", "gemm_tflops", "copy_tbps")
        found = [{name: float(record[name]) for name in names} for record in main]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: not the JSON of `python -m kvpo_kernels bench`") from error
    if not found:
        raise ConfigError(
            f"{path}: no record on a GPU of case F1, as routed_attention forward wan-1.3b was once"
            " called"
        )
    for record in found:
        for name, rate in record.items():
            if not 0 < rate < float("inf"):
                raise ConfigError(f"{path}: {name} must be > 0 and finite, got {rate}")
    best = max(found, key=lambda r: r["useful_tflops"])
    return {
        "gemm_tflops": 0.7 * best["gemm_tflops"],
        "attention_tflops": best["useful_tflops"],
        "copy_tbps": best["copy_tbps"],
    }


def _is_main(record: dict[str, Any]) -> bool:
    """Whether of the forward at the size of Wan-1.3B; "F1" in files from before November 2026."""
    new = ("routed_attention", "forward", "wan-1.3b")
    return record.get("case") == "F1" or tuple(map(record.get, ("op", "part", "case"))) == new


def estimate(run: Run, rates: Rates) -> dict[str, Any]:
    """Everything that the table shows, in bytes, operations and seconds, per iteration and GPU."""
    result: dict[str, Any] = {"run": dataclasses.asdict(run), "rates": dataclasses.asdict(rates)}
    for way in WAYS:
        work, held = phases(run, way), memory(run, way)
        result[way] = {
            "phases": {
                name: {**dataclasses.asdict(w), "seconds": rates.seconds(w)}
                for name, w in work.items()
            },
            "seconds": sum(rates.seconds(w) for w in work.values()),
            "memory": held,
            "peak_bytes": sum(held.values()),
        }
    return result


def advice(run: Run, limit: float) -> list[str]:
    """Changes that make it fit, smallest first; empty where it does."""

    def needs(r: Run) -> float:
        return sum(memory(r, "ours").values())

    if needs(run) <= limit:
        return []
    found = []
    tries: list[tuple[str, dict[str, Any]]] = []
    if not run.checkpoint_layers:
        tries.append(("recompute layers (no --store-activations)", {"checkpoint_layers": True}))
    if run.micro_batch > 1:
        tries.append(("--micro-batch 1", {"micro_batch": 1}))
    if run.history == "bfloat16":
        tries.append(("--history int8", {"history": "int8"}))
    if run.train == "full":
        tries.append(("--train lora", {"train": "lora"}))
    changed = run
    for text, change in tries:
        changed = dataclasses.replace(changed, **change)
        found.append(text)
        if needs(changed) <= limit:
            return found
    gpus = next(
        (
            n
            for n in range(run.gpus + 1, run.branches + 1)
            if needs(dataclasses.replace(changed, gpus=n)) <= limit
        ),
        None,
    )
    if gpus is not None:
        return [*found, f"--gpus {gpus}: {-(-run.branches // gpus)} branches on each"]
    return [*found, "more memory: one branch with its weights and the shared history does not fit"]


def table(run: Run, result: dict[str, Any], limit: float | None) -> str:
    """What a person reads."""
    gib, lines = 2**30, []
    each = f"{run.own_branches} of {run.branches} branches per GPU"
    at_once = f", {run.prompts_at_once} prompts at once" if run.prompts_at_once > 1 else ""
    lines.append(f"One iteration on one of {run.gpus} GPUs: {each}{at_once}")
    lines.append(f"\n{'':26}{'today':>10}{'ours':>10}   memory at the peak, GiB")
    for name in result["ours"]["memory"]:
        a, b = (result[way]["memory"][name] / gib for way in WAYS)
        lines.append(f"{name:26}{a:10.1f}{b:10.1f}")
    a, b = (result[way]["peak_bytes"] / gib for way in WAYS)
    lines.append(f"{'all':26}{a:10.1f}{b:10.1f}")
    if limit is not None:
        verdict = "fits" if b <= limit / gib else "DOES NOT FIT"
        lines.append(f"{'':26}{'':10}{verdict:>10}   into {limit / gib:.0f} GiB")
        lines += [f"  to make it fit: {text}" for text in advice(run, limit)]
    lines.append(f"\n{'':26}{'PFLOP':>18}{'GB to host':>16}{'expected s':>18}")
    lines.append(f"{'':26}{'today':>9}{'ours':>9}{'today':>8}{'ours':>8}{'today':>9}{'ours':>9}")
    for name in result["ours"]["phases"]:
        both = [result[way]["phases"][name] for way in WAYS]
        flops = [f"{(w['linear'] + w['attention']) / 1e15:9.1f}" for w in both]
        host = [f"{w['host'] / 1e9:8.0f}" for w in both]
        seconds = [f"{w['seconds']:9.1f}" for w in both]
        lines.append(f"{name:26}{''.join(flops + host + seconds)}")
    a, b = (result[way]["seconds"] for way in WAYS)
    lines.append(f"{'all':26}{'':34}{a:9.1f}{b:9.1f}   x{a / b:.2f}")
    lines.append("\nExpected times are counts over these rates, nothing overlapping:")
    for name, origin in result["rates"]["origin"].items():
        lines.append(f"  {name} = {result['rates'][name]:g}: {origin}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the plan of a run; returns 1 where it does not fit."""
    parser = argparse.ArgumentParser(
        prog="python -m kvpo_kernels plan",
        description=__doc__,
        epilog="example: python -m kvpo_kernels plan --model wan-14b --gpus 8 --memory 80;"
        " the exit status is 1 where it does not fit into --memory",
    )
    parser.add_argument("--model", choices=SIZES, default="wan-1.3b", help="wan-1.3b")
    for field in ("layers", "dim", "heads", "ffn"):
        parser.add_argument(f"--{field}", type=int, help="instead of the model's")
    parser.add_argument("--grid", help="rows x columns of tokens of a frame, such as 30x52")
    parser.add_argument("--branches", type=int, default=8, help="of one prompt; 8")
    parser.add_argument("--frames", type=int, default=147, help="latent frames of a video")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--memory", type=float, help="GiB per GPU: says whether it fits")
    parser.add_argument("--train", choices=("lora", "full"), default="lora")
    parser.add_argument("--lora-rank", type=int, default=256)
    parser.add_argument("--micro-batch", type=int, default=1)
    parser.add_argument("--store-activations", action="store_true", help="do not recompute layers")
    parser.add_argument("--history", choices=("bfloat16", "int8", "float8"), default="bfloat16")
    parser.add_argument("--whole-video", action="store_true", help="for a global reward")
    parser.add_argument("--rates", type=Path, help="JSON of `python -m kvpo_kernels bench`")
    for name in H200.origin:
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, help="instead of the H200's")
    parser.add_argument("--json", action="store_true", help="bytes, operations, seconds; as JSON")
    args = parser.parse_args(arguments)
    try:
        run = Run(
            _size(args),
            branches=args.branches,
            frames=args.frames,
            gpus=args.gpus,
            train=args.train,
            lora_rank=args.lora_rank,
            micro_batch=args.micro_batch,
            checkpoint_layers=not args.store_activations,
            history=args.history,
            whole_video=args.whole_video,
        )
        rates = _rates(args)
        if args.memory is not None and not 0 < args.memory < float("inf"):
            raise ConfigError(f"--memory must be > 0 and finite, got {args.memory}")
    except ConfigError as error:
        parser.error(str(error))
    limit = None if args.memory is None else args.memory * 2**30
    result = estimate(run, rates)
    print(json.dumps(result, indent=1) if args.json else table(run, result, limit))
    return int(limit is not None and result["ours"]["peak_bytes"] > limit)


def _size(args: argparse.Namespace) -> GeneratorSize:
    changes: dict[str, Any] = {
        field: getattr(args, field)
        for field in ("layers", "dim", "heads", "ffn")
        if getattr(args, field) is not None
    }
    if args.grid is not None:
        rows, cross, columns = args.grid.partition("x")
        if not (cross and rows.isdecimal() and columns.isdecimal()):
            raise ConfigError(f"--grid must look like 30x52, got {args.grid!r}")
        changes["grid"] = (int(rows), int(columns))
    return dataclasses.replace(SIZES[args.model], **changes)


def _rates(args: argparse.Namespace) -> Rates:
    rates = H200
    if args.rates is not None:
        measured = rates_from(args.rates)
        origin = {name: f"measured: {args.rates}" for name in measured}
        origin["gemm_tflops"] = f"0.7 (assumed) of what is measured: {args.rates}"
        rates = dataclasses.replace(rates, **measured, origin={**rates.origin, **origin})
    for name in H200.origin:
        value = getattr(args, name)
        if value is None:
            continue
        if not 0 < value < float("inf"):
            raise ConfigError(f"--{name.replace('_', '-')} must be > 0 and finite, got {value}")
        rates = dataclasses.replace(
            rates, **{name: value}, origin={**rates.origin, name: "given on the command line"}
        )
    return rates
