"""The report: one file that needs nothing else, with the numbers it was given."""

import base64
import io
import re
import subprocess
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from kvpo_trainer import report
from kvpo_trainer.data import DataConfig, Prompt, make_clips
from kvpo_trainer.evaluation import Evaluation, paired_difference
from kvpo_trainer.generator import Generator
from kvpo_trainer.rewards import HEADS, RewardModel
from kvpo_trainer.update import KvpoConfig, StepResult, Trainer
from PIL import Image

from kvpo_kernels import HistoryRouting, __version__

PROMPTS = [
    Prompt(3, "left", "slowly", "up"),
    Prompt(7, "up", "quickly", "right"),
    Prompt(0, "down", "slowly", "left"),
]
MEASURES = (*HEADS, "reward", "judge_digit", "judge_motion")


def evaluation(shift: float) -> Evaluation:
    videos = make_clips(PROMPTS, DataConfig(), torch.Generator().manual_seed(0)).videos
    base = torch.tensor([0.2, 0.3, 0.4])
    return Evaluation(videos, {m: base + shift * (i + 1) for i, m in enumerate(MEASURES)})


METRICS = [
    {"step": s, **{f"{k}_{w}": 0.1 * s for k in (*HEADS, "reward") for w in ("branches", "anchor")}}
    for s in range(1, 9)
]


def pixels(element: str) -> np.ndarray:
    (data,) = re.findall(r"base64,([^']*)'", element)
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        return np.array(image)


@pytest.fixture
def result(generator: Generator) -> StepResult:
    config = KvpoConfig(prompts_per_step=1, routing=HistoryRouting(num_branches=3))
    return Trainer(generator, RewardModel(), PROMPTS, config, 0).step()


