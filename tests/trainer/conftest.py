"""A generator small enough for tests, with weights that make every path count."""

import pytest
import torch
from kvpo_trainer.data import DataConfig
from kvpo_trainer.generator import Generator, GeneratorConfig


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
