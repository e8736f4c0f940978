"""`report.html`: what a run did, in one self-contained page."""

import base64
import datetime
import html
import io
import subprocess
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d

from kvpo_kernels import __version__
from kvpo_trainer.curves import curves, smooth
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
:root{color-scheme:light dark;--ink:#1c2430;--soft:#566273;--paper:#fff;--line:#d9dfe7;
--box:#f3f5f8;--branch:#1f5fbf;--anchor:#6b7685;--unseen:#e8ecf1;--up:#0a7d38;--down:#b3261e}
@media (prefers-color-scheme:dark){:root{--ink:#e3e8ef;--soft:#a3afbf;--paper:#14181e;
--line:#343c48;--box:#1f252e;--branch:#6ea8ff;--anchor:#9aa5b4;--unseen:#2c343f;--up:#5fd08a;
--down:#ff8f85}}
*{box-sizing:border-box}
body{font:16px/1.55 system-ui,sans-serif;color:var(--ink);background:var(--paper);
margin:2.5rem auto;max-width:70rem;padding:0 1.2rem;overflow-wrap:anywhere}
h1{font-size:1.7rem;margin:0 0 .4rem}h2{margin-top:2.4rem;font-size:1.2rem;
border-bottom:1px solid var(--line);padding-bottom:.3rem}p{max-width:46rem}
.note,figcaption,.legend,dt{color:var(--soft)}figcaption,.legend,.facts{font-size:.88rem}
.facts{display:grid;grid-template-columns:max-content 1fr;gap:.15rem 1rem}
.facts dt,.facts dd{margin:0}
.scroll{overflow-x:auto;margin:.6rem 0}table{border-collapse:collapse}
td,th{padding:.3rem .7rem;text-align:left;border-bottom:1px solid var(--line);
vertical-align:middle;overflow-wrap:normal}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}.scroll td.n{white-space:nowrap}
.wide td:nth-child(-n+2){white-space:nowrap}
.up{color:var(--up)}.down{color:var(--down)}
.charts,.clips{display:grid;gap:1.2rem}
.charts{grid-template-columns:repeat(auto-fill,minmax(min(14rem,100%),1fr))}
.clips{grid-template-columns:repeat(auto-fill,minmax(min(18rem,100%),1fr))}
figure{margin:0}.charts svg{width:100%;height:auto;display:block}
.charts text{font-size:13px;fill:var(--soft)}.charts path{fill:none;stroke-width:2}
.charts .axis{stroke:var(--line);stroke-width:1}.b{stroke:var(--branch)}
.a{stroke:var(--anchor);stroke-dasharray:5 3}.legend svg{vertical-align:middle}
.legend path{stroke-width:2}
rect[fill="#1f5fbf"]{fill:var(--branch)}rect[fill="#7b8794"]{fill:var(--anchor)}
rect[fill="#e8ecf1"]{fill:var(--unseen)}
.pair{display:flex;gap:.6rem;font-size:.88rem}.film,.strip{image-rendering:pixelated;display:block}
.film{width:8rem;object-fit:cover;object-position:0 0;animation:film var(--t)
steps(var(--n),jump-none) infinite}
@keyframes film{to{object-position:100% 0}}
.stop{accent-color:var(--branch);width:1.1rem;height:1.1rem;vertical-align:-.15rem;
margin:.3rem .2rem .5rem 0}.clips figcaption{color:var(--ink);font-weight:600}
.stop:checked~.pair .film,#stop-all:checked~.clips .film{animation-play-state:paused}
code,pre{background:var(--box)}code{padding:.1rem .3rem;border-radius:3px}
details pre{padding:1rem;overflow:auto}summary{cursor:pointer}.run{display:none}
@media (prefers-reduced-motion:reduce){.film{animation-play-state:paused}
.stop:checked~.pair .film,#stop-all:checked~.clips .film{animation-play-state:running}
.stop~.halt{display:none}.stop~.run{display:inline}}
@media (max-width:40rem){body{margin:1.2rem auto;padding:0 1rem}
td,th{padding:.3rem .35rem;font-size:.85rem}.narrow td.n{white-space:normal}
.narrow span{white-space:nowrap}}
"""
MAX_TEXT = 300
"""Characters of one text from outside, as a prompt."""
VIDEO_BYTES = 150_000
"""Of all videos on the page, which is to stay below 0.5 MB: those that go beyond are left out."""
FILM_PIXELS, STRIP_PIXELS = 32, 24
"""Of a side of a frame, at most; the means of squares of pixels where it has more."""
MILLISECONDS = 120
"""Of a frame."""


def frames_of(videos: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Pixels of videos in [-1, 1]."""
    pixels: np.ndarray[Any, np.dtype[np.uint8]] = (
        ((videos + 1) / 2).clamp(0, 1).mul(255).round().to(torch.uint8).numpy()
    )
    return pixels


def gif(video: Tensor, scale: int = 8, milliseconds: int = MILLISECONDS) -> bytes:
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


def film(video: Tensor) -> bytes:
    """All frames of a video `[T, H, W]` side by side, as PNG: what the page plays."""
    pixels = np.concatenate(list(frames_of(coarse(video, FILM_PIXELS))), 1)
    return _encoded(Image.fromarray(pixels))


def coarse(video: Tensor, limit: int) -> Tensor:
    """Frames `[T, H, W]` of at most `limit` pixels a side, by means over squares."""
    square = -(-max(video.shape[1:]) // limit)
    return avg_pool2d(video[:, None], square)[:, 0] if square > 1 else video


def differences(video: Tensor, anchor: Tensor, gain: float, every: int = 3) -> bytes:
    """Every so many frames `[T, H, W]` side by side, as PNG: what differs from the anchor.

    The mean of both is grey; what only the video shows is orange, what only the anchor shows blue.

    Args:
        gain: differences are shown that many times as large.
    """
    shown = (coarse(v[::every].double(), STRIP_PIXELS) for v in (video, anchor))
    both = [((v + 1) / 2).clamp(0, 1) for v in shown]
    mean, change = (both[0] + both[1]) / 2, gain * (both[0] - both[1]) / 2
    base = 0.25 + 0.5 * mean  # not black: readable on a light and on a dark page
    colours = torch.stack([base + change, base, base - change], -1).clamp(0, 1)
    pixels = colours.mul(255).round().to(torch.uint8)
    gap = torch.full((*pixels.shape[:2], 1, 3), 128, dtype=torch.uint8)
    row = torch.cat([pixels, gap], 2).transpose(0, 1).flatten(1, 2)
    return _encoded(Image.fromarray(row[:, :-1].numpy()))


def difference_gain(videos: Tensor, anchor: Tensor) -> float:
    """So that the largest differences fill the scale; at most 8, and never less than 1.

    Args:
        videos: `[G, T, H, W]`.
        anchor: `[T, H, W]`.
    """
    largest = (videos - anchor).abs().double().flatten().quantile(0.999) / 2
    return 1 / min(1.0, max(float(largest), 1 / 8))


def reward_figure(metrics: Sequence[Mapping[str, Any]]) -> Figure:
    """Reward curves of the branches' mean against the anchor's."""
    figure = Figure(figsize=(11, 2.6), layout="constrained")
    axes = figure.subplots(1, 4)
    steps = [row["step"] for row in metrics]
    for axis, name in zip(axes, (*HEADS, "reward"), strict=True):
        for who, colour in (("anchor", "#9aa5b1"), ("branches", "#1f5fbf")):
            values = np.array([float(row[f"{name}_{who}"]) for row in metrics])
            axis.plot(steps, values, color=colour, alpha=0.35, linewidth=1)
            axis.plot(*smooth(steps, values), color=colour, linewidth=2, label=who)
        axis.set_title(name.upper() if name in HEADS else name, fontsize=10)
        axis.set_xlabel("rollout", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].legend(fontsize=8, frameon=False)
    return figure


def run_figure(
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


def commit() -> str:
    """Of this code, where it is a checkout with git beside it; "unknown" elsewhere."""
    here = Path(__file__)

    def git(*words: str) -> str:
        command = ["git", "-C", str(here.parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # An installation may lie in somebody else's repository, whose commit it is not.
        git("ls-files", "--error-unmatch", here.name)
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/")
        return git("rev-parse", "--short=12", "HEAD") + (" with local changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


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
    """The page: HTML that needs nothing else, no network and no scripts.

    Args:
        facts: what is told about the run beside date and code, as the weights it began with.
        metrics: rows of `metrics.jsonl`; one that lacks a reward is left out of the curves.
        last: a rollout to show branch by branch.
        clips: so many prompts' videos, fewer where they are large.
    """
    now = datetime.datetime.now(datetime.timezone.utc)
    facts = {
        "date": now.strftime("%Y-%m-%d %H:%M UTC"),
        "code": f"kvpo_kernels {__version__}, commit {commit()}",
        **facts,
    }
    parts = [
        "<!doctype html><html lang=en><head><meta charset=utf-8>",
        "<meta name=viewport content='width=device-width, initial-scale=1'>",
        f"<title>{_e(title)}</title><style>{_STYLE}</style></head><body><main>",
        f"<h1>{_e(title)}</h1>",
        _summary(before, after, len(prompts), len(metrics)),
        "<dl class=facts>" + "".join(f"<dt>{_e(k)}<dd>{_e(v)}" for k, v in facts.items()) + "</dl>",
        "<h2>Held-out prompts, before and after</h2>",
        f"<p class=note>{len(prompts)} prompts that training never used, the same noise before and"
        " after; the change is the mean of the paired differences with its 95 % interval, which"
        " contains zero where there is no clear change. The judge"
        " has another architecture, other training data and another measure of motion than the"
        " rewards. A change here is not yet learning: weights also drift. <code>kvpo-train"
        " verify</code> has the controls.</p>",
        _comparison_table(before, after),
        _reward_charts(metrics),
        _videos(before, after, prompts, clips),
    ]
    if last is not None:
        parts.append(_branch_tree(last))
    parts.append(
        "<h2>Configuration</h2><details><summary>all of it</summary>"
        f"<pre tabindex=0>{_e(config_yaml, limit=None)}</pre></details></main></body></html>"
    )
    return "\n".join(parts)


def _summary(before: Evaluation, after: Evaluation, prompts: int, rollouts: int) -> str:
    rows = {name: row for name, *row in comparison(before, after)}
    was, now, change, half = rows["reward"]
    judged = ", ".join(
        f"{NAMES[name].partition(': ')[2]}: {verdict(*rows[name][2:])}"
        for name in ("judge_digit", "judge_motion")
    )
    trained = f"over {rollouts} rollouts" if rollouts else "in a run without recorded rollouts"
    return (
        f"<p>A video generator was trained {trained}. In a rollout every prompt is continued by"
        " several <b>branches</b>, which share noise and differ only in the old frames that they"
        " attend to, and by an <b>anchor</b>, which attends as in deployment. Reward models score"
        " them; the update makes branches that score above the anchor more likely, and those below"
        " less.</p>"
        f"<p><b>Result on {prompts} held-out prompts:</b> the reward went from {was:.3f} to"
        f" {now:.3f}, {change:+.4f} ± {half:.4f}: <b>{_e(verdict(change, half))}</b>. The"
        f" independent judge on {_e(judged)}.</p>"
    )


def _comparison_table(before: Evaluation, after: Evaluation) -> str:
    rows = []
    for name, was, now, change, half in comparison(before, after):
        word = verdict(change, half)
        mark = word if word in ("up", "down") else ""
        rows.append(
            f"<tr><td>{_e(NAMES[name])}<td class=n>{was:.3f}<td class=n>{now:.3f}"
            f"<td class='n {mark}'><span>{change:+.4f}</span> <span>± {half:.4f}</span>"
            f"<td>{_e(mark or 'no clear change')}"
        )
    head = "<tr><th>measure<th class=n>before<th class=n>after<th class=n>change<th>verdict"
    return _scrolling(f"{head}{''.join(rows)}", "Measures before and after training", "narrow")


def _reward_charts(metrics: Sequence[Mapping[str, Any]]) -> str:
    names = (*HEADS, "reward")
    keys = ["step", *(f"{name}_{who}" for name in names for who in ("branches", "anchor"))]
    rows = []
    for row in metrics:
        try:
            rows.append({key: float(row[key]) for key in keys})
        except (KeyError, TypeError, ValueError):
            continue  # of a damaged file
    if not rows:
        return ""
    title = lambda name: NAMES[name].partition(":")[0].partition(" (")[0]
    charts = "".join(curves(name, title(name), rows) for name in names)
    swatch = "<svg width=28 height=10 aria-hidden=true><path class={} d='M0 5H28' /></svg>"
    return (
        "<h2>Rewards while training</h2>"
        "<p class=note>Mean over a rollout's prompts; of the branches, and of the anchor. Prompts"
        " and forks differ from rollout to rollout, so the lines are running means over a quarter"
        " of the run.</p>"
        f"<p class=legend>{swatch.format('b')} branches &nbsp; {swatch.format('a')} anchor</p>"
        f"<div class=charts>{charts}</div>"
    )


def _videos(before: Evaluation, after: Evaluation, prompts: Sequence[Prompt], clips: int) -> str:
    figures: list[str] = []
    spent = 0
    for i in range(min(clips, len(prompts))):
        pair = {"before": before, "after": after}
        films = {who: film(e.videos[i]) for who, e in pair.items()}
        spent += sum(map(len, films.values()))
        if spent > VIDEO_BYTES and figures:
            break
        frames, height, width = coarse(before.videos[i], FILM_PIXELS).shape
        style = f"--n:{frames};--t:{frames * MILLISECONDS}ms;aspect-ratio:{width}/{height}"
        shown = "".join(
            "<div>"
            + _img(data, f"{who} training: “{prompts[i].text}”, {frames} frames", "film", style)
            + f"{who}<br>reward {float(pair[who].scores['reward'][i]):.3f}</div>"
            for who, data in films.items()
        )
        figures.append(
            f"<figure><figcaption>{_e(prompts[i].text)}</figcaption>"
            f"{_stop(f'stop-{i}', 'this one')}<div class=pair>{shown}</div></figure>"
        )
    if not figures:
        return ""
    true = tuple(before.videos.shape[-2:])
    scaled = "" if true == (height, width) else f"; {width} x {height} means of {true} pixels"
    return (
        f"<h2>Videos</h2><p class=note>Of {len(figures)} of the {len(prompts)} held-out prompts,"
        f" from the same noise before and after training{scaled}.</p>"
        f"{_stop('stop-all', 'all videos')}<div class=clips>{''.join(figures)}</div>"
    )


def _stop(name: str, what: str) -> str:
    """A box that halts videos, or, for readers who want no motion, sets them going."""
    return (
        f"<input type=checkbox class=stop id={name}> <label class=halt for={name}>pause {what}"
        f"</label><label class=run for={name}>play {what}</label>"
    )


def _branch_tree(result: StepResult, prompt: int = 0, every: int = 3) -> str:
    """One prompt of the last rollout: what each branch attended to, showed and earned."""
    rollout, plan = result.rollout, result.rollout.plans[prompt]
    G = result.advantages.shape[1]
    first, fork = rollout.chunk_first_frame, plan.start_frame
    videos = rollout.chunk[prompt, :, fork - first :]
    anchor_video = videos[G]
    gain = difference_gain(videos[:G], anchor_video)
    shown, height, width = coarse(anchor_video[::every], STRIP_PIXELS).shape
    style = f"height:3rem;aspect-ratio:{shown * (width + 1) - 1}/{height}"
    rows = []
    for row in range(G + 1):
        anchor = row == G
        attended = [] if anchor else plan.attended[row]
        nearest = LOCAL_FRAMES if anchor else rollout.nearest
        advantage = "" if anchor else f"{float(result.advantages[prompt, row]):+.2f}"
        scores = "".join(
            f"<td class=n>{float(result.rewards[c, prompt, row]):.3f}" for c in range(len(HEADS))
        )
        name = "anchor" if anchor else f"branch {row}"
        apart = float((videos[row] - anchor_video).div(2).square().mean().sqrt())
        picture = differences(videos[row], anchor_video, gain, every)
        alt = (
            f"anchor, {shown} frames from {fork} on"
            if anchor
            else f"{name} beside the anchor, {shown} frames from {fork} on; differs by {apart:.3f}"
        )
        rows.append(
            f"<tr><td>{name}<td>{_route_svg(fork, attended, nearest)}"
            f"<td>{_img(picture, alt, 'strip', style)}"
            f"<td class=n>{'' if anchor else f'{apart:.3f}'}{scores}<td class=n>{advantage}"
        )
    head = "<tr><th><th>frames attended<th>what it showed<th class=n>differs"
    head += "".join(f"<th class=n>{h.upper()}" for h in HEADS) + "<th class=n>advantage"
    return (
        "<h2>One rollout, branch by branch</h2>"
        f"<p class=note>“{_e(rollout.prompts[prompt].text)}”, forked at frame {fork}. All rows"
        " share prefix and noise and differ in the old frames they attend to (blue; grey: sink and"
        f" nearest) until frame {plan.end_frame}. Shown is one frame in {every} from the fork on:"
        " <b>orange</b> where only the branch is bright, <b>blue</b> where"
        f" only the anchor is, grey where they agree; differences are drawn {gain:.2g} times as"
        " large as they are. “Differs” is the root mean square distance of a pixel from the"
        " anchor's, of 1 from black to white. An advantage below zero means that the branch scored"
        " below the anchor and is made less likely.</p>"
        + _scrolling(f"{head}{''.join(rows)}", "Branches of one rollout", "wide")
    )


def _route_svg(fork: int, routed: Sequence[int], nearest: int) -> str:
    shown = {*range(SINK_FRAMES), *range(fork - nearest, fork)}
    cells = "".join(
        f"<rect x={5 * f} y=0 width=4 height=12 fill="
        f"{'#1f5fbf' if f in routed else '#7b8794' if f in shown else '#e8ecf1'} />"
        for f in range(fork)
    )
    frames = f"attends to {', '.join(map(str, routed))}" if routed else "attends as in deployment"
    return (
        f"<span role=img aria-label='{frames}, sink and {nearest} nearest, of {fork} frames'>"
        f"<svg width={5 * fork} height=12>{cells}</svg></span>"
    )


def _scrolling(rows: str, label: str, kind: str) -> str:
    """A table that scrolls by itself, by keyboard too, where it is wider than the page."""
    return (
        f"<div class='scroll {kind}' role=region tabindex=0 aria-label='{_e(label)}'>"
        f"<table>{rows}</table></div>"
    )


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160)
    return buffer.getvalue()


def _encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _img(data: bytes, alt: str, kind: str, style: str) -> str:
    return (
        f"<img class={kind} alt='{_e(alt)}' style='{style}'"
        f" src='data:image/png;base64,{base64.b64encode(data).decode()}'>"
    )


def _e(text: str, limit: int | None = MAX_TEXT) -> str:
    """For HTML; what cannot be seen, turns text around or cannot be written is spelled out."""
    if limit is not None and len(text) > limit:
        text = f"{text[:limit]}... ({len(text)} characters)"
    seen = "".join(
        c.encode("unicode_escape").decode()
        if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") and c not in "\n\t"
        else c
        for c in text
    )
    return html.escape(seen)
