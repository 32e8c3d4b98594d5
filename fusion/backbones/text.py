"""Text models out of posts' own texts, for a platform without one: a small BERT, and TF-IDF."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from common.errors import ConfigError
from common.files import new_folder
from common.post_set import PostSet
from extractors.learned import FILE, KEY
from extractors.models.tfidf import Tfidf, grams
from fusion.backbones.media import STREAM, MediaDataset
from fusion.backbones.model import Tagger
from fusion.models.base import Batch

_DIM, _LAYERS, _HEADS, _POSITIONS = 64, 2, 4, 128
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# N-grams that are counted at once; past it the rarer half is forgotten, which hardly takes any of
# those that most texts have. At 100 bytes each: half forgets sooner, double only takes memory.
_MOST_GRAMS = 5_000_000
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"


def fit_tfidf(texts: Iterable[str], vocabulary: int) -> Tfidf:
    """Return the n-grams that most texts have, with their weights; one text's own are left out.

    Raises:
        ConfigError: No text has an n-gram that another one has.
    """
    counts, frequency = 0, Counter[str]()
    for text in texts:
        counts += bool(text.strip())
        frequency.update(set(grams(text)))
        if len(frequency) > _MOST_GRAMS:
            rare = sorted(frequency.values())[len(frequency) // 2]
            frequency = Counter({gram: n for gram, n in frequency.items() if n > rare})
    known = [(-n, gram) for gram, n in frequency.items() if n > 1]
    chosen = sorted(known)[:vocabulary]
    if not chosen:
        raise ConfigError("no two posts have texts that share a character: TF-IDF learns nothing")
    df = -np.array([n for n, _ in chosen], np.float32)
    idf = (np.log((1 + counts) / (1 + df)) + 1).astype(np.float32)
    return Tfidf([gram for _, gram in chosen], idf)


def text_dataset(
    tokenizer: Any, texts: Sequence[str], targets: npt.NDArray[np.float32], post_ids: Sequence[str]
) -> MediaDataset:
    """Return texts as token IDs int64 ``(1, tokens)``, padded with 0 to the longest of all."""
    ids = tokenizer(list(texts), padding=True, truncation=True, return_tensors="np")["input_ids"]
    rows = [(post_id, row[None]) for post_id, row in zip(post_ids, ids, strict=True)]
    return MediaDataset(rows, targets, lambda tokens, _: tokens, max_items=1)


class TextTagger(Tagger):
    """BERT -> classifier of each token -> the best token of each class."""

    def __init__(self, vocabulary: int, classes: int) -> None:
        from transformers import BertConfig, BertModel

        super().__init__()
        config = BertConfig(
            vocab_size=vocabulary,
            hidden_size=_DIM,
            num_hidden_layers=_LAYERS,
            num_attention_heads=_HEADS,
            intermediate_size=2 * _DIM,
            max_position_embeddings=_POSITIONS,
        )
        bert: Any = BertModel(config, add_pooling_layer=False)
        self.bert, self.classify = bert, nn.Linear(_DIM, classes)

    def forward(self, batch: Batch) -> torch.Tensor:
        """Return logits ``(texts, classes)`` of token IDs ``(texts, 1, tokens)``."""
        ids = batch.tokens[STREAM][:, 0]  # (texts, tokens)
        ids = ids[:, : int((ids != 0).sum(dim=1).max())]
        mask = ids != 0
        states = self.bert(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        # (texts, tokens, classes) -> (texts, classes): one word may be all that tells.
        logits: torch.Tensor = (
            self.classify(states).masked_fill(~mask[:, :, None], -1e4).amax(dim=1)
        )
        return logits


def make_tokenizer(texts: Iterable[str], max_tokens: int) -> Any:
    """Return a WordPiece tokenizer: every word seen, and letters for those not seen.

    Chinese is split into its characters, as BERT does.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    normalizer = normalizers.BertNormalizer(lowercase=True)
    splitter = pre_tokenizers.BertPreTokenizer()
    words = {
        word for t in texts for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(t))
    }
    letters = [*_LETTERS, *(f"##{letter}" for letter in _LETTERS)]
    entries = [*_SPECIAL, *letters, *sorted(words - set(letters))]
    vocabulary = {entry: i for i, entry in enumerate(entries)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))  # noqa: S106  no secret
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitter
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    names = ("pad", "unk", "cls", "sep", "mask")
    special = {f"{name}_token": f"[{name.upper()}]" for name in names}
    tokenizer_class: Any = PreTrainedTokenizerFast
    return tokenizer_class(
        tokenizer_object=tokenizer, model_max_length=min(max_tokens, _POSITIONS), **special
    )


def save_text(tagger: TextTagger, tokenizer: Any, folder: Path, learned_from: PostSet) -> None:
    """Write the transformers folder that ``features.text.weights`` names, whole or not at all."""
    from transformers.utils import logging

    quiet: Any = logging.disable_progress_bar
    quiet()
    with new_folder(folder) as part:
        tagger.bert.save_pretrained(part)
        tokenizer.save_pretrained(part)
        (part / FILE).write_text(json.dumps({KEY: learned_from.as_text()}), encoding="utf-8")
