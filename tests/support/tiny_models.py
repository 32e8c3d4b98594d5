"""Makers of small real models on disk, and of feature settings that use small models.

Heavy libraries are imported inside the makers, so that importing this module is cheap.
"""

import json
from contextlib import closing
from pathlib import Path
from typing import Any

from config.features import (
    AudioSettings,
    FeatureSettings,
    ImageSettings,
    OcrSettings,
    TextSettings,
    VideoSettings,
)

TINY_VIT = "test_vit"
"""A timm ViT of 0.4 million parameters: patch 16, dim 64."""
TINY_CNN = "test_resnet"
"""A timm ResNet of 0.5 million parameters: dim 96, any image size."""
TINY_SIZE = 64
"""Side of the pictures in `tiny_features`, in pixels."""
VOCABULARY = (
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *"abcdefghijklmnopqrstuvwxyz0123456789",
    *(f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz0123456789"),
    *"猫狗红色蓝绿一只在跑步海边汽车音乐唱歌美食天气",
    *".,!?，。！？",
)


def tiny_features(*, ocr: bool = False, **overrides: Any) -> FeatureSettings:
    """Settings of five small extractors with random weights: no file, no network, quick to load.

    Dims: video and image 64, audio 96, text 64.

    Args:
        ocr: Whether pictures are read (the OCR engine takes a quarter of a second a picture).
        overrides: Fields of `FeatureSettings` to set instead, for example ``ocr_mode="append"``.
    """
    visual = {
        "arch": TINY_VIT,
        "weights": "random:1",
        "image_size": TINY_SIZE,
        "batch_size": 8,
        "precision": "fp32",
    }
    values: dict[str, Any] = {
        "video": VideoSettings(**visual, frames=4),
        "image": ImageSettings(**visual),
        "audio": AudioSettings(arch=TINY_CNN, weights="random:1", batch_size=8, precision="fp32"),
        "text": TextSettings(arch="tiny", weights="random:1", max_tokens=64, precision="fp32"),
        "ocr": OcrSettings(enabled=ocr, max_side=640, frames=1),
    }
    return FeatureSettings(**{**values, **overrides})


def tiny_timm_weights(
    folder: Path,
    arch: str = TINY_VIT,
    *,
    seed: int = 0,
    in_chans: int = 3,
    num_classes: int = 0,
    suffix: str = ".safetensors",
    **model_arguments: Any,
) -> Path:
    """Save the random weights of a timm model as a ``.safetensors`` or ``.pth`` state dict."""
    import timm
    import torch
    from safetensors.torch import save_file

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = timm.create_model(
            arch, in_chans=in_chans, num_classes=num_classes, **model_arguments
        )
    path = folder / f"{arch}-{seed}{suffix}"
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


def vggish_weights(folder: Path, *, seed: int = 0, pca: bool = False) -> Path:
    """Save a VGGish state dict with random weights, 288 MB: the network has no small form.

    Args:
        folder: Where to.
        seed: Of the weights.
        pca: Add ``pca_eigen_vectors`` ``(128, 128)`` and ``pca_means`` ``(128, 1)``.
    """
    import torch
    from torchvggish.torchvggish import _vgg

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        state = _vgg(postprocess=False).state_dict()
        if pca:
            state["pca_eigen_vectors"] = torch.linalg.qr(torch.randn(128, 128))[0].contiguous()
            state["pca_means"] = torch.randn(128, 1) * 0.01
    path = folder / f"vggish-{seed}.pth"
    torch.save(state, path)
    return path


def tiny_bert(folder: Path, *, seed: int = 0, dim: int = 32, layers: int = 2) -> Path:
    """Save a small BERT with random weights and its WordPiece tokenizer as a transformers folder.

    The vocabulary holds single letters, digits and a few Chinese characters.
    """
    import torch
    from transformers import BertConfig, BertModel

    folder.mkdir(parents=True, exist_ok=True)
    config = BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=dim,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=dim * 4,
        max_position_embeddings=128,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BertModel(config)
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer", "do_lower_case": True}), encoding="utf-8"
    )
    return folder


def tiny_site(folder: Path, **sections: Any) -> Path:
    """Small extractors and their bundle in a folder; the file of settings that names them."""
    features = tiny_features()
    tiny_bundle(folder / "bundle", features)
    settings = {
        "features": features.model_dump(mode="json"),
        "fusion": {"bundle": str(folder / "bundle")},
        "workers": {"extractors": [{"threads": 1}]},
        "log": {"level": "error"},
        **sections,
    }
    path = folder / "config.yaml"
    path.write_text(json.dumps(settings), encoding="utf-8")
    return path


def tiny_bundle(
    folder: Path, features: FeatureSettings, *, threshold: Any = 0.01, model: Any = None
) -> str:
    """Save a fusion model with random weights for these features; its version.

    Args:
        folder: Where to.
        features: What the model shall be served with.
        threshold: Scores above it become tags; one for all tags, or one each.
        model: Name of the fusion model; None is the default's.
    """
    from extractors.suite import ExtractorSuite
    from tests.support.workers.small_bundle import write_bundle

    suite = ExtractorSuite(features)
    suite.load()
    with closing(suite):
        return write_bundle(folder, suite, threshold=threshold, model=model)
