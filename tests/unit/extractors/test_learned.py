"""The posts that weights were trained on: kept with the weights, told of features."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from common.errors import ConfigError
from common.post_set import PostSet
from config.features import FeatureSettings
from extractors.feature_file import read_features, read_header, write_features
from extractors.learned import FILE, learned_from, posts_of_weights, streams_of_post
from fusion.backbones.model import save_weights
from tests.support.fusion import support


@given(st.sets(st.text()), st.sets(st.text()))
def test_a_set_of_posts_is_a_set(one: set[str], other: set[str]) -> None:
    joined = PostSet.from_text(PostSet.of(one).as_text()) | PostSet.of(other)
    assert len(joined) == len(one | other)
    assert all(post in joined for post in one | other)
    assert ("another" in joined) == ("another" in one | other)


def test_weights_tell_what_they_have_learned_from(tmp_path: Path) -> None:
    """Files and folders of ours; of third parties nothing is known. The tensors stay alone."""
    linear, posts = torch.nn.Linear(3, 2), PostSet.of(["a", "b"])
    ours, theirs, folder = tmp_path / "o.safetensors", tmp_path / "t.safetensors", tmp_path / "bert"
    save_weights(linear, ours, "backbone", {"arch": "x"}, posts)
    save_file(dict(linear.state_dict()), theirs, metadata={"format": "pt"})
    folder.mkdir()
    (folder / FILE).write_text(json.dumps({"learned_from": posts.as_text()}))
    settings = FeatureSettings.model_validate(
        {
            "image": {"weights": str(ours)},
            "video": {"weights": str(theirs), "lstm": {"weights": str(ours)}},
            "audio": {"weights": "random:1"},
            "text": {"weights": str(folder)},
        }
    )
    assert load_file(ours).keys() == linear.state_dict().keys()
    learned = learned_from(settings)
    assert learned.keys() == {"image", "video_lstm", "text", "ocr"}
    assert streams_of_post("a", learned) == ("video_lstm", "image", "text", "ocr")
    assert streams_of_post("c", learned) == ()
    assert len(posts_of_weights(tmp_path / "weights.pth")) == 0
    ours.write_bytes(b"broken")
    with pytest.raises(ConfigError, match=r"o\.safetensors: cannot be read as weights"):
        learned_from(settings)


def test_a_feature_file_tells_it_of_its_post(tmp_path: Path) -> None:
    """Of no other post; and a file without the note is byte for byte what it was."""
    features = support.features("a")
    plain = write_features(tmp_path, features, support.FINGERPRINTS).read_bytes()
    assert b"learned_from" not in plain
    path = write_features(tmp_path, features, support.FINGERPRINTS, ("text", "image"))
    assert read_header(path).learned_from == ("image", "text")
    assert read_features(tmp_path, "a").arrays.keys() == features.arrays.keys()
