"""Data files are read as a stream and kept as numbers; their parts are alike."""

import json
import pickle
import tracemalloc
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from common.errors import ConfigError, FeatureError
from extractors.feature_file import write_features
from fusion.data import data_file
from fusion.data.data_file import Record, entries
from fusion.data.dataset import FeatureFiles, PostDataset
from fusion.data.posts import PostList, stratified_folds
from fusion.models.base import Collate
from tests.support.fusion import support
from tests.support.mistakes import one_line

ENTRIES: list[dict[str, Any]] = [
    {"post_id": "a", "labels": ["tag1", "tag3"], "features": "f/a.safetensors", "text": "x"},
    {
        "post_id": '猫\\"]}',
        "labels": [],
        "text": 'braces } ] , { and "quotes" 😀',
        "n": [1, [2, {}]],
    },
    {"post_id": "c", "labels": None, "text": "y" * 5000},
    {"post_id": "d" * 300, "labels": ["tag0"] * 2},
]


def written(folder: Path, name: str, content: list[Any], **how: Any) -> Path:
    file = folder / name
    if name.endswith(".jsonl"):
        text = "\n\n".join(json.dumps(entry, **how) for entry in content)
    else:
        text = json.dumps(content, **how)
    file.write_text(text, encoding="utf-8")
    return file


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize("block", [1, 2, 3, 7, 64, 1 << 20])
@pytest.mark.parametrize("how", [{}, {"ensure_ascii": False}, {"indent": 3}])
def test_entries_are_what_json_says_wherever_blocks_end(
    name: str, block: int, how: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values equal the json module's, and each stands at the bytes that its entry names."""
    if name == "a.jsonl" and "indent" in how:
        how = {}
    monkeypatch.setattr(data_file, "_BLOCK_BYTES", block)
    file = written(tmp_path, name, ENTRIES, **how)
    read = list(entries(file))
    assert [entry.value for entry in read] == ENTRIES
    raw = file.read_bytes()
    assert [json.loads(raw[entry.start : entry.start + entry.size]) for entry in read] == ENTRIES


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "must be a list"),
        ("{}", "entry 1: must have a post_id"),
        ("[", "entry 1"),
        ('[{"post_id": "a"}', "not a JSON data file"),
        ('[{"post_id": "a"} {"post_id": "b"}]', "behind entry 1 must be a comma"),
        ('[{"post_id": "a"},]', "entry 2"),
        ('[{"post_id": "a"}] x', "there is something after the list"),
        ('[{"post_id": "a}]', "entry 1: Unterminated string"),
        ("[1, 2]", "entry 1: must have a post_id"),
        ('[{"post_id": 3}]', "entry 1: must have a post_id"),
        ('[{"post_id": "a", "labels": "b"}]', "labels must be a list"),
        ('[{"post_id": "a", "features": 1}]', "features must be a text"),
        ('[{"post_id": "a"}, {"post_id": "a"}]', "post 'a' appears twice"),
        ("[" * 100_000, "not a JSON data file"),
        (" [ ] ", "holds no posts"),
    ],
)
def test_a_broken_data_file_is_one_line(text: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text(text)
    with one_line(ConfigError, str(file), says):
        PostList.read(file, support.LABELS)


def test_a_broken_line_is_named_by_its_number(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"post_id": "a"}\n{"post_id"\n')
    with pytest.raises(ConfigError, match="line 2: not JSON"):
        PostList.read(file, support.LABELS)
    (tmp_path / "b.json").write_bytes(b'[{"post_id": "\xff"}]')
    with pytest.raises(ConfigError, match=r"b\.json: not a JSON data file"):
        PostList.read(tmp_path / "b.json", support.LABELS)


def test_posts_come_back_as_they_stand_in_the_file(tmp_path: Path) -> None:
    file = written(tmp_path, "a.json", ENTRIES, ensure_ascii=False)
    posts = PostList.read(file, support.LABELS)
    for copy in (posts, pickle.loads(pickle.dumps(posts))):
        assert tuple(copy) == support.records(file)
    targets = np.zeros((4, support.CLASSES), np.float32)
    targets[0, [1, 3]] = targets[3, 0] = 1
    np.testing.assert_array_equal(posts.targets(), targets)
    np.testing.assert_array_equal(np.stack([posts.target(i) for i in range(4)]), targets)
    np.testing.assert_array_equal(posts.positives(), targets.sum(axis=0))


def test_the_author_of_a_post_comes_with_its_batch(tmp_path: Path) -> None:
    """From the data file, when the features are read and when they are kept; "" without one."""
    entries = []
    for author in ("ann", None, ""):
        post = support.features(f"by {author}", seed=1)
        path = write_features(tmp_path, post, support.FINGERPRINTS)
        entries.append({"post_id": post.post_id, "author": author, "features": str(path)})
    posts = PostList.read(written(tmp_path, "a.json", entries), support.LABELS)
    schema = support.schema()
    dataset = PostDataset(posts, FeatureFiles(), support.manifest(), schema, cache_mb=1)
    for _ in range(2):
        batch = Collate(schema)([dataset[row] for row in range(3)])
        assert batch.authors == batch.to("cpu").authors == ("ann", "", "")


def test_what_is_left_out_is_told(tmp_path: Path) -> None:
    content = [{"post_id": "a"}, {"post_id": "b", "labels": ["nope"]}, {}, {"post_id": "a"}]
    file = written(tmp_path, "a.json", content)
    told: list[tuple[str | None, str, str]] = []
    posts = PostList.read(file, support.LABELS, skip=lambda *mistake: told.append(mistake))
    assert tuple(posts) == (Record("a"),)
    assert [(who, kind) for who, kind, _ in told] == [
        ("b", "label"),
        (None, "entry"),
        ("a", "repeated"),
    ]
    assert "label 'nope' is not in the label map" in told[0][2]


def test_a_file_that_changes_is_noticed(tmp_path: Path) -> None:
    """Another post's text is never taken for a post's own."""
    file = written(tmp_path, "a.json", [{"post_id": "aa"}, {"post_id": "bb"}])
    posts = PostList.read(file, support.LABELS)
    for content in ([{"post_id": "ax"}, {"post_id": "bb"}], [{"p": 1}], []):
        file.write_text(json.dumps(content))
        with pytest.raises(ConfigError, match="has changed since"):
            posts[0]
    file.unlink()
    with pytest.raises(ConfigError, match="has changed since"):
        posts[1]


def test_a_post_takes_few_bytes(tmp_path: Path) -> None:
    """Ten times the posts add less than 100 bytes each, whatever their text is."""

    def kept_and_peak(count: int) -> tuple[int, int]:
        entry = '{"post_id": "post%d", "labels": ["tag1", "tag2"], "text": "' + "x" * 3_000 + '"}'
        file = tmp_path / f"{count}.json"
        file.write_text("[" + ",".join(entry % i for i in range(count)) + "]")
        tracemalloc.start()
        posts = PostList.read(file, support.LABELS)
        current, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert len(posts) == count
        return current, peak

    few, many = kept_and_peak(1_000), kept_and_peak(4_000)
    assert (many[0] - few[0]) / 3_000 < 60
    assert (many[1] - few[1]) / 3_000 < 200


def tagged(posts: int, classes: int, seed: int) -> tuple[Any, Any, npt.NDArray[np.bool_]]:
    """Posts with 0 to 3 tags, some tags far rarer than others: ends, labels, and the matrix."""
    chance = np.random.default_rng(seed)
    share = 1 / np.arange(1, classes + 1)
    rows = [
        chance.choice(classes, chance.integers(0, 4), replace=False, p=share / share.sum())
        for _ in range(posts)
    ]
    truth = np.zeros((posts, classes), np.bool_)
    for row, tags in zip(truth, rows, strict=True):
        row[tags] = True
    return np.cumsum([0, *map(len, rows)]), np.concatenate(rows), truth


@pytest.mark.parametrize(("posts", "classes", "folds"), [(400, 24, 5), (600, 60, 3), (40, 6, 2)])
def test_every_part_is_like_the_whole(posts: int, classes: int, folds: int) -> None:
    """Sizes differ by one or two; of each tag a part has its share, off by less than two posts."""
    ends, labels, truth = tagged(posts, classes, posts)
    part = stratified_folds(ends, labels, classes, folds, seed=1)
    sizes = np.bincount(part, minlength=folds)
    assert sizes.sum() == posts
    assert sizes.max() - sizes.min() <= 2
    counts = np.stack([truth[part == i].sum(axis=0) for i in range(folds)])  # (folds, classes)
    off = np.abs(counts - truth.sum(axis=0) / folds)
    assert off.max() < 2
    random = np.random.default_rng(0).permutation(posts) % folds
    by_chance = np.stack([truth[random == i].sum(axis=0) for i in range(folds)])
    assert off.mean() < 0.5 * np.abs(by_chance - truth.sum(axis=0) / folds).mean()


def test_parts_depend_on_the_seed_alone() -> None:
    ends, labels, _ = tagged(200, 12, 3)
    first, again, other = (stratified_folds(ends, labels, 12, 4, seed=s) for s in (7, 7, 8))
    assert (first == again).all()
    assert (first != other).any()


def test_posts_without_tags_and_repeated_tags() -> None:
    """Both are dealt evenly; a tag that appears twice on a post counts once."""
    part = stratified_folds(np.zeros(11, int), [], 3, 2, seed=0)
    assert sorted(np.bincount(part).tolist()) == [5, 5]
    part = stratified_folds([0, 2, 4, 6, 8], [1, 1, 1, 1, 1, 1, 1, 1], 3, 2, seed=0)
    assert np.bincount(part).tolist() == [2, 2]


@pytest.mark.parametrize(("posts", "folds"), [(3, 4), (5, 1)])
def test_parts_that_cannot_be(posts: int, folds: int) -> None:
    with pytest.raises(ValueError, match=f"{posts} posts cannot be split into {folds} folds"):
        stratified_folds(np.arange(posts + 1), np.zeros(posts, int), 1, folds, seed=0)


@pytest.fixture
def lists(tmp_path: Path) -> tuple[PostList, PostList]:
    paths = [support.write_posts(tmp_path, name, n, n) for name, n in (("a", 9), ("b", 5))]
    first, second = (PostList.read(path, support.LABELS) for path in paths)
    return first, second


def test_a_pool_is_its_lists_one_after_another(lists: tuple[PostList, PostList]) -> None:
    pool, rows = PostList.joined(lists), [13, 0, 9, 8, 4]
    both = [record.post_id for some in lists for record in some]
    targets = np.concatenate([some.targets() for some in lists])
    assert [record.post_id for record in pool] == both
    np.testing.assert_array_equal(pool.targets(), targets)
    np.testing.assert_array_equal(pool.positives(), targets.sum(axis=0))
    some = pool.take(rows)
    assert [record.post_id for record in some] == [both[i] for i in rows]
    np.testing.assert_array_equal(some.targets(), targets[rows])
    np.testing.assert_array_equal(some.positives(), targets[rows].sum(axis=0))
    assert [record.post_id for record in some[1:3]] == [both[0], both[9]]
    assert some.take([2])[0].post_id == both[9]
    assert len(pool.take([])) == 0
    assert some.entry(0)["post_id"] == both[13]
    ends, labels = some.label_rows()
    assert set(labels[ends[1] : ends[2]]) == set(np.flatnonzero(targets[0]))
    assert PostList.joined(lists).digest() == pool.digest() != some.digest()


def test_a_post_in_two_files_is_refused(lists: tuple[PostList, PostList], tmp_path: Path) -> None:
    """It would be learned in one fold as what it is judged by in another."""
    entries = json.loads(lists[1].paths[0].read_text())
    entries[2]["post_id"] = "a4"
    file = tmp_path / "c.json"
    file.write_text(json.dumps(entries))
    again = PostList.read(file, support.LABELS)
    with pytest.raises(ConfigError, match=r"post 'a4' is in .*a\.json and in .*c\.json"):
        PostList.joined((lists[0], again))


def test_a_missing_feature_file_tells_where_it_was_looked_for(tmp_path: Path) -> None:
    files = FeatureFiles(tmp_path / "features")
    for read in (partial(files.features, "p", None, None), partial(files.header, "p", None)):
        with pytest.raises(FeatureError, match=f"features names the folder .*{tmp_path}/features"):
            read()
