"""`report.html`: what a run did, in one self-contained page."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from kvpo_trainer.data import Prompt
from kvpo_trainer.evaluation import Evaluation, paired_difference
from kvpo_trainer.rewards import HEADS
from kvpo_trainer.sampling import LOCAL_FRAMES, SINK_FRAMES
from kvpo_trainer.update import StepResult

NAMES = {
    "vq": "VQ: looks like a digit",
    "mq": "MQ: moves smoothly",
    "ta": "TA: does what the prompt says",
    "reward": "Reward (weighted sum)",
    "judge_digit": "Judge: the prompt's digit",
    "judge_motion": "Judge: the prompt's motion",
}
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#1c2430;background:#fff;margin:2.5rem auto;
max-width:62rem;padding:0 1.2rem}h1{font-size:1.7rem;margin-bottom:.2rem}h2{margin-top:2.4rem;
font-size:1.15rem;border-bottom:1px solid #dde3ea;padding-bottom:.3rem}
p.note{color:#5a6676;max-width:46rem}table{border-collapse:collapse;margin:.6rem 0}
td,th{padding:.3rem .8rem;text-align:left;border-bottom:1px solid #edf0f4;vertical-align:middle}
td.n{text-align:right;font-variant-numeric:tabular-nums}img{image-rendering:pixelated;display:block}
.clips{display:grid;grid-template-columns:repeat(auto-fill,minmax(17rem,1fr));gap:1.2rem}
.clips figure{margin:0}.clips div{display:flex;gap:.6rem}figcaption{font-size:.85rem;color:#5a6676}
code{background:#f4f6f9;padding:.1rem .3rem;border-radius:3px}details pre{background:#f4f6f9;
padding:1rem;overflow:auto}.up{color:#0a7d38}.down{color:#b3261e}
"""


