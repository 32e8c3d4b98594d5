"""A small BERT and its vocabulary, trained on the demo posts' texts and the words on signs."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from common.post import Post
from demo.lesson import Lesson, targets
from demo.parallel import tell
from fusion.data.data_file import read_whole_posts

_DIM, _LAYERS, _HEADS, _POSITIONS = 64, 2, 4, 128
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"


def train_text(lesson: Lesson) -> None:
    """Train a BERT from nothing and write it as a transformers folder.

    A post gives two examples, its text and the words of its pictures, each with all its tags.
    """
    posts, labels, sizes = read_whole_posts(lesson.train), lesson.labels, lesson.sizes
    settings = lesson.settings
    wanted = targets(posts, labels)
    texts, rows = _examples(posts)
    tokenizer = make_tokenizer(texts, settings.features.text.max_tokens)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = _make_model(len(tokenizer))
    head = nn.Linear(_DIM, len(labels))
    with torch.no_grad():
        head.bias.copy_(torch.logit(torch.from_numpy(wanted.mean(axis=0)).clamp(1e-3, 1 - 1e-3)))
    batch_size, epochs = sizes.batch_size["text"], sizes.epochs["text"]
    steps = epochs * -(-len(texts) // batch_size)
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=1.5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-3, total_steps=steps)
    random = np.random.default_rng(0)
    done, total_loss = 0, 0.0
    for epoch in range(1, epochs + 1):
        order = random.permutation(len(texts))
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            truth = torch.from_numpy(wanted[[rows[i] for i in chosen]])
            loss = _loss(model, head, tokenizer, [texts[i] for i in chosen], truth)
            optimizer.zero_grad(set_to_none=True)
            (loss * len(labels)).backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            done, total_loss = done + 1, float(loss.detach())
            tell("text", done, steps, f"epoch {epoch} loss {total_loss:.4f}")
    _save(model, tokenizer, Path(settings.features.text.weights))


def _examples(posts: Sequence[Post]) -> tuple[list[str], list[int]]:
    """Return texts, and the post that each belongs to."""
    texts, rows = [], []
    for i in range(len(posts)):
        for text in (posts[i].text, posts[i].ocr or ""):
            if text.strip():
                texts.append(text)
                rows.append(i)
    return texts, rows


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
    tokenizer_class: Any = PreTrainedTokenizerFast
    return tokenizer_class(
        tokenizer_object=tokenizer,
        model_max_length=max_tokens,
        pad_token="[PAD]",  # noqa: S106
        unk_token="[UNK]",  # noqa: S106
        cls_token="[CLS]",  # noqa: S106
        sep_token="[SEP]",  # noqa: S106
        mask_token="[MASK]",  # noqa: S106
    )


def _make_model(vocabulary: int) -> Any:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=_DIM,
        num_hidden_layers=_LAYERS,
        num_attention_heads=_HEADS,
        intermediate_size=2 * _DIM,
        max_position_embeddings=_POSITIONS,
    )
    return BertModel(config, add_pooling_layer=False)


def _loss(
    model: Any, head: nn.Linear, tokenizer: Any, texts: list[str], truth: torch.Tensor
) -> torch.Tensor:
    given = tokenizer(
        texts, padding=True, truncation=True, max_length=_POSITIONS, return_tensors="pt"
    )
    mask = given["attention_mask"]  # (texts, tokens)
    states = model(input_ids=given["input_ids"], attention_mask=mask).last_hidden_state
    # The best token of each class: one word may be all that tells.
    logits = head(states).masked_fill(mask[:, :, None] == 0, -1e4).amax(dim=1)  # (texts, classes)
    return nn.functional.binary_cross_entropy_with_logits(logits, truth)


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    from transformers.utils import logging

    partial = folder.with_name(f".{folder.name}.part")
    for old in (partial, folder):
        shutil.rmtree(old, ignore_errors=True)
    quiet: Any = logging.disable_progress_bar
    quiet()
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.replace(folder)
