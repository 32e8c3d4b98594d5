"""Decode small videos in tests, as the product does and plainly."""

from pathlib import Path
from typing import Any

import av
import numpy as np

from config.features import FeatureSettings
from config.settings import DecodeSettings
from extractors.media.containers import find_stream, open_container, packets
from extractors.media.decode import DecodedMedia, decode_media
from extractors.media.sniff import check_type
from extractors.media.video import PacketIndex, choose_frames, decode_frames
from extractors.parts import FrameChoice
from tests.support import media


def settings(frames: int = 16, size: int = 32, ocr_frames: int = 2, **more: Any) -> FeatureSettings:
    return FeatureSettings.model_validate(
        {
            "video": {"frames": frames, "image_size": size, "decode": "accurate", **more},
            "ocr": {"frames": ocr_frames, "max_side": 100},
        }
    )


def decode(path: Path, features: FeatureSettings | None = None, **limits: Any) -> DecodedMedia:
    return decode_media("video", path, features or settings(), DecodeSettings(**limits))


def greys(path: Path, frames: int = 16, **more: Any) -> list[int]:
    """Mean grey of each frame that is taken."""
    decoded = decode(path, settings(frames, **more))
    assert decoded.frames is not None
    return [round(float(frame.mean())) for frame in decoded.frames]


def index_of(path: Path) -> PacketIndex:
    with open_container(path, check_type(path, "video")) as container:
        stream = find_stream(container, "video")
        index = PacketIndex(stream, 3600)
        for packet in packets(container, stream):
            index.add(packet)
    return index


def taken(path: Path, count: int) -> dict[int, np.ndarray]:
    """Time ─► full-size pixels of the frames that are taken."""
    index = index_of(path)
    with open_container(path, check_type(path, "video")) as container:
        stream = find_stream(container, "video")
        chosen = choose_frames(index, FrameChoice(count))
        frames = decode_frames(packets(container, stream), stream, index, chosen, 224)
        return {frame.pts: frame.to_ndarray(format="rgb24") for frame in frames}


def everything(path: Path) -> dict[int, np.ndarray]:
    """Time ─► pixels of every frame, decoded plainly from the beginning."""
    with av.open(str(path)) as container:
        return {f.pts: f.to_ndarray(format="rgb24") for f in container.decode(video=0)}


def moving(count: int, width: int = 64, height: int = 48) -> list[np.ndarray]:
    """Frames that depend on each other: noise that shifts, so that a wrong reference shows."""
    base = media.noise(width * 2, height * 2, 1)
    return [
        np.ascontiguousarray(np.roll(base, (i, 2 * i), (0, 1))[:height, :width])
        for i in range(count)
    ]
