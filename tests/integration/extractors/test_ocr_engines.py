"""Engines of OCR: each reads the same text with PP-OCRv6, and says what it lacks."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import structlog
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from common.errors import ConfigError
from config.features import OcrSettings
from extractors.models.engines import openvino_is_installed
from extractors.models.ocr import OcrExtractor, with_products
from extractors.models.ocr_torch import Network
from tests.support.processes import python

# Characters of straight strokes, on a grid of 28: no font with Chinese is needed.
STROKES = {
    "\u4e2d": ("14,4 14,27", "5,9 23,9 23,19 5,19 5,9"),
    "\u5c71": ("14,4 14,24", "5,10 5,24 23,24 23,10"),
    "\u738b": ("6,6 22,6", "7,15 21,15", "4,25 24,25", "14,6 14,25"),
    "\u7530": ("5,5 23,5 23,25 5,25 5,5", "5,15 23,15", "14,5 14,25"),
}
CHINESE = "\u4e2d\u5c71\u738b\u7530"
ENGINES: tuple[Any, ...] = ("onnxruntime", "openvino", "torch")


SIGNALLED = """
import faulthandler, gc, os, signal
from config.features import OcrSettings
from extractors.models.ocr import OcrExtractor
faulthandler.enable()  # gives the thread a stack for signals, as a King's processes do
readers = [OcrExtractor(OcrSettings(engine="openvino")) for _ in range(2)]
for reader in readers:
    reader.load()
del reader
while readers:
    del readers[0]
    gc.collect()
signal.signal(signal.SIGUSR1, lambda *_: None)
os.kill(os.getpid(), signal.SIGUSR1)
print("alive")
"""


def chinese(*, vertical: bool = False) -> np.ndarray:
    """The four characters in black on white, from left to right or from top to bottom."""
    cell, pad = 56, 40
    long, short = len(CHINESE) * cell + 2 * pad, cell + 2 * pad
    canvas = np.full((long, short, 3) if vertical else (short, long, 3), 255, np.uint8)
    for place, character in enumerate(CHINESE):
        corner = np.array((0, place) if vertical else (place, 0)) * cell + pad
        for stroke in STROKES[character]:
            points = np.array([[int(v) for v in point.split(",")] for point in stroke.split()])
            line = (points * cell / 28 + corner).astype(np.int32)
            cv2.polylines(canvas, [line], False, (20, 20, 20), 4, cv2.LINE_AA)
    return canvas


def english(*, quarters: int = 0) -> np.ndarray:
    canvas = np.full((240, 480, 3), (250, 245, 200), np.uint8)
    where, colour = (20, 120), (20, 20, 120)
    cv2.putText(canvas, "GRAND OPENING", where, cv2.FONT_HERSHEY_SIMPLEX, 1.4, colour, 3)
    return np.ascontiguousarray(np.rot90(canvas, quarters))


def lettered(word: str, width: int) -> np.ndarray:
    canvas = np.full((240, width, 3), (250, 245, 200), np.uint8)
    cv2.putText(canvas, word, (40, 130), cv2.FONT_HERSHEY_SIMPLEX, 1.4, (20, 20, 120), 3)
    return canvas


def drawn(*lines: tuple[int, int, int, int], letter: str = "") -> np.ndarray:
    """Thick lines, each from (x, y) to (x, y), or one letter."""
    canvas, colour = np.full((240, 320, 3), (250, 245, 200), np.uint8), (20, 20, 120)
    for x0, y0, x1, y1 in lines:
        cv2.line(canvas, (x0, y0), (x1, y1), colour, 16)
    cv2.putText(canvas, letter, (120, 160), cv2.FONT_HERSHEY_SIMPLEX, 4, colour, 8)
    return canvas


PICTURES = {
    "english": (english(), "grandopening"),
    "rotated to the left": (english(quarters=1), "grandopening"),
    "upside down": (english(quarters=2), "grandopening"),
    "rotated to the right": (english(quarters=3), "grandopening"),
    "chinese": (chinese(), CHINESE),
    "vertical": (chinese(vertical=True), CHINESE),
    "a lone letter": (drawn(letter="R"), "r"),
    "a cross": (drawn((160, 40, 160, 200), (80, 120, 240, 120)), ""),
    "stripes": (drawn(*((90, y, 230, y) for y in (68, 108, 148))), ""),
    "blank": (np.full((200, 300, 3), 255, np.uint8), ""),
}


@pytest.fixture(scope="module", params=ENGINES)
def ocr(request: Any) -> Iterator[OcrExtractor]:
    """Every engine with the weights of rapidocr's wheel."""
    if request.param == "openvino" and not openvino_is_installed():
        pytest.skip("openvino is not installed")
    extractor = OcrExtractor(OcrSettings(engine=request.param))
    extractor.load()
    yield extractor
    extractor.close()


