"""docs/results.md and the README's numbers, from the JSON under benchmarks/results/ alone.

Run: `python benchmarks/render.py`. A test checks that both are what this makes.
"""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "results.md"
README, BEGIN, END = ROOT / "README.md", "<!-- numbers -->\n", "<!-- /numbers -->"


def newest(pattern: str) -> tuple[Path, dict[str, Any]]:
    """The file of that pattern that was measured last, by its own date."""
    found = [(path, json.loads(path.read_text())) for path in RESULTS.glob(pattern)]
    date = lambda item: item[1].get("environment", item[1]).get("date", "")
    path, data = max(found, key=date)
    return path, data


def kernels() -> list[str]:
    """The table of `make bench`."""
    path, data = newest("cpu-*.json")
    e = data["environment"]
    lines = [
        "## CPU kernels",
        "",
        f"{e['processor']}, {e['threads']} threads, {e['instructions']}; torch {e['torch']},"
        f" Python {e['python']}; malloc as {data['records'][0]['allocator']}, which keeps the"
        f" memory of outputs for the next; commit {e['commit'][:10]}, {e['date'][:10]}. Reproduce:"
        f" `make bench`. Raw: [`{path.name}`](../benchmarks/results/{path.name}).",
        "",
        "Each row's candidates take turns in one process on the same random inputs; times are"
        " medians. A ratio is the median, over the rounds, of the baseline's time over ours; beside"
        " it the least one accepted.",
        "",
        "| op | case | ours, ms | baselines, ms | ratios |",
        "|---|---|---:|---|---|",
    ]
    for r in data["records"]:
        baselines = ", ".join(f"{n} {ms:.3g}" for n, ms in r["baselines_ms"].items())
        checks = [c for c in r["checks"] if not c["what"].startswith("MiB")]
        cells = "; ".join(
            f"**{c['value']:.2f}** {c['what']} ({'bar' if c['holds'] else 'MISSES'} {c['bar']:g})"
            for c in checks
        )
        lines.append(f"| {r['op']} | {r['case']} | {r['ours_ms']:.3g} | {baselines} | {cells} |")
    extra = [r["peak_extra_bytes"] for r in data["records"] if "peak_extra_bytes" in r]
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
    rows = [(p, today["phases"][p], ours["phases"][p], "s") for p in ours["phases"]]
    rows.append(("**iteration**", today["seconds"], ours["seconds"], "s"))
    rows.append(("copied, read and written", today["copied_bytes"], ours["copied_bytes"], "GiB"))
    rows.append(("between host and device", today["host_bytes"], ours["host_bytes"], "GiB"))
    rows.append(("operations", today["operations"], ours["operations"], ""))
    rows.append(("waits for the device", today["syncs"], ours["syncs"], ""))
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
        f" {max(data['differences'].values()):.0e}); medians per iteration.",
        "",
        "![seconds by phase](figures/iteration.png)",
        "",
        "| | today | ours | ratio |",
        "|---|---:|---:|---:|",
    ]
    for label, a, b, unit in rows:
        a, b = (x / 2**30 if unit == "GiB" else x for x in (a, b))
        share = f"{a / b:,.1f}" if b else ""
        if label == "**iteration**":  # the median of the rounds' ratios
            share = f"**{data['ratios']['time']:.1f}**"
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


def readme(text: str) -> str:
    """The README with its numbers made anew."""
    e = newest("cpu-*.json")[1]["environment"]
    runs = [json.loads(path.read_text()) for path in RESULTS.glob("cpu-*.json")]
    ratios: dict[tuple[str, str], list[float]] = {}
    for r in (record for run in runs for record in run["records"]):
        dtype = "bfloat16" if "bfloat16" in r["case"] else "float32"
        best = min(c["value"] for c in r["checks"] if c["what"].startswith("x "))
        ratios.setdefault((r["op"], dtype), []).append(best)
    lines = [
        f"How many times faster than the best of torch {e['torch']} (eager or compiled, per shape)"
        f" on {e['threads']} threads of an {e['processor']} ({e['instructions'].split()[0]});"
        f" lowest and highest of the shapes, in {len(runs)} runs on several machines:",
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
        f" {i['ratios']['time']:.1f} times as fast as the same done branch by branch over cloned"
        f" caches, and copies {i['today']['copied_bytes'] / i['ours']['copied_bytes']:,.0f} times"
        " fewer bytes (`python benchmarks/iteration.py`). No GPU has been measured yet.",
    ]
    _, v = newest("verify-*.json")
    g, order = (v[name]["reward"] for name in ("signed", "plus_minus_shuffled"))
    lines += [
        "",
        f"It learns: {len(v['seeds'])} seeds trained for {v['iterations']} rollouts towards +reward"
        f" end {g['mean']:.2f} ± {g['error']:.2f} (standard error over the seeds) above the same"
        f" towards -reward, and {order['mean']:.2f} ± {order['error']:.2f} above the same with"
        " shuffled advantages, on held-out prompts (`kvpo-train verify`).",
    ]
    before, rest = text.split(BEGIN)
    return before + BEGIN + "\n".join(lines) + "\n" + END + rest.split(END)[1]


DTYPES = ("float32", "bfloat16")

if __name__ == "__main__":
    PAGE.write_text(page())
    README.write_text(readme(README.read_text()))
