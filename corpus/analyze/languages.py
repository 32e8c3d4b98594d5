"""Which language a text is in."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from py3langid.langid import LanguageIdentifier

EMPTY, NO_WORDS, SHORT = "empty", "no words", "too short to tell"

_MAX_CHARS = 500
_MIN_LETTERS = 12
_SURE = 0.5
_WRITTEN_AS = {"wuu": "zh", "yue": "zh"}  # of a mixed text the model can only guess which Chinese
_WEB = re.compile(r"https?://\S+|[@#]\w+")
_KANA = re.compile(r"[\u3040-\u30ff\uff66-\uff9f]")
_HANGUL = re.compile(r"[\uac00-\ud7af\u1100-\u11ff]")
_HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af]")


def language_of(text: str) -> str:
    """ISO 639-1 code of a text's language, or `EMPTY`, `NO_WORDS` (emoji, digits), `SHORT`.

    Chinese, Japanese and Korean are told by their characters, whatever the length; others by a
    statistical model, which needs a dozen letters. Addresses, @names and #tags are passed over,
    but where nothing else is there.
    """
    text = text[:_MAX_CHARS].strip()
    if not text:
        return EMPTY
    plain = _WEB.sub(" ", text).strip() or text
    letters = sum(char.isalpha() for char in plain)
    if not letters:
        return NO_WORDS
    han, kana, hangul = (len(found.findall(plain)) for found in (_HAN, _KANA, _HANGUL))
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
