"""Text -> one vector per token, or one per text, by any encoder or decoder of transformers."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from common.errors import ConfigError, FeatureError, one_line
from common.post import FeatureArray
from config.features import Pooling, TextSettings
from extractors.models.base import (
    RowExtractor,
    check_finite,
    clean,
    one_ahead,
    pass_on_device_errors,
    unit_rows,
)
from extractors.models.from_transformers import (
    SHAPE_KEYS,
    TransformersEncoder,
    json_file,
    silence,
    tokenizer_digest,
)
from extractors.models.weights import Weights, seeded

TokenIds: TypeAlias = npt.NDArray[np.int64]

_SETTING = "features.text"
_NO_LIMIT = 1_000_000  # tokens; models without a longest input say nothing, or astronomical numbers
_POOLING = "1_Pooling/config.json"
_POOLINGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
}
"""Keys of sentence-transformers' file -> ours; its newer form names one in `pooling_mode`."""

# Batches are padded to multiples of this many tokens. Kernels round differently for odd lengths:
# with lengths of 16, 32, ... a text's features are the same whatever it shares a batch with. At
# half they are not; double takes up to twice as long for the many short texts.
_PAD_MULTIPLE = 16
# On a CPU texts of one width only are a batch, since padding is computed like words: of MiniLM four
# texts of 8, 16, 24 and 32 tokens take 2.4, 4.1, 5.7 and 7.2 ms each, and one alone a third more.
# At half there are twice as many widths, and fewer texts of each; double computes 4 more paddings.
_CPU_PAD_MULTIPLE = 8
# Characters that are tokenized for each token that is kept; a megabyte of text would take seconds.
# Words are 5 characters on average, the longest real ones about 60: half could cut a text of long
# words before its last token, double only costs time.
_CHARS_PER_TOKEN = 64

# The built-in model of `random:SEED`: as small as a BERT can be and still tell words apart.
_VOCABULARY, _DIM, _LAYERS, _HEADS, _POSITIONS = 8192, 64, 2, 4, 512
_PAD, _BEGIN, _END, _FIRST_WORD = 0, 1, 2, 3
_EXAMPLE_TOKENS = (16, 32)  # widths of the batches that a graph is traced with and held against
_WORD = re.compile(r"[^\W\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff_]+|\S")


