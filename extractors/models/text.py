"""Text -> one vector per token, by a transformers encoder: from a folder, the hub, or a seed."""

from __future__ import annotations

import hashlib
import os
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from common.errors import ConfigError, FeatureError, one_line
from common.post import FeatureArray
from config.settings import TextSettings
from extractors.models.base import Encoder, RowExtractor, check_finite
from extractors.models.weights import Weights, from_cache_or_hub, seeded, weights_digest

TokenIds: TypeAlias = npt.NDArray[np.int64]

_SETTING = "features.text"
_FOLDER = "config.json, model.safetensors and the tokenizer's files"
_NO_LIMIT = 1_000_000  # tokens; models without a longest input say nothing, or astronomical numbers
_SHAPE_KEYS = ("model_type", "num_hidden_layers", "num_attention_heads", "hidden_act")

# Batches are padded to multiples of this many tokens. Kernels round differently for odd lengths:
# with lengths of 32, 64, ... a text's features are the same whatever it shares a batch with. Half
# makes no difference to them; double wastes time on the many short texts.
_PAD_MULTIPLE = 32
# Characters that are tokenized for each token that is kept; a megabyte of text would take seconds.
# Words are 5 characters on average, the longest real ones about 60: half could cut a text of long
# words before its last token, double only costs time.
_CHARS_PER_TOKEN = 64

# The built-in model of `random:SEED`: as small as a BERT can be and still tell words apart.
_VOCABULARY, _DIM, _LAYERS, _HEADS, _POSITIONS = 8192, 64, 2, 4, 512
_PAD, _BEGIN, _END, _FIRST_WORD = 0, 1, 2, 3
_WORD = re.compile(r"[^\W\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff_]+|\S")


