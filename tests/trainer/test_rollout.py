import pytest
import torch
from kvpo_trainer.cli import CONFIGS
from kvpo_trainer.config import load_config
from kvpo_trainer.data import all_prompts, patchify, tokenize
from kvpo_trainer.generator import Generator
from kvpo_trainer.rollout import Rollout, chunk_bounds, replay, roll_out
from kvpo_trainer.sampling import draw_noise, sample_videos

from kvpo_kernels import FramePool, HistoryRouting, RouteTable, Slots

PROMPTS = all_prompts()[3::70]
ROUTING = HistoryRouting(num_branches=4)


def rollout_of(generator: Generator, **options: object) -> Rollout:
    arguments = {"seed": 0, "seed_context": 5, "rng": torch.Generator().manual_seed(7)}
    return roll_out(generator, PROMPTS, ROUTING, **(arguments | options))  # type: ignore[arg-type]


@pytest.mark.parametrize(("frame", "bounds"), [(0, (0, 21)), (21, (21, 39)), (56, (39, 57))])
def test_chunks(frame: int, bounds: tuple[int, int]) -> None:
    assert chunk_bounds(ROUTING, frame, 57) == bounds


@torch.no_grad()
def test_anchor_is_the_plain_sample_and_branches_leave_it_at_the_fork(generator: Generator) -> None:
    rollout = rollout_of(generator, whole_video=True)
    noise = draw_noise(len(PROMPTS), 19, generator, torch.Generator().manual_seed(7))
    plain = sample_videos(generator, generator.encode_text(tokenize(PROMPTS)), noise)
    assert rollout.videos is not None
    tokens = patchify(rollout.videos, generator.data)
    # As in test_sampling: the batch size sets the rounding.
    torch.testing.assert_close(tokens[:, -1], plain.flatten(1, 2), rtol=1e-3, atol=1e-3)
    away = (rollout.videos[:, :-1] - rollout.videos[:, -1:]).abs().amax((-2, -1)) > 0
    assert not away[..., : rollout.start_frame].any()
    assert away[..., rollout.start_frame :].all()


def test_rollout_records_every_block_from_the_fork_to_the_chunks_end(generator: Generator) -> None:
    rollout = rollout_of(generator)
    first, end = chunk_bounds(ROUTING, rollout.start_frame, 57)
    blocks = (end - rollout.start_frame) // 3
    rows = len(PROMPTS) * ROUTING.num_branches
    shape = (rows, blocks, 4, generator.block_tokens, generator.data.patch_values)
    assert rollout.noisy.shape == rollout.x0.shape == shape
    assert rollout.context_noise.shape == (rows, blocks, *shape[3:])
    canvas = generator.data.canvas
    assert rollout.chunk.shape == (len(PROMPTS), 5, end - first, canvas, canvas)
    assert rollout.videos is None
    last = patchify(rollout.chunk[:, :-1], generator.data)[..., -generator.block_tokens :, :]
    assert torch.equal(last.flatten(0, 1), rollout.x0[:, -1, -1])
    # All branches of a prompt start from the same noise.
    first_inputs = rollout.noisy[:, 0, 0].unflatten(0, (len(PROMPTS), -1))
    assert torch.equal(first_inputs, first_inputs[:, :1].expand_as(first_inputs))


def test_a_branch_that_is_routed_as_another_is_the_other(generator: Generator) -> None:
    """With one candidate per place all branches read the same frames: bit-equal in the batch."""
    routing = HistoryRouting(num_branches=3, window_frames=7, nearest_frames=4)  # no routed frames
    rollout = roll_out(
        generator, PROMPTS, routing, seed=0, seed_context=0, rng=torch.Generator().manual_seed(1)
    )
    branches = rollout.chunk[:, :-1]
    assert torch.equal(branches, branches[:, :1].expand_as(branches))
    assert not torch.equal(branches[:, 0], rollout.chunk[:, -1])


def test_replay_of_the_same_weights_scores_the_same(generator: Generator) -> None:
    rollout = rollout_of(generator)
    one, two = (replay(generator, rollout, 1.0).energies.energies for _ in range(2))
    assert torch.equal(one, two)
    assert (one > 0).all()


def test_replay_in_the_branches_own_context_finds_nothing_to_say(generator: Generator) -> None:
    """Where a branch's context is the normal one, the replay predicts what it recorded."""
    rollout = rollout_of(generator)
    again = roll_out(
        generator,
        PROMPTS,
        HistoryRouting(num_branches=4, nearest_frames=9),  # the window's frames, nothing routed
        seed=0,
        seed_context=5,
        rng=torch.Generator().manual_seed(7),
    )
    exact = replay(generator, again, 1.0).energies.energies
    # Different row counts in rollout and replay: rounding only, far below a routed branch's.
    assert exact.amax() < 1e-6 * replay(generator, rollout, 1.0).energies.energies.amin()


