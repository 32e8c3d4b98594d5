"""Base of the encoders of the transformers library: from a folder, the hub, its cache, or a seed.

transformers 4.46 to 5 are served: where 4 gives a tensor, 5 gives an object around it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt
import structlog
import torch

from common.errors import ConfigError, one_line
from common.fingerprint import digest
from common.precision import autocast
from config.features import AsrSettings, AudioSettings, TextSettings, VisualSettings
from extractors.models.base import Encoder, clean, pass_on_device_errors
from extractors.models.weights import (
    Weights,
    from_cache_or_hub,
    get_command,
    in_place,
    seeded,
    weights_digest,
)

TransformersSettings: TypeAlias = VisualSettings | AudioSettings | TextSettings | AsrSettings

FOLDER = "config.json, model.safetensors and the {} files"
SHAPE_KEYS = ("model_type", "num_hidden_layers", "num_attention_heads", "hidden_act")
_PROCESSORS = ("preprocessor_config.json", "video_preprocessor_config.json")
_TEXTS_AT_ONCE = 64  # descriptions of tags: some thousands at most, once

_log = structlog.get_logger()


class TransformersEncoder(Encoder):
    """A network of transformers, with what its folder says of its input.

    Attributes:
        model_types: Those in config.json that the family takes; none for any.
        files: Of its processor or tokenizer, for messages.
        part: Attribute of the loaded model that is the network; the rest is not kept.
        optional: Weights with this word in their name may be missing: they are not used.
        auto: Class of transformers that loads the model.
    """

    kind = "transformers"
    model_types: ClassVar[Sequence[str]] = ()
    files: ClassVar[str] = "preprocessor's"
    part: ClassVar[str] = ""
    optional: ClassVar[str] = " "
    auto: ClassVar[str] = "AutoModel"

    def __init__(self, setting: str, settings: TransformersSettings, device: str) -> None:
        self._folder = Path(settings.arch).expanduser()
        if settings.weights == "pretrained" and self._folder.is_dir():
            settings = settings.model_copy(update={"weights": settings.arch})
        super().__init__(setting, settings, device)
        self._name, self._trust = settings.arch, settings.trust_remote_code
        self._from_file: frozenset[str] = frozenset()

    def _build(self, weights: Weights) -> Any:
        silence()
        if self._trust:
            _log.warning("extractors.remote_code_trusted", setting=self.setting, arch=self._name)
        if weights.pretrained:
            placed = in_place(self._name)
            if not placed.is_dir():
                return self._from_hub()
            weights = Weights(path=placed)
        folder = weights.path or self._folder
        files = FOLDER.format(self.files)
        if not (folder / "config.json").is_file():
            raise ConfigError(f"{self.setting}: {folder} must be a transformers folder: {files}")
        try:
            return self._read(str(folder), weights.seed, local=True)
        except ConfigError:
            raise
        except Exception as error:  # readers of JSON, vocabularies and weights share no base class
            pass_on_device_errors(error)
            raise ConfigError(
                f"{self.setting}: {folder} cannot be loaded as a transformers folder ({files}): "
                f"{one_line(error, 300)}"
            ) from error

    def _from_hub(self) -> Any:
        name, files = self._name, FOLDER.format(self.files)
        return from_cache_or_hub(
            lambda local: self._read(name, None, local=local),
            name=f"{self.setting}.arch: {name}",
            remedy=f"{get_command(name)}, or set {self.setting}.weights to a folder with its "
            f"{files}, or put it into the Hugging Face cache",
            repository=name,
        )

    def _read(self, source: str, seed: int | None, *, local: bool) -> Any:
        """Return the network of a folder or a hub's model, and take its limits and processor."""
        import transformers

        auto_config: Any = transformers.AutoConfig
        auto_model: Any = getattr(transformers, self.auto)
        arguments = {"local_files_only": local, "trust_remote_code": self._trust}
        try:
            config = auto_config.from_pretrained(source, **arguments)
        except ValueError as error:
            refusal = self._refusal(source, str(error))
            if refusal is None:
                raise
            raise refusal from error
        self._check(config)
        if seed is not None:
            with seeded(seed):
                model = auto_model.from_config(config, trust_remote_code=self._trust)
        else:
            model, info = auto_model.from_pretrained(source, **arguments, output_loading_info=True)
            missing = frozenset(str(key) for key in info["missing_keys"])
            needed = sorted(key for key in missing if self.optional not in key)
            if needed:
                raise ValueError(f"the weights lack {needed[0]} and {len(needed) - 1} more")
            if info.get("mismatched_keys"):
                raise ValueError(f"{len(info['mismatched_keys'])} weights have another shape")
            # An optional part is random where the file lacks it, and unused here.
            prefix = f"{self.part}." if self.part else ""
            loaded = frozenset(model.state_dict()) - missing
            self._from_file = frozenset(
                k.removeprefix(prefix) for k in loaded if k.startswith(prefix)
            )
        self._take(model, source, local=local)
        network = getattr(model, self.part) if self.part else model
        return network.to(torch.float32)

    def _check(self, config: Any) -> None:
        """Refuse a model that the family cannot run."""
        if self.model_types and config.model_type not in self.model_types:
            raise ConfigError(
                f"{self.setting}.arch: {self._name} is a {config.model_type}, which does not fit "
                f"{self.setting}; choose one of {', '.join(self.model_types)}"
            )

    def _take(self, model: Any, source: str, *, local: bool) -> None:
        """Take limits, shape and processor of a loaded model."""
        self.arch = shape_of(model.config)

    def _digest(self, weights: Weights, network: Any) -> str:
        state = {k: v for k, v in network.state_dict().items() if k in self._from_file}
        return weights_digest(weights, state)

    def _refusal(self, source: str, reason: str) -> ConfigError | None:
        """Return in words of ours that a model is unknown, or wants its own code to run."""
        if "does not recognize" in reason:
            return ConfigError(
                f"{self.setting}.arch: the installed transformers does not know the model type of "
                f"{source}; a newer one may: pip install --upgrade 'transformers<6'"
            )
        if "trust_remote_code" in reason:
            return ConfigError(
                f"{self.setting}.arch: {source} brings Python code of its own, which is not run: "
                f"choose another model, or read it and set {self.setting}.trust_remote_code: true"
            )
        return None


