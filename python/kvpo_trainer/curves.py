"""Curves as SVG, in the colours of the page around them."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from matplotlib.ticker import MaxNLocator

Numbers: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]


def smooth(steps: Sequence[float], values: Numbers) -> tuple[Numbers, Numbers]:
    """Running mean: prompts and fork differ from rollout to rollout."""
    width = max(1, len(values) // 4)
    middle = np.array(steps[width - 1 :]) - (width - 1) / 2
    return middle, np.convolve(values, np.ones(width) / width, "valid")


def curves(name: str, title: str, rows: Sequence[Mapping[str, float]]) -> str:
    """Running means of one reward of the branches and the anchor, as a figure of HTML.

    Args:
        name: of the reward; rows have it as `<name>_branches` and `<name>_anchor`, and `step`.
        title: what it is called; HTML.
    """
    steps = [row["step"] for row in rows]
    left, right, top, bottom = 42, 290, 8, 130
    lines, told = {}, []
    for who in ("branches", "anchor"):
        x, y = smooth(steps, np.array([row[f"{name}_{who}"] for row in rows]))
        known = np.isfinite(x) & np.isfinite(y)
        lines[who] = x[known], y[known]
        ends = f"from {y[known][0]:.3f} to {y[known][-1]:.3f}" if known.any() else "never finite"
        told.append(f"{who} {ends}")
    text = f"{title}: {', '.join(told)}"
    xs, ys = (np.concatenate([line[i] for line in lines.values()]) for i in (0, 1))
    if not len(xs):
        return f"<figure><figcaption>{text}</figcaption></figure>"

    def ticks(values: Numbers, integer: bool) -> Numbers:
        low, high = float(values.min()), float(values.max())
        margin = 0.5 if integer else max(1e-3, 0.05 * (high - low))
        locator = MaxNLocator(4, integer=integer, steps=[1, 2, 2.5, 5, 10])
        return np.asarray(locator.tick_values(low - margin, high + margin), np.float64)

    across, up = ticks(xs, True), ticks(ys, False)
    to_x = lambda v: left + (right - left) * (v - across[0]) / (across[-1] - across[0])
    to_y = lambda v: bottom - (bottom - top) * (v - up[0]) / (up[-1] - up[0])
    drawn = [f"<path class=axis d='M{left} {top}V{bottom}H{right}' />"]
    drawn += [f"<text x={left - 5} y={to_y(v) + 4:.1f} text-anchor=end>{v:.4g}</text>" for v in up]
    drawn += [
        f"<text x={to_x(v):.1f} y={bottom + 15} text-anchor=middle>{v:g}</text>"
        for v in across
        if v >= 1
    ]
    drawn.append(f"<text x={right} y={bottom + 31} text-anchor=end>rollout</text>")
    for who, (x, y) in lines.items():
        points = [f"{to_x(u):.1f} {to_y(v):.1f}" for u, v in zip(x, y, strict=True)]
        if points:
            path = "L".join(points if len(points) > 1 else points * 2)
            drawn.append(f"<path class={who[0]} stroke-linecap=round d='M{path}' />")
    return (
        f"<figure><svg viewBox='0 0 300 166' role=img aria-label='{text}'>{''.join(drawn)}"
        f"</svg><figcaption>{text}</figcaption></figure>"
    )
