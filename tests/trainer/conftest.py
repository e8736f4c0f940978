"""A generator small enough for tests, with weights that make every path count."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from kvpo_trainer.config import RunConfig
from kvpo_trainer.data import DataConfig
from kvpo_trainer.generator import Generator, GeneratorConfig
from kvpo_trainer.rewards import Judge, RewardModel
from kvpo_trainer.weights import save_weights


@pytest.fixture(autouse=True)
def one_thread():
    """Bit-exact comparisons between batch sizes hold for a fixed number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def data() -> DataConfig:
    return DataConfig(canvas=8)


@pytest.fixture
def generator(data: DataConfig) -> Generator:
    torch.manual_seed(0)
    model = Generator(GeneratorConfig(dim=32, layers=2, heads=2), data)
    with torch.no_grad():
        for p in model.parameters():  # initially gates and output are zero: nothing would show
            p.add_(torch.randn(p.shape) * 0.1)
    return model


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weights folder as `kvpo-train pretrain` writes it, of untrained models."""
    config = RunConfig(data=DataConfig(canvas=8), generator=GeneratorConfig(dim=32, heads=2))
    config = replace(config, generator=replace(config.generator, layers=2))
    torch.manual_seed(0)
    model = Generator(config.generator, config.data)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape) * 0.1)
    folder = tmp_path_factory.mktemp("weights")
    save_weights(folder, model, RewardModel(), Judge(config.data), config)
    return folder
