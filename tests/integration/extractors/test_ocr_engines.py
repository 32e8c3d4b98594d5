"""Engines of OCR: each reads the same text with PP-OCRv6, and says what it lacks."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import structlog
import transformers

from common.errors import ConfigError
from config.features import OcrSettings
from extractors.models.engines import openvino_is_installed
from extractors.models.ocr import OcrExtractor, with_products
from tests.support.extractors.ppocr_in_torch import save_ppocr
from tests.support.processes import python

# Characters of straight strokes, on a grid of 28: no font with Chinese is needed.
STROKES = {
    "\u4e2d": ("14,4 14,27", "5,9 23,9 23,19 5,19 5,9"),
    "\u5c71": ("14,4 14,24", "5,10 5,24 23,24 23,10"),
    "\u738b": ("6,6 22,6", "7,15 21,15", "4,25 24,25", "14,6 14,25"),
    "\u7530": ("5,5 23,5 23,25 5,25 5,5", "5,15 23,15", "14,5 14,25"),
}
CHINESE = "\u4e2d\u5c71\u738b\u7530"
PLACES = ("onnxruntime", "openvino", "torch")


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


@pytest.fixture(scope="module", params=PLACES)
def ocr(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OcrExtractor]:
    """Every engine with the weights of rapidocr's wheel; transformers takes them from a folder."""
    engine = request.param
    if engine == "torch" and not hasattr(transformers, "PPOCRV6SmallDetConfig"):
        pytest.skip("this transformers has no PP-OCRv6")
    if importlib.util.find_spec("openvino" if engine == "openvino" else "rapidocr") is None:
        pytest.skip("openvino is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp(engine))
        if engine == "torch":
            save_ppocr(Path("workshop/pretrained"))
        extractor = OcrExtractor(OcrSettings(engine=engine))
        extractor.load()
    yield extractor
    extractor.close()


@pytest.mark.parametrize("name", PICTURES)
def test_ppocr_reads_every_script_and_direction(ocr: OcrExtractor, name: str) -> None:
    """English, Chinese, rotated and vertical text, exactly; nothing where there is none."""
    picture, text = PICTURES[name]
    (read,) = ocr.forward([ocr.preprocess((picture,))])
    assert read.replace(" ", "").lower() == text


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


def test_cpu_engines_give_one_fingerprint() -> None:
    """The same weights give the same text, so features of one engine serve with the other."""
    if not openvino_is_installed():
        pytest.skip("openvino is not installed")
    prints = []
    of_engines = [OcrSettings(engine=engine) for engine in ("onnxruntime", "openvino")]
    for settings in (*of_engines, OcrSettings(detect_side=128)):
        extractor = OcrExtractor(settings)
        extractor.load()
        prints.append(extractor.fingerprint)
        extractor.close()
    assert prints[0] == prints[1] != prints[2]


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


def test_weights_for_torch_have_a_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without network: the repository, the folder and the command; a broken folder: its path."""
    if not hasattr(transformers, "PPOCRV6SmallDetConfig"):
        pytest.skip("this transformers has no PP-OCRv6")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("extractors.models.weights.reachable", lambda _url: False)
    name = "PP-OCRv6_small_det_safetensors"
    with pytest.raises(ConfigError, match=f"hf download PaddlePaddle/{name} --local-dir workshop"):
        OcrExtractor(OcrSettings(engine="torch")).load()
    Path(f"workshop/pretrained/PaddlePaddle--{name}").mkdir(parents=True)
    with pytest.raises(ConfigError, match=f"PaddlePaddle--{name} cannot be loaded"):
        OcrExtractor(OcrSettings(engine="torch")).load()


@pytest.mark.parametrize(
    ("engine", "runs", "provider"),
    [("onnxruntime", "onnxruntime", "CPUExecutionProvider"), ("auto", "openvino", "CPU")],
)
def test_a_gpu_that_is_not_used_is_said(engine: Any, runs: str, provider: str) -> None:
    """The CPU in the place of a device that was asked for is a warning that names both."""
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    extractor = OcrExtractor(OcrSettings(engine=engine), device="cuda:0")
    with structlog.testing.capture_logs() as logs:
        extractor.load()
    extractor.close()
    (line,) = [entry for entry in logs if entry["event"] == "extractors.ocr_on_cpu"]
    assert (line["device"], line["engine"], line["log_level"]) == ("cuda:0", runs, "warning")
    assert line["providers"] == [provider]


def test_a_signal_after_openvino_kills_nobody(project_root: Path) -> None:
    """OpenVINO frees a stack for signals that may be in use: it did, and the process died."""
    if not openvino_is_installed():
        pytest.skip("openvino is not installed")
    done = python("-c", SIGNALLED, timeout_s=300, PYTHONPATH=str(project_root))
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr
