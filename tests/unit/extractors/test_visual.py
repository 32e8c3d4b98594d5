"""Pictures -> timm features: against timm itself, batches, sizes, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import timm
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from common.errors import ConfigError, FeatureError
from common.precision import cpu_has_bf16
from config.features import ImageSettings, VideoSettings
from extractors.models.base import download
from extractors.models.visual import TimmBackbone, VisualExtractor
from tests.support.mistakes import one_line
from tests.support.tiny_models import TINY_CNN, TINY_VIT, tiny_timm_weights

Backbone = TypeVar("Backbone", bound=TimmBackbone)


def pictures(count: int, size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def with_backbone(kind: type[Backbone], batch_size: int) -> tuple[Backbone, VisualExtractor]:
    """Return a tiny network and its extractor, which takes as many rows at once as on a GPU."""
    settings = ImageSettings(arch=TINY_CNN, weights="random:1", image_size=32)
    model = kind("features.image", settings, "cpu", size=(32, 32))
    extractor = VisualExtractor("image", settings, backbone=model)
    extractor.load()
    extractor.batch_size = batch_size
    return model, extractor


def loaded(**settings: object) -> VisualExtractor:
    extractor = VisualExtractor("image", ImageSettings(**settings))
    extractor.load()
    return extractor


@pytest.mark.parametrize(
    ("arch", "size"), [(TINY_VIT, 160), (TINY_CNN, 96), ("test_efficientnet", 96)]
)
def test_features_are_those_of_timm(tmp_path: Path, arch: str, size: int) -> None:
    path = tiny_timm_weights(tmp_path, arch, seed=3)
    extractor = loaded(arch=arch, weights=str(path), image_size=size, precision="fp32")
    items = pictures(3, size)
    model: Any = timm.create_model(arch, num_classes=0, checkpoint_path=str(path)).eval()
    mean = np.array(model.pretrained_cfg["mean"])
    std = np.array(model.pretrained_cfg["std"])
    inputs = torch.from_numpy(((items / 255.0 - mean) / std).transpose(0, 3, 1, 2)).float()
    with torch.no_grad():
        expected = model(inputs).numpy()
    (vectors,) = extractor.forward([extractor.preprocess(items)])
    assert vectors.dtype == np.float16
    assert vectors.shape == (3, extractor.dim)
    np.testing.assert_allclose(vectors, expected, atol=2e-3, rtol=2e-3)


def test_two_views_of_a_picture_are_one_vector() -> None:
    """Their mean, also in a batch; other features, so another fingerprint."""
    arguments: dict[str, object] = {"arch": TINY_CNN, "weights": "random:1", "image_size": 64}
    one, both = (loaded(**arguments, padded=padded) for padded in (False, True))
    views = [pictures(2 * count, 64, seed=count) for count in (1, 3)]
    for means, rows in zip(both.forward(views), one.forward(views), strict=True):
        assert means.dtype == np.float16
        np.testing.assert_allclose(means, (rows[::2] + rows[1::2]) / 2, atol=2e-3)
    assert one.fingerprint != both.fingerprint
    assert "padded" not in one.fingerprint


def test_the_default_architecture_gives_1024_columns() -> None:
    for settings in (ImageSettings(), VideoSettings()):
        assert settings.arch == "vit_large_patch16_224"
        with torch.device("meta"):
            assert timm.create_model(settings.arch, num_classes=0).num_features == 1024
        config: Any = timm.get_pretrained_cfg(settings.arch)
        assert config.input_size[1:] == (224, 224)


@pytest.mark.parametrize(
    "precision",
    [
        "fp32",
        pytest.param("bf16", marks=pytest.mark.skipif(not cpu_has_bf16(), reason="CPU lacks bf16")),
    ],
)
@pytest.mark.parametrize("arch", [TINY_VIT, TINY_CNN])
def test_features_do_not_depend_on_the_batch(arch: str, precision: str) -> None:
    extractor = loaded(
        arch=arch, weights="random:1", image_size=64, batch_size=4, precision=precision
    )
    items = [pictures(n, 64, seed=n) for n in (1, 7, 0, 3, 5)]
    together = extractor.forward(items)
    assert [len(array) for array in together] == [1, 7, 0, 3, 5]
    for item, array in zip(items, together, strict=True):
        (alone,) = extractor.forward([item])
        np.testing.assert_allclose(array, alone, atol=1e-3)


def test_bfloat16_stays_near_float32() -> None:
    """bfloat16 changes a small ViT's features by about one percent of their length, no more."""
    arguments = {"arch": TINY_VIT, "weights": "random:1", "image_size": 160}
    items = pictures(2, 160)
    (exact,) = loaded(**arguments, precision="fp32").forward([items])
    (rough,) = loaded(**arguments, precision="bf16").forward([items])
    difference = np.linalg.norm(rough.astype(float) - exact) / np.linalg.norm(exact.astype(float))
    assert 0 < difference < 0.02


