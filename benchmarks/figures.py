"""The figures of README.md and docs/results.md, drawn from records.

What a figure shows is computed first, as plain data, and written into its PNG as text together with
the names of the records: so a test can tell a figure of another run.
"""

import json
from pathlib import Path
from typing import Any

Data = dict[str, Any]
KEY = "kvpo_kernels"  # of the text in the PNG

PHASES = ("prefix", "rollout", "replay", "replay, old", "replay, initial", "gradient", "optimizer")
BLUE, GREY, RED = "#1f6f8b", "#b8b8b8", "#b5483a"
SHADES = ("#123b4a", "#1f6f8b", "#3c93b0", "#7cb9cc", "#c2dde5", "#e0a458", "#8a8a8a")


def iteration_data(result: Data, record: str) -> Data:
    """Of a result of `benchmarks/iteration.py`: seconds by phase."""
    ways = ("today", "ours")
    return {
        "records": [record],
        "seconds": {w: {p: result[w]["phases"][p] for p in PHASES} for w in ways},
        "total": {w: result[w]["seconds"] for w in ways},
    }


def iteration(result: Data, record: str, path: Path) -> None:
    """A stacked bar per way."""
    data = iteration_data(result, record)
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(8, 2.2), layout="constrained")
    for y, way in enumerate(("ours", "today")):
        left = 0.0
        for shade, (phase, seconds) in zip(SHADES, data["seconds"][way].items(), strict=True):
            label = phase if way == "ours" else None
            axes.barh(y, seconds, left=left, color=shade, label=label)
            left += seconds
        axes.annotate(
            f"{data['total'][way]:.2f} s",
            (left, y),
            (5, 0),
            textcoords="offset points",
            va="center",
        )
    axes.set_yticks([0, 1], ["ours", "today"])
    axes.set_xlim(0, 1.1 * max(data["total"].values()))
    axes.set_xlabel("seconds per iteration, medians")
    figure.legend(ncols=7, fontsize=7.5, frameon=False, loc="outside upper center")
    _bare(axes)
    _save(figure, data, path)


def readme_data(
    verify: Data, iteration: Data, speeds: dict[str, float], records: list[str]
) -> Data:
    """Learning by arm, speed by op, and one iteration's time and copies."""
    arms: dict[str, list[float]] = {}
    for arm in verify["arms"].values():
        scores = arm["scores"]["reward"]
        arms.setdefault(arm["arm"], []).append(sum(scores) / len(scores))
    return {
        "records": records,
        "rollouts": verify["iterations"],
        "reward": {name: arms[name] for name in ("plus", "shuffled", "minus")},
        "start": arms["start"][0],
        "speeds": speeds
        | {"whole iteration": iteration["today"]["seconds"] / iteration["ours"]["seconds"]},
        "copied_gib": {w: iteration[w]["copied_bytes"] / 2**30 for w in ("today", "ours")},
    }


def readme(data: Data, path: Path) -> None:
    """Three panels: does training follow the reward, how fast, what is copied."""
    pyplot = _pyplot()
    figure, (learning, speed, memory) = pyplot.subplots(
        1, 3, figsize=(10, 2.9), layout="constrained", width_ratios=(1.1, 1.25, 0.8)
    )
    labels = {"plus": "towards\n+reward", "shuffled": "shuffled\nadvantages"}
    labels["minus"] = "towards\n-reward"
    for x, (name, color) in enumerate(zip(data["reward"], (BLUE, GREY, RED), strict=True)):
        values = data["reward"][name]
        mean = sum(values) / len(values)
        learning.bar(x, mean, 0.6, color=color)
        learning.scatter([x] * len(values), values, s=12, color="black", zorder=3)
        learning.annotate(
            f"{mean:.2f}", (x, max(values)), (0, 5), textcoords="offset points", ha="center"
        )
    learning.axhline(data["start"], color="black", linewidth=0.8, linestyle=":")
    learning.annotate("start", (2.3, data["start"]), (0, 3), textcoords="offset points", ha="right")
    learning.set_xticks(range(3), [labels[name] for name in data["reward"]])
    learning.set_ylim(0, 1.2 * max(max(v) for v in data["reward"].values()))
    learning.set_title(f"Held-out reward, {data['rollouts']} rollouts", fontsize=10)

    speeds = data["speeds"]
    speed.barh(range(len(speeds)), list(speeds.values()), 0.6, color=BLUE)
    for y, value in enumerate(speeds.values()):
        speed.annotate(f"x{value:.1f}", (value, y), (4, 0), textcoords="offset points", va="center")
    speed.set_yticks(range(len(speeds)), list(speeds))
    speed.invert_yaxis()
    speed.axvline(1, color="black", linewidth=0.8, linestyle=":")
    speed.set_xlim(0, 1.18 * max(speeds.values()))
    speed.set_title("Times as fast as plain torch, CPU", fontsize=10)

    copied = data["copied_gib"]
    memory.bar(range(2), list(copied.values()), 0.6, color=(GREY, BLUE))
    for x, value in enumerate(copied.values()):
        text = f"{value:.1f} GiB" if value >= 1 else f"{value:.2f} GiB"
        memory.annotate(text, (x, value), (0, 4), textcoords="offset points", ha="center")
    memory.set_xticks(range(2), ["cloned\ncaches", "shared\npool"])
    memory.set_ylim(0, 1.2 * max(copied.values()))
    memory.set_title("Copied per iteration", fontsize=10)
    for axes in (learning, speed, memory):
        _bare(axes)
        axes.tick_params(labelsize=8)
        for text in axes.texts:
            text.set_fontsize(8)
    _save(figure, data, path)


def shown(path: Path) -> Data:
    """The data that a figure was drawn from."""
    from PIL import Image

    with Image.open(path) as image:
        data: Data = json.loads(image.text[KEY])  # type: ignore[attr-defined]
    return data


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _bare(axes: Any) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _save(figure: Any, data: Data, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={KEY: json.dumps(data)})
    _pyplot().close(figure)