class TextExtractor(RowExtractor):
    """Text -> float16 ``(t, dim)``: the last hidden state of its t tokens, special ones included.

    With ``pooling`` other than ``tokens`` it is one row: the vector of a sentence encoder.
    Text without a token gives ``(0, dim)``. Longer text is cut after ``max_tokens``, or after
    what the model can take where that is less.
    """

    def __init__(self, settings: TextSettings, device: str = "cpu") -> None:
        self._text = TextEncoder(settings, device)
        super().__init__("text", self._text, (), "int64", settings.batch_size)
        self._pooling, self._prefix = settings.pooling, settings.prefix

    def preprocess(self, item: Any) -> TokenIds:
        """Return the token ids int64 ``(t,)`` of a text."""
        if not isinstance(item, str):
            raise FeatureError(f"text: an item must be text, not {type(item).__name__}")
        # Lone surrogates become question marks: tokenizers refuse them.
        text = clean(item[: self._text.limit * _CHARS_PER_TOKEN])
        ids = self._text.tokenize(self._prefix + text) if text.strip() else []
        return np.asarray(ids if len(ids) > self._text.special_tokens else [], dtype=np.int64)

    def forward(self, items: Sequence[TokenIds]) -> list[FeatureArray]:
        """Encode token ids; texts of like length share a batch."""
        results = [np.empty((0, self.dim), np.float16) for _ in items]
        order = sorted((i for i, ids in enumerate(items) if len(ids)), key=lambda i: len(items[i]))
        groups, size = [order], self.batch_size
        if self._text.device == "cpu":
            alike = groupby(order, key=lambda i: self._width(len(items[i])))
            groups = [list(group) for _, group in alike]
        batches = [group[i : i + size] for group in groups for i in range(0, len(group), size)]
        begun = (self._begin([items[i] for i in batch]) for batch in batches)
        for batch, states in zip(batches, one_ahead(begun), strict=True):
            for row, i in zip(states, batch, strict=True):  # (width, dim), or pooled (dim,)
                tokens = self._pooling == "tokens"
                rows = (row[: len(items[i])] if tokens else row[None]).copy()  # not all the batch
                check_finite("text", rows)
                results[i] = rows
        return results

    def _begin(self, batch: Sequence[TokenIds]) -> Callable[[], FeatureArray]:
        width = self._width(max(map(len, batch)))
        ids = np.full((len(batch), width), self._text.pad_id, np.int64)
        mask = np.zeros((len(batch), width), np.int64)
        for row, tokens in enumerate(batch):
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = 1
        return self._text.begin(ids, mask)

    def _width(self, tokens: int) -> int:
        """Return the width of a batch whose longest text has so many tokens."""
        multiple = _CPU_PAD_MULTIPLE if self._text.device == "cpu" else _PAD_MULTIPLE
        return min(-(-tokens // multiple) * multiple, self._text.positions)

    def embed_texts(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        if self._pooling == "tokens":
            raise ConfigError(
                f"{_SETTING}.pooling: tokens gives no vector of a whole text; set cls, mean or "
                "last, as the model was trained"
            )
        return unit_rows(self, texts)

    def _preprocessing(self) -> Mapping[str, Any]:
        # Fingerprints from before these two settings do not know them.
        later: dict[str, str] = {}
        later |= {"pooling": self._pooling} if self._pooling != "tokens" else {}
        later |= {"prefix": self._prefix} if self._prefix else {}
        tokens = {"tokenizer": self._text.tokenizer_digest, "max_tokens": self._text.limit}
        return {**tokens, **later}


class TextEncoder(TransformersEncoder):
    """A transformers encoder and its tokenizer.

    ``random:SEED`` never asks a hub: it takes configuration and tokenizer from ``arch`` where that
    is a local folder, and a small built-in BERT with a hashed vocabulary otherwise.

    Attributes:
        positions: The longest sequence that the network takes.
        special_tokens: How many tokens an empty text gives.
    """

    traced = True
    files = "tokenizer's"
    optional = "pooler"  # of a language model's checkpoint

    def __init__(self, settings: TextSettings, device: str = "cpu") -> None:
        super().__init__(_SETTING, settings, device)
        self._max_tokens, self._pooling = settings.max_tokens, settings.pooling
        self._tokenizer: Any = None
        self.dim, self.arch = _DIM, f"built-in bert {_DIM}x{_LAYERS}"
        self.positions, self.pad_id = _POSITIONS, _PAD
        self.special_tokens = len(hashed_tokens("", _POSITIONS))
        self.tokenizer_digest = f"crc32 {_VOCABULARY} {_WORD.pattern}"

    @property
    def limit(self) -> int:
        """Return the most tokens of one text."""
        return min(self._max_tokens, self.positions)

    def load(self) -> None:
        super().load()
        ids = np.full((1, self.special_tokens + 1), self.pad_id, np.int64)
        try:
            self.run(ids, np.ones_like(ids))
        except (RuntimeError, TypeError, ValueError, AttributeError) as error:
            pass_on_device_errors(error)
            kind = getattr(getattr(self._network, "config", None), "model_type", "model")
            raise ConfigError(
                f"{self.setting}.arch: {self._named} is a {kind}, which encodes no texts by "
                f"itself: {one_line(error, 200)}"
            ) from error

    def tokenize(self, text: str) -> list[int]:
        """Return the token ids of a text, special ones included, `limit` at most."""
        if self._tokenizer is None:
            return hashed_tokens(text, self.limit)
        tokens = self._tokenizer(text, truncation=True, max_length=self.limit, verbose=False)
        return [int(i) for i in tokens["input_ids"]]

    def _build(self, weights: Weights) -> Any:
        if weights.seed is None or self._folder.is_dir():
            return super()._build(weights)
        silence()
        return _built_in(weights.seed)

    def _call(self, *inputs: torch.Tensor) -> torch.Tensor:
        ids, mask = inputs  # (batch, width) each
        states: torch.Tensor = self._network(input_ids=ids, attention_mask=mask).last_hidden_state
        return pool(states.float(), mask, self._pooling)

    def _examples(self) -> Sequence[Sequence[TokenIds]]:
        if self.positions < _EXAMPLE_TOKENS[-1]:
            return ()
        chance = np.random.default_rng(0)
        batches = []
        for count, width in enumerate(_EXAMPLE_TOKENS, 2):
            mask = np.ones((count, width), np.int64)
            mask[0, width // 2 :] = 0
            ids = chance.integers(
                0, self._network.get_input_embeddings().num_embeddings, mask.shape
            )
            batches.append([ids * mask + self.pad_id * (1 - mask), mask])
        return batches

    def _built_in(self) -> Sequence[object]:
        return (self._pooling, self.positions)

    def _take(self, model: Any, source: str, *, local: bool) -> None:
        """Take shape, limits and tokenizer."""
        from transformers import AutoTokenizer

        auto: Any = AutoTokenizer
        tokenizer = auto.from_pretrained(
            source, local_files_only=local, trust_remote_code=self._trust
        )
        self._check_pooling(source, local=local)
        config = model.config
        text = config.get_text_config()
        shape = {key: getattr(config, key, None) for key in SHAPE_KEYS}
        self.dim = int(getattr(text, "embedding_dim", None) or text.hidden_size)
        self.arch = " ".join(f"{key}={value}" for key, value in shape.items())
        self.positions = min(
            int(getattr(text, "max_position_embeddings", None) or _NO_LIMIT),
            int(getattr(tokenizer, "model_max_length", None) or _NO_LIMIT),
        )
        self.pad_id = int(tokenizer.pad_token_id or 0)
        self.special_tokens = int(tokenizer.num_special_tokens_to_add())
        self.tokenizer_digest = tokenizer_digest(tokenizer)
        self._tokenizer = tokenizer

    def _check_pooling(self, source: str, *, local: bool) -> None:
        """Refuse a pooling that sentence-transformers' file of the model contradicts."""
        modes = json_file(source, _POOLING, local=local) if self._pooling != "tokens" else {}
        trained = {name for key, name in _POOLINGS.items() if modes.get(key)}
        trained |= {str(modes.get("pooling_mode"))} & {*_POOLINGS.values()}
        if trained and self._pooling not in trained:
            raise ConfigError(
                f"{_SETTING}.pooling: {source} was trained with {' and '.join(sorted(trained))} "
                f"({_POOLING}), not {self._pooling}"
            )


def pool(states: torch.Tensor, mask: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    """Return ``(batch, dim)`` of token states ``(batch, width, dim)``; for `tokens` all of them.

    The last token is the last one that the mask counts: padding is behind the text, where causal
    models do not see it, so that a text's vector is the same whatever it shares a batch with.
    """
    match pooling:
        case "tokens":
            return states
        case "cls":
            return states[:, 0]
        case "mean":
            counted = mask[:, :, None].to(states.dtype)
            return (states * counted).sum(1) / counted.sum(1)
        case "last":
            rows = torch.arange(states.shape[0], device=states.device)  # len() would be a constant
            return states[rows, mask.sum(1) - 1]  # of a traced graph


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
