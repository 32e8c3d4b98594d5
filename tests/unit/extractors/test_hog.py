"""Pictures as histograms of gradients and colours: against numpy, and what is refused."""

import numpy as np
import pytest
import torch

from common.errors import ConfigError
from config.features import ImageSettings
from extractors.models.hog import colours, gradients
from extractors.models.visual import VisualExtractor


def loaded(side: int) -> VisualExtractor:
    extractor = VisualExtractor("image", ImageSettings(arch="hog", image_size=side))
    extractor.load()
    return extractor


def one_block(picture: np.ndarray) -> np.ndarray:
    """HOG of a picture uint8 ``(16, 16, 3)``, pixel by pixel."""
    cells = np.zeros((9, 2, 2))
    values = picture.astype(float)
    for row in range(16):
        for column in range(16):
            steps = []
            for c in range(3):
                x = y = 0.0
                if 0 < column < 15:
                    x = values[row, column + 1, c] - values[row, column - 1, c]
                if 0 < row < 15:
                    y = values[row + 1, column, c] - values[row - 1, column, c]
                steps.append((np.hypot(x, y), np.arctan2(y, x) % np.pi))
            strength, angle = max(steps, key=lambda step: step[0])
            place = angle / np.pi * 9 - 0.5
            share = place - np.floor(place)
            below = int(np.floor(place)) % 9
            cells[below, row // 8, column // 8] += strength * (1 - share) / 64
            cells[(below + 1) % 9, row // 8, column // 8] += strength * share / 64
    block = cells.ravel() / np.linalg.norm(cells)
    block = np.minimum(block, 0.2)
    return np.asarray(block / np.linalg.norm(block))


def test_gradients_are_those_of_the_paper() -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
    vectors = gradients(torch.from_numpy(pictures)).numpy()
    for picture, vector in zip(pictures, vectors, strict=True):
        np.testing.assert_allclose(vector, one_block(picture), atol=1e-4)


def test_colours_are_counted() -> None:
    picture = np.zeros((16, 16, 3), np.uint8)
    picture[:, 4:] = (255, 0, 128)
    [shares] = colours(torch.from_numpy(picture[None])).numpy() ** 2
    assert shares[0] == pytest.approx(0.25)
    assert shares[5 * 36 + 3] == pytest.approx(0.75)


def test_it_is_an_encoder_of_pictures_without_weights() -> None:
    extractor = loaded(64)
    black = np.zeros((1, 64, 64, 3), np.uint8)
    [vectors] = extractor.forward([black])
    assert vectors.shape == (1, 7 * 7 * 36 + 216)
    assert vectors.sum() == 1  # no gradient, one colour
    for side in (60, 8, 224):
        with pytest.raises(ConfigError, match=r"features\.image\.image_size: hog takes a multiple"):
            loaded(side)