def test_a_vit_takes_another_size_and_the_weights_of_its_own(tmp_path: Path) -> None:
    """Weights saved at the model's own size load at another: positions are interpolated."""
    path = tiny_timm_weights(tmp_path, TINY_VIT, num_classes=10)
    extractor = loaded(arch=TINY_VIT, weights=str(path), image_size=96)
    assert extractor.forward([pictures(2, 96)])[0].shape == (2, 64)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_with_a_classifier_load(tmp_path: Path, suffix: str) -> None:
    path = tiny_timm_weights(tmp_path, TINY_CNN, num_classes=7, suffix=suffix)
    state = timm.create_model(TINY_CNN, num_classes=7).state_dict()
    assert any(key.startswith("fc") for key in state)
    assert loaded(arch=TINY_CNN, weights=str(path), image_size=64).dim == 96


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"arch": "vit_larch_patch16_224"}, ("features.image.arch", "vit_large_patch16_224")),
        ({"arch": TINY_VIT, "weights": "random:x"}, ("features.image.weights", "random:SEED")),
        ({"arch": TINY_VIT, "weights": "/no/such"}, ("features.image.weights", "/no/such")),
        ({"arch": TINY_VIT, "weights": "random:1", "image_size": 100}, ("image_size", "160x160")),
        ({"arch": "efficientformer_l1", "weights": "random:1"}, ("image_size", "64x64", "224")),
        ({"arch": "nest_tiny", "weights": "random:1", "image_size": 100}, ("image_size", "224")),
        ({"arch": TINY_VIT, "weights": "random:1", "precision": "fp16"}, ("precision", "fp16")),
    ],
)
def test_wrong_settings_are_one_line(settings: dict[str, object], words: tuple[str, ...]) -> None:
    with one_line(ConfigError, *words):
        loaded(**{"image_size": 64, **settings})


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = tiny_timm_weights(tmp_path, TINY_CNN)
    with pytest.raises(ConfigError, match=r"features.image.weights: .*does not fit test_vit"):
        loaded(arch=TINY_VIT, weights=str(path), image_size=160)
    state = timm.create_model(TINY_CNN, num_classes=0).state_dict()
    state.pop("layer1.0.conv1.weight")
    torch.save(state, tmp_path / "part.pth")
    with pytest.raises(ConfigError, match=r"layer1\.0\.conv1"):
        loaded(arch=TINY_CNN, weights=str(tmp_path / "part.pth"), image_size=64)


def test_items_of_the_wrong_shape_or_type_are_refused() -> None:
    """Only uint8 (n, size, size, 3) is taken."""
    extractor = VisualExtractor("video", VideoSettings(image_size=64))
    for item in (pictures(1, 32), pictures(1, 64).astype(np.float32), pictures(1, 64)[0], "x"):
        with pytest.raises(FeatureError, match="video: an item must be"):
            extractor.preprocess(item)


def test_a_batch_is_halved_when_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    sizes: list[int] = []

    class SmallDevice(TimmBackbone):
        most = 2

        def begin(self, *inputs: np.ndarray) -> Callable[[], np.ndarray]:
            sizes.append(len(inputs[0]))
            if len(inputs[0]) > self.most:
                raise torch.cuda.OutOfMemoryError("out of memory")
            return super().begin(*inputs)

    model, extractor = with_backbone(SmallDevice, batch_size=8)
    sizes.clear()
    items = [pictures(5, 32), pictures(5, 32, seed=1)]
    vectors = extractor.forward(items)
    assert sizes == [8, 4, 2, 2, 2, 2, 2]
    np.testing.assert_allclose(vectors[1][:2], model.run(items[1][:2]), atol=1e-3)
    sizes.clear()
    extractor.forward(items[:1])
    assert sizes == [2, 2, 1]  # it does not run out again
    model.most = 0
    with pytest.raises(torch.cuda.OutOfMemoryError):
        extractor.forward(items)


@pytest.mark.parametrize(("device", "rows"), [("cpu", 3), ("cuda:0", 128)])
def test_on_a_cpu_a_pass_has_three_pictures_at_most(device: str, rows: int) -> None:
    """More are slower there, whatever the settings say."""
    settings = ImageSettings(arch=TINY_CNN, weights="random:1", image_size=32)
    assert VisualExtractor("image", settings, device).batch_size == rows


def test_a_batch_begins_before_the_result_of_the_last_one_is_waited_for() -> None:
    """Else a GPU idles while the next one loads; one more at a time is enough."""
    events: list[str] = []

    class LateDevice(TimmBackbone):
        def begin(self, *inputs: np.ndarray) -> Callable[[], np.ndarray]:
            result, count = super().begin(*inputs), len(inputs[0])
            events.append(f"begin {count}")

            def wait() -> np.ndarray:
                events.append(f"wait {count}")
                return result()

            return wait

    model, extractor = with_backbone(LateDevice, batch_size=4)
    events.clear()
    items = [pictures(5, 32), pictures(6, 32, seed=1)]
    vectors = extractor.forward(items)
    assert events == ["begin 4", "begin 4", "wait 4", "begin 3", "wait 4", "wait 3"]
    for rows, item in zip(vectors, items, strict=True):
        np.testing.assert_allclose(rows, model.run(item), atol=1e-3)


def test_a_thread_that_waits_for_a_gpu_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's own way is to ask again and again: a core for each of the threads that read text."""
    said: list[tuple[str, Any]] = []

    class Event:
        def __init__(self, *, blocking: bool = False) -> None:
            said.append(("sleeps", blocking))

        def record(self, stream: Any) -> None:
            said.append(("records", stream))

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", str)
    with FakeTensorMode():
        download(torch.empty(2, 3, device="cuda:1"))
    assert said == [("sleeps", True), ("records", "cuda:1")]


def test_values_that_are_not_finite_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "nan.pth"
    state = timm.create_model(TINY_CNN, num_classes=0).state_dict()
    state["conv1.0.weight"].fill_(torch.nan)
    torch.save(state, path)
    extractor = loaded(arch=TINY_CNN, weights=str(path), image_size=64)
    with pytest.raises(FeatureError, match=r"features.image.precision=fp32"):
        extractor.forward([pictures(1, 64)])