@pytest.mark.parametrize("name", PICTURES)
def test_ppocr_reads_every_script_and_direction(ocr: OcrExtractor, name: str) -> None:
    """English, Chinese, rotated and vertical text, exactly; nothing where there is none."""
    picture, text = PICTURES[name]
    (read,) = ocr.forward([ocr.preprocess((picture,))])
    assert read.replace(" ", "").lower() == text


def test_ppocr_reads_letters_and_spaces_once(ocr: OcrExtractor) -> None:
    """One that is wide enough for two steps of the network is one."""
    line = "Summer sale, two for one"
    canvas = np.full((96, 720, 3), 255, np.uint8)
    cv2.putText(canvas, line, (30, 60), cv2.FONT_HERSHEY_SIMPLEX, 1.5, (0, 0, 0), 3)
    assert ocr.forward([ocr.preprocess((canvas,))]) == [line]


def test_the_finders_end_as_products_gives_the_same_map() -> None:
    """Of onnxruntime, which runs the network as it comes."""
    if not openvino_is_installed():
        pytest.skip("openvino is not installed")
    import onnxruntime
    import openvino
    import rapidocr

    path = Path(rapidocr.__file__).parent / "models" / "PP-OCRv6_det_small.onnx"
    model = with_products(openvino.Core().read_model(path))
    assert "ConvolutionBackpropData" not in {op.get_type_name() for op in model.get_ops()}
    pixels = np.random.default_rng(0).uniform(-1, 1, (1, 3, 64, 96)).astype(np.float32)
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    ours = openvino.Core().compile_model(model, "CPU", options)(pixels)[0]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    [theirs] = session.run(None, {session.get_inputs()[0].name: pixels})
    assert np.ptp(theirs) > 0
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("PP-OCRv6_det_small", [(1, 3, 64, 96), (2, 3, 160, 320)]),
        ("PP-OCRv6_rec_small", [(1, 3, 48, 320), (3, 3, 48, 160), (2, 3, 48, 481)]),
        ("ch_ppocr_mobile_v2.0_cls_mobile", [(1, 3, 48, 192), (4, 3, 48, 192)]),
    ],
)
def test_torch_runs_the_networks_as_onnxruntime_does(
    name: str, shapes: list[tuple[int, ...]]
) -> None:
    """The wheel's own files, in batches, of sizes that are no multiples of anything."""
    import onnxruntime
    import rapidocr

    path = Path(rapidocr.__file__).parent / "models" / f"{name}.onnx"
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    network = Network(path, "cpu", "fp32")
    for shape in shapes:
        batch = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
        with torch.inference_mode():
            output = network(torch.from_numpy(batch)).numpy()
        [expected] = session.run(None, {session.get_inputs()[0].name: batch})
        assert np.ptp(expected) > 0
        np.testing.assert_allclose(output, expected, rtol=1e-3, atol=1e-5)
        # Without values: a pass that asks for one would wait for the GPU, one that was left on the
        # CPU or in float32 is an error.
        with FakeTensorMode():
            fake = Network(path, "cuda:0", "fp16")
            on_gpu = torch.empty(shape, dtype=torch.float16, device="cuda:0")
            with torch.inference_mode():
                half = fake(on_gpu)
        assert (half.shape, half.dtype) == (expected.shape, torch.float16)
        assert half.device == torch.device("cuda:0")


