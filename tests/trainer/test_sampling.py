import pytest
import torch
from kvpo_trainer.data import all_prompts, tokenize
from kvpo_trainer.generator import Generator
from kvpo_trainer.sampling import NOISES, SIGMAS, draw_noise, sample_videos, warped_sigmas


def test_noise_levels_are_the_released_schedule() -> None:
    assert pytest.approx([1.0, 0.9375, 5 / 6, 0.625]) == SIGMAS
    assert pytest.approx([1.0, 0.75, 0.5, 0.25]) == warped_sigmas(shift=1.0)


@torch.no_grad()
def test_videos_follow_from_noise_and_prompt(generator: Generator) -> None:
    rng = torch.Generator().manual_seed(0)
    noise = draw_noise(3, 19, generator, rng)
    assert noise.shape[:3] == (3, 19, NOISES)
    text = generator.encode_text(tokenize(all_prompts()[::60]))
    videos = sample_videos(generator, text, noise)
    assert videos.shape == (3, 19, generator.block_tokens, generator.data.patch_values)
    assert torch.equal(videos, sample_videos(generator, text, noise))
    # A row alone: the rounding of the matrix products follows the batch size, the 95 forwards
    # that a video takes carry it on.
    alone = sample_videos(generator, text[1:2], noise[1:2])
    torch.testing.assert_close(alone, videos[1:2], rtol=1e-3, atol=1e-3)
    for changed in range(NOISES):  # each draw of a block reaches the blocks after it
        other = noise.clone()
        other[:, 5, changed] += 1
        moved = (sample_videos(generator, text, other) - videos).abs().amax((-2, -1)) > 0
        assert not moved[:, :5].any() and moved[:, 6:12].all(), changed
