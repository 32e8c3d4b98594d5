"""Tags by their texts: bundles without training, labels that calibrate, tags added by text."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from common.errors import ConfigError
from common.post import Features, Stream
from config.fusion_models import ModelSettings
from config.tags import TagTexts
from extractors.feature_file import write_features
from fusion.bundle.bundle import Bundle, load_bundle, save_bundle
from fusion.bundle.tag_vectors import TagRows, start_from_texts, with_tags, zero_shot
from fusion.data.dataset import FeatureFiles
from fusion.data.posts import PostList
from fusion.infer.inferer import Inferer
from fusion.metrics.ranking import GapMeter
from fusion.models import build_model
from fusion.models.base import Collate, FeatureManifest, InputSchema, Sample

DIM, NAMES = 24, tuple(f"tag{i}" for i in range(8))
STREAMS: tuple[Stream, ...] = ("image", "text")


def embed(texts: Sequence[str]) -> npt.NDArray[np.float32]:
    """A sentence encoder of one direction a word, and one that all texts share."""
    words = {name: np.eye(DIM)[i] for i, name in enumerate((*NAMES, "new", "other"))}
    rows = [np.eye(DIM)[-1] + sum(words.get(w, np.zeros(DIM)) for w in t.split()) for t in texts]
    vectors = np.stack(rows).astype(np.float32)
    unit: npt.NDArray[np.float32] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit


def texts(*tags: Any) -> TagTexts:
    return TagTexts.model_validate({"tags": tags or NAMES})


def manifest(streams: Sequence[Stream] = STREAMS) -> FeatureManifest:
    return FeatureManifest(dict.fromkeys(streams, DIM), {s: f"{s}-1" for s in streams})


def post(name: str, *tags: str, noise: float = 0.2, hidden: str = "") -> Features:
    chance = np.random.default_rng(sum(map(ord, name)))
    arrays: dict[Stream, Any] = {}
    for stream, much in (("image", 2 * noise), ("text", noise)):
        if stream != hidden:
            row = embed([" ".join(tags)]) + chance.normal(0, much / np.sqrt(DIM) * 2, (1, DIM))
            arrays[stream] = (row * 3).astype(np.float16)  # type: ignore[index]
    return Features(name, arrays, {})


def clear(name: str, *tags: str, hidden: str = "") -> Features:
    return post(name, *tags, noise=0.05, hidden=hidden)


def data_file(
    folder: Path, count: int, *, noise: float = 0.6, learned: Sequence[int] = ()
) -> PostList:
    entries, chance = [], np.random.default_rng(3)
    for i in range(count):
        tags = [NAMES[t] for t in chance.choice(len(NAMES), chance.integers(1, 3), replace=False)]
        hidden = ("image", "text", "")[i % 3]
        path = write_features(
            folder,
            post(f"p{i}", *tags, noise=noise, hidden=hidden),
            manifest().fingerprints,
            learned_from=("image",) if i in learned else (),
        )
        labels = tags if i % 2 else []
        entries.append({"post_id": f"p{i}", "labels": labels, "features": str(path)})
    file = folder / "posts.json"
    file.write_text(json.dumps(entries), encoding="utf-8")
    return PostList.read(file, texts().labels())


def made(posts: PostList | None = None, *tags: Any) -> Bundle:
    tag_texts = texts(*tags)
    rows = dict.fromkeys(STREAMS, TagRows.of(tag_texts, embed))
    return zero_shot(tag_texts, rows, manifest(), posts, FeatureFiles(), name="z")


def test_name_synonyms_and_descriptions_count_alike() -> None:
    """However many there are of each; a tag without has what is left."""
    tag = {"name": "tag1", "synonyms": ["tag2"] * 3, "descriptions": ["other", "other other"]}
    tag_texts = TagTexts.model_validate({"templates": ["{}", "a {}"], "tags": [tag, "tag3"]})
    one, two = TagRows.of(tag_texts, embed).vectors.numpy()
    np.testing.assert_allclose(two, embed(["tag3"])[0], atol=1e-6)
    parts = [embed(["tag1"])[0], embed(["tag2"])[0], embed(["other", "other other"]).mean(axis=0)]
    total = sum(part / np.linalg.norm(part) for part in parts)
    np.testing.assert_allclose(one, total / np.linalg.norm(total), atol=1e-6)


def names_of(bundle: Bundle, *posts: Features) -> list[set[str]]:
    return [{tag.name for tag in tags.tags} for tags in Inferer(bundle).predict(posts)]


def test_without_posts_a_tag_is_given_to_posts_that_speak_of_it() -> None:
    """Also where a modality is missing; a post that has nothing, or something else, gets none."""
    bundle = made()
    posts = [
        clear("a", "tag1"),
        clear("b", "tag2", hidden="image"),
        clear("c", "tag3", hidden="text"),
    ]
    assert names_of(bundle, *posts) == [{"tag1"}, {"tag2"}, {"tag3"}]
    assert names_of(bundle, clear("d", "other"), Features("e", {}, {})) == [set(), set()]
    assert bundle.metrics == {}


def test_labels_calibrate_scores_and_the_weights_of_modalities(tmp_path: Path) -> None:
    """Scores of new posts are near the share that is right, and the better modality counts more."""
    bundle = made(data_file(tmp_path, 400))
    image, text = dict(bundle.members[0].named_parameters())["mixing"].mean(dim=1).tolist()
    assert text > image
    assert bundle.metrics["f1_micro"] > 0.7
    chance, scores, truth = np.random.default_rng(5), [], []
    for i in range(200):
        tags = [NAMES[t] for t in chance.choice(len(NAMES), 1)]
        scores.append(Inferer(bundle).scores([post(f"new{i}", *tags, noise=0.6)])[0])
        truth.append([name in tags for name in NAMES])
    assert np.mean(scores) == pytest.approx(np.mean(truth), abs=0.08)
    meter = GapMeter()
    meter.add(np.array(scores), np.array(truth))
    assert meter.value() > 0.8


@pytest.mark.parametrize(
    ("learned", "by"),
    [((), range(1, 40, 2)), (range(20), range(21, 40, 2)), (range(40), ())],
    ids=["none", "some", "all"],
)
def test_posts_that_an_encoder_was_trained_on_calibrate_nothing(
    tmp_path: Path, learned: Sequence[int], by: Sequence[int]
) -> None:
    """The bundle knows those that did: figures of them say nothing of new posts."""
    bundle = made(data_file(tmp_path, 40, learned=learned))
    assert [i for i in range(40) if f"p{i}" in bundle.learned_from] == list(by)
    assert bundle.seen_posts == len(by)
    assert bool(bundle.metrics) == bool(by)
    save_bundle(tmp_path / "bundle", bundle)
    again = load_bundle(tmp_path / "bundle")
    assert (again.seen_posts, len(again.learned_from)) == (len(by), len(by))


def test_synonyms_descriptions_and_negatives_move_a_tag() -> None:
    tags = [*NAMES[2:], {"name": "x", "synonyms": ["tag0"], "negatives": ["tag1"]}]
    plain = made(None, *NAMES[2:], {"name": "x", "descriptions": ["tag0"]})
    against = made(None, *tags)
    both = post("a", "tag0", "tag1", noise=0.0)
    one, other = (Inferer(bundle).scores([both])[0][-1] for bundle in (plain, against))
    assert one > other


def test_a_tag_added_by_text_leaves_the_others_alone(tmp_path: Path) -> None:
    """It is found at once; the scores of the others are what they were, in the written bundle."""
    before = made(data_file(tmp_path, 200))
    more = texts("new")
    after = with_tags(before, more, dict.fromkeys(STREAMS, TagRows.of(more, embed)))
    save_bundle(tmp_path / "b", after)
    bundle = load_bundle(tmp_path / "b")
    assert bundle.labels.names == (*NAMES, "new")
    posts = [post("a", "new", noise=0.1), post("b", "tag4", noise=0.1)]
    assert names_of(bundle, *posts) == [{"new"}, {"tag4"}]
    np.testing.assert_allclose(
        Inferer(bundle).scores(posts)[:, :-1], Inferer(before).scores(posts), atol=1e-6
    )
    with pytest.raises(ConfigError, match="'new' is in the bundle already"):
        with_tags(bundle, more, {})


def test_a_training_starts_with_the_texts_of_a_bundle(tmp_path: Path) -> None:
    """Its tags in the order of the training's labels; what does not fit is one line."""
    earlier = made()
    save_bundle(tmp_path / "z", earlier)
    labels = texts("tag5", "tag1").labels()

    def start(tags: Any = labels, of: FeatureManifest | None = None, **options: Any) -> Any:
        options = {"start": tmp_path / "z", **options}
        settings = ModelSettings.model_validate({"name": "tag_text", "tag_text": options})
        of = of or manifest()
        model = build_model(InputSchema.of(of, settings.tokens, len(tags)), settings)
        start_from_texts(model, settings, of, tags)
        return model

    old: Any = earlier.model
    model = start()
    torch.testing.assert_close(model.vectors["text"][0], old.vectors["text"][5])
    assert bool(model.from_texts)
    joined = start(projected={"image": "text"})
    assert list(joined.vectors) == ["text"]
    assert list(joined.maps) == ["image"]
    with pytest.raises(ConfigError, match="has no tag 'gone'"):
        start(texts("gone").labels())
    with pytest.raises(ConfigError, match=r"audio: name it in model\.tag_text\.projected"):
        start(of=manifest(("audio", "text")))
    wrong = FeatureManifest({"text": DIM}, {"text": "text-2"})
    with pytest.raises(ConfigError, match="text features are not made like its texts"):
        start(of=wrong)
    with pytest.raises(ConfigError, match="image cannot go into the space of video"):
        start(projected={"image": "video"})