class TextExtractor(RowExtractor):
    """Text -> float16 ``(t, dim)``: the last hidden state of its t tokens, special ones included.

    Text without a token gives ``(0, dim)``. Longer text is cut after ``max_tokens``, or after
    what the model can take where that is less.
    """

    def __init__(self, settings: TextSettings, device: str = "cpu") -> None:
        self._text = TextEncoder(settings, device)
        super().__init__("text", self._text, (), "int64", settings.batch_size)

    def preprocess(self, item: Any) -> TokenIds:
        """Return the token ids int64 ``(t,)`` of a text."""
        if not isinstance(item, str):
            raise FeatureError(f"text: an item must be text, not {type(item).__name__}")
        # Lone surrogates become question marks: tokenizers refuse them.
        text = item[: self._text.limit * _CHARS_PER_TOKEN].encode(errors="replace").decode()
        ids = self._text.tokenize(text) if text.strip() else []
        return np.asarray(ids if len(ids) > self._text.special_tokens else [], dtype=np.int64)

    def forward(self, items: Sequence[TokenIds]) -> list[FeatureArray]:
        """Encode token ids; texts of like length share a batch."""
        results = [np.empty((0, self.dim), np.float16) for _ in items]
        order = sorted((i for i, ids in enumerate(items) if len(ids)), key=lambda i: len(items[i]))
        for start in range(0, len(order), self._batch_size):
            batch = order[start : start + self._batch_size]
            for i, features in zip(batch, self._encode([items[i] for i in batch]), strict=True):
                check_finite("text", features)
                results[i] = features
        return results

    def _encode(self, batch: Sequence[TokenIds]) -> list[FeatureArray]:
        longest = max(map(len, batch))
        width = min(-(-longest // _PAD_MULTIPLE) * _PAD_MULTIPLE, self._text.positions)
        ids = np.full((len(batch), width), self._text.pad_id, np.int64)
        mask = np.zeros((len(batch), width), np.int64)
        for row, tokens in enumerate(batch):
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = 1
        states = self._text.run(ids, mask)  # (batch, width, dim)
        return [states[row, : len(tokens)].copy() for row, tokens in enumerate(batch)]

    def _preprocessing(self) -> Mapping[str, Any]:
        return {"tokenizer": self._text.tokenizer_digest, "max_tokens": self._text.limit}


class TextEncoder(Encoder):
    """A transformers encoder and its tokenizer.

    ``random:SEED`` never asks a hub: it takes configuration and tokenizer from ``arch`` where that
    is a local folder, and a small built-in BERT with a hashed vocabulary otherwise.

    Attributes:
        positions: The longest sequence that the network takes.
        special_tokens: How many tokens an empty text gives.
    """

    kind = "transformers"

    def __init__(self, settings: TextSettings, device: str = "cpu") -> None:
        self._folder = Path(settings.arch).expanduser()
        if settings.weights == "pretrained" and self._folder.is_dir():
            settings = settings.model_copy(update={"weights": settings.arch})
        super().__init__(_SETTING, settings, device)
        self._settings = settings
        self._tokenizer: Any = None
        self._from_file: frozenset[str] = frozenset()
        self.dim, self.arch = _DIM, f"built-in bert {_DIM}x{_LAYERS}"
        self.positions, self.pad_id = _POSITIONS, _PAD
        self.special_tokens = len(hashed_tokens("", _POSITIONS))
        self.tokenizer_digest = f"crc32 {_VOCABULARY} {_WORD.pattern}"

    @property
    def limit(self) -> int:
        """Return the most tokens of one text."""
        return min(self._settings.max_tokens, self.positions)

    def tokenize(self, text: str) -> list[int]:
        """Return the token ids of a text, special ones included, `limit` at most."""
        if self._tokenizer is None:
            return hashed_tokens(text, self.limit)
        tokens = self._tokenizer(text, truncation=True, max_length=self.limit, verbose=False)
        return [int(i) for i in tokens["input_ids"]]

    def _build(self, weights: Weights) -> Any:
        _silence()
        arch, seed = self._settings.arch, weights.seed
        if weights.pretrained:
            return from_cache_or_hub(
                lambda local: self._from_transformers(arch, seed, local_files_only=local),
                name=f"{_SETTING}.arch: {arch}",
                remedy=f"set {_SETTING}.weights to a folder with its {_FOLDER}, or put it into "
                "the Hugging Face cache",
            )
        if seed is not None and not self._folder.is_dir():
            return _built_in(seed)
        folder = weights.path or self._folder
        if not (folder / "config.json").is_file():
            raise ConfigError(f"{_SETTING}: {folder} must be a transformers folder: {_FOLDER}")
        try:
            return self._from_transformers(str(folder), seed, local_files_only=True)
        except Exception as error:  # readers of JSON, vocabularies and weights share no base class
            raise ConfigError(
                f"{_SETTING}: {folder} cannot be loaded as a transformers folder ({_FOLDER}): "
                f"{one_line(error, 300)}"
            ) from error

    def _call(self, *inputs: torch.Tensor) -> torch.Tensor:
        ids, mask = inputs  # (batch, width) each
        states: torch.Tensor = self._network(input_ids=ids, attention_mask=mask).last_hidden_state
        return states

    def _digest(self, weights: Weights, network: Any) -> str:
        state = {k: v for k, v in network.state_dict().items() if k in self._from_file}
        return weights_digest(weights, state)

    def _from_transformers(self, source: str, seed: int | None, *, local_files_only: bool) -> Any:
        """Return the network of a folder or a hub's model; take tokenizer and limits from it."""
        from transformers import AutoConfig, AutoModel, AutoTokenizer

        auto_model: Any = AutoModel
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local_files_only)
        if seed is not None:
            config = AutoConfig.from_pretrained(source, local_files_only=True)
            with seeded(seed):
                model = auto_model.from_config(config)
        else:
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
            self._from_file = frozenset(model.state_dict()) - missing
        config = model.config
        shape = {key: getattr(config, key, None) for key in _SHAPE_KEYS}
        self.dim = int(config.hidden_size)
        self.arch = " ".join(f"{key}={value}" for key, value in shape.items())
        self.positions = min(
            int(getattr(config, "max_position_embeddings", None) or _NO_LIMIT),
            int(getattr(tokenizer, "model_max_length", None) or _NO_LIMIT),
        )
        self.pad_id = int(tokenizer.pad_token_id or 0)
        self.special_tokens = int(tokenizer.num_special_tokens_to_add())
        # Before it is used: truncation is part of its state.
        fast = getattr(tokenizer, "backend_tokenizer", None)
        text = fast.to_str() if fast is not None else repr(sorted(tokenizer.get_vocab().items()))
        self.tokenizer_digest = hashlib.sha256(text.encode("utf-8")).hexdigest()
        self._tokenizer = tokenizer
        return model.to(torch.float32)


def _built_in(seed: int) -> Any:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=_VOCABULARY,
        hidden_size=_DIM,
        num_hidden_layers=_LAYERS,
        num_attention_heads=_HEADS,
        intermediate_size=4 * _DIM,
        max_position_embeddings=_POSITIONS,
    )
    with seeded(seed):
        return BertModel(config, add_pooling_layer=False)


def hashed_tokens(text: str, limit: int) -> list[int]:
    """Return token ids of the built-in vocabulary: one per word, or per Chinese character.

    The id of a word is a hash of it, so the vocabulary needs no file and is the same everywhere.
    """
    words = _WORD.findall(text.lower())[: max(0, limit - 2)]
    span = _VOCABULARY - _FIRST_WORD
    return [_BEGIN, *(_FIRST_WORD + zlib.crc32(w.encode("utf-8")) % span for w in words), _END]


def _silence() -> None:
    """Keep progress bars and advice of transformers off standard error, and fork no tokenizers."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging as transformers_logging

    logging: Any = transformers_logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