def test_the_page(result: StepResult) -> None:
    before, after = evaluation(0.0), evaluation(0.01)
    hostile = "title <script>alert(1)</script>"
    page = report.render(
        hostile, "seed: 1 # <b>", {"seed": "<i>"}, METRICS, before, after, PROMPTS, result
    )
    assert "<script" not in page and "<i>" not in page and "&lt;b&gt;" in page
    sources = re.findall(r"(?:src|href)=['\"]([^'\"]*)", page)
    assert sources and all(s.startswith("data:image/") for s in sources)
    assert not re.search(r"https?://|@import|url\(", page)
    for i in range(len(MEASURES)):
        assert f"{0.01 * (i + 1):+.4f}" in page
    for prompt in PROMPTS:
        assert prompt.text in page
    films = [element for element in re.findall(r"<img [^>]*>", page) if "class=film" in element]
    assert len(films) == 2 * len(PROMPTS)
    for i, element in enumerate(films):
        e, prompt = (before, after)[i % 2], PROMPTS[i // 2]
        assert f"{('before', 'after')[i % 2]} training: “{prompt.text}”" in element
        frames = np.hstack(list(report.frames_of(e.videos[i // 2])))
        assert (pixels(element) == frames).all()  # all of them, bit for bit
    assert len(page.encode()) < 500_000
    for branch in range(3):
        assert f"branch {branch}" in page
    assert "anchor" in page
    assert f"forked at frame {result.rollout.start_frame}" in page


@pytest.mark.parametrize("nearest", [3, 4, 6])
def test_frames_attended_are_those_of_the_routing(generator: Generator, nearest: int) -> None:
    routing = HistoryRouting(num_branches=3, nearest_frames=nearest)
    config = KvpoConfig(prompts_per_step=1, routing=routing)
    result = Trainer(generator, RewardModel(), PROMPTS, config, 0).step()
    same = evaluation(0.0)
    page = report.render("t", "", {}, METRICS, same, same, PROMPTS, result)
    pictures = re.findall(r"<svg width=\d+ height=12>.*?</svg>", page)[-4:]  # branches, anchor
    fork, plan = result.rollout.start_frame, result.rollout.plans[0]
    for row, picture in enumerate(pictures):
        colours = re.findall(r"fill=(#\w+)", picture)
        seen = {f for f, colour in enumerate(colours) if colour != "#e8ecf1"}
        local = 6 if row == 3 else nearest - 3  # the window of the anchor; the rest is the block
        routed = set() if row == 3 else set(plan.attended[row])
        assert len(colours) == fork
        assert seen == {0, 1, 2, *routed, *range(fork - local, fork)}


def test_what_a_reader_and_a_machine_need(result: StepResult) -> None:
    same = evaluation(0.0)
    facts = {"weights": "0123abcd"}
    page = report.render("t", "", facts, METRICS, same, same, PROMPTS, result)
    assert re.match("<!doctype html><html lang=en><head><meta charset=utf-8>", page)
    assert "<meta name=viewport content='width=device-width, initial-scale=1'>" in page
    assert "prefers-color-scheme:dark" in page and "prefers-reduced-motion:reduce" in page
    assert "image/gif" not in page and "0123abcd" in page
    assert f"kvpo_kernels {__version__}, commit {report.commit()}" in page
    assert re.search(r"<dt>date<dd>20\d\d-\d\d-\d\d \d\d:\d\d UTC", page)
    images = re.findall(r"<img [^>]*>", page)
    alts = [re.findall(r"alt='([^']+)'", image) for image in images]
    assert len(images) == 2 * len(PROMPTS) + 4 and all(len(a) == 1 for a in alts)
    assert len({a for (a,) in alts}) == len(images)  # each says what it alone shows
    assert page.count("<table>") == page.count("class='scroll ") == 2
    for picture in re.findall(r"<svg [^>]*viewBox[^>]*>", page):
        assert re.search("role=img aria-label='(VQ|MQ|TA|Reward): branches from ", picture)
    parser = Tags()
    parser.feed(page)
    assert parser.open == [] and len(parser.ids) == len(set(parser.ids)) == 4
    assert parser.targets <= set(parser.ids)


class Tags(HTMLParser):
    """Elements that are left open, ids, and what labels point to."""

    FREE = ("meta", "img", "input", "br", "tr", "td", "th", "dt", "dd")  # need no end

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.targets: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag not in self.FREE:
            self.open.append(tag)
        self.ids += filter(None, [values.get("id")])
        self.targets |= set(filter(None, [values.get("for")]))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in ("rect", "path")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_strips_show_what_differs(result: StepResult) -> None:
    chunk = result.rollout.chunk[0]
    videos, anchor = chunk[:-1], chunk[-1]
    gain = report.difference_gain(videos, anchor)
    assert 1 <= gain <= 8
    with Image.open(io.BytesIO(report.differences(anchor, anchor, gain))) as image:
        same = np.array(image)
    assert (same[..., 0] == same[..., 2]).all() and same.min() >= 63  # grey, and nowhere black
    video = anchor.clone()
    video[0, 2, 3], anchor[0, 2, 3] = 1, -1
    video[3, 4, 5], anchor[3, 4, 5] = -1, 1
    with Image.open(io.BytesIO(report.differences(video, anchor, 1.0))) as image:
        shown = np.array(image)
    width = anchor.shape[2]
    assert shown.shape[:2] == (width, (width + 1) * len(anchor[::3]) - 1)
    assert shown[2, 3].tolist() == [255, 128, 0]  # orange: only the video's
    assert shown[4, width + 1 + 5].tolist() == [0, 128, 255]  # blue: only the anchor's


def test_difference_gain() -> None:
    anchor = torch.zeros(6, 8, 8)
    shifted = lambda by: (anchor + by).expand(3, -1, -1, -1)
    assert report.difference_gain(shifted(0.0), anchor) == 8
    assert report.difference_gain(shifted(0.5), anchor) == pytest.approx(4)
    assert report.difference_gain(shifted(5.0), anchor) == 1


def test_hostile_text_is_spelled_out() -> None:
    same = evaluation(0.0)
    odd = "a\x00\x1b[31m \u202eevil\u2028 \ud800 ' \" <img src=x onerror=alert(1)>"
    prompts = [Text(odd), Text("long " * 10_000), Text("")]
    page = report.render(odd, odd, {odd: odd}, METRICS, same, same, prompts, None)  # type: ignore[arg-type]
    page.encode()  # a lone surrogate cannot be
    assert not set("\x00\x1b\u202e\u2028\ud800") & set(page)
    assert "\\x1b[31m \\u202eevil" in page and "<img src=x" not in page
    assert "long " * 61 not in page and "(50000 characters)" in page


@dataclass
class Text:
    text: str


def test_metrics_that_are_damaged_or_not_finite() -> None:
    same = evaluation(0.0)
    rows = [*METRICS, {"step": 9}, {**METRICS[0], "vq_branches": None}, {}]
    page = report.render("t", "", {}, rows, same, same, PROMPTS, None)
    assert page.count("viewBox") == 4
    rows = [{**row, "vq_branches": "nan", "vq_anchor": "inf"} for row in METRICS]
    page = report.render("t", "", {}, rows, same, same, PROMPTS, None)
    assert page.count("viewBox") == 3 and "VQ: branches never finite" in page
    one = report.render("t", "", {}, METRICS[:1], same, same, PROMPTS, None)
    assert one.count("viewBox") == 4
    for path in re.findall(r"d='([^']*)'", page + one):
        assert not re.search("nan|inf", path), path


@pytest.mark.parametrize(("canvas", "films"), [(16, 6), (48, 4), (130, 4)])
def test_the_page_stays_small(canvas: int, films: int, result: StepResult) -> None:
    """Even for noise, which no encoder makes smaller, of any resolution."""
    noise = lambda *shape: torch.rand(*shape, canvas, canvas) * 2 - 1
    large = Evaluation(noise(3, 57), evaluation(0.0).scores)
    _, rows, frames = result.rollout.chunk.shape[:3]
    chunk = noise(1, rows, frames)
    last = replace(result, rollout=replace(result.rollout, chunk=chunk))
    page = report.render("t", "", {}, METRICS, large, large, PROMPTS, last)
    assert len(page.encode()) < 500_000
    assert page.count("class=film") == films
    assert ("means of" in page) == (canvas > 32)


def test_coarse() -> None:
    video = torch.arange(2 * 8 * 6.0).view(2, 8, 6)
    assert report.coarse(video, 8) is video
    assert torch.equal(report.coarse(video, 4)[1, 2, 1], video[1, 4:6, 2:4].mean())


def test_commit_is_the_codes_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that of a repository the package is merely installed into."""
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path)]
    for words in (["init", "-q"], ["commit", "-qm", "x", "--allow-empty"]):
        subprocess.run([*git, *words], check=True)
    here = tmp_path / "report.py"
    here.touch()
    monkeypatch.setattr(report, "__file__", str(here))
    assert report.commit() == "unknown"
    subprocess.run([*git, "add", "report.py"], check=True)
    subprocess.run([*git, "commit", "-qm", "y"], check=True)
    assert re.fullmatch("[0-9a-f]{12}", report.commit())
    here.write_text("# changed")
    assert re.fullmatch("[0-9a-f]{12} with local changes", report.commit())
    monkeypatch.setenv("PATH", "")
    assert report.commit() == "unknown"


def test_a_page_without_training() -> None:
    same = evaluation(0.0)
    page = report.render("t", "", {}, [], same, same, PROMPTS, None)
    assert "branch 0" not in page and "+0.0000 ± 0.0000" in page


def test_gif_shows_the_video() -> None:
    video = evaluation(0.0).videos[0]
    with Image.open(io.BytesIO(report.gif(video, scale=4))) as image:
        assert image.size == (64, 64) and image.n_frames == 57
        for frame in (0, 20, 56):
            image.seek(frame)
            pixels = torch.tensor(np.array(image.convert("L")))[2::4, 2::4].float()
            ink = (video[frame] + 1) / 2 * 255
            assert (pixels - ink).abs().max() <= 2  # a palette's rounding


def test_verdict_is_honest() -> None:
    assert report.verdict(0.2, 0.1) == "up"
    assert report.verdict(-0.2, 0.1) == "down"
    assert report.verdict(0.05, 0.1) not in ("up", "down")
    assert report.verdict(-0.05, 0.1) not in ("up", "down")


def test_paired_difference() -> None:
    before = torch.tensor([1.0, 2.0, 3.0, 4.0])
    after = before + torch.tensor([0.1, 0.3, 0.1, 0.3])
    difference = paired_difference(after, before)
    assert difference.mean == pytest.approx(0.2, abs=1e-6)
    # Standard deviation .1155 over root of 4, times 1.96: the spread of the prompts cancels.
    assert difference.half_width == pytest.approx(1.96 * 0.11547 / 2, rel=1e-3)


def test_figures() -> None:
    figure = report.run_figure(METRICS, evaluation(0.0), evaluation(0.1))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    with Image.open(buffer) as image:
        assert image.size[0] > 500
    assert len(report.reward_figure(METRICS).axes) == 4
