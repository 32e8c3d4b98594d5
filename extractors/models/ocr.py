"""Pictures -> the text inside them, by PP-OCRv6 as rapidocr runs it, whose wheel brings its models.

rapidocr finds boxes, cuts and turns lines, and decodes; one of three engines runs the networks.
Nothing is downloaded.
"""

from __future__ import annotations

import importlib.util
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal

import cv2
import numpy as np
import numpy.typing as npt
import structlog

from common.errors import ConfigError, FeatureError, one_line
from common.files import file_digest
from common.precision import Arithmetic, cpu_has_bf16, require_device
from config.features import ExtractorName, OcrSettings
from extractors.media.pictures import shrink
from extractors.models.base import Extractor, pass_on_device_errors
from extractors.models.engines import (
    compiled,
    keep_alive,
    openvino_is_installed,
    quiet_openvino,
)
from extractors.models.ocr_torch import BUCKET, Networks
from extractors.parts import ALIKE, ALIKE_GRID

Picture = npt.NDArray[np.uint8]
Tensor = npt.NDArray[np.float32]
Session = Callable[[Tensor], Tensor]  # a network: (n, 3, h, w) -> its output
Finder = Callable[[Picture], Tensor]  # BGR (h, w, 3) -> how likely each pixel is text (1, 1, h, w)
Step = Literal["Det", "Cls", "Rec"]  # finds lines, tells those upside down, reads them

_MODELS: dict[Step, str] = {
    "Det": "PP-OCRv6_det_small.onnx",
    "Cls": "ch_ppocr_mobile_v2.0_cls_mobile.onnx",
    "Rec": "PP-OCRv6_rec_small.onnx",
}

# Longer side over shorter; strips are padded to it. The engine enlarges the shorter side of a
# picture to its detection size: without a bound, one row of pixels would become gigabytes. Double
# doubles that memory; half would shrink the text of ordinary banners.
_LONGEST_RATIO = 8
# Share of a tile that the next one repeats, as 1/8: the tallest line of text that is surely whole
# in one of them. Double would read a quarter of the picture twice; half would cut headings.
_OVERLAP = 8
# Confidence of a character that stands alone: PP-OCRv6 sees one in many a drawn shape. On 500 of
# the demo's posts 66 such passed 0.5, 23 pass 0.9 and 8 pass this; of 104 real ones in four sizes
# 93 pass 0.9, 87 this, and 81 would pass 0.98.
_LONE_CONFIDENCE = 0.95
# Longer side of the copy that is looked at first. 640 costs half of a usual picture.
_COARSE_SIDE = 480
# What a pixel of that copy needs, where the finder's own threshold is 0.3. Of 652 words of 8 to 72
# pixels on photos and plain grounds 550 were read at full size, 552 so, and 6 fewer with 0.2.
_MAYBE_TEXT = 0.1
# Of 255 between neighbours in that copy. Of 101 lines of 8 to 56 pixels, a third of full contrast
# on photos among them, all have 28 or more; plain grounds and soft ramps have up to 2, although the
# network sees text in a third of their rows.
_LEAST_CONTRAST = 12
_NEAR = 8  # pixels of that copy: inside the strokes of large letters there is none
# Pixels across what the network marks of a line in that copy, where it is surer of it than this: a
# line of 40 pixels has 9 or 10. Such lines are taken from the copy. Of 453 words, half of them of
# 34 to 120 pixels, 428 were read so, 430 at full size; 429 with 13, which saves a third as much.
_LARGE, _SURELY_TEXT = 9, 0.6
_LEAST_SAVED = 0.7  # of the longer side: a copy that is hardly smaller is no shorter way
_LEAST_SIDE = 32  # the engine's detector works on blocks of 32 pixels
# OpenVINO compiles for each new shape, and keeps some dozens: a line of a new width takes twice as
# long. Double would pad short lines by half; at half there are twice as many widths. Pictures have
# sides of multiples of 32 already: one of a new shape takes a third longer.
_CPU_BUCKET = 64

# Operations at the end of the finder, the last first.
_ENDING = [
    *("Sigmoid", "Add", "ConvolutionBackpropData"),
    *("Relu", "Add", "ConvolutionBackpropData"),
]
_RANGES = {
    "rapidocr": "rapidocr>=3.10,<4",
    "onnxruntime": "onnxruntime>=1.19,<2",
    "openvino": "openvino>=2025,<2027",
    "onnx": "onnx>=1.17,<2",
}

_log = structlog.get_logger()


