"""The README's example runs as it stands, and its links lead somewhere."""

import re
from pathlib import Path

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
