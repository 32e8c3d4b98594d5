"""Bundles: whole or refused, replaced in one step, of one model or the mean of several."""

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from common.errors import BundleError, ConfigError, RetryableError
from config.tag_rules import TagFile, TagRules
from fusion.bundle import bundle
from fusion.bundle.about import Averaging
from fusion.bundle.bundle import Ensemble, averaged
from fusion.bundle.folder import newest_version, thresholds_of
from fusion.infer.inferer import Inferer, TagChooser
from fusion.metrics.calibration import Temperature
from tests.support.fusion import support
from tests.support.mistakes import one_line
from tests.support.processes import no_descriptors


def write(folder: Path, seed: int = 0, **changes: Any) -> str:
    torch.manual_seed(seed)
    return support.write_bundle(folder, **{"metrics": {"gap": 0.9}, **changes})


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    thresholds = np.linspace(0.1, 0.9, support.CLASSES).astype(np.float32)
    version = write(tmp_path / "b", thresholds=thresholds)
    loaded = bundle.load_bundle(tmp_path / "b")
    torch.manual_seed(0)
    state = support.model("token_transformer").state_dict()
    for key, value in loaded.model.state_dict().items():
        torch.testing.assert_close(value, state[key], rtol=0, atol=0)
    assert (loaded.name, loaded.version) == ("small", version)
    assert loaded.labels == support.LABELS
    assert loaded.manifest == support.manifest()
    assert loaded.metrics == {"gap": 0.9}
    np.testing.assert_allclose(loaded.thresholds, thresholds, atol=1e-6)
    np.testing.assert_allclose(thresholds_of(tmp_path / "b", version), thresholds, atol=1e-6)
    assert thresholds_of(tmp_path / "b", "20250101T000000Z-00000000") == ()
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == [
        "bundle.yaml",
        "labels.json",
        "model.safetensors",
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["b"], "nothing is left beside it"


def test_sure_scores_do_not_tie(tmp_path: Path) -> None:
    """Logits from 17 on are all 1 in float32, and posts that differ would be ranked by chance."""
    model = support.model("token_transformer")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)
    write(tmp_path / "b", model=model, calibration=Temperature(temperature=1.5))
    posts = [support.features(f"p{i}", seed=i) for i in range(60)]
    scores = Inferer.load(tmp_path / "b").scores(posts)
    assert (scores.astype(np.float32) == 1).sum() > 1
    assert len(np.unique(scores)) == scores.size


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _edit(path: Path, **changes: object) -> None:
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **changes}))


def _calibrated(**calibration: object) -> Callable[[Path], None]:
    return lambda folder: _edit(folder / "bundle.yaml", calibration=calibration)


