"""The report as headless Chromium lays it out: on a desk and on a phone, light and dark."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kvpo_trainer import report
from kvpo_trainer.data import DataConfig, Prompt, make_clips
from kvpo_trainer.evaluation import Evaluation
from kvpo_trainer.generator import Generator, GeneratorConfig
from kvpo_trainer.rewards import HEADS, RewardModel
from kvpo_trainer.update import KvpoConfig, Trainer
from PIL import Image

from kvpo_kernels import HistoryRouting

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on the path")

PROMPTS = [Prompt(3, "left", "slowly", "up"), Prompt(7, "up", "quickly", "right")]
WIDTHS = (1200, 390)
HEIGHT = 6000  # more than the page needs in any font
FRAME = 20  # at which the videos are stopped for the picture
QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--hide-scrollbars", "--force-device-scale-factor=1", "--force-color-profile=srgb"),
)
# Around the page: a frame of each width, and a script that looks in and stops the videos.
LOOK = """
const found = [];
window.onerror = text => { document.getElementById('found').textContent = text; };
for (const frame of document.querySelectorAll('iframe')) frame.onload = () => {
  const w = frame.contentWindow, d = w.document, all = q => [...d.querySelectorAll(q)];
  const style = (e, name) => w.getComputedStyle(e)[name];
  const box = e => { const r = e.getBoundingClientRect(); return [r.x, r.y, r.width, r.height]; };
  const films = all('.film'), state = () => films.map(f => style(f, 'animationPlayState'));
  const states = [state()];
  for (const name of ['stop-0', 'stop-0', 'stop-all', 'stop-all']) {
    const label = all(`label[for=${name}]`).find(l => style(l, 'display') != 'none');
    label.click();
    states.push(state());
  }
  const moves = films.map(f => f.getAnimations()[0]);
  for (const m of moves) { m.pause(); m.currentTime = 120 * FRAME + 60; }
  found.push({
    width: w.innerWidth, content: d.documentElement.scrollWidth,
    height: d.documentElement.scrollHeight,
    dark: w.matchMedia('(prefers-color-scheme:dark)').matches,
    images: [...d.images].map(i => [i.complete, i.naturalWidth, i.alt]),
    states, films: films.map(box), strips: all('.strip').map(box),
    tables: all('table').map(t => [box(t.parentElement)[2], style(t.parentElement, 'overflowX')]),
    paper: style(d.body, 'backgroundColor'),
    text: ['body', '.note', 'figcaption', 'dt', 'td', '.up', '.down', 'pre'].map(
      q => [q, style(all(q)[0], 'color')]).concat([['.charts text', style(
      all('.charts text')[0], 'fill')]]),
    lines: ['.charts .b', '.charts .a'].map(q => [q, style(all(q)[0], 'stroke')]),
  });
  document.getElementById('found').textContent = JSON.stringify(found);
};
""".replace("FRAME", str(FRAME))


@pytest.fixture(scope="module")
def evaluations() -> tuple[Evaluation, Evaluation]:
    videos = make_clips(PROMPTS, DataConfig(), torch.Generator().manual_seed(0)).videos
    names = (*HEADS, "reward", "judge_digit", "judge_motion")
    scores = {name: torch.tensor([0.2, 0.3]) for name in names}
    shift = {name: 0.1 if name in ("vq", "reward") else -0.1 for name in names}
    return (
        Evaluation(videos, scores),
        Evaluation(-videos, {name: v + shift[name] for name, v in scores.items()}),
    )


@pytest.fixture(scope="module")
def page(evaluations: tuple[Evaluation, Evaluation]) -> str:
    torch.manual_seed(0)
    config = KvpoConfig(prompts_per_step=1, routing=HistoryRouting(num_branches=3))
    generator = Generator(GeneratorConfig(dim=32, layers=2, heads=2), DataConfig(canvas=8))
    result = Trainer(generator, RewardModel(), PROMPTS, config, 0).step()
    keys = [f"{k}_{w}" for k in (*HEADS, "reward") for w in ("branches", "anchor")]
    metrics = [{"step": s, **dict.fromkeys(keys, 0.1 * s)} for s in range(1, 9)]
    facts = {"weights": 64 * "f", "a long word": 500 * "w"}
    return report.render("KVPO run", 300 * "k", facts, metrics, *evaluations, PROMPTS, result)


def look(page: str, tmp_path: Path, *flags: str) -> tuple[list[dict[str, Any]], Any]:
    """What the browser found at each width, and its picture."""
    frames = "".join(
        f"<iframe width={width} height={HEIGHT} srcdoc='{html.escape(page)}'></iframe>"
        for width in WIDTHS
    )
    around = tmp_path / "around.html"
    around.write_text(
        "<!doctype html><meta charset=utf-8><style>:root{color-scheme:light dark}body{margin:0;"
        "display:flex;align-items:flex-start}iframe{border:0;flex:none}</style><body>"
        f"{frames}<pre id=found></pre><script>{LOOK}</script>",
        encoding="utf-8",
    )
    picture = tmp_path / "picture.png"
    assert BROWSER is not None
    done = subprocess.run(
        [
            *(BROWSER, *QUIET, *flags, f"--user-data-dir={tmp_path / 'profile'}"),
            *(f"--window-size={sum(WIDTHS)},{HEIGHT}", f"--screenshot={picture}", "--dump-dom"),
            around.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    found = re.search(r'<pre id="found">(\[.+\])</pre>', done.stdout)
    assert found, (done.stdout[-1000:], done.stderr[-1000:])
    with Image.open(picture) as image:
        return json.loads(html.unescape(found[1])), np.array(image.convert("RGB")).astype(int)


def luminance(colour: str) -> float:
    """Relative luminance of `rgb(r, g, b)`, as WCAG 2 defines it."""
    values = [int(v) / 255 for v in re.findall(r"\d+", colour)[:3]]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
    return sum(w * v for w, v in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(a: str, b: str) -> float:
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark, without motion"])
def test_as_it_is_laid_out(
    dark: bool, page: str, evaluations: tuple[Evaluation, Evaluation], tmp_path: Path
) -> None:
    # Dark is 0 there. Readers who want no motion get none until they ask for it.
    flags = ("--blink-settings=preferredColorScheme=0", "--force-prefers-reduced-motion")
    found, picture = look(page, tmp_path, *(flags if dark else ()))
    found.sort(key=lambda seen: -seen["width"])
    assert [seen["width"] for seen in found] == list(WIDTHS)
    calm, moving = ("running", "paused") if dark else ("paused", "running")
    for seen, width, left in zip(found, WIDTHS, (0, WIDTHS[0]), strict=True):
        assert seen["content"] == width, "it is wider than the window"
        assert 0 < seen["height"] <= HEIGHT
        assert seen["dark"] == dark and (luminance(seen["paper"]) < 0.2) == dark
        assert len(seen["images"]) == 2 * len(PROMPTS) + 4
        assert all(done and size > 0 and alt for done, size, alt in seen["images"])
        for table, overflow in seen["tables"]:
            assert table < width and overflow == "auto"
        # 4.5 and 3 are WCAG 2.1's limits for text (1.4.3) and for lines (1.4.11).
        for name, colour in seen["text"]:
            assert contrast(colour, seen["paper"]) >= 4.5, name
        for name, colour in seen["lines"]:
            assert contrast(colour, seen["paper"]) >= 3, name

        all_moving, all_calm = [moving] * 4, [calm] * 4
        one_calm = [calm] * 2 + [moving] * 2
        assert seen["states"] == [all_moving, one_calm, all_moving, all_calm, all_moving]

        top, right, bottom = 0, left + width, min(HEIGHT, seen["height"])
        paper = [int(v) for v in re.findall(r"\d+", seen["paper"])]
        assert (picture[top + 2 : bottom - 2, right - 4] == paper).all(), "something sticks out"
        for i, box in enumerate(seen["films"]):
            shown = report.frames_of(evaluations[i % 2].videos[i // 2])[FRAME].astype(int)
            x, y, w, h = (round(v) for v in box)
            size = w // shown.shape[0]
            assert (w, h) == (128, 128)
            middle = slice(size // 2, None, size)
            film = picture[y : y + h, left + x : left + x + w][middle, middle]
            # Laid out at a fraction of a pixel, and scaled: a level or two of rounding.
            assert abs(film - shown[..., None]).max() <= 2, i
        for x, y, w, h in seen["strips"]:
            strip = picture[round(y) + 1 : round(y + h) - 1, left + round(x) + 1 : right - 20]
            strip = strip[:, : round(w) - 2]
            assert (strip.max(-1) > 50).mean() > 0.95, "mostly black"
