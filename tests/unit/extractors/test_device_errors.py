"""Errors of a GPU while models load are not taken for mistakes in the settings."""

from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import is_device_lost, is_out_of_memory
from config.features import ImageSettings, OcrSettings, TextSettings
from extractors.models import ocr
from extractors.models.base import Encoder
from extractors.models.ocr import OcrExtractor
from extractors.models.text import TextEncoder
from extractors.models.transformers_vision import TransformersVision
from extractors.models.visual import TimmBackbone
from tests.support import tiny_encoders
from tests.support.tiny_models import TINY_CNN

ERRORS = [
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: device-side assert triggered"),
]
PLAIN: dict[str, Any] = {"precision": "fp32", "engine": "torch"}


@pytest.mark.parametrize(
    ("text", "full", "lost"),
    [
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True, False),
        ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", True, False),
        ("CUDA error: out of memory", True, False),
        ("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes", True, False),
        ("CUDA error: an illegal memory access was encountered", False, True),
        ("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED", False, True),
        ("mat1 and mat2 must have the same dtype, but got Float and Half", False, False),
    ],
)
def test_errors_of_cuda_are_told_apart(text: str, full: bool, lost: bool) -> None:
    """Full memory is met by smaller batches, a lost device by a new process."""
    error = RuntimeError(text)
    assert (is_out_of_memory(error), is_device_lost(error)) == (full, lost)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_encoders.dinov2(tmp_path_factory.mktemp("dinov2"))


def failing(kind: type[Encoder], error: Exception) -> type[Any]:
    def fail(*_: Any) -> torch.Tensor:
        raise error

    return type(kind.__name__, (kind,), {"_call": fail})


@pytest.mark.parametrize("error", ERRORS, ids=["full", "cublas", "lost"])
def test_encoders_pass_on_what_their_first_run_meets(error: Exception, folder: Path) -> None:
    image = {"image_size": 32, **PLAIN}
    cnn = ImageSettings(arch=TINY_CNN, weights="random:1", **image)
    dino = ImageSettings(arch=str(folder), **image)
    encoders = [
        failing(TimmBackbone, error)("features.image", cnn, "cpu", size=(32, 32)),
        failing(TransformersVision, error)("features.image", dino, "cpu", size=(32, 32)),
        failing(TextEncoder, error)(TextSettings(arch="tiny", weights="random:1", **PLAIN), "cpu"),
    ]
    for encoder in encoders:
        with pytest.raises(type(error)) as raised:
            encoder.load()
        assert raised.value is error


def test_ocr_passes_on_what_its_networks_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise ERRORS[0]

    monkeypatch.setattr(ocr, "Networks", full)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        OcrExtractor(OcrSettings(engine="torch")).load()
