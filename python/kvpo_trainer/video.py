"""A clip as MP4, for players and slides that show no GIF; takes PyAV, which is not required."""

import io
from fractions import Fraction

import numpy as np
from torch import Tensor

from kvpo_trainer.report import frames_of


class EncoderMissing(RuntimeError):
    """No encoder is installed; the message says which would do."""


def check_encoder() -> None:
    """Raise `EncoderMissing` where `mp4` would."""
    try:
        import av
    except ModuleNotFoundError:
        raise EncoderMissing(
            "MP4 takes an encoder: pip install 'kvpo_kernels[video]' brings PyAV"
        ) from None
    if "libx264" not in av.codecs_available:
        raise EncoderMissing("MP4 takes an encoder: this PyAV was built without libx264")


def mp4(video: Tensor, scale: int = 8, milliseconds: int = 120) -> bytes:
    """A video `[T, H, W]` in [-1, 1] as H.264, so many milliseconds a frame.

    Raises:
        EncoderMissing: PyAV is not installed.
    """
    check_encoder()
    import av

    frames = np.kron(frames_of(video), np.ones((1, scale, scale), np.uint8))
    H, W = frames.shape[1:]
    frames = np.pad(frames, ((0, 0), (0, H % 2), (0, W % 2)))  # 4:2:0 takes even sizes
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(1000, milliseconds))
        stream.height, stream.width = frames.shape[1:]
        stream.pix_fmt = "yuv420p"  # what every player knows
        stream.options = {"crf": "18", "movflags": "+faststart"}
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(frame, format="gray").reformat(format="yuv420p")
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return buffer.getvalue()