def test_an_operation_that_torch_lacks_here_is_named(tmp_path: Path) -> None:
    import onnx
    from onnx import helper

    ends = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [1]) for n in ("x", "y")]
    node = helper.make_node("Cosh", ["x"], ["y"])
    graph = helper.make_graph([node], "one", ends[:1], ends[1:])
    onnx.save(helper.make_model(graph), tmp_path / "one.onnx")
    with pytest.raises(ValueError, match=r"one\.onnx: torch has no operation Cosh here"):
        Network(tmp_path / "one.onnx", "cpu", "fp32")


def test_torch_reads_in_order_with_many_threads_and_after_it_was_closed() -> None:
    """Pictures share passes; each has its own text."""
    words = ["ALPHA", "BRAVO", "CHARLIE", "DELTA", "ECHO", "FOXTROT", "GOLF", "HOTEL"]
    pictures = [lettered(word, 480 + 96 * (i % 3)) for i, word in enumerate(words)]
    extractor = OcrExtractor(OcrSettings(engine="torch"), threads=4)
    for _ in range(2):
        extractor.load()
        items = [extractor.preprocess(pictures[i : i + 2]) for i in range(0, 8, 2)]
        texts = extractor.forward(items)
        assert "\n".join(texts).split() == words
        extractor.close()


def test_engines_give_one_fingerprint() -> None:
    """The same weights give the same text, so features of one engine serve with the other."""
    if not openvino_is_installed():
        pytest.skip("openvino is not installed")
    prints = []
    for settings in (*(OcrSettings(engine=each) for each in ENGINES), OcrSettings(detect_side=128)):
        extractor = OcrExtractor(settings)
        extractor.load()
        prints.append(extractor.fingerprint)
        extractor.close()
    assert len(set(prints[:3])) == 1
    assert prints[3] != prints[0]


def test_models_are_never_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A model that the wheel lacks is named, with the command; rapidocr would fetch it."""
    import rapidocr
    from rapidocr.utils.download_file import DownloadFile

    def fetched(*_: Any) -> None:
        raise AssertionError("rapidocr wanted to download a model")

    monkeypatch.setattr(DownloadFile, "run", fetched)
    extractor = OcrExtractor(OcrSettings())
    extractor.load()
    extractor.close()
    monkeypatch.setattr(rapidocr, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(ConfigError, match=r"\.onnx is missing: pip install --force-reinstall"):
        OcrExtractor(OcrSettings()).load()


def test_an_engine_that_is_not_installed_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "openvino" else real(name)
    )
    with pytest.raises(ConfigError) as caught:
        OcrExtractor(OcrSettings(engine="openvino")).load()
    assert str(caught.value) == (
        "features.ocr.engine: openvino is not installed: pip install 'openvino>=2025,<2027'"
    )


@pytest.mark.parametrize(
    ("engine", "provider"), [("onnxruntime", "CPUExecutionProvider"), ("openvino", "CPU")]
)
def test_a_gpu_that_is_not_used_is_said(engine: Any, provider: str) -> None:
    """The CPU in the place of a device that was asked for is a warning that names both."""
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    extractor = OcrExtractor(OcrSettings(engine=engine), device="cuda:0")
    with structlog.testing.capture_logs() as logs:
        extractor.load()
    extractor.close()
    (line,) = [entry for entry in logs if entry["event"] == "extractors.ocr_on_cpu"]
    assert (line["device"], line["engine"], line["log_level"]) == ("cuda:0", engine, "warning")
    assert line["providers"] == [provider]


def test_auto_uses_the_gpu_of_its_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """By onnxruntime where it is built for CUDA, else by torch, and never on the CPU in silence."""
    import onnxruntime

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    extractor = OcrExtractor(OcrSettings(), device="cuda:0")
    with pytest.raises(ConfigError, match="device cuda:0: this machine has 0 CUDA devices"):
        extractor.load()
    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: providers)
    with structlog.testing.capture_logs() as logs:
        extractor.load()  # its session finds no GPU
    extractor.close()
    engines = [each["engine"] for each in logs if each["event"] == "extractors.ocr_on_cpu"]
    assert engines == ["onnxruntime"]


def test_a_signal_after_openvino_kills_nobody(project_root: Path) -> None:
    """OpenVINO frees a stack for signals that may be in use: it did, and the process died."""
    if not openvino_is_installed():
        pytest.skip("openvino is not installed")
    done = python("-c", SIGNALLED, timeout_s=300, PYTHONPATH=str(project_root))
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr
