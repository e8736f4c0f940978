"""docs/results.md, the README's numbers and all figures, from the JSON under benchmarks/results/.

Run: `python benchmarks/render.py`. A test checks that all are what this makes.
"""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import figures

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "results.md"
FIGURES, README = ROOT / "docs" / "figures", ROOT / "README.md"
BEGIN, END = "<!-- numbers -->\n", "<!-- /numbers -->"
LEAD_BEGIN, LEAD_END = "<!-- lead -->\n", "<!-- /lead -->"


def newest(pattern: str) -> tuple[Path, dict[str, Any]]:
    """The file of that pattern that was measured last, by its own date."""
    found = [(path, json.loads(path.read_text())) for path in RESULTS.glob(pattern)]

    def date(item: tuple[Path, dict[str, Any]]) -> str:
        data = item[1]
        first: dict[str, Any] = (data.get("records") or [{}])[0]
        found: str = (data.get("environment") or data).get("date") or first.get("date", "")
        return found

    path, data = max(found, key=date)
    return path, data


@dataclass
class Row:
    """A case of one run: ours and whatever it was held against."""

    op: str
    case: str
    ours_ms: float
    times_ms: dict[str, float]
    """Of the baselines."""
    shares: dict[str, float]
    """Of bounds (the peak, a copy) that ours reaches."""
    bars: dict[str, float]
    """Least accepted ratio or share."""
    extra_bytes: int | None

    def ratio(self, baseline: str) -> float:
        """Median against median, over the same rounds."""
        return self.times_ms[baseline] / self.ours_ms

    @property
    def over_torch(self) -> float | None:
        """Over the best of what one writes in torch."""
        found = [self.ratio(name) for name in self.times_ms if name in TORCH]
        return min(found, default=None)


TORCH = ("eager", "compile", "loop", "gather", "original")
LABELS = {"loss+gradient": "loss + gradient", "write": "+ slot write"}


def rows(data: dict[str, Any]) -> list[Row]:
    """Of a file of `python -m kvpo_kernels bench --out`, or of one from before 28 November 2026."""
    if "environment" in data:
        return [_old_row(r) for r in data["records"]]
    found: dict[tuple[str, ...], Row] = {}
    for r in data["records"]:
        key = tuple(r[k] for k in ("op", "part", "case", "dtype", "backend"))
        if key not in found:
            case = f"{r['case']} {r['dtype']}"
            op = f"{r['op']} {LABELS.get(r['part'], r['part'])}"
            if r["op"] == "store_frames":
                op, case = "store_frames", f"{case} {r['part'].replace('-', ' ')}"
            found[key] = Row(op, case, r["ours_ms"], {}, {}, {}, r["peak_extra_bytes"])
        row = found[key]
        if r["yardstick"]:
            row.shares[r["baseline"]] = r["ratio"]
        elif r["baseline"] != r["backend"]:
            row.times_ms[r["baseline"]] = r["baseline_ms"]
        row.bars |= {c["what"]: c["bar"] for c in r["checks"]}
    return list(found.values())


def _old_row(r: dict[str, Any]) -> Row:
    checks = {c["what"]: c for c in r["checks"] if not c["what"].startswith("MiB")}
    shares = {w.removeprefix("of "): c["value"] for w, c in checks.items() if w.startswith("of ")}
    bars = {w.split(" ", 1)[1]: c["bar"] for w, c in checks.items()}
    times, extra = r["baselines_ms"], r.get("peak_extra_bytes")
    return Row(r["op"], r["case"], r["ours_ms"], times, shares, bars, extra)


def machine_of(data: dict[str, Any]) -> dict[str, Any]:
    """What a run was measured on; the same words for both kinds of file."""
    if "environment" in data:
        e = data["environment"]
        allocator = data["records"][0].get("allocator", "")
        return e | {"device": e["processor"], "allocator": allocator}
    return dict(data["records"][0])


def kernels() -> list[str]:
    """The table of a run over the cases of `kvpo_kernels.bench`."""
    path, data = newest("cpu-*.json")
    e = machine_of(data)
    lines = [
        "## CPU kernels",
        "",
        f"{e['device']}, {e['threads']} threads, {e['instructions']}; torch {e['torch']},"
        f" Python {e['python']}; malloc as {e['allocator']}, which keeps the"
        f" memory of outputs for the next; commit {e['commit'][:10]}, {e['date'][:10]}. Reproduce:"
        " `python -m kvpo_kernels bench --out FILE`. Raw:"
        f" [`{path.name}`](../benchmarks/results/{path.name}).",
        "",
        "Each row's candidates take turns in one process on the same random inputs; times are"
        " medians. A ratio is the baseline's median over ours, of the same rounds; in bold that"
        " over the best of torch, beside it the least one accepted. Shares of a bound (the peak,"
        " reading as many bytes) are of ours.",
        "",
        "| op | case | ours, ms | baselines, ms | ratios and shares |",
        "|---|---|---:|---|---|",
    ]
    found = rows(data)
    for r in found:
        baselines = ", ".join(f"{n} {ms:.3g}" for n, ms in r.times_ms.items())
        values = [(f"x {n}", r.ratio(n), r.bars.get(n)) for n in r.times_ms]
        values += [(f"of {n}", share, r.bars.get(n)) for n, share in r.shares.items()]
        best = "x " + min((n for n in r.times_ms if n in TORCH), key=r.ratio, default="")
        cells = "; ".join(
            (f"**{value:.2f}** {what}" if what == best else f"{value:.2f} {what}")
            + ("" if bar is None else f" ({'bar' if value >= bar else 'MISSES'} {bar:g})")
            for what, value, bar in values
        )
        lines.append(f"| {r.op} | {r.case} | {r.ours_ms:.3g} | {baselines} | {cells} |")
    extra = [r.extra_bytes for r in found if r.extra_bytes is not None]
    if extra:
        lines += [
            "",
            "Peak memory of routed attention beyond inputs and outputs, forward and backward: at"
            f" most {max(extra) / 2**20:.1f} MiB.",
        ]
    return lines


def iteration() -> list[str]:
    """The table of `benchmarks/iteration.py`."""
    path, data = newest("iteration-*.json")
    e, size, today, ours = data["environment"], data["size"], data["today"], data["ours"]
    lines_of = [(p, today["phases"][p], ours["phases"][p], "s") for p in ours["phases"]]
    lines_of.append(("**iteration**", today["seconds"], ours["seconds"], "s"))
    for label, key in (
        ("copied, read and written", "copied_bytes"),
        ("between host and device", "host_bytes"),
        ("peak of memory, mostly weights", "peak_bytes"),
    ):
        lines_of.append((label, today[key], ours[key], "GiB"))
    lines_of.append(("operations", today["operations"], ours["operations"], ""))
    lines_of.append(("waits for the device", today["syncs"], ours["syncs"], ""))
    lines = [
        "## One KVPO iteration",
        "",
        f"Size {size['name']} ({size['layers']} layers, width {size['dim']}), {size['branches']}"
        f" branches, on {e['processor']}, {e['threads']} threads; torch {e['torch']}; commit"
        f" {e['commit'][:10]}, {e['date'][:10]}. Reproduce: `python benchmarks/iteration.py`. Raw:"
        f" [`{path.name}`](../benchmarks/results/{path.name}).",
        "",
        "The same rollout, replays and gradient as today's trainers run them (rebuilt: caches"
        " cloned and rolled per layer, branches one by one, state saved to the host) and over the"
        " pool. Both take turns in one process after a check that scores and gradients agree (to"
        f" {max(data['differences'].values()):.0e}); medians per iteration, ratios of medians.",
        "",
        "![seconds by phase](figures/iteration.png)",
        "",
        "| | today | ours | ratio |",
        "|---|---:|---:|---:|",
    ]
    for label, a, b, unit in lines_of:
        a, b = (x / 2**30 if unit == "GiB" else x for x in (a, b))
        share = f"{a / b:,.1f}" if b else ""
        if label == "**iteration**":
            share = f"**{share}**"
        lines.append(f"| {label}{', ' * bool(unit)}{unit} | {a:,.3g} | {b:,.3g} | {share} |")
    return lines


def learning() -> list[str]:
    """The controls of `kvpo-train verify`."""
    path, data = newest("verify-*.json")
    return ["## Does the reference trainer learn?", "", *controls(path, data, "")]


def controls(path: Path, data: dict[str, Any], options: str) -> list[str]:
    """One run of them, with these options of the command."""
    lines = [
        f"`kvpo-train verify{options}`: {len(data['seeds'])} training seeds, {data['iterations']}"
        f" rollouts each, {data['minutes']:.0f} minutes; torch {data['torch']},"
        f" {data['date'][:10]}. Raw: [`{path.name}`](../benchmarks/results/{path.name}). Mean"
        " difference over the same held-out prompts and noise ± its standard error over the seeds,"
        " and the mean in standard errors.",
        "",
    ]
    columns = {
        "towards +reward minus towards -reward": "signed",
        "real minus shuffled advantages": "plus_minus_shuffled",
        "real minus start": "plus_minus_start",
        "shuffled minus start": "shuffled_minus_start",
    }
    shown = {title: name for title, name in columns.items() if name in data}
    lines += [f"| measure | {' | '.join(shown)} |", "|---" * (1 + len(shown)) + "|"]
    for measure in data["signed"]:
        gaps = (data[name][measure] for name in shown.values())
        cells = [f"{g['mean']:+.3f} ± {g['error']:.3f} ({g['errors']:.1f})" for g in gaps]
        lines.append(f"| {measure} | {' | '.join(cells)} |")
    word = "holds" if data["passed"] else "does **not** hold"
    lines += [
        "",
        f"The signed test (more than {data['required_errors']:g} standard errors) {word}.",
    ]
    return lines


