"""Achieved rates as a picture; needs matplotlib."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

OP = "routed_attention"
OURS, THEIRS = "#1f6f8b", "#c9c9c9"


def why_not(records: Sequence[dict[str, Any]]) -> str | None:
    """Why there is nothing to draw, or None."""
    if any(r["op"] == OP and not r.get("yardstick") for r in records):
        return None
    return f"there are no records of {OP} to draw: it is what the picture shows"


def why_not_to(path: Path) -> str | None:
    """Why the picture cannot be written there, or None.

    Raises:
        ImportError: there is no matplotlib.
    """
    from matplotlib.backend_bases import FigureCanvasBase

    if path.is_dir():
        return "is a folder"
    formats = FigureCanvasBase.get_supported_filetypes()
    if _format(path) not in formats:
        return f"is no picture, which ends in one of .{', .'.join(sorted(formats))}"
    return None


def draw(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Write the picture; see `figure`."""
    drawn = figure(records)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, dpi=130, format=_format(path))
    _pyplot().close(drawn)


def figure(records: Sequence[dict[str, Any]]) -> Any:
    """Useful TFLOP/s per case, ours and the baselines', each with the rate of a product beside it.

    A baseline's rate counts the same useful operations in its own time.
    """
    pyplot = _pyplot()
    shown = [r for r in records if r["op"] == OP and not r.get("yardstick")]
    bars: list[tuple[str, float, str, str]] = []  # label, TFLOP/s, colour, text beside it
    last = None
    for r in shown:
        case = (r["part"], r["case"], r["dtype"], r["backend"])
        if case != last:
            share = "" if r["fraction"] is None else f"{r['fraction']:.2f} of peak"
            label = f"{r['part']} {r['case']} {r['dtype']}: ours, {r['backend']}"
            bars.append((label, r["useful_tflops"], OURS, share))
            last = case
        rate = r["useful_tflops"] / r["ratio"]
        bars.append((r["baseline"], rate, THEIRS, f"ours is x{r['ratio']:.2f}"))
    drawn, axes = pyplot.subplots(figsize=(9, 1.3 + 0.24 * len(bars)), layout="constrained")
    for y, (_, rate, color, text) in enumerate(bars):
        axes.barh(y, rate, 0.8, color=color)
        axes.annotate(
            text, (rate, y), (4, 0), textcoords="offset points", va="center", fontsize=7.5
        )
    axes.set_yticks(range(len(bars)), [label for label, *_ in bars], fontsize=7.5)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    # A text is about a seventh of the width: it must end within the frame.
    axes.set_xlim(0, 1.25 * max(rate for _, rate, _, _ in bars))
    axes.set_xlabel("useful TFLOP/s; x = median of the baseline's times / median of ours")
    axes.set_title(f"{shown[0]['device']}, {shown[0].get('instructions', '')}", fontsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return drawn


def _format(path: Path) -> str:
    return path.suffix[1:].lower() or "png"


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
