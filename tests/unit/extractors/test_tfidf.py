"""Character n-grams as a text encoder: against scikit-learn, alone and next to an encoder."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from sklearn.feature_extraction.text import TfidfVectorizer

import train_net
from common.errors import ConfigError, FeatureError
from common.post_set import PostSet
from config.features import FeatureSettings
from config.load import validate
from extractors.learned import learned_from
from extractors.models.tfidf import Tfidf
from extractors.suite import ExtractorSuite
from fusion.backbones.text import fit_tfidf
from tests.support.tiny_models import tiny_bert

TEXTS = ("A red  cat runs\nfast", "the red dog", "一只猫在海边唱歌", "一只猫", "cat " * 40, "")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Give the file that the command makes of `TEXTS`, each the text of one post."""
    posts = [{"post_id": str(i), "text": text, "ocr": "red"} for i, text in enumerate(TEXTS)]
    (tmp_path / "train.json").write_text(json.dumps(posts))
    settings = yaml.safe_load(Path("config/train_text.yaml").read_text("utf-8"))
    settings["data"]["train"] = str(tmp_path / "train.json")
    settings["trainer"]["save_dir"] = str(tmp_path / "run")
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(settings))
    assert train_net.main(["--model_config", str(tmp_path / "train.yaml")]) == 0
    return tmp_path / "run" / "weights" / "tfidf.safetensors"


def suite(**text: object) -> ExtractorSuite:
    loaded = ExtractorSuite(validate(FeatureSettings, {"text": text}, "test"), names=("text",))
    loaded.load()
    return loaded


def test_vectors_are_those_of_scikit_learn() -> None:
    """Over the same vocabulary; white space counts as one space."""
    ours = fit_tfidf(TEXTS, 25)
    assert len(ours.vocabulary) == 25
    theirs = TfidfVectorizer(
        analyzer="char", ngram_range=(1, 4), sublinear_tf=True, vocabulary=ours.vocabulary
    )
    lines = [" ".join(text.split()) for text in TEXTS]
    theirs.fit(line for line in lines if line)
    for line, text in zip(lines, TEXTS, strict=True):
        expected = theirs.transform([line]).toarray()[0]
        np.testing.assert_allclose(ours.vector(text), expected, atol=1e-6)


def test_the_vocabulary_is_of_the_most_texts() -> None:
    """An n-gram of one text alone is none of it, however often it stands there."""
    assert set(fit_tfidf(("abab", "ab", "b", "zzzz"), 9).vocabulary) == {"a", "b", "ab"}
    assert fit_tfidf(("abab", "ab", "b"), 1).vocabulary == ("b",)
    with pytest.raises(ConfigError, match="no two posts have texts"):
        fit_tfidf(("a", "b"), 9)


def test_it_is_an_encoder_of_texts(file: Path) -> None:
    """Alone: a unit vector for each text, none for an empty one; its file is the fingerprint."""
    texts = suite(arch="tfidf", weights=str(file))
    cat, again, empty, unknown = texts.run("text", ["red cat", "RED  cat", " \n", "\ud83d?"])
    assert cat.dtype == np.float16
    assert cat.shape == (1, texts.dims["text"])
    np.testing.assert_array_equal(cat, again)
    assert np.linalg.norm(cat.astype(float)) == pytest.approx(1, abs=1e-3)
    assert empty.shape == (0, texts.dims["text"])
    assert not unknown.any()
    [one, other] = texts.embed_texts("text", ["a cat", "a dog"])
    assert one @ other < 0.9
    other_file = file.with_name("other.safetensors")
    fit_tfidf(TEXTS[:3], 40).save(other_file, PostSet())
    assert suite(arch="tfidf", weights=str(other_file)).fingerprints != texts.fingerprints
    with pytest.raises(FeatureError, match="must be text"):
        texts.run("text", [b"bytes"])


def test_it_joins_the_vector_of_a_sentence_encoder(file: Path, tmp_path: Path) -> None:
    """Both parts have norm 1; one text's vector does not depend on the others."""
    bert = {"weights": str(tiny_bert(tmp_path / "bert", seed=2, dim=128)), "pooling": "mean"}
    alone, joined = suite(**bert), suite(**bert, tfidf=str(file))
    texts = ["a red cat", "the dog", "", "一只猫"]
    rows = joined.run("text", texts)
    assert joined.dims["text"] == 128 + suite(arch="tfidf", weights=str(file)).dims["text"]
    for row, text, of_bert in zip(rows, texts, alone.run("text", texts), strict=True):
        assert len(row) == (1 if text else 0)
        expected = of_bert / np.linalg.norm(of_bert.astype(float), axis=1, keepdims=True)
        np.testing.assert_allclose(row[:, :128], expected, atol=1e-3)
        np.testing.assert_allclose(np.linalg.norm(row[:, 128:].astype(float), axis=1), 1, atol=1e-3)
        np.testing.assert_allclose(row, joined.run("text", [text])[0], atol=2e-3)
    assert joined.fingerprints["text"] != alone.fingerprints["text"]
    tag = joined.embed_texts("text", ["cat"])
    np.testing.assert_allclose(tag[:, :128], alone.embed_texts("text", ["cat"]), atol=1e-3)
    assert not tag[:, 128:].any()  # a tag's texts say what it means, not its letters


@pytest.mark.parametrize("key", ["weights", "tfidf"])
def test_features_know_the_posts_that_it_was_made_of(file: Path, key: str) -> None:
    learned = learned_from(FeatureSettings(text={key: str(file), "pooling": "mean"}))
    assert learned.keys() == {"text", "ocr"}
    assert "0" in learned["text"]
    assert "another" not in learned["text"]


def test_mistakes_are_one_line(file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="set pooling to cls, mean or last"):
        suite(tfidf=str(file))
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"broken")
    for path in (broken, tmp_path / "missing"):
        with pytest.raises(ConfigError, match=r"features\.text\.weights: .* is not a TF-IDF file"):
            suite(arch="tfidf", weights=str(path))
    with pytest.raises(ConfigError, match=r"setting: .* is not a TF-IDF file"):
        Tfidf.load(broken, "setting")
