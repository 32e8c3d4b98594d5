"""The extractors' models as graphs for export; they take the output of `preprocess`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

from common.errors import ConfigError
from common.post import Stream
from config.features import FeatureSettings, ImageSettings
from extractors.models.audio import build_encoder
from extractors.models.text import TextEncoder
from extractors.models.visual import TimmBackbone, VideoLstm, make_backbone
from extractors.parts import LogMelPatches, audio_encoder
from extractors.suite import ExtractorSuite
from fusion.bundle.export import Graph, Inputs, Port

Backbone: TypeAlias = Literal["image", "video", "audio", "text", "video_lstm"]

# Tokens of the texts that are compared, besides the longest. torch.export treats a length of 1 as
# fixed unless told otherwise; an odd one is no length of the example.
_TEXT_LENGTHS = (1, 2, 7, 32)


class Pictures(nn.Module):
    """A timm model with the normalisation before it."""

    shift: torch.Tensor
    scale: torch.Tensor

    def __init__(self, backbone: TimmBackbone) -> None:
        super().__init__()
        self.model: Any = backbone.model
        shape = (1, 3, 1, 1)
        self.register_buffer("shift", torch.tensor(backbone.mean).view(shape) * 255)
        self.register_buffer("scale", 1 / (torch.tensor(backbone.std).view(shape) * 255))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Map RGB float32 ``(n, 3, size, size)`` in [0, 255] to ``(n, dim)``."""
        states = self.model.forward_features((pixels - self.shift) * self.scale)
        pooled: torch.Tensor = self.model.forward_head(states, pre_logits=True)
        return pooled