def quantized() -> list[str]:
    """The table of `benchmarks/quantized_history.py`."""
    path, data = newest("quantized-history-*.json")
    e, error = data["environment"], data["attention_error"]
    lines = [
        "## A history of 8 bits",
        "",
        f"The shipped generator over a float32 history and over quantized ones: {data['prompts']}"
        f" held-out videos of the same noise, and the scores of {data['branches']} recorded"
        f" branches replayed from the same prefix. torch {e['torch']}; commit {e['commit'][:10]},"
        f" {e['date'][:10]}. Reproduce: `python benchmarks/quantized_history.py`. Raw:"
        f" [`{path.name}`](../benchmarks/results/{path.name}).",
        "",
        "| | int8 | float8_e4m3fn |",
        "|---|---:|---:|",
    ]
    a, b = data["histories"]["int8"], data["histories"]["float8"]
    ratio = f"{data['memory_ratio']:.4f}"
    lines.append(f"| memory, of a bfloat16 pool of Wan-1.3B | {ratio} | {ratio} |")
    lines.append(
        "| error of attention over random frames, of the output's size (bfloat16 frames:"
        f" {error['bfloat16']:.4f}) | {error['int8']:.4f} | {error['float8']:.4f} |"
    )
    rows = [
        ("scores: mean relative change", "relative"),
        ("scores: change, of what branches of a prompt are apart", "off_over_apart"),
        ("scores: correlation over the branches of a prompt", "correlation"),
        ("largest change of a branch's probability", "largest_probability_change"),
    ]
    for name, key in rows:
        lines.append(f"| {name} | {a['scores'][key]:.4f} | {b['scores'][key]:.4f} |")
    other = data["pixel_rms_of_another_noise"]
    lines.append(
        f"| pixels: RMS change (another noise: {other:.3f}) | {a['pixel_rms']:.3f} |"
        f" {b['pixel_rms']:.3f} |"
    )
    for measure in a["reward_differences"]:
        cells = [
            f"{d['mean']:+.3f} ± {d['half_width']:.3f}"
            for d in (h["reward_differences"][measure] for h in (a, b))
        ]
        lines.append(f"| {measure}: difference ± 95 % | {cells[0]} | {cells[1]} |")
    lines += ["", "Trained over it:", ""]
    return lines + controls(*newest("int8-verify-*.json"), " --set history=int8")


def diversity() -> list[str]:
    """Two runs of `kvpo-train diversity`."""
    runs = {name: newest(f"diversity-{name}-*.json") for name in ("official", "first_block")}
    options = {"official": "", "first_block": " --config first_block"}
    commands = " and ".join(f"`kvpo-train diversity{options[name]}`" for name in runs)
    raws = ", ".join(f"[`{p.name}`](../benchmarks/results/{p.name})" for p, _ in runs.values())
    data = runs["official"][1]
    branches = data["config"]["kvpo"]["routing"]["num_branches"]
    lines = [
        "## How different branches are",
        "",
        f"{commands}: {data['groups']} groups of {branches} branches each; torch"
        f" {data['torch']}, {data['date'][:10]}. Raw: {raws}. Standard deviation"
        " over the branches of a prompt, beside branches that go on from the same prefix"
        " unrouted under other noise, and how much more the anchor has than the mean branch; mean ±"
        " standard error over the groups.",
        "",
    ]
    columns = [
        (f"{name}: {title}", run[part])
        for name, (_, run) in runs.items()
        for title, part in (("routed", "routed"), ("noise", "noise"), ("anchor - mean", "cost"))
    ]
    lines += [f"| measure | {' | '.join(title for title, _ in columns)} |"]
    lines += ["|---" * (1 + len(columns)) + "|"]
    for measure in data["routed"]:
        values = (part.get(measure) for _, part in columns)
        cells = [f"{v['mean']:.3f} ± {v['error']:.3f}" if v else "" for v in values]
        lines.append(f"| {measure} | {' | '.join(cells)} |")
    return lines


def page() -> str:
    """All of it."""
    head = ["# Results", "", "Made by `python benchmarks/render.py`; do not edit.", ""]
    parts = (kernels(), iteration(), quantized(), learning(), diversity())
    return "\n".join(head) + "\n" + "\n\n".join("\n".join(part) for part in parts) + "\n"


