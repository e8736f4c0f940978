import pytest
import torch
from kvpo_trainer.data import (
    DIRECTIONS,
    PROMPT_WORDS,
    SPEEDS,
    WORDS,
    Clips,
    DataConfig,
    Prompt,
    all_prompts,
    digit_bank,
    make_clips,
    patchify,
    split_prompts,
    tokenize,
    unpatchify,
)

DATA = DataConfig()


def clips_of(prompts: list[Prompt], seed: int = 0) -> Clips:
    return make_clips(prompts, DATA, torch.Generator().manual_seed(seed))


def moved(clips: Clips, i: int, t: int, heading: str) -> torch.Tensor:
    """Frame t - 1 of clip i, shifted by the step of frame t."""
    step = tuple(int(clips.speeds[i, t]) * s for s in DIRECTIONS[heading])
    return clips.videos[i, t - 1].roll(step, dims=(0, 1))


def test_prompts_survive_their_text() -> None:
    prompts = all_prompts()
    assert len(set(prompts)) == 160
    assert [Prompt.parse(p.text) for p in prompts] == prompts


@pytest.mark.parametrize(
    "text",
    ["", "a 3", "a 12 moves left slowly, then turns up", "a 3 moves left fast, then turns up"],
)
def test_unknown_prompt_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not 'a <digit> moves"):
        Prompt.parse(text)


def test_words_of_a_prompt() -> None:
    words = tokenize([Prompt(3, "left", "slowly", "up")])
    assert words.shape == (1, PROMPT_WORDS)
    assert [WORDS[i] for i in words[0]] == [
        "a",
        "3",
        "moves",
        "left",
        "slowly",
        "then",
        "turns",
        "up",
    ]


def test_prompts_held_out_are_apart() -> None:
    train, held_out = split_prompts()
    assert len(held_out) == 40 and not set(train) & set(held_out)
    assert set(train) | set(held_out) == set(all_prompts())
    assert {p.digit for p in held_out} == set(range(10))


def test_each_frame_is_the_one_before_shifted_by_the_hidden_speed() -> None:
    prompts = all_prompts()[::7]
    clips = clips_of(prompts)
    for i, prompt in enumerate(prompts):
        heading = prompt.direction
        for t in range(1, DATA.frames):
            if not torch.equal(clips.videos[i, t], moved(clips, i, t, heading)):
                assert heading == prompt.direction, "the digit turned twice"
                heading = prompt.turn
                first, last = DATA.turn_blocks
                assert first * DATA.block_frames <= t <= last * DATA.block_frames
                assert torch.equal(clips.videos[i, t], moved(clips, i, t, heading)), (prompt, t)
        assert heading == prompt.turn


def test_speed_follows_the_word_as_often_as_configured() -> None:
    prompts = all_prompts() * 8
    speeds = clips_of(prompts).speeds
    asked = torch.tensor([SPEEDS[p.speed] for p in prompts])[:, None]
    assert (speeds[:, : DATA.segment_blocks[0] * DATA.block_frames] == asked).all()
    late = (speeds[:, -1:] == asked).double().mean()
    # 1280 clips: four standard errors of a share of .65 are .053.
    assert abs(float(late) - DATA.speed_match) < 0.053


def test_the_digit_is_a_writer_of_the_generators_share() -> None:
    prompts = [p for p in all_prompts() if p.digit == 7]
    bank = digit_bank()[7][: DATA.exemplars]
    ink = {round(float(image.sum()), 3) for image in bank}
    frames = (clips_of(prompts).videos + 1) / 2
    assert {round(float(f), 3) for f in frames[:, 0].sum((-1, -2))} <= ink
    assert len(digit_bank()[7]) > 10 * DATA.exemplars  # plenty left for the reward models


def test_clips_follow_from_the_seed() -> None:
    prompts = all_prompts()[:5]
    assert torch.equal(clips_of(prompts, 3).videos, clips_of(prompts, 3).videos)
    assert not torch.equal(clips_of(prompts, 3).speeds, clips_of(prompts, 4).speeds)


def test_patches_are_read_row_by_row_and_back() -> None:
    video = torch.arange(2 * DATA.canvas**2).view(1, 2, DATA.canvas, DATA.canvas)
    tokens = patchify(video, DATA)
    assert tokens.shape == (1, 2 * DATA.frame_tokens, DATA.patch_values)
    assert torch.equal(tokens[0, 0, : DATA.patch], video[0, 0, 0, : DATA.patch])
    assert torch.equal(tokens[0, 1, : DATA.patch], video[0, 0, 0, DATA.patch : 2 * DATA.patch])
    assert torch.equal(unpatchify(tokens, DATA), video)
