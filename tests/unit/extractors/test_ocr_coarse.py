"""A small copy of a picture tells where text may be; only there it is looked at in full size."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from extractors.models.ocr import _bands, _CoarseFirst


class Finder:
    """Finds text where the first channel is bright; keeps the sizes that it was asked for.

    Every answer is written into the same memory, as OpenVINO's are.
    """

    def __init__(self) -> None:
        self.sizes: list[tuple[int, ...]] = []
        self.memory = np.empty(1_000_000, np.float32)

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        assert pixels.dtype == np.uint8
        self.sizes.append(pixels.shape[:2])
        answer = pixels[None, None, :, :, 0].astype(np.float32) / 255
        probabilities = self.memory[: answer.size].reshape(answer.shape)
        probabilities[:] = answer
        return probabilities


def picture(height: int, width: int) -> np.ndarray:
    return np.zeros((height, width, 3), np.uint8)


def photo(height: int, width: int) -> np.ndarray:
    """Dark, with contrast everywhere, none of it text."""
    pixels = picture(height, width)
    pixels[::16, :, 1] = 255
    return pixels


def test_a_picture_without_text_costs_its_copy() -> None:
    finder = Finder()
    probabilities = _CoarseFirst(finder)(photo(704, 960))
    assert finder.sizes == [(352, 480)]
    assert probabilities.shape == (1, 1, 704, 960)
    assert not probabilities.any()


def test_few_rows_with_a_contrast_are_looked_at_without_the_copy() -> None:
    pixels = picture(704, 960)
    pixels[200:230, 100:600:8, 0] = 255
    finder = Finder()
    np.testing.assert_array_equal(_CoarseFirst(finder)(pixels)[0, 0], pixels[:, :, 0] / 255)
    assert finder.sizes == [(160, 960)]


def test_lines_are_found_where_they_are() -> None:
    """Two lines far apart: a band for each, as wide as the picture, with the rows around it."""
    pixels = photo(960, 704)
    pixels[200:216, 100:600, 0] = pixels[944:960, :300, 0] = 255
    finder = Finder()
    np.testing.assert_array_equal(_CoarseFirst(finder)(pixels)[0, 0], pixels[:, :, 0] / 255)
    assert finder.sizes == [(480, 352), (96, 704), (64, 704)]


def test_large_lines_are_taken_from_the_copy() -> None:
    """A band with small lines beside them is looked at, since the copy may not show these well."""
    pixels = photo(960, 704)
    pixels[200:240, 100:600, 0] = pixels[600:640, 100:600, 0] = 255
    pixels[650:658, 100:600, 0] = 255
    finder = Finder()
    probabilities = _CoarseFirst(finder)(pixels)[0, 0]
    assert finder.sizes == [(480, 352), (160, 704)]
    off = np.abs(probabilities - pixels[:, :, 0] / 255)
    assert off[204:236, 104:596].max() == off[576:].max() == 0
    np.testing.assert_array_equal(probabilities > 0.5, pixels[:, :, 0] > 127)


@pytest.mark.parametrize("ground", [100, 255])
def test_a_plain_ground_has_no_text(ground: int) -> None:
    """The network sees text in white pages and soft ramps, where no letter stands out."""
    pixels = picture(704, 960)
    pixels[:, :, 0] = np.linspace(ground - 60, ground, 960)
    finder = Finder()
    assert not _CoarseFirst(finder)(pixels).any()
    assert finder.sizes == []


def test_pale_letters_stand_out() -> None:
    pixels = picture(704, 960) + np.uint8(200)
    pixels[200:230, 100:600:8] -= 40
    finder = Finder()
    _CoarseFirst(finder)(pixels)
    assert finder.sizes == [(160, 960)]


def test_a_picture_that_is_small_is_looked_at_once() -> None:
    finder = Finder()
    for height, width in ((480, 640), (32, 96)):
        _CoarseFirst(finder)(picture(height, width))
    assert finder.sizes == [(480, 640), (32, 96)]


def test_a_strip_keeps_a_block_of_height() -> None:
    finder = Finder()
    _CoarseFirst(finder)(photo(96, 3840))
    assert finder.sizes == [(32, 480)]


@given(st.integers(1, 120), st.data())
def test_bands_hold_every_row_that_was_seen(blocks: int, data: st.DataObject) -> None:
    """In order, apart, of whole blocks, inside the picture, with a block on each side."""
    height = blocks * 32
    seen = np.array(data.draw(st.lists(st.booleans(), min_size=1, max_size=blocks)), np.bool_)
    bands = _bands(seen, height)
    edges = [edge for band in bands for edge in band]
    assert edges == sorted(set(edges))
    assert all(edge % 32 == 0 and 0 <= edge <= height for edge in edges)
    for row in np.flatnonzero(seen):
        place = row * height / len(seen)
        assert any(
            top <= max(0, place - 32) and min(height, place + 32) <= bottom for top, bottom in bands
        )
