"""Pictures -> the text inside them, by rapidocr-onnxruntime, whose wheel brings its models."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import numpy.typing as npt

from common.errors import ConfigError, FeatureError, one_line
from common.files import file_digest
from config.settings import ExtractorName, OcrSettings
from extractors.models.base import Extractor

Picture = npt.NDArray[np.uint8]

# Longer side over shorter; strips are padded to it. The engine enlarges the shorter side of a
# picture to its detection size: without a bound, one row of pixels would become gigabytes. Double
# doubles that memory; half would shrink the text of ordinary banners.
_LONGEST_RATIO = 8
# Share of a tile that the next one repeats, as 1/8: the tallest line of text that is surely whole
# in one of them. Double would read a quarter of the picture twice; half would cut headings.
_OVERLAP = 8
_LEAST_SIDE = 32  # the engine's detector works on blocks of 32 pixels


class OcrExtractor(Extractor):
    """A tuple of uint8 RGB pictures ``(h, w, 3)`` -> their text, a line for each in reading order.

    A line that was read before, as in the next frame of a video, is not repeated. No picture, or
    none with text, gives ``""``.

    Args:
        threads: Pictures that are read at once, each by an engine of one thread. Threads inside
            one picture would spin while they wait, which costs more than it gains as soon as
            other processes want the cores.
    """

    name: ExtractorName = "ocr"

    def __init__(self, settings: OcrSettings, *, threads: int = 1) -> None:
        self._settings = settings
        self._threads = max(1, threads)
        self._engines: SimpleQueue[Callable[[Picture], Any]] = SimpleQueue()
        self._pool: ThreadPoolExecutor | None = None

    def _load(self) -> Mapping[str, Any]:
        try:
            import rapidocr_onnxruntime
        except ImportError as error:
            raise ConfigError(
                f"features.ocr.enabled: rapidocr-onnxruntime cannot be imported: {error}"
            ) from error
        models = sorted((Path(rapidocr_onnxruntime.__file__).parent / "models").glob("*.onnx"))
        for _ in range(self._threads):
            engine = rapidocr_onnxruntime.RapidOCR(
                intra_op_num_threads=1,
                inter_op_num_threads=1,
                text_score=self._settings.min_confidence,
                det_limit_side_len=self._settings.detect_side,
            )
            self._engines.put(engine)
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="ocr")
        return {
            "kind": "rapidocr",
            "weights": file_digest(*models),
            **self._settings.model_dump(exclude={"enabled"}),
        }

    def preprocess(self, item: Iterable[Picture]) -> tuple[Picture, ...]:
        """Turn an item's pictures, uint8 ``(h, w, 3)``, into what the engine takes."""
        return tuple(_prepare(picture, self._settings.max_side) for picture in item)

    def forward(self, items: Sequence[tuple[Picture, ...]]) -> list[str]:
        if self._pool is None:
            raise FeatureError("ocr: the extractor is not loaded")
        pictures = [picture for item in items for picture in item]
        read = iter(list(self._pool.map(self._read, pictures)))
        return [self._join(next(read) for _ in item) for item in items]

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()
        self._pool = None
        self._engines = SimpleQueue()

    def _read(self, picture: Picture) -> list[str]:
        """Return the lines of one picture, in reading order."""
        from cv2 import error as OpenCvError  # noqa: N812  a class with a lower-case name
        from rapidocr_onnxruntime.utils.infer_engine import ONNXRuntimeError

        engine = self._engines.get()  # an engine keeps state between its steps: one user at a time
        lines: list[tuple[Any, str, float]] = []
        try:
            for tile, top, first, last in _tiles(picture, self._settings.max_side):
                found, _ = engine(tile)
                # A line is that tile's which has it whole: the middle of its box tells.
                for line in found or ():
                    middle = np.mean([point[1] for point in line[0]])
                    if first <= top + middle < last:
                        lines.append(line)
                if sum(len(text) for _, text, _ in lines) > self._settings.max_chars:
                    break
        except (ONNXRuntimeError, OpenCvError, ValueError, IndexError) as error:
            raise FeatureError(f"ocr: the engine failed: {one_line(error, 300)}") from error
        finally:
            self._engines.put(engine)
        return [
            str(text).strip()
            for _, text, score in lines
            if float(score) >= self._settings.min_confidence
        ]

    def _join(self, pictures: Iterable[list[str]]) -> str:
        lines = dict.fromkeys(line for lines in pictures for line in lines if line)
        return "\n".join(lines)[: self._settings.max_chars]


def _tiles(picture: Picture, side: int) -> Iterator[tuple[Picture, int, float, float]]:
    """Yield overlapping tiles of a picture taller than `side`, with their tops and own rows."""
    height = len(picture)
    overlap = side // _OVERLAP
    tops = range(0, max(1, height - overlap), side - overlap)
    for top in tops:
        first = top + overlap / 2 if top else -math.inf
        last = top + side - overlap / 2 if top != tops[-1] else math.inf
        yield np.ascontiguousarray(picture[top : top + side]), top, first, last


def _prepare(picture: Picture, tile: int) -> Picture:
    """Return a picture as BGR, a thin strip padded."""
    if not isinstance(picture, np.ndarray) or picture.dtype != np.uint8:
        raise FeatureError("ocr: a picture must be an array of uint8")
    if picture.ndim != 3 or picture.shape[2] != 3 or 0 in picture.shape:
        raise FeatureError(f"ocr: a picture must be (h, w, 3), not {picture.shape}")
    height, width = picture.shape[:2]
    least = max(_LEAST_SIDE, -(-max(min(height, tile), width) // _LONGEST_RATIO))
    below, right = max(0, least - height), max(0, least - width)
    if below or right:
        picture = np.pad(picture, ((0, below), (0, right), (0, 0)), mode="edge")
    return np.ascontiguousarray(picture[:, :, ::-1])  # RGB -> BGR