class TextQueryable(TransformersEncoder):
    """An encoder whose model has a text side in the same space: CLIP, SigLIP, CLAP."""

    def __init__(self, setting: str, settings: TransformersSettings, device: str) -> None:
        super().__init__(setting, settings, device)
        self._tokenizer: Any = None
        self._source = ("", True)

    def embed_texts(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        if not hasattr(self._network, "get_text_features"):
            return super().embed_texts(texts)
        rows = []
        for start in range(0, len(texts), _TEXTS_AT_ONCE):
            tokens = self._tokens([clean(text) for text in texts[start : start + _TEXTS_AT_ONCE]])
            inputs = {key: value.to(self.device) for key, value in tokens.items()}
            with torch.inference_mode(), autocast(self.device, self._mixed):
                rows.append(pooled(self._network.get_text_features(**inputs)).float().cpu())
        vectors = torch.cat(rows) if rows else torch.empty(0, self.dim)
        unit: npt.NDArray[np.float32] = torch.nn.functional.normalize(vectors, dim=-1).numpy()
        return unit

    def _take(self, model: Any, source: str, *, local: bool) -> None:
        super()._take(model, source, local=local)
        self._source = (source, local)

    def _tokens(self, texts: Sequence[str]) -> Mapping[str, torch.Tensor]:
        """Return the inputs of `get_text_features`."""
        tokens = self._text_tokenizer()(
            list(texts), padding=True, truncation=True, return_tensors="pt"
        )
        return {key: tokens[key] for key in ("input_ids", "attention_mask")}

    def _text_tokenizer(self) -> Any:
        """Return the tokenizer; loaded when first needed, since features need none."""
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            auto: Any = AutoTokenizer
            source, local = self._source
            try:
                self._tokenizer = auto.from_pretrained(
                    source, local_files_only=local, trust_remote_code=self._trust
                )
            except Exception as error:  # readers of JSON and vocabularies share no base class
                raise ConfigError(
                    f"{self.setting}.arch: {source} has no tokenizer for tag texts: "
                    f"{one_line(error, 200)}"
                ) from error
        return self._tokenizer


def pooled(output: Any) -> torch.Tensor:
    """Return the vectors of ``get_*_features``: a tensor in transformers 4, its field in 5."""
    vectors: torch.Tensor = output if isinstance(output, torch.Tensor) else output.pooler_output
    return vectors


def shape_of(config: Any) -> str:
    """Return the shape of a network as a line, those of its towers included."""
    towers = [config, *(getattr(config, f"{t}_config", None) for t in ("vision", "audio"))]
    keys = (*SHAPE_KEYS, "hidden_size", "patch_size", "image_size")
    shape = [
        f"{key}={getattr(tower, key)}"
        for tower in towers
        if tower
        for key in keys
        if getattr(tower, key, None) is not None
    ]
    return " ".join(shape)


def processor_values(source: str, *, local: bool) -> Mapping[str, Any]:
    """Return the settings of a folder's preprocessor; ValueError when it has none."""
    values = next(filter(None, (json_file(source, name, local=local) for name in _PROCESSORS)), {})
    if not values:  # as transformers 5 saves them: all of a model in one file
        whole = json_file(source, "processor_config.json", local=local)
        values = whole.get("image_processor") or whole.get("video_processor") or {}
    if not values:
        raise ValueError(f"{source} has no {_PROCESSORS[0]}")
    return values


def processor_digest(source: str, *, local: bool) -> str:
    """Return the digest of the settings in a folder's files of processors."""
    names = (*_PROCESSORS, "processor_config.json")
    return digest({name: json_file(source, name, local=local) for name in names})


def tokenizer_digest(tokenizer: Any) -> str:
    """Return the digest of a tokenizer that was not used yet: truncation is part of its state."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    content = fast.to_str() if fast is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(content.encode("utf-8")).hexdigest()


def json_file(source: str, name: str, *, local: bool) -> dict[str, Any]:
    """Return a JSON file of a folder or a hub's repository; empty when there is none."""
    from transformers.utils import hub

    path: Any = hub.cached_file(
        source, name, local_files_only=local, _raise_exceptions_for_missing_entries=False
    )
    content: dict[str, Any] = json.loads(Path(path).read_text("utf-8")) if path else {}
    return content


def silence() -> None:
    """Keep progress bars and advice of transformers off standard error, and fork no tokenizers."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging as transformers_logging

    logging: Any = transformers_logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
