"""The shipped weights: a pretrained generator, the reward model and the judge.

`kvpo-train pretrain` writes the same three files from a seed. The manifest holds their checksums,
the configuration and the command.
"""

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from kvpo_trainer.checkpoint import MALFORMED, MANIFEST, CheckpointError, load_tensors
from kvpo_trainer.config import RunConfig, from_mapping, to_mapping
from kvpo_trainer.files import write_whole
from kvpo_trainer.generator import Generator
from kvpo_trainer.rewards import Judge, RewardModel

SHIPPED = Path(__file__).parent / "weights"
GENERATOR, REWARDS = "generator.safetensors", "rewards.safetensors"


@dataclass(frozen=True)
class Weights:
    """A generator with the models that score it, and the configuration it was made with."""

    generator: Generator
    reward_model: RewardModel
    judge: Judge
    config: RunConfig
    checksum: str
    """Of the two files with tensors."""


def save_weights(
    folder: Path, generator: Generator, reward_model: RewardModel, judge: Judge, config: RunConfig
) -> None:
    """Write the three files."""
    folder.mkdir(parents=True, exist_ok=True)
    scorers = {f"reward_model/{k}": v for k, v in reward_model.state_dict().items()}
    scorers |= {f"judge/{k}": v for k, v in judge.state_dict().items()}
    files: dict[str, dict[str, Any]] = {}
    for name, tensors in ((GENERATOR, generator.state_dict()), (REWARDS, scorers)):
        data = save({k: v.detach().contiguous() for k, v in tensors.items()})
        write_whole(folder / name, data)
        files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest = {
        "files": files,
        "config": to_mapping(config),
        "command": " ".join(["kvpo-train", *sys.argv[1:]]),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    write_whole(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")


def load_weights(folder: Path = SHIPPED) -> Weights:
    """Read and check the three files.

    Raises:
        CheckpointError: a file is missing or damaged, or does not fit its configuration.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        config = from_mapping(RunConfig, manifest["config"])
        files = manifest["files"]
        read = {
            name: load_tensors(folder / name, int(files[name]["bytes"]), str(files[name]["sha256"]))
            for name in (GENERATOR, REWARDS)
        }
    except MALFORMED as error:
        raise CheckpointError(f"{folder / MANIFEST}: {error}") from error
    generator = Generator(config.generator, config.data)
    reward_model, judge = RewardModel(), Judge(config.data)
    fill(generator, read[GENERATOR], folder / GENERATOR)
    for module, prefix in ((reward_model, "reward_model/"), (judge, "judge/")):
        own = {k[len(prefix) :]: v for k, v in read[REWARDS].items() if k.startswith(prefix)}
        fill(module, own, folder / REWARDS)
        module.requires_grad_(False)
    sums = "".join(str(files[name]["sha256"]) for name in (GENERATOR, REWARDS))
    checksum = hashlib.sha256(sums.encode()).hexdigest()
    return Weights(generator, reward_model, judge, config, checksum)


def fill(module: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Put tensors read from `path` into a module.

    Raises:
        CheckpointError: a name, shape or dtype is not the module's.
    """
    for name, own in module.state_dict().items():
        if name in tensors and tensors[name].dtype != own.dtype:  # torch would convert it
            raise CheckpointError(f"{path}: {name} is {tensors[name].dtype}, expected {own.dtype}")
    try:
        module.load_state_dict(dict(tensors))
    except RuntimeError as error:
        text = " ".join(str(error).split())
        few = text if len(text) <= 300 else f"{text[:300]}..."
        raise CheckpointError(f"{path}: does not fit its configuration: {few}") from error
