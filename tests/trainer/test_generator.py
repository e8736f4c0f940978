import pytest
import torch
from kvpo_trainer.data import DataConfig, all_prompts, tokenize
from kvpo_trainer.generator import Contexts, Generator
from kvpo_trainer.pretrain import normal_contexts, training_contexts

from kvpo_kernels import HistoryRouting, plan_history_routing
from kvpo_kernels.history.planning import eligible_starts

BLOCKS = 19


def inputs(generator: Generator, rows: int) -> tuple[torch.Tensor, ...]:
    rng = torch.Generator().manual_seed(1)
    shape = (rows, BLOCKS, generator.block_tokens, generator.data.patch_values)
    clean, noisy = (torch.randn(shape, generator=rng) for _ in range(2))
    sigmas = torch.rand(1, BLOCKS, generator=rng).expand(rows, -1)  # a streamed block has one
    return clean, noisy, sigmas, tokenize(all_prompts()[:: 160 // rows][:rows])


def streamed(generator: Generator, contexts: Contexts, rows: int) -> torch.Tensor:
    """What teacher forcing computes, block by block through the pool."""
    clean, noisy, sigmas, words = inputs(generator, rows)
    frames = generator.data.block_frames
    text = generator.encode_text(words)
    pool = generator.new_pool(rows * BLOCKS * frames)
    timelines = [pool.timeline() for _ in range(rows)]
    out = []
    for k in range(BLOCKS):
        first = k * frames
        lists = [
            [t.slot(f) for f in contexts.frames[b, k][contexts.valid[b, k]].tolist()]
            for b, t in enumerate(timelines)
        ]
        table = pool.routes(lists)
        out.append(generator.stream(noisy[:, k], float(sigmas[0, k]), text, first, pool, table))
        usual = pool.routes([t.window(3, 6) for t in timelines])
        for timeline in timelines:
            timeline.append(frames)
        slots = pool.prepare_write(timelines, first, frames)
        generator.stream(clean[:, k], 0.0, text, first, pool, usual, write_slots=slots)
    return torch.stack(out, 1)


@pytest.mark.parametrize("routed", [False, True])
@torch.no_grad()
def test_streaming_computes_what_teacher_forcing_trained(
    generator: Generator, routed: bool
) -> None:
    rows = 4
    clean, noisy, sigmas, words = inputs(generator, rows)
    usual = normal_contexts(rows, generator.data)
    contexts = usual
    if routed:
        rng = torch.Generator().manual_seed(2)
        contexts = training_contexts(rows, generator.data, 1.0, rng)
        assert not torch.equal(contexts.frames, usual.frames)
    forced = generator.teacher_forced(
        clean, noisy, sigmas, generator.encode_text(words), usual, contexts
    )
    # Float32 through two layers, sums in another order; values are of order 1.
    torch.testing.assert_close(streamed(generator, contexts, rows), forced, rtol=1e-4, atol=1e-5)


def test_training_sees_the_frames_that_plans_route_to(data: DataConfig) -> None:
    """Every context is one that a branch of some fork sees, and as old ones as the planner's."""
    rows, routing = 400, HistoryRouting()
    contexts = training_contexts(rows, data, 1.0, torch.Generator().manual_seed(2))
    usual = normal_contexts(rows, data)
    ages: dict[int, set[int]] = {}
    for k in range(BLOCKS):
        f = 3 * k
        if f < 12:  # no fork comes before
            assert torch.equal(contexts.frames[:, k], usual.frames[:, k])
            continue
        allowed = [
            set(range(max(3, fork + 12 - 30), fork - 4)) for fork in range(12, f + 1, 3)[-5:]
        ]
        for frames in contexts.frames[:, k].tolist():
            assert frames[:3] == [0, 1, 2] and frames[-1] == f - 1 and len(set(frames)) == 9
            routed = frames[3:-1]
            assert routed == sorted(routed) and any(set(routed) <= pool for pool in allowed)
            ages.setdefault(f, set()).update(f - x for x in routed)
    for start in eligible_starts(routing, data.frames):
        candidates = plan_history_routing(routing, data.frames, start_frame=start).candidates
        for f in range(start, start + 15, 3):
            assert {f - x for x in candidates} <= ages[f], (start, f)
    mixed = training_contexts(rows, data, 0.25, torch.Generator().manual_seed(2))
    share = (mixed.frames[:, 4:] != usual.frames[:, 4:]).any(-1).float().mean()
    assert 0.22 < share < 0.28  # 6,000 draws: 5 standard deviations


@torch.no_grad()
def test_history_and_text_matter(generator: Generator) -> None:
    usual = normal_contexts(2, generator.data)
    clean, noisy, sigmas, words = inputs(generator, 2)
    text = generator.encode_text(words)
    base = generator.teacher_forced(clean, noisy, sigmas, text, usual, usual)
    other = clean.clone()
    other[:, 4] += 1
    moved = generator.teacher_forced(other, noisy, sigmas, text, usual, usual)
    changed = (moved - base).abs().amax((-2, -1)) > 1e-4
    assert not changed[:, :5].any(), "a block saw itself or the future"
    assert changed[:, 5:7].all(), "the local window did not see its frames"
    worded = generator.teacher_forced(clean, noisy, sigmas, text.flip(0), usual, usual)
    assert ((worded - base).abs().amax((-2, -1)) > 1e-4).all()


@torch.no_grad()
def test_a_row_does_not_depend_on_the_others(generator: Generator) -> None:
    """Branches in one batch are what each would be alone, to the rounding of the matrix products:
    their blocking follows the batch size."""
    together = streamed(generator, normal_contexts(4, generator.data), 4)
    _, noisy, sigmas, words = inputs(generator, 4)
    text = generator.encode_text(words)
    pool = generator.new_pool(8)
    table = pool.routes([[]])
    alone = generator.stream(noisy[2:3, 0], float(sigmas[0, 0]), text[2:3], 0, pool, table)
    torch.testing.assert_close(alone, together[2:3, 0], rtol=1e-6, atol=1e-6)


def test_context_pass_predicts_nothing_and_writes_every_layer(generator: Generator) -> None:
    _, noisy, _, words = inputs(generator, 1)
    pool = generator.new_pool(3)
    timeline = pool.timeline()
    timeline.append(3)
    slots = pool.prepare_write([timeline], 0, 3)
    with torch.no_grad():
        text = generator.encode_text(words)
        table = pool.routes([[]])
        out = generator.stream(noisy[:, 0], 0.0, text, 0, pool, table, write_slots=slots)
    assert out.numel() == 0
    assert timeline.committed_frames == 3
    for layer in range(generator.config.layers):
        assert pool.k(layer).abs().amax() > 0 and pool.v(layer).abs().amax() > 0