def _isotonic(scores: list[float], values: list[float]) -> Callable[[Path], None]:
    return _calibrated(kind="isotonic", scores=scores, values=values)


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "bundle.yaml is missing"),
    "no weights": (lambda b: (b / "model.safetensors").unlink(), "model.safetensors: is missing"),
    "no labels": (lambda b: (b / "labels.json").unlink(), "labels.json: is missing"),
    "cut weights": (lambda b: _cut(b / "model.safetensors"), "model.safetensors: is truncated"),
    "other labels": (lambda b: (b / "labels.json").write_text('{"0": "x"}'), "labels.json: is tr"),
    "no YAML": (lambda b: (b / "bundle.yaml").write_text("a: [b"), "cannot be read"),
    "a list": (lambda b: (b / "bundle.yaml").write_text("- 1"), "keys and values"),
    "a lost key": (lambda b: (b / "bundle.yaml").write_text("format: 1"), "name: is required"),
    "few thresholds": (lambda b: _edit(b / "bundle.yaml", thresholds=[0.5]), "1 thresholds for 6"),
    "wild threshold": (lambda b: _edit(b / "bundle.yaml", thresholds=[7.0]), "in \\[0, 1\\]"),
    "other model": (
        lambda b: _edit(b / "bundle.yaml", model={"name": "concat_se"}),
        "does not fit the architecture",
    ),
    "no such calibration": (_calibrated(kind="magic"), "calibration"),
    "cold": (_calibrated(kind="temperature", temperature=0), "calibration.*greater than 0"),
    "falling": (_isotonic([0.1, 0.5], [0.9, 0.1]), "must not fall"),
    "unsorted": (_isotonic([0.5, 0.1], [0.1, 0.9]), "must rise"),
    "uneven": (_isotonic([0.5], [0.1, 0.9]), "equally many"),
    "wild": (_isotonic([0.1, 0.5], [0.1, 1.9]), r"in \[0, 1\]"),
    "empty": (_isotonic([], []), "calibration.*at least 1"),
    "other format": (lambda b: _edit(b / "bundle.yaml", format=9), "format"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_bundle_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    spoil, says = BROKEN[name]
    write(tmp_path / "b")
    spoil(tmp_path / "b")
    with one_line(BundleError, str(tmp_path / "b"), match=says):
        bundle.load_bundle(tmp_path / "b")


def test_a_bundle_that_cannot_be_read_now_is_not_broken(tmp_path: Path) -> None:
    write(tmp_path / "b")
    with no_descriptors(), pytest.raises(RetryableError, match="Too many open files"):
        Inferer.load(tmp_path / "b")


def test_bundles_of_before_still_load(tmp_path: Path) -> None:
    """Without the keys that came later: one model, no calibration, the sections that there were."""
    write(tmp_path / "b", subsets={"text": 0.5})
    scores = Inferer.load(tmp_path / "b").predict([support.features()])[0].scores
    assert bundle.load_bundle(tmp_path / "b").subsets == {"text": 0.5}
    path = tmp_path / "b" / "bundle.yaml"
    content = yaml.safe_load(path.read_text())
    for key in ("calibration", "subsets", "averaging", "members_sha256"):
        del content[key]
    sections = ("name", "modality_dropout", "tokens", "token_transformer")
    content["model"] = {key: content["model"][key] for key in sections}
    content["model"]["concat_se"] = {"modality_width": 16, "width": 32, "dropout": 0.1}
    path.write_text(yaml.safe_dump(content))
    loaded = bundle.load_bundle(tmp_path / "b")
    assert (len(loaded.members), loaded.subsets, loaded.calibration) == (1, {}, None)
    np.testing.assert_array_equal(Inferer(loaded).predict([support.features()])[0].scores, scores)


def test_versions_sort_by_time_and_end_in_the_weights(tmp_path: Path) -> None:
    first = write(tmp_path / "b", seed=1)
    assert newest_version(tmp_path / "b") == first
    second = write(tmp_path / "b", seed=2)
    assert newest_version(tmp_path / "b") == second
    assert first[:16] <= second[:16]
    assert first[-8:] != second[-8:]


def test_newest_version_of_nothing_is_none(tmp_path: Path) -> None:
    assert newest_version(tmp_path / "none") is None
    for text in ("", "a: [", "- 1", "version: 7"):
        (tmp_path / "bundle.yaml").write_text(text)
        assert newest_version(tmp_path) is None


def test_a_bundle_behind_a_link_is_read_and_replaced(tmp_path: Path) -> None:
    """`current` may be a link: it stays one, and shows the new bundle."""
    write(tmp_path / "b", seed=1)
    link = tmp_path / "current"
    link.symlink_to("b")
    assert Inferer.load(link).name == "small"
    version = write(link, seed=2)
    assert link.is_symlink()
    assert newest_version(link) == version == Inferer.load(link).version


def test_a_reader_never_sees_half_a_bundle(tmp_path: Path) -> None:
    folder = tmp_path / "b"
    write(folder)
    missing, done = [], threading.Event()

    def look() -> None:
        while not done.is_set():
            if newest_version(folder) is None:
                missing.append(1)

    reader = threading.Thread(target=look)
    reader.start()
    try:
        for seed in range(8):
            write(folder, seed)
    finally:
        done.set()
        reader.join()
    assert not missing


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match="cannot be written"):
        write(tmp_path / "file" / "b")


