"""The weights that settings of encoders need: source, licence, size, and where they lie here.

Importing this loads no torch; hubs are not asked.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

from common.errors import ConfigError
from config.features import FeatureSettings
from config.presets import PRESETS
from extractors.models.weights import PACKAGES, VGGISH, Package, in_place
from extractors.parts import AUDIO_ENCODERS, VISUAL_ENCODERS, audio_encoder, visual_encoder

Origin: TypeAlias = Literal["hub", "release", "package", "wheel", "file", "seed"]

WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")
"""Of a repository, one of them; where there is none, `PICKLED_FILES`."""
PICKLED_FILES = ("pytorch_model.bin", "pytorch_model.bin.index.json")


@dataclass(frozen=True)
class Known:
    """Facts of an encoder that a preset names.

    Attributes:
        megabytes: To download, in units of 10^6 bytes.
        repository: Of the hub, where it is not the encoder's name.
    """

    licence: str
    megabytes: int
    dim: int
    repository: str = ""


KNOWN: dict[str, Known] = {
    "vit_large_patch16_224": Known(
        "Apache-2.0", 1_217, 1024, "timm/vit_large_patch16_224.augreg_in21k_ft_in1k"
    ),
    "vggish": Known("Apache-2.0", 288, 128),
    "bert-base-chinese": Known("Apache-2.0", 412, 768),
    "resnet50": Known("", 94, 2048, "timm/resnet50.a1_in1k"),
    "efficientnet_b5": Known("", 114, 2048, "timm/efficientnet_b5.sw_in12k_ft_in1k"),
    "google/siglip2-so400m-patch16-256": Known("Apache-2.0", 4_585, 1152),
    "MIT/ast-finetuned-audioset-10-10-0.4593": Known("BSD-3-Clause", 346, 768),
    "Qwen/Qwen3-Embedding-0.6B": Known("Apache-2.0", 1_208, 1024),
    "tf_efficientnet_lite0": Known("Apache-2.0", 19, 1280, "timm/tf_efficientnet_lite0.in1k"),
    "sentence-transformers/all-MiniLM-L6-v2": Known("Apache-2.0", 91, 384),
    "test_resnet": Known("", 2, 96, "timm/test_resnet.r160_in1k"),
    "PP-OCRv6 small": Known("Apache-2.0", 27, 0),
    "openai/whisper-small": Known("Apache-2.0", 967, 0),
    "google/embeddinggemma-2": Known("Apache-2.0", 1_500, 768),
}
"""``features.*.arch`` -> facts, of the model's card or file list on its hub."""


@dataclass(frozen=True)
class Need:
    """Weights that some modalities need.

    Attributes:
        arch: The encoder's name in its library.
        origin: A `wheel` is a dependency that has its models inside.
        name: The repository, package, or path; of released files their repository.
        timm: The repository is one of timm's.
        urls: Of released files.
        dim: Of a vector; 0 when that is not known.
    """

    modalities: tuple[str, ...]
    arch: str
    origin: Origin
    name: str
    timm: bool = False
    urls: tuple[str, ...] = ()
    dim: int = 0

    @property
    def known(self) -> Known:
        return KNOWN.get(self.arch, Known("", 0, self.dim))

    @property
    def package(self) -> Package | None:
        return PACKAGES[self.arch] if self.origin == "package" else None

    @property
    def licence(self) -> str:
        if self.origin in ("file", "seed"):
            return "your own"
        return self.known.licence or "see its hub"

    def here(self) -> str:
        """Return where the weights are on this machine; empty when they are not."""
        if self.origin == "seed":
            return self.name
        if self.origin == "wheel":
            try:
                return f"installed, {importlib.metadata.version(self.name)}"
            except importlib.metadata.PackageNotFoundError:
                return ""
        if self.origin == "file":
            return self.name if Path(self.name).expanduser().exists() else ""
        placed = in_place(self.name)
        if placed.is_dir():
            return str(placed)
        match self.origin:
            case "package":
                return "installed" if self.installed() else ""
            case "release":
                cache = _torch_hub() / "checkpoints"  # the PCA behind the network is optional
                return str(cache) if (cache / Path(self.urls[0]).name).is_file() else ""
            case _:
                return _cached(self.name)

    def installed(self) -> Path | None:
        """Return the folder of its package in this environment."""
        package = self.package
        spec = importlib.util.find_spec(package.module) if package else None
        folders = (spec and spec.submodule_search_locations) or ()
        return next(map(Path, folders), None)