@pytest.mark.parametrize("unit", [False, True])
def test_a_linear_probe_is_pulled_to_the_texts_of_a_bundle(tmp_path: Path, unit: bool) -> None:
    """A tag without posts is found by its text, and one that posts show otherwise by those."""
    save_bundle(tmp_path / "z", made())
    labels = texts("tag3", "tag1", "tag0").labels()
    options = {"start": tmp_path / "z", "penalties": [0.1], "unit": unit}
    settings = ModelSettings.model_validate({"name": "linear_probe", "linear_probe": options})
    schema = InputSchema.of(manifest(), settings.tokens, len(labels))

    def probe(of: FeatureManifest) -> Any:
        model = build_model(InputSchema.of(of, settings.tokens, len(labels)), settings)
        start_from_texts(model, settings, of, labels)
        return model

    def batch(*posts: Features) -> Any:
        rows = {"tag1": (0.0, 1.0, 0.0), "tag0": (0.0, 0.0, 0.0), "other": (0.0, 0.0, 1.0)}
        samples = [
            Sample(p.post_id, p.arrays, np.array(rows[p.post_id.split()[0]], np.float32))
            for p in posts
        ]
        return Collate(schema)(samples)

    model = probe(manifest())
    shown = [post(f"{tag} {i}", tag) for tag in ("tag1", "tag0", "other") for i in range(20)]
    assert len(list(model.solutions([batch(*shown)]))) == 1
    new = [clear("other a", "tag3"), clear("tag1 b", "tag1"), clear("other c", "other")]
    assert model.eval()(batch(*new)).argmax(dim=1).tolist() == [0, 1, 2]
    only_text = probe(FeatureManifest({"text": DIM, "audio": 3}, {"text": "text-1", "audio": "x"}))
    assert only_text.start[0][:, :3].abs().sum() == 0
    with pytest.raises(ConfigError, match=r"model\.linear_probe\.start: .* no texts .* of audio"):
        probe(FeatureManifest({"audio": 3}, {"audio": "x"}))