class OcrExtractor(Extractor):
    """A tuple of uint8 RGB pictures ``(h, w, 3)`` -> their text, a line for each in reading order.

    A line that was read before, as in the next frame of a video, is not repeated. No picture, or
    none with text, gives ``""``.

    Args:
        device: Of the engines that run on a GPU; one that does not says so in the log.
        threads: Pictures that are read at once, each by an engine of one thread. Threads inside
            one picture would spin while they wait, which costs more than it gains as soon as
            other processes want the cores. On a GPU at least eight, whose networks run together.
    """

    name: ExtractorName = "ocr"

    def __init__(self, settings: OcrSettings, *, device: str = "cpu", threads: int = 1) -> None:
        self._settings, self._device = settings, device
        self._threads = settings.pictures_at_once(device, max(1, threads))
        self._readers: SimpleQueue[Any] = SimpleQueue()
        self._pool: ThreadPoolExecutor | None = None
        self._networks: Networks | None = None
        self._errors: tuple[type[Exception], ...] = ()
        self._engine = ""
        self._key = (device, settings.min_confidence, settings.detect_side)  # of its readers

    def _load(self) -> Mapping[str, Any]:
        engine = self._engine = _engine(self._settings.engine, self._device)
        models = _models(engine)
        if engine == "torch":
            require_device(self._device)
        # One set of weights on a GPU is enough; OpenVINO's sessions serve one thread at a time.
        shared = engine == "torch" or (engine == "onnxruntime" and self._device != "cpu")
        try:
            if engine == "torch":
                self._networks = _torch_networks(models, self._device)
            first: Any = None
            for _ in range(self._threads):
                idle = _idle[self._key] if engine == "openvino" else None
                if idle:
                    reader = idle.pop()
                elif shared and first is not None:
                    reader = _copy_of(first)
                else:
                    reader = first = _open_reader(
                        self._settings, engine, models, self._device, self._networks
                    )
                self._readers.put(reader)
        except Exception as error:  # engines and readers of models share no base class
            pass_on_device_errors(error)
            raise ConfigError(
                f"features.ocr.engine: {engine} cannot load the models of rapidocr: "
                f"{one_line(error, 300)}"
            ) from error
        self._errors = _errors_of(engine)
        self._pool = ThreadPoolExecutor(self._threads, "ocr")
        # Engines give the same text from the same weights, as devices and precisions do.
        return {
            "kind": "rapidocr",
            "models": [_MODELS[step] for step in sorted(_MODELS)],
            "weights": file_digest(*sorted(models.values())),
            "lone_confidence": _LONE_CONFIDENCE,
            "coarse": [_COARSE_SIDE, _MAYBE_TEXT, _LEAST_CONTRAST, _LARGE, _SURELY_TEXT],
            "scaling": "halved and linear",
            "alike": [ALIKE_GRID, ALIKE],
            **self._settings.model_dump(exclude={"enabled", "engine"}),
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
        if self._networks is not None:
            self._networks.close()
        self._networks = None
        if self._engine == "openvino":
            while not self._readers.empty():
                _idle[self._key].append(self._readers.get())
        self._readers = SimpleQueue()

    def _read(self, picture: Picture) -> list[str]:
        """Return the lines of one picture, in reading order."""
        reader = self._readers.get()  # it keeps state between its steps: one user at a time
        lines: list[tuple[str, float]] = []
        try:
            for tile, top, first, last in _tiles(picture, self._settings.max_side):
                read = reader(tile)
                if not getattr(read, "txts", None):
                    continue
                # A line is that tile's which has it whole: the middle of its box tells.
                for box, text, score in zip(read.boxes, read.txts, read.scores, strict=True):
                    if first <= top + np.mean(box[:, 1]) < last:
                        lines.append((str(text).strip(), float(score)))
                if sum(len(text) for text, _ in lines) > self._settings.max_chars:
                    break
        except self._errors as error:
            raise FeatureError(f"ocr: the engine failed: {one_line(error, 300)}") from error
        finally:
            self._readers.put(reader)
        return [text for text, score in lines if score >= self._least_confidence(text)]

    def _least_confidence(self, text: str) -> float:
        least = self._settings.min_confidence
        return max(least, _LONE_CONFIDENCE) if len(text) == 1 else least

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
    return np.asarray(cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), np.uint8)