def test_rollout_leaves_the_pool_to_the_prefixes(generator: Generator) -> None:
    rollout = rollout_of(generator)
    stats = rollout.pool.stats()
    assert stats.timeline_slots == len(PROMPTS) * rollout.start_frame
    assert stats.table_slots == 0
    replayed = replay(generator, rollout, 1.0)
    assert rollout.pool.stats().table_slots > 0
    del replayed
    assert rollout.pool.stats().free_slots == stats.free_slots


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
def test_every_shipped_routing_rolls_out(generator: Generator, name: str) -> None:
    config = load_config(CONFIGS / f"{name}.yaml")
    rollout = roll_out(
        generator,
        PROMPTS[:1],
        config.kvpo.routing,
        seed=0,
        seed_context=0,
        rng=torch.Generator().manual_seed(1),
    )
    assert rollout.chunk.shape[1] == 9
    new = rollout.chunk[:, :, -rollout.new_frames :]
    assert rollout.new_frames == rollout.noisy.shape[1] * 3
    assert torch.equal(
        rollout.chunk[:, 0, : -rollout.new_frames], rollout.chunk[:, 8, : -rollout.new_frames]
    )
    assert not torch.equal(new[:, 0], new[:, -1])
    block = config.kvpo.routing.nearest_frames == 3  # only the first, without the previous frame
    assert rollout.nearest == (0 if block else 1)
    assert rollout.plans[0].end_frame - rollout.start_frame == (3 if block else 15)


@pytest.mark.parametrize("slot_mapping", ["exact", "official"])
def test_every_block_reads_its_route_and_the_context_pass_too(
    slot_mapping: str, generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    frame_of: dict[int, int] = {}
    passes: list[tuple[int, float, list[list[int]], torch.Tensor]] = []
    routes_of, stream = FramePool.routes, Generator.stream

    def looked_up(self: FramePool, rows: list[Slots]) -> RouteTable:
        for row in rows:
            frame_of.update(zip(row.tolist(), row.frames, strict=True))
        return routes_of(self, rows)

    def seen(self: Generator, x, sigma, text, first, pool, table, write_slots=None):
        assert (write_slots is not None) == (sigma == 0.0)
        frames = [[frame_of[s] for s in row] for row in table.tolist()]
        passes.append((first, sigma, frames, x))
        return stream(self, x, sigma, text, first, pool, table, write_slots)

    monkeypatch.setattr(FramePool, "routes", looked_up)
    monkeypatch.setattr(Generator, "stream", seen)
    routing = HistoryRouting(num_branches=4, slot_mapping=slot_mapping)
    starts = set()
    for context in range(6):
        passes.clear()
        rng = torch.Generator().manual_seed(7)
        rollout = roll_out(
            generator, PROMPTS, routing, seed=0, seed_context=context, rng=rng, whole_video=True
        )
        fork, n = rollout.start_frame, len(PROMPTS)
        starts.add(fork)
        assert [(first, sigma) for first, sigma, *_ in passes] == [
            (first, sigma)
            for first in range(0, 57, 3)
            for sigma in (1.0, 0.9375, 5 / 6, 0.625, 0.0)
        ]
        late = 3 if slot_mapping == "official" and fork >= 39 else 0
        routes = [  # of each prompt, and of the window of the fifteen frames from the fork
            [[0, 1, 2, *(f + late for f in selected)] for selected in plan.selected]
            for plan in rollout.plans
        ]
        assert routes[0] != routes[1]
        for first, sigma, frames, x in passes:
            window = sorted({*range(min(3, first)), *range(max(0, first - 6), first)})
            if first < fork:
                assert frames == [window] * n
                continue
            routed = fork <= first < fork + 15
            expected = []
            for of_prompt in routes:
                expected += [[*r, first - 1] if routed else window for r in of_prompt]
                expected.append(window)  # the anchor
            assert frames == expected, first
            k = (first - fork) // 3
            if sigma == 0.0 and k < rollout.x0.shape[1]:
                branches = x.unflatten(0, (n, 5))[:, :4].flatten(0, 1)
                mixed = (1 - 0.00498) * rollout.x0[:, k, -1] + 0.00498 * rollout.context_noise[:, k]
                assert torch.equal(branches, mixed)
    assert len(starts) > 2 and max(starts) >= 39