def test_scores_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    write(tmp_path / "b")
    posts = [
        support.features(f"p{i}", seed=i, lengths={"video": 1 + i, "ocr": i % 3}) for i in range(9)
    ]
    inferer = Inferer.load(tmp_path / "b", threads=1)
    together = inferer.predict(posts)
    in_twos = Inferer.load(tmp_path / "b", batch_size=2).predict(posts)
    for post, one, two in zip(posts, together, in_twos, strict=True):
        alone = inferer.predict([post])[0]
        assert one.post_id == post.post_id
        np.testing.assert_allclose(one.scores, alone.scores, atol=1e-5)
        np.testing.assert_allclose(one.scores, two.scores, atol=1e-5)
    assert inferer.predict([]) == []
    inferer.close()
    with pytest.raises(RuntimeError, match="closed"):
        inferer.predict(posts)


def test_tags_are_those_over_their_thresholds(tmp_path: Path) -> None:
    write(tmp_path / "low", thresholds=np.full(support.CLASSES, 0.0, np.float32))
    tags = Inferer.load(tmp_path / "low").predict([support.features()])[0]
    assert len(tags.tags) == support.CLASSES
    assert [t.score for t in tags.tags] == sorted((t.score for t in tags.tags), reverse=True)
    for tag in tags.tags:
        assert tag.name == support.LABELS.names[int(tag.id)]
        assert tag.score == pytest.approx(float(tags.scores[int(tag.id)]))
    write(tmp_path / "high", thresholds=np.full(support.CLASSES, 1.0, np.float32))
    assert Inferer.load(tmp_path / "high").predict([support.features()])[0].tags == ()


def chooser(rules: dict[str, Any]) -> TagChooser:
    """Thresholds of 0.9 for the first tag, 0.5 for the others."""
    made = SimpleNamespace(
        labels=support.LABELS, thresholds=np.array([0.9, 0.5, 0.5, 0.5, 0.5, 0.5], np.float32)
    )
    of_file = {key: rules[key] for key in rules if key in TagFile.model_fields}
    numbers = {key: rules[key] for key in rules if key not in TagFile.model_fields}
    rest = TagRules(**numbers, file=TagFile.model_validate(of_file))
    return TagChooser(made, rest)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rules", "tags"),
    [
        ({}, [(4, 0.7), (1, 0.6)]),
        ({"min_tags": 2}, [(4, 0.7), (1, 0.6)]),
        ({"min_tags": 4}, [(0, 0.8), (4, 0.7), (1, 0.6), (5, 0.4)]),
        ({"min_tags": 9}, [(0, 0.8), (4, 0.7), (1, 0.6), (5, 0.4), (2, 0.2), (3, 0.2)]),
        ({"max_tags": 1}, [(4, 0.7)]),
        ({"min_tags": 3, "max_tags": 3}, [(0, 0.8), (4, 0.7), (1, 0.6)]),
        # Hidden tags fill nothing up, and are not counted.
        ({"hide": ["tag4", "tag0"]}, [(1, 0.6)]),
        ({"hide": ["tag4", "tag0"], "min_tags": 2}, [(1, 0.6), (5, 0.4)]),
        # One of several reaches its threshold: the best of their scores counts.
        ({"map": {"A": {"id": "a", "tags": ["tag0", "tag1"]}}}, [("a", 0.8), (4, 0.7)]),
        ({"map": {"A": ["tag0", "tag5"]}}, [(4, 0.7), (1, 0.6)]),
        ({"rename": {"tag0": "tag4"}, "max_tags": 1}, [(4, 0.8)]),
    ],
)
def test_rules_choose_the_tags(rules: dict[str, Any], tags: list[tuple[int | str, float]]) -> None:
    """Thresholds first, then at least and at most so many; two tags that are one keep the best."""
    chosen, _ = chooser(rules).choose(np.array([0.8, 0.6, 0.2, 0.2, 0.7, 0.4]))
    assert [(tag.id, tag.score) for tag in chosen] == tags


