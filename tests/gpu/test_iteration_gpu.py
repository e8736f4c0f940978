"""An iteration whose denoise steps are CUDA graphs. Collected only where there is a GPU."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import denoise_graph
import iteration
import pooled_trainer
import trainers

from kvpo_kernels.cost.sizes import GeneratorSize

SMALL = GeneratorSize(2, 96, 3, 96, (4, 4), 1, 4)


def test_replayed_denoise_steps_are_the_launched_ones() -> None:
    p = trainers.make_problem(SMALL, 3, 3, False, device="cuda", dtype=torch.bfloat16)
    scores = []
    for capture in (None, denoise_graph.CudaGraphs()):
        trainer = pooled_trainer.Pooled(p, capture)
        for synced in (True, False):  # the weights have moved: the second reads them in place
            trainer.iteration(iteration.Stopwatch(p.device), synced)
        scores.append(trainer.scores)
    assert torch.equal(*scores)
