"""Presets: the encoders of all modalities by one name, ``features.preset``.

A preset writes its keys out beneath those of its own source (file, environment, ``--set``), and
above those of the sources before: ``--set features.preset=small`` changes the encoders of any file,
and any key can be set next to it. One that changes nothing, since its own source names every
encoder next to it, is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

Preset: TypeAlias = Literal["classic", "classic2", "modern", "small", "omni"]


def _visual(arch: str, weights: str = "pretrained", image_size: int = 224) -> dict[str, Any]:
    return {"arch": arch, "weights": weights, "image_size": image_size}


def _video(picture: Mapping[str, Any], frames: int = 16, **video: Any) -> dict[str, Any]:
    once = {
        "frames": frames,
        "decode": "auto",
        "short_clips": "once",
        "lstm": {"weights": None},
    }
    return {**picture, **once, **video}


def _text(arch: str, weights: str = "pretrained", **text: Any) -> dict[str, Any]:
    whole = {"pooling": "tokens", "prefix": "", "max_tokens": 256}
    return {"arch": arch, "weights": weights, **whole, **text}


def _audio(arch: str, weights: str = "pretrained", batch_size: int = 64) -> dict[str, Any]:
    return {"arch": arch, "weights": weights, "batch_size": batch_size}


_VIT = _visual("vit_large_patch16_224")
_LITE0 = _visual("tf_efficientnet_lite0", "package")
_SIGLIP2 = _visual("google/siglip2-so400m-patch16-256", image_size=256)
# 768 pixels are 256 of its tokens, of 280 at most: half the side would show it no small things.
_OMNI = _visual("google/embeddinggemma-2", image_size=768)
# Windows of 10 s: 64 of them at once would need gigabytes on a CPU.
_AST = _audio("MIT/ast-finetuned-audioset-10-10-0.4593", batch_size=8)

PRESETS: dict[Preset, dict[str, Any]] = {
    "classic": {
        "video": _video(_VIT),
        "image": _VIT,
        "audio": _audio("vggish"),
        "text": _text("bert-base-chinese"),
    },
    "classic2": {  # trained by config/train_video_tsn_lstm.yaml and config/train_image_eff103.yaml
        "video": _video(
            _visual("resnet50", "workshop/video_tsn_lstm/weights/tsn.safetensors"),
            frames=300,
            short_clips="repeat",
            lstm={"weights": "workshop/video_tsn_lstm/weights/video_lstm.safetensors"},
        ),
        "image": _visual(
            "efficientnet_b5", "workshop/image_eff103/weights/efficientnet_b5.safetensors", 456
        ),
        "audio": _audio("vggish"),
        "text": _text("bert-base-chinese"),
    },
    "modern": {
        "video": _video(_SIGLIP2),
        "image": _SIGLIP2,
        "audio": _AST,
        "text": _text("Qwen/Qwen3-Embedding-0.6B", pooling="last", max_tokens=512),
    },
    "small": {  # no package brings weights for sound: they are trained here
        "video": _video(_LITE0, frames=8),
        "image": _LITE0,
        "audio": _audio("test_resnet", "workshop/pretrained/audio.safetensors"),
        "text": _text("sentence-transformers/all-MiniLM-L6-v2", "package", pooling="mean"),
    },
    "omni": {
        "video": _video(_OMNI),
        "image": _OMNI,
        "audio": _audio("google/embeddinggemma-2", batch_size=8),
        "text": _text("google/embeddinggemma-2", pooling="mean", max_tokens=512),
    },
}


TRAINED = {
    "workshop/pretrained/audio.safetensors": "config/train_audio.yaml",
    "workshop/video_tsn_lstm/weights/tsn.safetensors": "config/train_video_tsn_lstm.yaml",
    "workshop/video_tsn_lstm/weights/video_lstm.safetensors": "config/train_video_tsn_lstm.yaml",
    "workshop/image_eff103/weights/efficientnet_b5.safetensors": "config/train_image_eff103.yaml",
}
"""Weights of presets that are trained on one's own posts -> the settings of `train_net.py`."""


def merge(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Merge nested mappings; later layers win, lists are replaced whole."""
    result: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            if isinstance(value, Mapping) and isinstance(result.get(key), Mapping):
                result[key] = merge(result[key], value)
            else:
                result[key] = value
    return result


def flat(values: Mapping[str, Any], at: str = "") -> dict[str, Any]:
    """Return nested settings by dotted keys."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        result |= (
            flat(value, f"{at}{key}.") if isinstance(value, Mapping) else {f"{at}{key}": value}
        )
    return result


def with_preset(features: Any) -> Any:
    """Return the values of ``features`` with those of their preset written out beneath them."""
    chosen = features.get("preset") if isinstance(features, Mapping) else None
    preset = next((values for name, values in PRESETS.items() if name == chosen), {})
    return merge(preset, features) if preset else features


def changes_nothing(features: Any) -> bool:
    """Return True for a preset whose own source names another encoder for every modality."""
    chosen = features.get("preset") if isinstance(features, Mapping) else None
    preset = next((values for name, values in PRESETS.items() if name == chosen), {})
    overridden = (
        isinstance(own := features.get(name), Mapping)
        and own.get("arch", values["arch"]) != values["arch"]
        for name, values in preset.items()
    )
    return bool(preset) and all(overridden)