def needs(features: FeatureSettings) -> list[Need]:
    """Return what settings need, once where several modalities share an encoder."""
    merged: dict[Need, tuple[str, ...]] = {}
    for need in _each(features):
        key = replace(need, modalities=())
        merged[key] = (*merged.get(key, ()), *need.modalities)
    return [replace(need, modalities=modalities) for need, modalities in merged.items()]


def needs_of(name: str) -> list[Need]:
    """Return what a preset needs, or one encoder by its name, or by its repository's.

    Raises:
        ConfigError: It is not a preset, and timm has no model of the name.
    """
    if name in PRESETS:
        return needs(FeatureSettings.model_validate({"preset": name}))
    for preset in PRESETS:  # by the way that its preset has it
        for need in needs(FeatureSettings.model_validate({"preset": preset})):
            if name in (need.arch, need.name) and need.origin not in ("file", "wheel"):
                return [need]
    if "/" in name:
        return [Need((), name, "hub", name, timm=name.startswith("timm/"))]
    return [Need((), name, "hub", timm_repository(name), timm=True)]


def from_source(need: Need, source: Literal["hub", "package"] | None) -> Need:
    """Return the same weights from the hub, or from a package.

    Raises:
        ConfigError: No package brings them.
    """
    if source == "package" and need.origin != "package":
        if need.arch not in PACKAGES:
            raise ConfigError(
                f"--from package: no package brings the weights of {need.arch}; there are some for "
                f"{', '.join(PACKAGES)}"
            )
        return replace(need, origin="package", name=PACKAGES[need.arch].name, timm=False)
    if source == "hub" and need.origin == "package":
        timm = "/" not in need.arch
        name = timm_repository(need.arch) if timm else need.arch
        return replace(need, origin="hub", name=name, timm=timm)
    return need


def timm_repository(arch: str) -> str:
    """Return the hub's repository of a timm model."""
    known = KNOWN.get(arch)
    if known and known.repository:
        return known.repository
    import timm

    config = timm.get_pretrained_cfg(arch) if timm.is_model(arch.split(".", 1)[0]) else None
    if config is None or not config.hf_hub_id:
        raise ConfigError(
            f"{arch}: is not a preset ({', '.join(PRESETS)}), and timm has no weights of that name"
        )
    repository = str(config.hf_hub_id)
    named = repository.endswith("/")
    return f"{repository}{config.architecture}.{config.tag}" if named else repository


def _each(features: FeatureSettings) -> Iterator[Need]:
    for name, visual in (("video", features.video), ("image", features.image)):
        if visual.arch != "hog":  # it has no weights
            timm = visual_encoder(visual) is VISUAL_ENCODERS["timm"]
            yield _need(name, visual.arch, visual.weights, timm=timm)
        if name == "video" and features.video.lstm.weights:
            lstm = features.video.lstm
            yield Need(("video",), "attention LSTM", "file", str(lstm.weights), dim=lstm.width)
    audio = features.audio
    if audio.arch == "vggish" and audio.weights == "pretrained":
        yield Need(("audio",), audio.arch, "release", VGGISH.repository, urls=VGGISH.urls)
    else:
        timm = audio_encoder(audio) is AUDIO_ENCODERS["timm"]
        yield _need("audio", audio.arch, audio.weights, timm=timm)
    text = features.text
    if text.arch == "tfidf":
        yield Need(("text",), "tfidf", "file", text.weights)
    else:
        yield _need("text", text.arch, text.weights)
    if text.tfidf:
        yield Need(("text",), "tfidf", "file", text.tfidf)
    if features.asr.enabled:
        yield _need("asr", features.asr.arch, features.asr.weights)
    if features.ocr.enabled:
        yield Need(("ocr",), "PP-OCRv6 small", "wheel", "rapidocr")


def _need(modality: str, arch: str, weights: str, *, timm: bool = False) -> Need:
    if weights.startswith("random:"):
        return Need((modality,), arch, "seed", weights)
    if weights == "package" and arch in PACKAGES:
        return Need((modality,), arch, "package", PACKAGES[arch].name)
    if weights != "pretrained" or Path(arch).expanduser().is_dir():
        return Need((modality,), arch, "file", arch if weights == "pretrained" else weights)
    return Need((modality,), arch, "hub", timm_repository(arch) if timm else arch, timm=timm)


def _torch_hub() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    return Path(os.environ.get("TORCH_HOME", cache / "torch")).expanduser() / "hub"


def _cached(repository: str) -> str:
    """Return the folder of a repository whose weights are in the hub's cache."""
    from huggingface_hub import constants, try_to_load_from_cache

    for name in (*WEIGHT_FILES, *PICKLED_FILES):
        if isinstance(try_to_load_from_cache(repository, name), str):
            return str(Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}")
    return ""