def speeds() -> dict[tuple[str, str], list[float]]:
    """Op, dtype of the inputs -> over the best of torch, of every case of every run."""
    found: dict[tuple[str, str], list[float]] = {}
    for path in sorted(RESULTS.glob("cpu-*.json")):
        for r in rows(json.loads(path.read_text())):
            dtype = "bfloat16" if "bfloat16" in r.case else "float32"
            if r.over_torch is not None:
                found.setdefault((r.op, dtype), []).append(r.over_torch)
    return found


def readme(text: str) -> str:
    """The README with its numbers made anew."""
    e = machine_of(newest("cpu-*.json")[1])
    runs = len(list(RESULTS.glob("cpu-*.json")))
    ratios = speeds()
    lines = [
        f"How many times faster than the best of torch {e['torch']} (eager or compiled, per shape)"
        f" on {e['threads']} threads of an {e['device']} ({e['instructions'].split()[0]});"
        f" lowest and highest of the shapes, in {runs} runs on several machines:",
        "",
        "| | float32 | bfloat16 |",
        "|---|---:|---:|",
    ]
    for op in dict.fromkeys(op for op, _ in ratios):
        cells = [f"{min(v):.1f} to {max(v):.1f}" for v in (ratios[op, d] for d in DTYPES)]
        lines.append(f"| {op} | {cells[0]} | {cells[1]} |")
    _, i = newest("iteration-*.json")
    lines += [
        "",
        f"One KVPO iteration at the reference trainer's size, {i['size']['branches']} branches, is"
        f" {i['today']['seconds'] / i['ours']['seconds']:.1f} times as fast as the same done branch"
        " by branch over cloned caches, and copies"
        f" {i['today']['copied_bytes'] / i['ours']['copied_bytes']:,.0f} times"
        " fewer bytes (`python benchmarks/iteration.py`). No GPU has been measured yet.",
    ]
    before, rest = text.split(BEGIN)
    numbers = before + BEGIN + "\n".join(lines) + "\n" + END + rest.split(END)[1]
    before, rest = numbers.split(LEAD_BEGIN)
    return before + LEAD_BEGIN + lead() + LEAD_END + rest.split(LEAD_END)[1]


def lead() -> str:
    """What the README leads with: the figure, and the signed test in words."""
    _, v = newest("verify-*.json")
    g, order = (v[name]["reward"] for name in ("signed", "plus_minus_shuffled"))
    data = lead_data()
    means = {name: sum(values) / len(values) for name, values in data["reward"].items()}
    today, ours = data["copied_gib"].values()
    alt = (
        f"Held-out reward after {v['iterations']} rollouts: {means['plus']:.2f} trained towards"
        f" +reward, {means['shuffled']:.2f} with shuffled advantages, {means['minus']:.2f} towards"
        f" -reward, {data['start']:.2f} at the start. Speed over torch on a CPU: "
        + "; ".join(f"{op} {speed:.1f}" for op, speed in data["speeds"].items())
        + f". Copied per iteration: {today:.1f} GiB with cloned caches, {ours:.2f} GiB with the"
        " pool."
    )
    return (
        f"![{alt}](docs/figures/results.png)\n\n"
        f"Does it learn? {len(v['seeds'])} seeds trained for {v['iterations']} rollouts towards"
        f" +reward end {g['mean']:.2f} ± {g['error']:.2f} (standard error over the seeds) above the"
        f" same towards -reward, and {order['mean']:.2f} ± {order['error']:.2f} above the same with"
        " shuffled advantages, on held-out prompts (`kvpo-train verify`).\n"
    )


def lead_data() -> figures.Data:
    """Of the README's figure; a speed is the median over the cases of the newest run."""
    verify, iteration, cpu = (newest(f"{name}-*.json") for name in ("verify", "iteration", "cpu"))
    found: dict[str, list[float]] = {}
    for r in rows(cpu[1]):
        if r.over_torch is not None:
            found.setdefault(SHORT.get(r.op, r.op), []).append(r.over_torch)
    medians = {op: statistics.median(values) for op, values in found.items()}
    names = [path.name for path, _ in (verify, iteration, cpu)]
    return figures.readme_data(verify[1], iteration[1], medians, names)


SHORT = {
    "routed_attention forward": "attention",
    "routed_attention forward+backward": "attention with gradients",
    "tve_grpo loss + gradient": "energies, loss, gradient",
    "norm_rope + slot write": "norm, RoPE, slot write",
    "store_frames": "frames to 8 bits",
}
DTYPES = ("float32", "bfloat16")

if __name__ == "__main__":
    PAGE.write_text(page())
    README.write_text(readme(README.read_text()))
    record, result = newest("iteration-*.json")
    figures.iteration(result, record.name, FIGURES / "iteration.png")
    figures.readme(lead_data(), FIGURES / "results.png")
