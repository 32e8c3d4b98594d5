"""The joint between files and extractors: what is allocated, what is imported, what is refused."""

import os
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from common.errors import MediaError
from common.post import MEDIA_KINDS, MediaKind
from config.features import FeatureSettings
from config.settings import DecodeSettings, Settings
from extractors.media.decode import decode_media
from extractors.parts import slot_bytes
from tests.support import media


class Slot:
    """Hands out views of one block of memory, as a worker does with shared memory."""

    def __init__(self, size: int) -> None:
        self.memory = np.zeros(size, np.uint8)
        self.used = 0

    def __call__(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        size = int(np.prod(shape)) * dtype.itemsize
        view = self.memory[self.used : self.used + size].view(dtype).reshape(shape)
        self.used += -(-size // 64) * 64
        return view


SMALL = Settings.model_validate(
    {
        "decode": {"max_audio_s": 4},
        "features": {
            "video": {"frames": 4, "image_size": 32},
            "image": {"max_frames": 3, "image_size": 48},
            "ocr": {"frames": 2, "max_side": 80},
        },
    }
)


@pytest.mark.parametrize("kind", MEDIA_KINDS)
def test_results_lie_in_the_allocated_memory(tmp_path: Path, kind: MediaKind) -> None:
    """Everything that is returned is a view of the slot, and a slot's size is always enough."""
    if kind == "image":
        path = media.write_animation(tmp_path / "a.gif", media.grey_steps(9, 400, 400))
    elif kind == "video":
        path = media.write_video(
            tmp_path / "a.mp4", media.grey_steps(50, 400, 400), audio=media.tone(440, 9, 44100)
        )
    else:
        path = media.write_wav(tmp_path / "a.wav", media.tone(440, 9))
    slot = Slot(slot_bytes(SMALL))
    decoded = decode_media(kind, path, SMALL.features, SMALL.decode, slot)
    arrays = [a for a in (decoded.frames, decoded.image, decoded.sound) if a is not None]
    assert len(arrays) == (2 if kind == "video" else 1)
    for array in (*arrays, *decoded.pictures):
        assert np.shares_memory(array, slot.memory)
    plain = decode_media(kind, path, SMALL.features, SMALL.decode)
    for name in ("frames", "image", "sound"):
        one, two = getattr(decoded, name), getattr(plain, name)
        assert (one is None) == (two is None)
        assert one is None or np.array_equal(one, two)


def test_an_image(tmp_path: Path) -> None:
    path = media.write_png(tmp_path / "a", media.halves(200, 100))
    decoded: Any = decode_media("image", path, SMALL.features, SMALL.decode)
    assert decoded.image.shape == (1, 48, 48, 3)
    assert decoded.image[0, 24, 2].tolist() == list(media.RED)
    assert decoded.image[0, 24, 45].tolist() == list(media.BLUE)
    assert [p.shape for p in decoded.pictures] == [(40, 80, 3)]


def test_an_animation_gives_several_images(tmp_path: Path) -> None:
    path = media.write_animation(tmp_path / "a.gif", media.grey_steps(9))
    decoded: Any = decode_media("image", path, SMALL.features, SMALL.decode)
    assert decoded.image.shape == (3, 48, 48, 3)
    assert len(decoded.pictures) == 1


def test_a_second_view_of_a_picture_keeps_its_proportions(tmp_path: Path) -> None:
    """After the squashed one; white lies around it, and frames of an animation take turns."""
    features = SMALL.features.image.model_copy(update={"padded": True})
    both = SMALL.features.model_copy(update={"image": features})
    path = media.write_animation(
        tmp_path / "a.gif", [np.full((20, 60, 3), v, np.uint8) for v in (0, 99)]
    )
    one, two = (
        decode_media("image", path, of, SMALL.decode).image for of in (SMALL.features, both)
    )
    assert one is not None
    assert two is not None
    np.testing.assert_array_equal(two[::2], one)
    grey = two[1::2, :, :, 0]
    assert (grey[:, 16:32] == one[:, :1, :1, 0]).all()
    assert (grey[:, :16] == 255).all()
    assert (grey[:, 32:] == 255).all()


def test_ocr_settings_do_not_change_the_image(tmp_path: Path) -> None:
    path = media.write_jpeg(tmp_path / "a.jpg", media.noise(3000, 2200))
    images = []
    for ocr in ({"enabled": False}, {"max_side": 960}, {"max_side": 2000}):
        features = FeatureSettings.model_validate({"ocr": ocr})
        image = decode_media("image", path, features, DecodeSettings()).image
        assert image is not None
        images.append(image)
    assert np.array_equal(images[0], images[1])
    assert np.array_equal(images[0], images[2])


@pytest.mark.parametrize("kind", MEDIA_KINDS)
@pytest.mark.parametrize("case", ["missing", "empty", "folder", "pipe", "random", "text"])
def test_bad_files(tmp_path: Path, kind: MediaKind, case: str) -> None:
    """Each is a MediaError of one line without the path."""
    path = tmp_path / "file"
    if case == "folder":
        path.mkdir()
    elif case == "pipe":  # nobody writes to it: opening it would wait for ever
        os.mkfifo(path)
    elif case == "random":
        media.write_random(path)
    elif case != "missing":
        path.write_bytes(b"" if case == "empty" else b"not a media file at all")
    with pytest.raises(MediaError) as caught:
        decode_media(kind, path, FeatureSettings(), DecodeSettings())
    message = str(caught.value)
    assert message
    assert "\n" not in message
    assert str(tmp_path) not in message


def test_odd_names(tmp_path: Path) -> None:
    """A path that looks like a protocol or a pattern is a plain file to FFmpeg and OpenCV."""
    for name in ("concat:a|b.mp4", "a%03d.mp4", "名前 😀.mp4"):
        path = media.write_video(tmp_path / "v.mp4", media.grey_steps(3)).rename(tmp_path / name)
        assert decode_media("video", path, SMALL.features, SMALL.decode).frames is not None


def test_a_film_is_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its frames come from the packets that were read on the way to its sound."""
    path = media.write_video(
        tmp_path / "a.mp4", media.grey_steps(50), audio=media.tone(440, 2, 44100)
    )
    opened = []

    def counted(*arguments: Any, **options: Any) -> Any:
        opened.append(arguments)
        return original(*arguments, **options)

    original = av.open
    monkeypatch.setattr(av, "open", counted)
    decoded = decode_media("video", path, SMALL.features, SMALL.decode)
    assert len(decoded.times_s) == 4
    assert decoded.sound is not None
    assert len(opened) == 1
