"""Frames that move between a GPU and the host. Collected only where there is one."""

import pytest
import torch

from kvpo_kernels import FramePool, Timeline


def filled(pool: FramePool, frames: int) -> Timeline:
    video = pool.timeline()
    video.append(frames)
    for layer in range(pool.num_layers):
        value = torch.arange(frames, device="cuda")[:, None, None, None] + 100 * layer
        page = value.expand(-1, pool.frame_tokens, pool.num_heads, pool.head_dim).to(pool.dtype)
        video.write(layer, 0, page, -page)
    return video


@pytest.mark.parametrize("page", [None, torch.int8], ids=["bfloat16", "int8"])
def test_frames_leave_and_come_back_beside_other_work(page: torch.dtype | None) -> None:
    """Slots are written again at once, by launches that were queued before the move was over."""
    pool = FramePool(6, 1560, 4, 12, 128, device="cuda", page_dtype=page, host_slots=4)
    video = filled(pool, 4)
    kept = [(pool.k(2)[s].clone(), pool.v(3)[s].clone()) for s in map(video.slot, range(4))]
    busy = torch.randn(8192, 8192, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            for _ in range(5):
                busy = busy @ busy * 1e-4
            video.offload(range(4))
            others = filled(pool, 6)  # into the slots that are being read
            others.release()
            video.fetch(range(4))
            table = pool.routes([video.window(0, 4)])
            seen = [(pool.k(2)[s] + 0, pool.v(3)[s] + 0) for s in map(video.slot, range(4))]
            del table
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for (k, v), (k_seen, v_seen) in zip(kept, seen, strict=True):
        assert torch.equal(k, k_seen) and torch.equal(v, v_seen)


def test_offloaded_frames_are_pinned() -> None:
    pool = FramePool(2, 8, 1, 1, 16, device="cuda", host_slots=2)
    assert all(t.is_pinned() for t in pool._pages.host)