class _Bucketed:
    """A network that sees few shapes: heights and widths are padded, and maps cut back.

    The widths of lines end in the padding that the recogniser has for shorter lines of its batch.
    """

    def __init__(self, session: Session, bucket: int, *, finds_lines: bool) -> None:
        self._session, self._bucket, self._finds_lines = session, bucket, finds_lines

    def __call__(self, batch: Tensor) -> Tensor:
        height, width = batch.shape[2:]
        below = -height % self._bucket if self._finds_lines else 0
        sides = ((0, 0), (0, 0), (0, below), (0, -width % self._bucket))
        if not self._finds_lines:
            return self._session(np.pad(batch, sides))
        return self._session(np.pad(batch, sides, mode="edge"))[..., :height, :width]


class _CoarseFirst:
    """A finder of lines that looks at a small copy first, and at full size only where text may be.

    It takes pixels BGR uint8 ``(height, width, 3)``.
    Where nothing stands out from its surroundings the network sees text in plain grounds: only rows
    with a contrast are looked at, and the copy is passed over where these are few. It costs a fifth
    of a usual picture. Large lines are taken from it, others read in bands as wide as the picture:
    around narrower parts the finder knows too little, and loses one word in ten.
    """

    def __init__(self, look: Finder) -> None:
        self._look = look

    def __call__(self, pixels: Picture) -> Tensor:
        """Return how likely each pixel is text ``(1, 1, height, width)``."""
        height, width = pixels.shape[:2]
        scale = _COARSE_SIDE / max(height, width)
        if scale > _LEAST_SAVED:
            return self._look(pixels)
        size = [max(1, round(s * scale / _LEAST_SIDE)) * _LEAST_SIDE for s in (width, height)]
        small = shrink(pixels, *size)
        seen = fine = _stands_out(small)
        likely: Tensor = np.empty(seen.shape, np.float32)
        bands = _bands(seen.max(axis=1), height)
        if width * sum(bottom - top for top, bottom in bands) > likely.size:
            likely[:] = self._look(small)[0, 0]  # a copy: the next look overwrites its own
            seen &= likely > _MAYBE_TEXT
            fine, bands = _fine(seen, likely), _bands(seen.max(axis=1), height)
        text_map: Tensor = np.zeros((1, 1, height, width), np.float32)
        large: Any = None
        for top, bottom in bands:
            rows = slice(top * len(small) // height, -(-bottom * len(small) // height))
            if fine[rows].any():
                text_map[:, :, top:bottom] = self._look(pixels[top:bottom])
            else:
                if large is None:
                    large = cv2.resize(likely, (width, height))
                # With edges as steep as at full size: soft ones gave boxes that are too tall.
                band = np.multiply(large[top:bottom], 1 / scale, out=text_map[0, 0, top:bottom])
                band += 0.5 - 0.5 / scale
                np.clip(band, 0, 1, out=band)
        return text_map


def _normalised(session: Session) -> Finder:
    """Return the finder of a network on the CPU, which takes float32 in [-1, 1]."""

    def look(pixels: Picture) -> Tensor:
        # [0, 255] -> [-1, 1], (h, w, 3) -> (1, 3, h, w); rapidocr's own way through float64 takes
        # ten times as long
        blob = cv2.dnn.blobFromImage(pixels, 1 / 127.5, mean=(127.5, 127.5, 127.5))
        return session(np.asarray(blob, np.float32))

    return look


def _boxes_of_text(boxes: Any) -> Any:
    """Return rapidocr's search for boxes, left out where the map is empty."""

    def search(text_map: Tensor, size: tuple[int, int]) -> Any:
        return boxes(text_map, size) if text_map.any() else ([], [])

    return search


def _decoder(ctc: Any) -> Any:
    """Return rapidocr's decoder for steps ``(n, steps, 2)`` of numbers and likelihoods of the best.

    A character that fills several steps in a row is one character.
    """
    return lambda steps, *_, **__: ctc.decode(
        steps[..., 0].astype(np.int64), steps[..., 1], remove_duplicate=True
    )


def _stands_out(small: Picture) -> npt.NDArray[np.bool_]:
    """Return the pixels ``(height, width)`` next to which there is a contrast."""
    around = np.ones((3, 3), np.uint8)
    blue, green, red = cv2.split(cv2.morphologyEx(small, cv2.MORPH_GRADIENT, around))
    contrast = np.asarray(cv2.max(cv2.max(blue, green), red))  # 40 times as fast as by numpy
    near = np.ones((2 * _NEAR + 1, 2 * _NEAR + 1), np.uint8)
    return cv2.dilate((contrast >= _LEAST_CONTRAST).astype(np.uint8), near).astype(np.bool_)


def _fine(seen: npt.NDArray[np.bool_], likely: Tensor) -> npt.NDArray[np.bool_]:
    """Return those of the pixels seen that are in no large line: one that is thick somewhere."""
    sure = (seen & (likely > _SURELY_TEXT)).astype(np.uint8)
    padded = np.pad(sure, 1)  # distances know no end of the picture
    thick = 2 * cv2.distanceTransform(padded, cv2.DIST_L2, 3)[1:-1, 1:-1] >= _LARGE
    if not thick.any():
        return seen
    count, parts = cv2.connectedComponents(seen.astype(np.uint8))
    fine = np.ones(count, np.bool_)
    fine[parts[thick]] = False
    small: npt.NDArray[np.bool_] = seen & fine[parts]
    return small


def _bands(seen: npt.NDArray[np.bool_], height: int) -> list[tuple[int, int]]:
    """Return tops and bottoms of what the rows of a small copy show, with a block around it."""
    count = height // _LEAST_SIDE
    blocks = np.zeros(count + 2, np.int8)
    rows = np.flatnonzero(seen) * count // len(seen)
    for shift in (0, 1, 2):
        blocks[rows + shift] = 1
    blocks[[0, -1]] = 0
    edges = np.flatnonzero(np.diff(blocks)) * _LEAST_SIDE
    return [(int(top), int(bottom)) for top, bottom in edges.reshape(-1, 2)]


def _models(engine: str) -> dict[Step, Path]:
    """Return the models in rapidocr's wheel; ConfigError when they or the engine are not there."""
    for name in ("rapidocr", "onnxruntime", "onnx" if engine == "torch" else engine):
        if name in _RANGES and importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"features.ocr.engine: {name} is not installed: pip install '{_RANGES[name]}'"
            )
    import rapidocr

    if engine == "openvino":
        quiet_openvino()
    folder = Path(rapidocr.__file__).parent / "models"
    models = {step: folder / name for step, name in _MODELS.items()}
    for path in models.values():
        if not path.is_file():  # rapidocr would download it
            raise ConfigError(
                f"features.ocr.engine: {path} is missing: pip install --force-reinstall "
                f"'{_RANGES['rapidocr']}'"
            )
    return models


