"""Text in pictures: what is read, in which order, and what is refused."""

from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
import pytest

from common.errors import FeatureError
from config.features import OcrSettings
from extractors.models.ocr import OcrExtractor


def picture(*lines: str, size: tuple[int, int] = (240, 480), columns: int = 1) -> np.ndarray:
    """RGB with dark blue lines of text on light yellow, one column or the same text in several."""
    height, width = size
    canvas = np.full((height, width, 3), (250, 245, 200), np.uint8)
    for row, line in enumerate(lines):
        where = (20, height * (row + 1) // (len(lines) + 1) + 10)
        cv2.putText(canvas, line, where, cv2.FONT_HERSHEY_SIMPLEX, 1.2, (20, 20, 120), 3)
    return np.concatenate([canvas] * columns, axis=1)


def words(text: str) -> str:
    return text.replace(" ", "").lower()


@pytest.fixture(scope="module")
def ocr() -> Iterator[OcrExtractor]:
    extractor = OcrExtractor(OcrSettings(), threads=2)
    extractor.load()
    yield extractor
    extractor.close()


def run(ocr: OcrExtractor, *items: tuple[np.ndarray, ...]) -> list[str]:
    return ocr.forward([ocr.preprocess(item) for item in items])


def test_lines_are_read_in_order(ocr: OcrExtractor) -> None:
    (text,) = run(ocr, (picture("GRAND OPENING", "coffee 42"),))
    assert words(text) == "grandopening\ncoffee42"


def test_items_keep_their_own_text_and_order(ocr: OcrExtractor) -> None:
    blank = np.full((240, 480, 3), 200, np.uint8)
    items = ((picture("ALPHA"),), (), (blank,), (picture("BRAVO"), picture("CHARLIE")))
    together = run(ocr, *items)
    assert [words(text) for text in together] == ["alpha", "", "", "bravo\ncharlie"]
    assert together == [run(ocr, item)[0] for item in items]


def test_a_line_that_stays_on_screen_is_read_once(ocr: OcrExtractor) -> None:
    (text,) = run(ocr, (picture("SALE"), picture("SALE"), picture("SALE", "now")))
    assert words(text).split("\n") == ["sale", "now"]


def test_confidence_and_length_limit_the_text() -> None:
    """Lines under min_confidence are left out, and the text ends after max_chars."""
    strict = OcrExtractor(OcrSettings(min_confidence=1.0))
    short = OcrExtractor(OcrSettings(max_chars=4))
    for extractor in (strict, short):
        extractor.load()
    assert run(strict, (cv2.GaussianBlur(picture("ALPHA"), (9, 9), 4),)) == [""]
    assert len(run(short, (picture("GRAND OPENING"),))[0]) == 4
    assert strict.fingerprint != short.fingerprint


def test_strips_and_specks_are_harmless(ocr: OcrExtractor) -> None:
    """Pictures of one row, one column or one pixel cost neither memory nor a crash."""
    strips = tuple(np.zeros(shape, np.uint8) for shape in ((1, 320, 3), (320, 1, 3), (1, 1, 3)))
    assert run(ocr, strips) == [""]


def test_colours_are_taken_as_rgb(ocr: OcrExtractor) -> None:
    """The engine wants BGR: what it gets of an RGB picture is the picture with its ends swapped."""
    red = np.zeros((64, 64, 3), np.uint8)
    red[..., 0] = 255
    (prepared,) = ocr.preprocess((red,))
    assert prepared[0, 0].tolist() == [0, 0, 255]


def test_what_is_no_picture_is_refused(ocr: OcrExtractor) -> None:
    item: Any
    for item in (np.zeros((4, 4, 3)), np.zeros((4, 4), np.uint8), np.zeros((0, 4, 3), np.uint8)):
        with pytest.raises(FeatureError, match="ocr: a picture must be"):
            ocr.preprocess((item,))


def test_an_unloaded_extractor_says_so() -> None:
    extractor = OcrExtractor(OcrSettings())
    with pytest.raises(FeatureError, match="not loaded"):
        extractor.forward([(picture("A"),)])
