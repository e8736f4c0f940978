"""The README's example runs as it stands, and its links lead somewhere."""

import json
import re
from pathlib import Path

import figures
import pytest
import render
import torch
from kvpo_trainer.weights import load_weights

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_example() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    scope: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), scope)
    assert scope["out"].shape == (4, 48, 4, 64)  # type: ignore[attr-defined]
    for name in "qkv":
        grad = scope[name].grad  # type: ignore[attr-defined]
        assert isinstance(grad, torch.Tensor) and grad.isfinite().all() and grad.any()


def test_links() -> None:
    links = [x for x in re.findall(r"\]\(([^)]+)\)", README) if not x.startswith("http")]
    assert links
    for link in links:
        assert (ROOT / link).exists(), link


def test_results_are_those_of_the_raw_files() -> None:
    assert render.PAGE.read_text() == render.page()
    assert render.readme(README) == README


def test_figures_are_of_the_runs_beside_them() -> None:
    pytest.importorskip("PIL")
    record, result = render.newest("iteration-*.json")
    shown = figures.shown(render.FIGURES / "iteration.png")
    assert shown == figures.iteration_data(result, record.name)
    assert shown["records"] == [record.name] and f"[`{record.name}`]" in render.PAGE.read_text()
    assert figures.shown(render.FIGURES / "results.png") == render.lead_data()
    for path in render.FIGURES.iterdir():  # none that nothing makes
        assert path.name in ("iteration.png", "results.png")
        assert path.stat().st_size < 100_000


def test_a_figure_of_another_run_is_told(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path, other = sorted(render.RESULTS.glob("iteration-*.json"))[0], tmp_path / "a.png"
    result = json.loads(path.read_text())
    figures.iteration(result, path.name, other)
    record, newest = render.newest("iteration-*.json")
    assert path != record
    assert figures.shown(other) == figures.iteration_data(result, path.name)
    assert figures.shown(other) != figures.iteration_data(newest, record.name)


def test_it_leads_with_the_signed_test() -> None:
    before, after = README.split("```python")[0], README.split("```python")[1]
    (alt, image) = re.findall(r"!\[([^]]+)\]\(([^)]+)\)", before)[0]
    assert image == "docs/figures/results.png" and "![" not in after
    assert "towards -reward" in before and "kvpo-train verify" in before
    for fact in ("towards +reward", "shuffled", "Speed over torch", "GiB"):
        assert fact in alt
    assert "seven minutes with the installs" in before and "five minutes" not in README


def test_learning_was_measured_on_the_shipped_weights() -> None:
    own = load_weights().checksum
    for pattern in (
        "verify-*.json",
        "int8-verify-*.json",
        "diversity-official-*.json",
        "diversity-first_block-*.json",
        "quantized-history-*.json",
    ):
        path, data = render.newest(pattern)
        assert data["weights"] == own, path
