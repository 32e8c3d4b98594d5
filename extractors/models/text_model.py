"""Loading of a transformers encoder and its tokenizer: from a folder, the hub, or a seed."""

from __future__ import annotations

import hashlib
import os
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import ConfigError, one_line
from config.settings import TextSettings
from extractors.models.weights import (
    Weights,
    hub_offline,
    parse_weights,
    seeded,
    weights_digest,
)

_SETTING = "features.text"
_FOLDER = "config.json, model.safetensors and the tokenizer's files"
_NO_LIMIT = 1_000_000
_WEIGHT_FILES = ("*.safetensors", "*.bin")
_SHAPE_KEYS = ("model_type", "num_hidden_layers", "num_attention_heads", "hidden_act")
# The built-in model of `random:SEED`
_VOCABULARY, _DIM, _LAYERS, _HEADS, _POSITIONS = 8192, 64, 2, 4, 512
_PAD, _BEGIN, _END, _FIRST_WORD = 0, 1, 2, 3
_WORD = re.compile(r"[^\W\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff_]+|\S")


@dataclass(frozen=True)
class TextModel:
    """A loaded encoder.

    Attributes:
        tokenize: Text, most tokens ─► token ids, special ones included.
        special_tokens: How many tokens an empty text gives.
        positions: The longest sequence that the model takes.
        digest: Of the weights.
    """

    model: Any
    tokenize: Callable[[str, int], list[int]]
    arch: str
    dim: int
    positions: int
    pad_id: int
    special_tokens: int
    digest: str
    tokenizer_digest: str


@dataclass(frozen=True)
class _Loaded:
    """Tokenizer, model, and the names of the tensors that came from a file."""

    tokenizer: Any
    model: Any
    keys: frozenset[str]


def load_text_model(settings: TextSettings) -> TextModel:
    """Load what the settings name, on the CPU, in float32.

    ``random:SEED`` never asks a hub: it takes configuration and tokenizer from ``arch`` where that
    is a local folder, and a small built-in BERT with a hashed vocabulary otherwise.

    Raises:
        ConfigError: It is not to be had; the line names the files to provide and where.
    """
    weights = parse_weights(settings.weights, setting=f"{_SETTING}.weights")
    folder = Path(settings.arch).expanduser()
    if weights.pretrained and folder.is_dir():
        weights = Weights(path=folder)
    with _quiet():
        if weights.path is not None:
            return _wrap(_load_folder(weights.path, weights), weights)
        if weights.seed is None:
            return _wrap(_load_hub(settings.arch, weights), weights)
        if folder.is_dir():
            return _wrap(_load_folder(folder, weights), weights)
        return _built_in(weights)


def hashed_tokens(text: str, limit: int) -> list[int]:
    """Token ids of the built-in vocabulary: one token per word, or per Chinese character.

    The id of a word is a hash of it, so the vocabulary needs no file and is the same everywhere.
    """
    words = _WORD.findall(text.lower())[: max(0, limit - 2)]
    span = _VOCABULARY - _FIRST_WORD
    return [_BEGIN, *(_FIRST_WORD + zlib.crc32(w.encode("utf-8")) % span for w in words), _END]


def _load_folder(folder: Path, weights: Weights) -> _Loaded:
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{_SETTING}: {folder} must be a transformers folder: {_FOLDER}")
    try:
        return _from_transformers(str(folder), weights, local_files_only=True)
    except Exception as error:  # readers of JSON, vocabularies and weights share no base class
        raise ConfigError(
            f"{_SETTING}: {folder} cannot be loaded as a transformers folder ({_FOLDER}): "
            f"{one_line(error, 300)}"
        ) from error


def _load_hub(name: str, weights: Weights) -> _Loaded:
    """The cache is asked first, so that a cached model needs no network."""
    try:
        return _from_transformers(name, weights, local_files_only=True)
    except (OSError, ValueError):
        pass  # not cached: the hub is asked below, and what is wrong is said there
    if hub_offline():
        raise ConfigError(
            f"{_SETTING}.weights: {name} is not on this machine and its hub cannot be reached: set "
            f"{_SETTING}.weights to a folder with its {_FOLDER}, or put it into the Hugging Face "
            "cache"
        )
    try:
        return _from_transformers(name, weights, local_files_only=False)
    except Exception as error:  # as above, and the hub's client besides
        raise ConfigError(
            f"{_SETTING}.arch: {name} cannot be loaded: {one_line(error, 300)}"
        ) from (error)


