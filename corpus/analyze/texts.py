"""Texts: which are nearly the same (shingles, MinHash bands), and their languages."""

from __future__ import annotations

import hashlib
import re
import unicodedata
import zlib
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasketch import MinHash
    from py3langid.langid import LanguageIdentifier

_SHINGLE = 3
_PERMUTATIONS = 128
_SEED = 1

MIN_WIDTH = 20
"""A shorter text, in columns of a terminal, is a greeting: that two share it means nothing."""

MAX_CHARS = 5000
"""The beginning of a longer text that is compared."""

EMPTY, NO_WORDS, SHORT = "empty", "no words", "too short to tell"

# The model is sure long before; the rest only takes time.
_LANGUAGE_CHARS = 500
# Shorter texts are names and exclamations, which look like any language.
_MIN_LETTERS = 12
# Below it the model is as often wrong as right.
_SURE = 0.5
_WRITTEN_AS = {"wuu": "zh", "yue": "zh"}  # of a mixed text the model can only guess which Chinese
_WEB = re.compile(r"https?://\S+|[@#]\w+")
_KANA = re.compile(r"[\u3040-\u30ff\uff66-\uff9f]")
_HANGUL = re.compile(r"[\uac00-\ud7af\u1100-\u11ff]")
_HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af]")


def normal(text: str) -> str:
    """Return the text without what does not matter: width, case, runs of white space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def comparable(text: str) -> bool:
    """Tell whether a normal text is long enough to be a copy; Han characters count double."""
    if len(text) >= MIN_WIDTH:
        return True
    return sum(1 + (unicodedata.east_asian_width(c) in "WF") for c in text) >= MIN_WIDTH


def key_of(text: str) -> bytes:
    """Return 16 bytes of a hash of a normal text."""
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).digest()


def shingles(text: str) -> frozenset[str]:
    """Return every run of three characters of a normal text."""
    return frozenset(text[i : i + _SHINGLE] for i in range(max(1, len(text) - _SHINGLE + 1)))


def jaccard(one: frozenset[str], other: frozenset[str]) -> float:
    """Return the share of the shingles of both that they have in common."""
    common = len(one & other)
    return common / (len(one) + len(other) - common)


class Bands:
    """Keys of a text such that texts as alike as `threshold` share one, nearly always.

    Of 128 permutations, as many (`rows`) go into each of `count` bands as still let 99 in 100 pairs
    at the threshold meet in one at least. Pairs that meet by chance are told apart by `jaccard`.
    """

    def __init__(self, threshold: float) -> None:
        fitting = (
            rows
            for rows in range(_PERMUTATIONS, 0, -1)
            if 1 - (1 - threshold**rows) ** (_PERMUTATIONS // rows) >= 0.99
        )
        self.rows = next(fitting, 1)
        self.count = _PERMUTATIONS // self.rows
        self._blank: MinHash | None = None

    def keys(self, parts: frozenset[str]) -> list[int]:
        """Return a signed 64-bit key for each band."""
        from datasketch import MinHash

        self._blank = self._blank or MinHash(_PERMUTATIONS, _SEED, hashfunc=zlib.crc32)
        minhash = self._blank.copy()
        minhash.update_batch([part.encode("utf-8", "replace") for part in parts])
        keys = []
        for band in range(self.count):
            values = minhash.hashvalues[band * self.rows : (band + 1) * self.rows]
            digest = hashlib.blake2b(bytes([band]) + values.tobytes(), digest_size=8).digest()
            keys.append(int.from_bytes(digest, "little", signed=True))
        return keys


def language_of(text: str) -> str:
    """Return the ISO 639-1 code of a text's language, or `EMPTY`, `NO_WORDS` or `SHORT`.

    Chinese, Japanese and Korean are told by their characters, whatever the length; others by a
    statistical model, which needs a dozen letters. Addresses, @names and #tags are ignored,
    except where there is nothing else.
    """
    text = text[:_LANGUAGE_CHARS].strip()
    if not text:
        return EMPTY
    plain = _WEB.sub(" ", text).strip() or text
    letters = sum(char.isalpha() for char in plain)
    if not letters:
        return NO_WORDS
    han, kana, hangul = (len(pattern.findall(plain)) for pattern in (_HAN, _KANA, _HANGUL))
    if 3 * (han + kana + hangul) >= letters:  # each says as much as three letters
        if 2 * hangul > han + kana:
            return "ko"
        return "ja" if 8 * kana > han else "zh"
    if letters < _MIN_LETTERS:
        return SHORT
    code, sure = _model().classify(plain)
    return _WRITTEN_AS.get(code, str(code)) if sure >= _SURE else SHORT


@lru_cache(maxsize=1)
def _model() -> LanguageIdentifier:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
