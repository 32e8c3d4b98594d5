"""Text ─► one vector per token, by a transformers encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from common.errors import FeatureError
from common.post import FeatureArray
from common.precision import (
    Arithmetic,
    autocast,
    cast_weights,
    resolve_precision,
    to_float16,
)
from config.settings import ExtractorName, TextSettings
from extractors.fingerprint import digest
from extractors.models.base import check_device, check_finite
from extractors.models.text_model import TextModel, load_text_model
from extractors.models.timm_backbone import free_device

TokenIds = npt.NDArray[np.int64]

_PAD_MULTIPLE = 32
_CHARS_PER_TOKEN = 64
_SETTING = "features.text"


class TextExtractor:
    """Text ─► float16 ``(t, dim)``: the last hidden state of its t tokens, special ones included.

    Text without a token gives ``(0, dim)``. Longer text is cut after ``max_tokens``, or after
    what the model can take where that is less.
    """

    name: ExtractorName = "text"

    def __init__(self, settings: TextSettings, device: str = "cpu") -> None:
        self.dim = 0
        self.fingerprint = ""
        self._settings, self._device = settings, device
        self._arithmetic: Arithmetic = "fp32"
        self._loaded: TextModel | None = None
        self._limit = 0

    def load(self) -> None:
        """Load model and tokenizer.

        Raises:
            ConfigError: The model, its tokenizer or the device are not to be had.
        """
        if self._loaded is not None:
            return
        check_device(self._device)
        self._arithmetic = resolve_precision(
            self._settings.precision, self._device, setting=f"{_SETTING}.precision"
        )
        loaded = load_text_model(self._settings)
        cast_weights(loaded.model, self._arithmetic)
        loaded.model.to(self._device)
        self._loaded = loaded
        self.dim = loaded.dim
        self._limit = min(self._settings.max_tokens, loaded.positions)
        self.fingerprint = digest(
            {
                "kind": "transformers",
                "arch": loaded.arch,
                "weights": loaded.digest,
                "dim": self.dim,
                "tokenizer": loaded.tokenizer_digest,
                "max_tokens": self._limit,
            }
        )

    def preprocess(self, item: str) -> TokenIds:
        """Token ids int64 ``(t,)`` of a text.

        Raises:
            FeatureError: The item is no text.
        """
        if not isinstance(item, str):
            raise FeatureError(f"text: an item must be text, not {type(item).__name__}")
        loaded = self._model()
        # A megabyte of text is not tokenized to keep 256 tokens of it; lone surrogates go.
        text = item[: self._limit * _CHARS_PER_TOKEN].encode("utf-8", "replace").decode("utf-8")
        ids = loaded.tokenize(text, self._limit) if text.strip() else []
        if len(ids) <= loaded.special_tokens:
            ids = []
        return np.asarray(ids, dtype=np.int64)

    def forward(self, items: Sequence[TokenIds]) -> list[FeatureArray]:
        """Features of token ids; texts of like length share a batch.

        Raises:
            FeatureError: The model gave values that are not finite.
        """
        results = [np.empty((0, self.dim), np.float16) for _ in items]
        order = sorted((i for i, ids in enumerate(items) if len(ids)), key=lambda i: len(items[i]))
        size = self._settings.batch_size
        for start in range(0, len(order), size):
            chunk = order[start : start + size]
            for index, features in zip(chunk, self._run([items[i] for i in chunk]), strict=True):
                results[index] = check_finite("text", features)
        return results

    def close(self) -> None:
        """Free the model."""
        self._loaded = None
        free_device(self._device)

    def _model(self) -> TextModel:
        if self._loaded is None:
            raise FeatureError("text: the extractor is not loaded")
        return self._loaded

    def _run(self, batch: Sequence[TokenIds]) -> list[FeatureArray]:
        import torch

        loaded = self._model()
        longest = max(len(ids) for ids in batch)
        # Kernels round differently for odd lengths: with lengths of 32, 64, … a text's features
        # are the same whatever it shares a batch with.
        width = min(-(-longest // _PAD_MULTIPLE) * _PAD_MULTIPLE, loaded.positions)
        ids = np.full((len(batch), width), loaded.pad_id, np.int64)
        mask = np.zeros((len(batch), width), np.int64)
        for row, tokens in enumerate(batch):
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = 1
        arguments: dict[str, Any] = {
            "input_ids": torch.from_numpy(ids).to(self._device),
            "attention_mask": torch.from_numpy(mask).to(self._device),
        }
        with torch.inference_mode(), autocast(self._device, self._arithmetic):
            states = loaded.model(**arguments).last_hidden_state  # (batch, width, dim)
        host = to_float16(states).numpy()
        return [host[row, : len(tokens)].copy() for row, tokens in enumerate(batch)]
