"""Weights folders: the shipped one is whole, and a damaged one is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from kvpo_trainer.checkpoint import MANIFEST, CheckpointError
from kvpo_trainer.weights import GENERATOR, REWARDS, SHIPPED, load_weights, save_weights


def test_the_shipped_weights_are_whole_and_small() -> None:
    weights = load_weights()
    assert sum(p.stat().st_size for p in SHIPPED.iterdir()) <= 10_000_000
    for module in (weights.generator, weights.reward_model, weights.judge):
        for value in module.state_dict().values():
            assert value.isfinite().all()
    manifest = json.loads((SHIPPED / MANIFEST).read_text())
    assert "kvpo-train pretrain" in manifest["command"]


def test_round_trip(tiny_weights: Path, tmp_path: Path) -> None:
    first = load_weights(tiny_weights)
    save_weights(tmp_path, first.generator, first.reward_model, first.judge, first.config)
    second = load_weights(tmp_path)
    assert second.config == first.config
    for name in ("generator", "reward_model", "judge"):
        for a, b in zip(
            getattr(first, name).state_dict().values(),
            getattr(second, name).state_dict().values(),
            strict=True,
        ):
            assert torch.equal(a, b)
    assert not any(p.requires_grad for p in second.reward_model.parameters())


@pytest.mark.parametrize("name", [GENERATOR, REWARDS])
def test_damage_is_seen(tiny_weights: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "w"
    shutil.copytree(tiny_weights, folder)
    data = bytearray((folder / name).read_bytes())
    data[-3] ^= 4
    (folder / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=f"{name}: sha256 differs"):
        load_weights(folder)
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        load_weights(folder)
    with pytest.raises(CheckpointError, match=MANIFEST):
        load_weights(tmp_path / "nowhere")


def test_weights_of_another_size_are_refused(tiny_weights: Path, tmp_path: Path) -> None:
    folder = tmp_path / "w"
    shutil.copytree(tiny_weights, folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["config"]["generator"]["dim"] = 64
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=f"{GENERATOR}: does not fit its configuration"):
        load_weights(folder)
