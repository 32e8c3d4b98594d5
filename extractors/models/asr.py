"""Windows of sound -> the words that are spoken in them, by Whisper -> features as of a text.

Whisper invents words where nobody speaks, so that silent windows are never heard, those that it
calls no speech have no text, and what it writes of noises or over and over is dropped.

Source: arXiv 2212.04356.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from common.errors import ConfigError, FeatureError
from common.fingerprint import digest
from common.post import FeatureArray
from common.precision import autocast
from config.features import AsrSettings, ExtractorName
from extractors.models.base import Extractor, Rows
from extractors.models.from_transformers import (
    TransformersEncoder,
    processor_digest,
    tokenizer_digest,
)
from extractors.models.spectrograms import WhisperSpectrograms
from extractors.parts import SPEECH

_SETTING = "features.asr"
_LOUDNESS_SAMPLES = 1600  # 0.1 s: the shortest word; half would take a click for speech
# Half of what the decoder can hold, as the original: 30 s of fast speech. Double lets a window
# that it repeats itself in take twice as long.
_MOST_TOKENS = 224
# Text that shrinks by more repeats itself, as Whisper does where it is lost; the original's bound.
_MOST_REPEATED = 2.4
_NO_SPEECH = ("<|nospeech|>", "<|nocaptions|>")  # of large-v3, and of those before
# Whisper's notes of what is no speech: [Music], (applause), *sighs*, signs of music.
_NOISE = re.compile(
    r"\[[^\]]*\]|\([^)]*\)|\uff08[^\uff09]*\uff09|\u3010[^\u3011]*\u3011|\*[^*]*\*|[\u2669-\u266f]"
)


class AsrExtractor(Extractor):
    """Windows float32 ``(n, 480000)`` of one file -> float16 ``(t, dim)`` of the words in them.

    Without words it is ``(0, dim)``.

    Args:
        text: The encoder of texts, which may be loaded already.
    """

    name: ExtractorName = "asr"

    def __init__(self, settings: AsrSettings, text: Extractor, device: str = "cpu") -> None:
        self._settings, self._text = settings, text
        self._whisper = Whisper(settings, device)

    def close(self) -> None:
        self._whisper.close()
        self._text.close()

    def preprocess(self, item: Any) -> Rows:
        return checked(item)

    def forward(self, items: Sequence[Rows]) -> list[FeatureArray]:
        lines = self._whisper.transcribe(np.concatenate(items)) if items else []
        borders = np.cumsum([0, *map(len, items)]).tolist()
        texts = [" ".join(filter(None, lines[a:b])) for a, b in pairwise(borders)]
        spoken = self._text.forward([self._text.preprocess(text) for text in texts if text])
        rows = iter(spoken)
        return [next(rows) if text else np.empty((0, self.dim), np.float16) for text in texts]

    def _load(self) -> Mapping[str, Any]:
        self._whisper.load()
        self._text.load()
        self.dim = self._text.dim
        keys = {"language", "max_s", "silence_db", "no_speech"}
        return {
            "kind": "whisper",
            "arch": self._whisper.arch,
            "weights": self._whisper.digest,
            "processor": self._whisper.processing,
            "text": self._text.fingerprint,
            **self._settings.model_dump(include=keys),
        }


class Whisper(TransformersEncoder):
    """Whisper with its decoder: what is said in windows of 30 s, each by itself."""

    model_types = ("whisper",)
    files = "preprocessor's and tokenizer's"
    auto = "AutoModelForSpeechSeq2Seq"

    def __init__(self, settings: AsrSettings, device: str) -> None:
        super().__init__(_SETTING, settings, device)
        self._settings = settings
        self._spectrograms: Any = None
        self._tokenizer: Any = None
        self._no_speech: int | None = None
        self._languages: dict[str, int] = {}

    def transcribe(self, windows: Rows) -> list[str]:
        """Return the words in each window; empty where nobody speaks."""
        texts = [""] * len(windows)
        loud = [i for i, w in enumerate(windows) if level_db(w) >= self._settings.silence_db]
        size = self._settings.batch_size
        for start in range(0, len(loud), size):
            rows = loud[start : start + size]
            with torch.inference_mode():
                # Outside autocast: bf16 would cut the spectrogram's bands to three digits.
                made = self._spectrograms(torch.from_numpy(windows[rows]).to(self.device))
                with autocast(self.device, self._mixed):
                    heard = self._heard(self._as_network(made))
            for row, text in zip(rows, heard, strict=True):
                texts[row] = words_of(text)
        return texts

    def _heard(self, spectrograms: torch.Tensor) -> list[str]:
        """Return what is said in ``(n, bands, frames)``; empty for what is no speech."""
        from transformers.modeling_outputs import BaseModelOutput

        states = self._call(spectrograms)  # (n, states, width)
        start = self._network.generation_config.decoder_start_token_id
        logits = (
            self._network(
                encoder_outputs=BaseModelOutput(states),
                decoder_input_ids=torch.full((len(states), 1), start, device=states.device),
            )
            .logits[:, 0]
            .float()
        )  # (n, tokens), of the first token
        speak = torch.ones(len(states), dtype=torch.bool, device=states.device)
        if self._no_speech is not None:
            speak = logits.softmax(dim=-1)[:, self._no_speech] < self._settings.no_speech
        texts = [""] * len(states)
        if not speak.any():
            return texts
        limit = self._network.config.max_target_positions // 2
        tokens = self._network.generate(
            encoder_outputs=BaseModelOutput(states[speak]),
            max_new_tokens=min(_MOST_TOKENS, limit),
            do_sample=False,
            num_beams=1,
            **self._language_of(logits[speak]),
        )
        heard = iter(self._tokenizer.batch_decode(tokens, skip_special_tokens=True))
        return [next(heard) if one else "" for one in speak.tolist()]

    def _call(self, *inputs: torch.Tensor) -> torch.Tensor:
        states: torch.Tensor = self._network.get_encoder()(*inputs).last_hidden_state
        return states

    def _language_of(self, logits: torch.Tensor) -> Mapping[str, Any]:
        """Return the options of `generate` for a language, set or heard; none where it has one."""
        if not self._languages:
            return {}
        names, places = list(self._languages), list(self._languages.values())
        told = [self._settings.language] * len(logits)
        if self._settings.language is None:
            told = [names[i] for i in logits[:, places].argmax(dim=1).tolist()]
        return {"task": "transcribe", "language": told}

    def _take(self, model: Any, source: str, *, local: bool) -> None:
        import transformers

        super()._take(model, source, local=local)
        spectrograms: Any = transformers.WhisperFeatureExtractor
        tokenizers: Any = transformers.AutoTokenizer
        processor = spectrograms.from_pretrained(source, local_files_only=local)
        self._spectrograms = WhisperSpectrograms(processor, self.device)
        tokenizer = tokenizers.from_pretrained(source, local_files_only=local)
        self.processing = digest(
            {
                "sound": processor_digest(source, local=local),
                "text": tokenizer_digest(tokenizer),
                "generation": model.generation_config.to_diff_dict(),
            }
        )
        known = tokenizer.get_vocab()
        self._no_speech = next((known[mark] for mark in _NO_SPEECH if mark in known), None)
        several = getattr(model.generation_config, "is_multilingual", False)
        marks = getattr(model.generation_config, "lang_to_id", None) if several else None
        self._languages = {mark.strip("<|>"): place for mark, place in (marks or {}).items()}
        language = self._settings.language
        if language is not None and language not in (self._languages or ("en",)):
            raise ConfigError(
                f"{_SETTING}.language: {self._named} knows no {language!r}, but "
                f"{', '.join(self._languages) or 'en'}"
            )
        self._tokenizer = tokenizer


def checked(item: Any) -> Rows:
    """Return the windows of a file's sound; FeatureError for anything else."""
    if not isinstance(item, np.ndarray) or item.dtype != np.float32:
        raise FeatureError("asr: an item must be an array of float32")
    if item.ndim != 2 or item.shape[1:] != SPEECH.shape or not np.isfinite(item).all():
        raise FeatureError(f"asr: an item must be finite (n, {SPEECH.samples}), not {item.shape}")
    return item


def level_db(window: npt.NDArray[np.float32]) -> float:
    """Return the level of the loudest 0.1 s of a window ``(samples,)``, full scale being 0."""
    power = np.square(window.reshape(-1, _LOUDNESS_SAMPLES)).mean(axis=1).max()
    return float(10 * np.log10(max(float(power), 1e-20)))


def words_of(text: str) -> str:
    """Return the words in a text of Whisper's; empty for noises, signs, or one phrase repeated."""
    words = " ".join(_NOISE.sub(" ", text).split())
    content = words.encode("utf-8", "replace")
    repeats = len(content) > _MOST_REPEATED * len(zlib.compress(content))
    return "" if repeats or not any(map(str.isalnum, words)) else words
