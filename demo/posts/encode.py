"""Write real files: JPEG, PNG, H.264 + AAC in MP4, WAV, OGG."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import numpy.typing as npt
import soundfile

from demo.posts.pictures import Picture

_AAC_FRAME = 1024
_H264 = {
    "crf": "20",
    "preset": "veryfast",
    "threads": "1",
    "g": "8",
    "x264-params": "rc-lookahead=0:sync-lookahead=0:mbtree=0",
}


def write_picture(path: Path, picture: Picture, quality: int = 88) -> None:
    """Write a BGR picture as JPEG or PNG, after the path's suffix."""
    options = [cv2.IMWRITE_JPEG_QUALITY, quality] if path.suffix == ".jpg" else []
    if not cv2.imwrite(str(path), picture, options):
        raise OSError(f"{path}: cannot be written")


def write_sound(path: Path, wave: npt.NDArray[np.float32], rate_hz: int) -> None:
    """Write mono sound as 16-bit WAV or as OGG Vorbis, after the path's suffix."""
    soundfile.write(str(path), wave, rate_hz)


def write_video(
    path: Path,
    frames: Sequence[Picture],
    frame_rate_hz: int,
    wave: npt.NDArray[np.float32] | None = None,
    sample_rate_hz: int = 16_000,
) -> None:
    """Write BGR frames, and sound where there is some, as H.264 and AAC in MP4.

    One encoder thread and no look-ahead: the same frames must give the same bytes. Sides must be
    even.
    """
    height, width = frames[0].shape[:2]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=frame_rate_hz)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = dict(_H264)
        track = None
        if wave is not None:
            track = container.add_stream("aac", rate=sample_rate_hz, layout="mono")
            track.bit_rate = 48_000
        for picture in frames:
            planes = cv2.cvtColor(picture, cv2.COLOR_BGR2YUV_I420)
            frame = av.VideoFrame.from_ndarray(np.asarray(planes, np.uint8), format="yuv420p")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if track is not None and wave is not None:
            for start in range(0, len(wave), _AAC_FRAME):
                chunk = np.ascontiguousarray(wave[None, start : start + _AAC_FRAME])
                samples = av.AudioFrame.from_ndarray(chunk, format="fltp", layout="mono")
                samples.sample_rate, samples.pts = sample_rate_hz, start
                samples.time_base = Fraction(1, sample_rate_hz)
                container.mux(track.encode(samples))
            container.mux(track.encode(None))