# Closed readers of OpenVINO, which may never be freed (`keep_alive`): later extractors take them.
_idle: defaultdict[tuple[object, ...], list[Any]] = defaultdict(list)


def _engine(setting: str, device: str) -> str:
    """Return the engine, ``auto`` decided."""
    if setting != "auto":
        return setting
    if device != "cpu":
        import onnxruntime

        if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            return "onnxruntime"
        return "torch"
    return "openvino" if openvino_is_installed() else "onnxruntime"


def _open_reader(
    settings: OcrSettings,
    engine: str,
    models: Mapping[Step, Path],
    device: str,
    networks: Networks | None = None,
) -> Any:
    """Return rapidocr with its models loaded, for one picture at a time."""
    from rapidocr import EngineType, RapidOCR

    on_gpu = engine == "onnxruntime" and device != "cpu"
    if networks:
        engine = "onnxruntime"  # torch has no engine of rapidocr
    of_ort, of_openvino = "EngineConfig.onnxruntime", "EngineConfig.openvino"
    parameters: dict[str, Any] = {
        "Global.text_score": settings.min_confidence,
        "Global.log_level": "error",  # it warns of each picture without text
        "Det.limit_side_len": settings.detect_side,
        f"{of_ort}.intra_op_num_threads": 1,
        f"{of_ort}.inter_op_num_threads": 1,
        f"{of_ort}.use_cuda": on_gpu,
        f"{of_ort}.cuda_ep_cfg.device_id": int(device.partition(":")[2] or 0),
        # Its search of all algorithms would begin again with each new shape.
        f"{of_ort}.cuda_ep_cfg.cudnn_conv_algo_search": "DEFAULT",
        f"{of_openvino}.inference_num_threads": 1,
        f"{of_openvino}.num_streams": 1,
        f"{of_openvino}.enable_cpu_pinning": False,
    }
    for step, path in models.items():
        parameters[f"{step}.model_path"] = str(path)
        parameters[f"{step}.engine_type"] = EngineType(engine)
    reader: Any = RapidOCR(params=parameters)
    if engine == "openvino":
        keep_alive(reader)
    # Models are loaded when they are first used: the last two, then the first.
    blank = np.full((2 * _LEAST_SIDE, 2 * _LEAST_SIDE, 3), 255, np.uint8)
    reader(blank, use_det=False)
    reader(blank, use_det=True)
    finder, recogniser = reader.text_det, reader.text_rec
    if device != "cpu" and not networks:
        _warn_of_cpu(device, engine, finder.session.session if on_gpu else None)
    if engine == "openvino":
        arithmetic: Arithmetic = "bf16" if cpu_has_bf16() else "fp32"  # rapidocr itself has fp32
        for session in (finder.session, recogniser.session):
            model = with_products(session.model)
            session.session = compiled(model, arithmetic, threads=1)
        recogniser.session = _Bucketed(recogniser.session, _CPU_BUCKET, finds_lines=False)
    if on_gpu:
        finder.session = _Bucketed(finder.session, BUCKET, finds_lines=True)
        recogniser.session = _Bucketed(recogniser.session, BUCKET, finds_lines=False)
    if networks:
        reader.text_cls.session, recogniser.session = networks.turn, networks.read
        recogniser.postprocess_op = _decoder(recogniser.postprocess_op)
    finder.session = _CoarseFirst(networks.find if networks else _normalised(finder.session))
    finder.postprocess_op = _boxes_of_text(finder.postprocess_op)
    resized = finder.get_preprocess().resize  # to multiples of 32 pixels, and no more
    finder.get_preprocess = lambda: resized
    return reader


