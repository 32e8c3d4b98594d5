"""Measure the cost of an item for the encoders of the preset `small`, and for two of `classic`.

Seconds of one core, in batches as the preset has them; the best of some runs, since other work on
the machine takes caches away. Weights do not change the cost, so that those which are not here are
random. OCR reads a picture of 960x720 with one line.

Run: ``python bench/encoders.py [--runs N]``; needs the packages of ``pip install '.[small]'``.
"""

from __future__ import annotations

import argparse
import os
import time
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import cv2
import numpy as np
import torch
from results_file import write_results

from config.settings import FeatureSettings
from extractors.models.catalog import needs
from extractors.suite import ExtractorSuite

WORDS = "a red bus waits in front of the old town hall while people cross the wet street"


def items(features: FeatureSettings, pictures: int) -> dict[str, list[Any]]:
    """Return one batch of items for each extractor, as decoders give them."""
    chance = np.random.default_rng(0)
    side = features.image.image_size
    page = np.full((720, 960, 3), 255, np.uint8)
    cv2.putText(page, "Summer sale, two for one", (80, 360), 0, 1.5, (0, 0, 0), 3)
    return {
        "image": [chance.integers(0, 256, (1, side, side, 3), np.uint8) for _ in range(pictures)],
        "audio": [chance.normal(-2, 2, (10, 96, 64)).astype(np.float32) for _ in range(4)],
        "text": [" ".join(chance.permutation(WORDS.split())) for _ in range(32)],
        "ocr": [(page,) for _ in range(4)],
    }


def measure(preset: str, only: tuple[str, ...], runs: int) -> list[dict[str, Any]]:
    """Return the cost of each extractor, loaded alone."""
    given: dict[str, Any] = {"preset": preset, "audio": {"weights": "random:0"}}
    if preset == "classic":
        given["image"] = {"weights": "random:0"}
    features = FeatureSettings.model_validate(given)
    found = []
    for name, batch in items(features, 16 if preset == "small" else 4).items():
        if name not in only:
            continue
        suite = ExtractorSuite(features, names=(name,), threads=1)  # type: ignore[arg-type]
        suite.load()
        rows = sum(map(len, suite.run(name, batch))) if name == "audio" else len(batch)  # type: ignore[arg-type]
        best = min(_seconds(suite, name, batch) for _ in range(runs))
        [arch] = [need.arch for need in needs(features) if name in need.modalities]
        found.append(
            {"preset": preset, "for": name, "encoder": arch, "ms": round(1000 * best / rows, 2)}
        )
        print(found[-1])
        suite.close()
    return found


def _seconds(suite: ExtractorSuite, name: Any, batch: list[Any]) -> float:
    began = time.process_time()
    suite.run(name, batch)
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    results = measure("small", ("image", "audio", "text", "ocr"), runs)
    results += measure("classic", ("image", "audio"), runs)
    print(write_results("encoders", runs, results))


if __name__ == "__main__":
    main()