def _from_transformers(source: str, weights: Weights, *, local_files_only: bool) -> _Loaded:
    import torch
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    auto_model: Any = AutoModel

    tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local_files_only)
    if weights.seed is not None:
        config = AutoConfig.from_pretrained(source, local_files_only=True)
        with seeded(weights.seed):
            model = auto_model.from_config(config)
        return _Loaded(tokenizer, model.to(torch.float32), frozenset())
    model, info = auto_model.from_pretrained(
        source, local_files_only=local_files_only, output_loading_info=True
    )
    missing = frozenset(str(key) for key in info["missing_keys"])
    needed = sorted(key for key in missing if "pooler" not in key)
    if needed:
        raise ValueError(f"the weights lack {needed[0]} and {len(needed) - 1} more")
    if info.get("mismatched_keys"):
        raise ValueError(f"{len(info['mismatched_keys'])} weights have another shape")
    # The pooler of a language model's checkpoint is random, and unused here.
    return _Loaded(tokenizer, model.to(torch.float32), frozenset(model.state_dict()) - missing)


def _wrap(loaded: _Loaded, weights: Weights) -> TextModel:
    tokenizer, model, config = loaded.tokenizer, loaded.model, loaded.model.config
    model.eval().requires_grad_(False)
    positions = int(getattr(config, "max_position_embeddings", _NO_LIMIT) or _NO_LIMIT)
    longest = int(getattr(tokenizer, "model_max_length", _NO_LIMIT) or _NO_LIMIT)
    tokenizer_digest = _tokenizer_digest(tokenizer)  # before use: truncation is part of its state

    def tokenize(text: str, limit: int) -> list[int]:
        found = tokenizer(text, truncation=True, max_length=limit, verbose=False)
        return [int(i) for i in found["input_ids"]]

    files = _weight_files(weights.path) if weights.path is not None else []
    state = {k: v for k, v in model.state_dict().items() if k in loaded.keys}
    shape = {key: getattr(config, key, None) for key in _SHAPE_KEYS}
    return TextModel(
        model=model,
        tokenize=tokenize,
        arch=" ".join(f"{key}={value}" for key, value in shape.items()),
        dim=int(config.hidden_size),
        positions=min(positions, longest),
        pad_id=int(tokenizer.pad_token_id or 0),
        special_tokens=int(tokenizer.num_special_tokens_to_add()),
        digest=weights_digest(weights, files, state),
        tokenizer_digest=tokenizer_digest,
    )


def _weight_files(folder: Path) -> list[Path]:
    for pattern in _WEIGHT_FILES:
        files = sorted(folder.glob(pattern))
        if files:
            return files
    return []


def _tokenizer_digest(tokenizer: Any) -> str:
    fast = getattr(tokenizer, "backend_tokenizer", None)
    text = fast.to_str() if fast is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _built_in(weights: Weights) -> TextModel:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=_VOCABULARY,
        hidden_size=_DIM,
        num_hidden_layers=_LAYERS,
        num_attention_heads=_HEADS,
        intermediate_size=4 * _DIM,
        max_position_embeddings=_POSITIONS,
    )
    with seeded(weights.seed):
        model: Any = BertModel(config, add_pooling_layer=False)
    model.eval().requires_grad_(False)
    return TextModel(
        model=model,
        tokenize=hashed_tokens,
        arch=f"built-in bert {_DIM}x{_LAYERS}",
        dim=_DIM,
        positions=_POSITIONS,
        pad_id=_PAD,
        special_tokens=len(hashed_tokens("", _POSITIONS)),
        digest=weights_digest(weights, [], {}),
        tokenizer_digest=f"crc32 {_VOCABULARY} {_WORD.pattern}",
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and advice of transformers on standard error; no forked tokenizers."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging as transformers_logging

    logging: Any = transformers_logging
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