def with_products(model: Any) -> Any:
    """Return the finder with its last layers as products of a quarter of the size; others as is.

    It ends with two transposed convolutions, 2 by 2 pixels of each, which OpenVINO runs in float32:
    a sixtieth of the arithmetic took a sixth of the time. Without overlap they are products, whose
    pixels are put in order at the very end.
    """
    ops = quiet_openvino().opset13
    node = model.get_results()[0]
    ending: list[Any] = []
    while len(ending) < len(_ENDING) and node.get_input_size():
        node = node.input_value(0).get_node()
        if node.get_type_name() != "Identity":
            ending.append(node)
    if [each.get_type_name() for each in ending] != _ENDING:
        return model
    weights = [each.input_value(1).get_node().data for each in ending if each.get_input_size() > 1]
    last_shift, last, first_shift, first = weights  # of doublings (in, out, dy, dx)
    inner, middle = first.shape[:2]
    once = first.transpose(2, 3, 1, 0).reshape(4 * middle, inner, 1, 1)  # (dy dx out, in, 1, 1)
    twice: Tensor = np.zeros((2, 2, 2, 2, 2, 2, middle), np.float32)  # dy ey dx ex, dy dx middle
    for y, x in np.ndindex(2, 2):
        twice[y, :, x, :, y, x] = last[:, 0].transpose(1, 2, 0)

    def product(rows: Any, weights: Tensor, shift: Tensor) -> Any:
        none = [0, 0]
        made = ops.convolution(rows, ops.constant(weights), [1, 1], none, none, [1, 1])
        return ops.add(made, ops.constant(shift.reshape(1, -1, 1, 1)))

    wide = ops.relu(product(node.input_value(0), once, np.tile(first_shift.ravel(), 4)))
    text = ops.sigmoid(product(wide, twice.reshape(16, 4 * middle, 1, 1), last_shift))
    pixels = ops.depth_to_space(text, "blocks_first", 4)
    return quiet_openvino().Model([pixels], model.get_parameters())


def _warn_of_cpu(device: str, engine: str, session: Any) -> None:
    """Say in the log that OCR runs on the CPU, where the session of a GPU fell back to it."""
    providers = session.get_providers() if session is not None else ["CPU"]
    if "CUDAExecutionProvider" not in providers:
        _log.warning(
            "extractors.ocr_on_cpu",
            device=device,
            engine=engine,
            providers=providers,
            use="features.ocr.engine=torch, or onnxruntime-gpu in the place of onnxruntime",
        )


def _torch_networks(models: Mapping[Step, Path], device: str) -> Networks:
    """Return the networks in torch."""
    # float16 on a GPU: their values stay below 2,200, and bfloat16 has an eighth of its precision.
    arithmetic: Arithmetic = "fp32" if device == "cpu" else "fp16"
    return Networks((models["Det"], models["Cls"], models["Rec"]), device, arithmetic)


def _copy_of(reader: Any) -> Any:
    """Return a reader for another thread, with the same networks."""
    other = copy(reader)
    for name in ("text_det", "text_cls", "text_rec"):
        setattr(other, name, copy(getattr(reader, name)))
    return other


def _errors_of(engine: str) -> tuple[type[Exception], ...]:
    """Return what rapidocr raises over a picture: its engines' errors, OpenCV's, numpy's."""
    from rapidocr.inference_engine.onnxruntime import ONNXRuntimeError

    errors = (ONNXRuntimeError, cv2.error, ValueError, IndexError)
    if engine != "openvino":
        return errors
    from rapidocr.inference_engine.openvino import OpenVINOError

    return (*errors, OpenVINOError)
