"""The report: one file that needs nothing else, with the numbers it was given."""

import base64
import io
import re

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

from kvpo_kernels import HistoryRouting

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
    gifs = [base64.b64decode(s.split(",")[1]) for s in sources if s.startswith("data:image/gif")]
    assert len(gifs) == 2 * len(PROMPTS)
    for gif in gifs:
        with Image.open(io.BytesIO(gif)) as image:
            assert image.n_frames == DataConfig().frames
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
    figure = report.readme_figure(METRICS, evaluation(0.0), evaluation(0.1))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    with Image.open(buffer) as image:
        assert image.size[0] > 500
    assert len(report.reward_figure(METRICS).axes) == 4