def frames_of(videos: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Pixels of videos in [-1, 1]."""
    pixels: np.ndarray[Any, np.dtype[np.uint8]] = (
        ((videos + 1) / 2).clamp(0, 1).mul(255).round().to(torch.uint8).numpy()
    )
    return pixels


def gif(video: Tensor, scale: int = 8, milliseconds: int = 120) -> bytes:
    """An endless animation of a video `[T, H, W]`."""
    images = [
        Image.fromarray(np.kron(frame, np.ones((scale, scale), np.uint8)))
        for frame in frames_of(video)
    ]
    buffer = io.BytesIO()
    images[0].save(
        buffer,
        "GIF",
        save_all=True,
        append_images=images[1:],
        duration=milliseconds,
        loop=0,
    )
    return buffer.getvalue()


def strip(video: Tensor, every: int = 3, scale: int = 3) -> bytes:
    """Every so many frames of a video `[T, H, W]` side by side, as PNG."""
    gap = np.full((video.shape[1], 1), 96, np.uint8)
    row = np.concatenate([np.concatenate([f, gap], 1) for f in frames_of(video[::every])], 1)
    buffer = io.BytesIO()
    Image.fromarray(np.kron(row, np.ones((scale, scale), np.uint8))).save(buffer, "PNG")
    return buffer.getvalue()


def reward_figure(metrics: Sequence[Mapping[str, Any]]) -> Figure:
    """Reward curves of the branches' mean against the anchor's."""
    figure = Figure(figsize=(11, 2.6), layout="constrained")
    axes = figure.subplots(1, 4)
    steps = [row["step"] for row in metrics]
    for axis, name in zip(axes, (*HEADS, "reward"), strict=True):
        for who, colour in (("anchor", "#9aa5b1"), ("branches", "#1f5fbf")):
            values = np.array([float(row[f"{name}_{who}"]) for row in metrics])
            axis.plot(steps, values, color=colour, alpha=0.35, linewidth=1)
            width = max(1, len(values) // 4)  # prompts and fork differ from rollout to rollout
            smooth = np.convolve(values, np.ones(width) / width, "valid")
            middle = np.array(steps[width - 1 :]) - (width - 1) / 2
            axis.plot(middle, smooth, color=colour, linewidth=2, label=who)
        axis.set_title(name.upper() if name in HEADS else name, fontsize=10)
        axis.set_xlabel("rollout", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].legend(fontsize=8, frameon=False)
    return figure


def readme_figure(
    metrics: Sequence[Mapping[str, Any]], before: Evaluation, after: Evaluation, rows: int = 3
) -> Figure:
    """Reward curves above strips of held-out videos before and after."""
    rows = min(rows, before.videos.shape[0])
    heights = [5.0] + [1.0] * (2 * rows)
    figure = Figure(figsize=(11, 0.55 * sum(heights)), layout="constrained")
    curves, *grid = figure.subplots(1 + 2 * rows, 1, height_ratios=heights)
    curves.imshow(np.asarray(Image.open(io.BytesIO(_png(reward_figure(metrics))))))
    curves.axis("off")
    for i in range(rows):
        for j, (name, videos) in enumerate((("before", before), ("after", after))):
            axis = grid[2 * i + j]
            axis.imshow(
                np.asarray(Image.open(io.BytesIO(strip(videos.videos[i], 2, 4)))), cmap="gray"
            )
            axis.set_ylabel(name, fontsize=8, rotation=0, ha="right", va="center")
            axis.set_xticks([])
            axis.set_yticks([])
    return figure


def comparison(
    before: Evaluation, after: Evaluation
) -> list[tuple[str, float, float, float, float]]:
    """Per measure: its name, means before and after, mean paired change, half width."""
    rows = []
    for name in NAMES:
        change = paired_difference(after.scores[name], before.scores[name])
        rows.append(
            (
                name,
                float(before.scores[name].mean()),
                float(after.scores[name].mean()),
                change.mean,
                change.half_width,
            )
        )
    return rows


def verdict(change: float, half_width: float) -> str:
    """What a change with this 95 % interval lets one say."""
    if not abs(change) > half_width:  # NaN too
        return "not distinguishable from no change"
    return "up" if change > 0 else "down"


def render(
    title: str,
    config_yaml: str,
    facts: Mapping[str, str],
    metrics: Sequence[Mapping[str, Any]],
    before: Evaluation,
    after: Evaluation,
    prompts: Sequence[Prompt],
    last: StepResult | None,
    clips: int = 6,
) -> str:
    """The page."""
    parts = [
        f"<!doctype html><meta charset=utf-8><title>{_e(title)}</title><style>{_STYLE}</style>",
        f"<h1>{_e(title)}</h1><p class=note>{_e(' · '.join(f'{k} {v}' for k, v in facts.items()))}",
        "<h2>Held-out prompts, before and after</h2>",
        f"<p class=note>{len(prompts)} prompts that training never used, the same noise before and"
        " after; the change is the mean of the paired differences with its 95 % interval. The judge"
        " has another architecture, other training data and another measure of motion than the"
        " rewards. A change here is not yet learning: weights also drift. <code>kvpo-train"
        " verify</code> has the controls.</p>",
        _comparison_table(before, after),
        "<h2>Rewards while training</h2>",
        "<p class=note>Mean over the branches, and the anchor (no perturbation, same noise).</p>",
    ]
    if metrics:
        parts.append(_img(_png(reward_figure(metrics)), width="100%"))
    parts.append("<h2>Videos</h2><div class=clips>")
    for i in range(min(clips, len(prompts))):
        parts.append(
            f"<figure><div>{_img(gif(before.videos[i]), 'gif')}{_img(gif(after.videos[i]), 'gif')}"
            f"</div><figcaption>{_e(prompts[i].text)}<br>before · after</figcaption></figure>"
        )
    parts.append("</div>")
    if last is not None:
        parts.append(_branch_tree(last))
    parts.append(
        f"<h2>Configuration</h2><details><summary>all of it</summary><pre>{_e(config_yaml)}</pre>"
        "</details>"
    )
    return "\n".join(parts)


def _comparison_table(before: Evaluation, after: Evaluation) -> str:
    rows = []
    for name, was, now, change, half in comparison(before, after):
        word = verdict(change, half)
        mark = word if word in ("up", "down") else ""
        rows.append(
            f"<tr><td>{_e(NAMES[name])}<td class=n>{was:.3f}<td class=n>{now:.3f}"
            f"<td class='n {mark}'>{change:+.4f} ± {half:.4f}<td>{_e(word)}"
        )
    head = "<tr><th>measure<th>before<th>after<th>change<th>"
    return f"<table>{head}{''.join(rows)}</table>"


def _branch_tree(result: StepResult, prompt: int = 0) -> str:
    """One prompt of the last rollout: what each branch attended to, showed and earned."""
    rollout, plan = result.rollout, result.rollout.plans[prompt]
    G = result.advantages.shape[1]
    first, fork = rollout.chunk_first_frame, plan.start_frame
    rows = []
    for row in range(G + 1):
        anchor = row == G
        frames = [] if anchor else plan.attended[row]
        nearest = LOCAL_FRAMES if anchor else rollout.nearest
        advantage = "" if anchor else f"{float(result.advantages[prompt, row]):+.2f}"
        scores = "".join(
            f"<td class=n>{float(result.rewards[c, prompt, row]):.3f}" for c in range(len(HEADS))
        )
        name = "anchor" if anchor else f"branch {row}"
        video = rollout.chunk[prompt, row, fork - first :]
        rows.append(
            f"<tr><td>{name}<td>{_route_svg(fork, frames, nearest)}"
            f"<td>{_img(strip(video, 3, 2))}{scores}<td class=n>{advantage}"
        )
    head = "<tr><th><th>frames attended<th>what it showed"
    head += "".join(f"<th>{h.upper()}" for h in HEADS) + "<th>advantage"
    return (
        "<h2>One rollout, branch by branch</h2>"
        f"<p class=note>“{_e(rollout.prompts[prompt].text)}”, forked at frame {fork}. All rows"
        " share prefix and noise and differ in the old frames they attend to (blue; grey: sink and"
        f" nearest) until frame {plan.end_frame}.</p><table>{head}{''.join(rows)}</table>"
    )


def _route_svg(fork: int, routed: Sequence[int], nearest: int) -> str:
    shown = {*range(SINK_FRAMES), *range(fork - nearest, fork)}
    cells = "".join(
        f"<rect x={5 * f} y=0 width=4 height=12 fill="
        f"{'#1f5fbf' if f in routed else '#7b8794' if f in shown else '#e8ecf1'} />"
        for f in range(fork)
    )
    return f"<svg width={5 * fork} height=12>{cells}</svg>"


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160)
    return buffer.getvalue()


def _img(data: bytes, kind: str = "png", width: str | None = None) -> str:
    size = f" style='width:{width};image-rendering:auto'" if width else ""
    return f"<img{size} src='data:image/{kind};base64,{base64.b64encode(data).decode()}'>"


def _e(text: str) -> str:
    return html.escape(text)