class Patches(nn.Module):
    """A model of log-mel patches."""

    def __init__(self, model: nn.Module, after: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.model: Any = model
        self._after = after

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Map float32 ``(n, 96, 64)`` to ``(n, dim)``."""
        inputs = patches[:, None]  # (n, 1, 96, 64)
        if not hasattr(self.model, "forward_head"):
            return self._after(self.model(inputs))
        states = self.model.forward_features(inputs)
        pooled: torch.Tensor = self.model.forward_head(states, pre_logits=True)
        return pooled


class Tokens(nn.Module):
    """A transformers encoder."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Map int64 ``(texts, t)`` twice to ``(texts, t, dim)``; rows of padding are 0."""
        output = self.model(input_ids=input_ids, attention_mask=attention_mask)
        # Tokens behind a text's end are no features; zeros are the same in every runtime.
        states: torch.Tensor = output.last_hidden_state * attention_mask[:, :, None]
        return states


def backbone_graph(name: Backbone, features: FeatureSettings) -> Graph:
    """Return the graph of one backbone, loaded as the settings say, in float32."""
    features = _in_float32(features)
    match name:
        case "image":
            return _pictures(name, features.image)
        case "video":
            return _pictures(name, features.video)
        case "audio":
            return _audio(features)
        case "text":
            return _text(features)
        case "video_lstm":
            return _video_lstm(features)


def fingerprints(name: Backbone, features: FeatureSettings) -> dict[Stream, str]:
    """Return the fingerprints that the extractor of a backbone writes into feature files."""
    extractor: Any = "video" if name == "video_lstm" else name
    suite = ExtractorSuite(features, names=(extractor,))
    suite.load()
    result = dict(suite.fingerprints)
    suite.close()
    return result


def _in_float32(features: FeatureSettings) -> FeatureSettings:
    def changed(section: Any) -> Any:
        return section.model_copy(update={"precision": "fp32"})

    video = changed(features.video)
    video = video.model_copy(update={"lstm": changed(features.video.lstm)})
    rest = {key: changed(getattr(features, key)) for key in ("image", "audio", "text")}
    return features.model_copy(update={"video": video, **rest})


def _pictures(name: Literal["image", "video"], settings: Any) -> Graph:
    backbone = make_backbone(name, settings, "cpu")
    if not isinstance(backbone, TimmBackbone):
        raise ConfigError(
            f"features.{name}.arch: {settings.arch} cannot be exported; only models of timm can"
        )
    backbone.load()
    size = settings.image_size
    about = {
        "backbone": name,
        "arch": settings.arch,
        "input": "RGB in [0, 255], the whole picture squashed to a square by area interpolation",
    }
    if isinstance(settings, ImageSettings) and settings.padded:
        about["input"] += (
            "; and again in its proportions, padded with white: the vector is the mean of both"
        )
    return _rows_graph(
        Pictures(backbone),
        backbone.model,
        name="pixels",
        shape=(3, size, size),
        top=255.0,
        about=about,
    )


def _audio(features: FeatureSettings) -> Graph:
    settings = features.audio
    if audio_encoder(settings).sound != LogMelPatches():
        raise ConfigError(
            f"features.audio.arch: {settings.arch} cannot be exported; only encoders of log-mel "
            "patches can"
        )
    encoder = build_encoder(settings, "cpu")
    encoder.load()
    about = {
        "backbone": "audio",
        "arch": settings.arch,
        "input": "log-mel patches of 0.96 s, 64 bands, as VGGish takes them",
    }
    return _rows_graph(
        Patches(encoder.model, encoder.postprocess),
        encoder.model,
        name="patches",
        shape=LogMelPatches.shape,
        top=1.0,
        about=about,
    )


def _text(features: FeatureSettings) -> Graph:
    if features.text.arch == "tfidf":
        raise ConfigError("features.text.arch: tfidf is not a network, so it cannot be exported")
    loaded = TextEncoder(features.text)
    loaded.load()
    most = loaded.limit
    chance = torch.Generator().manual_seed(0)

    def texts(count: int, length: int) -> Inputs:
        ids = torch.randint(3, 30, (count, length), generator=chance)
        ends = torch.randint(1, length + 1, (count, 1), generator=chance)
        ends[0] = length
        return [ids, (torch.arange(length)[None, :] < ends).long()]

    lengths = sorted({min(length, most) for length in (*_TEXT_LENGTHS, most)})
    free = {0: "texts", 1: "tokens"}
    return Graph(
        module=Tokens(loaded.model).eval(),
        legacy=loaded.model,
        ports=tuple(Port(n, free, {"tokens": most}) for n in ("input_ids", "attention_mask")),
        output="features",
        example=texts(2, 3),
        cases={f"{n} texts of {t}": texts(n, t) for t in lengths for n in (1, 3)},
        about={"backbone": "text", "arch": features.text.arch, "dim": loaded.dim, "input": "ids"},
    )


def _video_lstm(features: FeatureSettings) -> Graph:
    if features.video.lstm.weights is None:
        raise ConfigError("features.video.lstm.weights: is null: there is no video_lstm to export")
    backbone = make_backbone("video", features.video, "cpu")
    backbone.load()
    lstm = VideoLstm(features.video.lstm, "cpu")
    lstm.load_for(backbone.dim, "")
    backbone_dim, most = backbone.dim, features.video.frames
    backbone.close()
    chance = torch.Generator().manual_seed(0)

    def videos(count: int, frames: int) -> Inputs:
        return [torch.randn(count, frames, backbone_dim, generator=chance)]

    lengths = sorted({1, 2, min(5, most), most})
    return Graph(
        module=lstm.model.eval(),
        legacy=lstm.model,
        ports=(Port("frames", {0: "videos", 1: "frames"}, {}),),
        output="features",
        example=videos(2, 3),
        cases={f"{n} videos of {f}": videos(n, f) for f in lengths for n in (1, 3)},
        about={"backbone": "video_lstm", "dim": lstm.dim, "input": "features of a video's frames"},
    )


def _rows_graph(
    module: nn.Module,
    legacy: nn.Module,
    *,
    name: str,
    shape: tuple[int, ...],
    top: float,
    about: Mapping[str, Any],
) -> Graph:
    chance = torch.Generator().manual_seed(0)

    def rows(count: int) -> Inputs:
        return [torch.rand(count, *shape, generator=chance) * top]

    return Graph(
        module=module.eval(),
        legacy=legacy,
        ports=(Port(name, {0: "n"}, {}),),
        output="features",
        example=rows(2),
        cases={
            "one": rows(1),
            "many": rows(5),
            "black": [torch.zeros(1, *shape)],
            "white": [torch.full((2, *shape), top)],
        },
        about=about,
    )
