"""Text -> token features: against transformers itself, padding, truncation, odd text."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from common.errors import ConfigError, FeatureError
from common.precision import cpu_has_bf16
from config.features import TextSettings
from extractors.models.text import TextEncoder, TextExtractor, hashed_tokens
from tests.support.mistakes import one_line
from tests.support.tiny_models import tiny_bert

TEXTS = (
    "a red cat runs",
    "一只猫在海边唱歌",
    "x",
    "the quick brown fox jumps over the lazy dog 1234567890 " * 2,
    "猫狗" * 20,
)


def loaded(**settings: object) -> TextExtractor:
    extractor = TextExtractor(TextSettings(**settings))
    extractor.load()
    return extractor


def run(extractor: TextExtractor, *texts: str) -> list[np.ndarray]:
    return extractor.forward([extractor.preprocess(text) for text in texts])


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("bert"), seed=2, dim=128)


def test_features_are_those_of_transformers(bert: Path) -> None:
    """Each text's features equal a direct call of transformers on that text alone, float32."""
    extractor = loaded(weights=str(bert), precision="fp32", batch_size=3)
    model, tokenizer = AutoModel.from_pretrained(bert).eval(), AutoTokenizer.from_pretrained(bert)
    for text, array in zip(TEXTS, run(extractor, *TEXTS), strict=True):
        inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=128)
        with torch.no_grad():
            expected = model(**inputs).last_hidden_state[0].numpy()
        assert array.dtype == np.float16
        assert array.shape == expected.shape
        np.testing.assert_allclose(array, expected, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize(
    "precision",
    [
        "fp32",
        pytest.param("bf16", marks=pytest.mark.skipif(not cpu_has_bf16(), reason="CPU lacks bf16")),
    ],
)
def test_features_do_not_depend_on_the_batch(bert: Path, precision: str) -> None:
    extractor = loaded(weights=str(bert), precision=precision)
    for text, together in zip(TEXTS, run(extractor, *TEXTS), strict=True):
        np.testing.assert_allclose(together, run(extractor, text)[0], atol=1e-3)


def test_on_a_cpu_texts_of_one_width_share_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """There padding takes as long as words."""
    shapes: list[tuple[int, ...]] = []
    begin = TextEncoder.begin

    def noted(encoder: TextEncoder, *inputs: Any) -> Any:
        shapes.append(inputs[0].shape)
        return begin(encoder, *inputs)

    extractor = loaded(weights="random:1", precision="fp32")
    monkeypatch.setattr(TextEncoder, "begin", noted)
    short, long = "a cat", " ".join("word" * 12)
    run(extractor, short, long, short, short)
    assert sorted(shapes) == [(1, 56), (3, 8)]


def test_empty_and_odd_texts(bert: Path) -> None:
    """Text without a token gives no rows; lone surrogates and control characters are no crash."""
    extractor = loaded(weights=str(bert))
    arrays = run(extractor, "", "  \n\t", "\x00\x07", "cat \ud83d dog", "a")
    assert [len(array) for array in arrays[:3]] == [0, 0, 0]
    assert all(array.shape[1] == 128 for array in arrays)
    assert len(arrays[3]) > 4
    assert run(extractor) == []
    with pytest.raises(FeatureError, match="must be text"):
        extractor.preprocess(b"bytes")


def test_long_text_is_cut(bert: Path) -> None:
    """Text ends after max_tokens, and after what the model takes where that is less; fast."""
    text = "cat dog " * 1_000_000
    began = time.monotonic()
    assert len(run(loaded(weights=str(bert), max_tokens=40), text)[0]) == 40
    assert len(run(loaded(weights=str(bert), max_tokens=256), text)[0]) == 128  # its positions
    assert time.monotonic() - began < 5


def test_arch_may_be_a_local_folder(bert: Path) -> None:
    by_arch, by_weights = loaded(arch=str(bert)), loaded(weights=str(bert))
    assert by_arch.fingerprint == by_weights.fingerprint
    assert loaded(arch=str(bert), weights="random:1").fingerprint != by_arch.fingerprint


def test_random_weights_need_no_file() -> None:
    """random:SEED without a folder is a small built-in BERT whose words are hashed, no network."""
    extractor = loaded(weights="random:4")
    assert loaded(weights="random:4").fingerprint == extractor.fingerprint
    first, second = run(extractor, "red cat", "blue cat")
    assert first.shape == (4, 64)
    assert np.abs(first[1].astype(float) - second[1]).max() > 0.5  # another word, another vector
    assert (
        hashed_tokens("Red 猫狗, x_1!", 99)[1:-1] == hashed_tokens("red 猫 狗 , x _ 1 !", 99)[1:-1]
    )
    assert len(hashed_tokens("Red 猫狗, x_1!", 99)) == 2 + 8
    assert len(hashed_tokens("one two three", 3)) == 3


def test_the_fingerprint_names_weights_tokenizer_and_length(bert: Path, tmp_path: Path) -> None:
    other = tiny_bert(tmp_path / "other", seed=3, dim=128)
    vocabulary = tiny_bert(tmp_path / "vocabulary", seed=2, dim=128)
    words = (vocabulary / "vocab.txt").read_text("utf-8").split("\n")
    words[5], words[6] = words[6], words[5]
    (vocabulary / "vocab.txt").write_text("\n".join(words), "utf-8")
    prints = [
        loaded(weights=str(bert)).fingerprint,
        loaded(weights=str(bert), max_tokens=64).fingerprint,
        loaded(weights=str(other)).fingerprint,
        loaded(weights=str(vocabulary)).fingerprint,
    ]
    assert len(set(prints)) == 4
    again = loaded(weights=str(bert))
    run(again, "text")
    assert loaded(weights=str(bert)).fingerprint == again.fingerprint


def test_weights_that_lack_layers_are_refused(tmp_path: Path) -> None:
    folder = tiny_bert(tmp_path / "bert")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}), "utf-8")
    with one_line(ConfigError, match=r"features.text: .*lack encoder.layer.2"):
        loaded(weights=str(folder))


@pytest.mark.parametrize("broken", ["empty", "config", "weights"])
def test_broken_folders_are_one_line(tmp_path: Path, broken: str) -> None:
    folder = tmp_path / "bert"
    if broken == "empty":
        folder.mkdir()
    else:
        tiny_bert(folder)
        name = {"config": "config.json", "weights": "model.safetensors"}[broken]
        (folder / name).write_bytes(b"{ not what it says")
    with one_line(ConfigError, str(folder), match=r"features.text.*config.json"):
        loaded(weights=str(folder))