@pytest.mark.parametrize(
    ("rules", "near"),
    [
        ({"near_misses": 9}, [(0, 0.8, 0.9), (5, 0.4, 0.5)]),
        ({"near_misses": 1}, [(0, 0.8, 0.9)]),
        ({"near_misses": 9, "min_tags": 3}, [(5, 0.4, 0.5)]),
        ({"near_misses": 9, "max_tags": 1}, [(0, 0.8, 0.9), (5, 0.4, 0.5)]),
        ({"near_misses": 9, "hide": ["tag0"]}, [(5, 0.4, 0.5)]),
        ({"near_misses": 9, "map": {"A": ["tag3", "tag5"]}}, [(0, 0.8, 0.9), (3, 0.4, 0.5)]),
        ({}, []),
    ],
)
def test_near_misses_are_the_nearest_to_their_thresholds(
    rules: dict[str, Any], near: list[tuple[int | str, float, Any]]
) -> None:
    """Of a tag that stands for several, the one that is nearest; none below half its threshold."""
    _, misses = chooser(rules).choose(np.array([0.8, 0.6, 0.2, 0.2, 0.7, 0.4]))
    assert [(each.id, each.score, pytest.approx(each.threshold)) for each in misses] == near


def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    write(tmp_path / "b")
    with pytest.raises(ConfigError, match=r"cuda:99: this machine has \d+ CUDA"):
        Inferer.load(tmp_path / "b", device="cuda:99")


def member(seed: int) -> Any:
    torch.manual_seed(seed)
    return support.model("token_transformer")


@pytest.mark.parametrize("averaging", ["probabilities", "logits"])
def test_an_ensemble_is_the_mean_of_its_members(averaging: Averaging, tmp_path: Path) -> None:
    """Served from one bundle it equals the members, each served alone and averaged by hand."""
    members = [member(seed) for seed in range(3)]
    version = write(tmp_path / "all", model=Ensemble(members, averaging))
    files = sorted(str(p.relative_to(tmp_path / "all")) for p in (tmp_path / "all").rglob("*.*"))
    assert files == [
        "bundle.yaml",
        "labels.json",
        "members/1.safetensors",
        "members/2.safetensors",
        "model.safetensors",
    ]
    features = [support.features(f"p{i}", seed=i, lengths={"ocr": i % 2}) for i in range(7)]
    each = []
    for i, one in enumerate(members):
        write(tmp_path / str(i), model=one)
        each.append(Inferer.load(tmp_path / str(i)).scores(features).astype(np.float64))
    if averaging == "probabilities":
        expected = np.mean(each, axis=0)
    else:
        expected = 1 / (1 + np.exp(-np.mean([np.log(s / (1 - s)) for s in each], axis=0)))
    inferer = Inferer.load(tmp_path / "all")
    np.testing.assert_allclose(inferer.scores(features), expected, atol=2e-6)
    assert np.abs(each[0] - each[1]).max() > 1e-3
    assert inferer.version == version
    assert len(bundle.load_bundle(tmp_path / "all").members) == 3


def test_sure_members_do_not_tie() -> None:
    """Probabilities that float32 rounds to 1 keep their order in the ensemble's logits."""
    logits = torch.tensor([[40.0, 50.0, -60.0], [30.0, 60.0, -70.0]])  # (members, tags)
    mean = averaged(logits, "probabilities")
    assert torch.isfinite(mean).all()
    assert mean[1] > mean[0] > 0 > mean[2]
    p = torch.sigmoid(torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=torch.float64))
    expected = torch.logit(p.mean(dim=0))
    torch.testing.assert_close(averaged(torch.logit(p), "probabilities"), expected)


def test_the_version_knows_every_member(tmp_path: Path) -> None:
    versions = [
        write(tmp_path / str(seed), model=Ensemble([member(0), member(seed)])) for seed in (1, 2)
    ]
    assert versions[0][-8:] != versions[1][-8:]


def test_a_member_that_is_missing_or_another_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "b"
    write(folder, model=Ensemble([member(0), member(1)]))
    other = folder / "members" / "1.safetensors"
    shutil.copy(folder / "model.safetensors", other)
    with pytest.raises(BundleError, match=r"members/1.safetensors: is truncated, or not"):
        bundle.load_bundle(folder)
    other.unlink()
    with pytest.raises(BundleError, match=r"members/1.safetensors: is missing"):
        bundle.load_bundle(folder)
