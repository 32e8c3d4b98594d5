"""`build_trainval_data.py` and `build_label_map.py` on feature files with planted faults."""

import errno
import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.post import Features
from config.labels import LabelMap
from corpus.build import index, label_map
from corpus.build.command import main
from corpus.records import AtomicLines
from extractors.feature_file import feature_path, write_features
from tests.support.fusion import support

TAGS = tuple(f"tag{i}" for i in range(6))
ABSENT = {"image": "missing", "audio": "missing", "video": "missing", "ocr": "missing"}


def _features(root: Path, post_id: str, fingerprint: str = "bert-1", value: float = 1.0) -> None:
    array = np.full((1, 4), value, np.float16)
    features = Features(post_id, {"text": array}, {"text": "ok", **ABSENT})  # type: ignore[dict-item]
    write_features(root, features, {"text": fingerprint})


def _post(number: int, **more: Any) -> dict[str, Any]:
    own = {"post_id": f"p{number}", "labels": [TAGS[number % 6]], "text": f"text {number} of many"}
    return {**own, "images": [f"media/{number}.jpg"], "author": f"author {number}", **more}


def _corpus(folder: Path, posts: list[Any]) -> Path:
    path = folder / "posts.jsonl"
    lines = [p if isinstance(p, str) else json.dumps(p, ensure_ascii=False) for p in posts]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "labels.json").write_text(json.dumps(LabelMap(TAGS).as_json()))
    for post in posts:
        if isinstance(post, dict) and not feature_path(folder / "f", post["post_id"]).exists():
            _features(folder / "f", post["post_id"])
    return path


def _build(folder: Path, *more: str, out: str = "out") -> int:
    named = {"input": "posts.jsonl", "features": "f", "labels": "labels.json", "out": out}
    asked = [part for key, name in named.items() for part in (f"--{key}", str(folder / name))]
    return main([*asked, *more])


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_what_cannot_be_learned_from_is_named_with_its_reason(tmp_path: Path) -> None:
    good = [_post(i) for i in range(60)]
    faults: list[Any] = [
        '{"post_id": "broken',
        _post(100, labels=[]),
        _post(101, labels=["nowhere"]),
        _post(3),
        _post(102),
        _post(103),
        _post(104),
        _post(105),
    ]
    posts = _corpus(tmp_path, [*good, *faults])
    feature_path(tmp_path / "f", "p102").unlink()
    feature_path(tmp_path / "f", "p103").write_bytes(b"no safetensors")
    _features(tmp_path / "f", "p104", fingerprint="bert-2")
    _features(tmp_path / "f", "p105", value=float("nan"))
    assert _build(tmp_path, "--unknown", "skip_post", "--check", "full") == 0
    assert posts.exists()
    left_out = {
        (each["post_id"], each["reason"]) for each in _lines(tmp_path / "out/left_out.jsonl")
    }
    assert left_out == {
        (None, "broken line"),
        ("p100", "no labels"),
        ("p101", "label not in the map"),
        ("p3", "post_id appears twice"),
        ("p102", "no feature file"),
        ("p103", "broken feature file"),
        ("p104", "features made otherwise than most"),
        ("p105", "broken feature file"),
    }
    used = [
        record["post_id"]
        for side in ("train", "valid", "test")
        for record in json.loads((tmp_path / f"out/{side}_cls6.json").read_text())
    ]
    assert sorted(used) == sorted(f"p{i}" for i in range(60))
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["failed"]["no labels"] == 1
    assert summary["done"] == 60


def test_json_has_files_and_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _corpus(tmp_path, [_post(n) for n in range(60)])
    assert _build(tmp_path, "--json") == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert report["files"][0] == str(tmp_path / "out" / "train_cls6.json")
    assert (report["total"], report["done"]) == (60, 60)
    assert report["files"][0] in printed.err


def test_what_belongs_together_is_never_on_two_sides(tmp_path: Path) -> None:
    """Planted authors, media, copied texts and near-duplicates, in chains, over 600 posts."""
    random = np.random.default_rng(0)
    posts, groups = [], defaultdict(list)
    for i in range(600):
        post = _post(i)
        kind = ("author", "media", "text", "near", "none")[int(random.integers(5))]
        key = f"{kind}-{int(random.integers(30))}"
        if kind == "author":
            post["author"] = key
        elif kind == "media":
            post["images"] = [f"media/{key.encode().hex():0<64}"[:70] + ".jpg"]
        elif kind == "text":
            post["text"] = f"The same long text of {key}   Again" + " " * int(random.integers(3))
        if kind != "none":
            groups[key].append(post["post_id"])
        posts.append(post)
    _corpus(tmp_path, posts)
    near = [{"kind": "near_image", "members": m} for k, m in groups.items() if "near" in k]
    (tmp_path / "dup.jsonl").write_text("".join(json.dumps(each) + "\n" for each in near))
    assert _build(tmp_path, "--duplicates", str(tmp_path / "dup.jsonl")) == 0
    side = {each["post_id"]: each["side"] for each in _lines(tmp_path / "out/split.jsonl")}
    assert len(side) == 600
    assert all(len({side[member] for member in members}) == 1 for members in groups.values())
    assert sum(len(members) > 1 for members in groups.values()) > 80
    counts = [list(side.values()).count(name) for name in ("train", "valid", "test")]
    assert np.abs(np.array(counts) - [480, 60, 60]).max() <= 12
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert float(summary["largest deviation of a tag's share"].split("%")[0]) < 10


def test_media_are_the_same_by_their_content(tmp_path: Path) -> None:
    """Two URLs with one content are one medium: the manifest says so."""
    _corpus(tmp_path, [_post(i) for i in range(40)])
    lines = [
        {"source": f"media/{i}.jpg", "status": "ok", "sha256": "ab" * 32, "path": f"m/{i}.jpg"}
        for i in (1, 9, 17)
    ]
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert _build(tmp_path, "--manifest", str(manifest)) == 0
    group = {each["post_id"]: each["group"] for each in _lines(tmp_path / "out/split.jsonl")}
    assert group["p1"] == group["p9"] == group["p17"] != group["p2"]


def test_a_second_run_gives_the_same_bytes(tmp_path: Path) -> None:
    """The same seed, the same split; the trainer reads both formats."""
    _corpus(tmp_path, [_post(i) for i in range(80)])
    for out, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        assert _build(tmp_path, "--seed", seed, out=out) == 0
    name = "split.jsonl"
    for form in ("json", "jsonl"):
        assert _build(tmp_path, "--format", form, out=form) == 0
        record: Any = support.records(tmp_path / form / f"train_cls6.{form}")[0]
        assert record.features.exists()
        assert record.labels[0] in TAGS
    first, second, third = ((tmp_path / o / name).read_bytes() for o in ("a", "b", "c"))
    assert first == second != third
    assert (tmp_path / "a/train_cls6.json").read_bytes() == (
        tmp_path / "b/train_cls6.json"
    ).read_bytes()


def test_a_disk_that_is_full_at_the_end_leaves_the_earlier_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last bytes do not fit: exit 1, and all files are those of the run before."""
    _corpus(tmp_path, [_post(i) for i in range(60)])
    assert _build(tmp_path) == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def full(lines: AtomicLines) -> None:
        if lines.path.name == "split.jsonl":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(lines.path))

    monkeypatch.setattr(AtomicLines, "sync", full)
    assert _build(tmp_path, "--seed", "1") == 1
    assert "split.jsonl: No space left on device" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_a_smaller_split_leaves_no_old_side(tmp_path: Path) -> None:
    """The validation file of an earlier run would share posts with the new training file."""
    _corpus(tmp_path, [_post(i) for i in range(60)])
    assert _build(tmp_path) == 0
    assert _build(tmp_path, "--valid", "0") == 0
    assert sorted(path.name for path in (tmp_path / "out").glob("*_cls6.json")) == [
        "idx2name_cls6.json",
        "test_cls6.json",
        "train_cls6.json",
    ]


def test_kept_posts_stay_new_ones_join(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A grown corpus: the test set of before stays one; a link to it pulls a training post over."""
    posts = [_post(i) for i in range(60)]
    _corpus(tmp_path, posts)
    assert _build(tmp_path, out="old") == 0
    old = {each["post_id"]: each["side"] for each in _lines(tmp_path / "old/split.jsonl")}
    tested = next(p for p, side in old.items() if side == "test")
    learned = next(p for p, side in old.items() if side == "train")
    grown = [*posts, *(_post(i) for i in range(60, 120))]
    for post in grown:
        if post["post_id"] in (tested, learned):
            post["author"] = "one and the same"
    _corpus(tmp_path, grown)
    assert _build(tmp_path, "--keep", str(tmp_path / "old/split.jsonl"), out="new") == 0
    new = {each["post_id"]: each["side"] for each in _lines(tmp_path / "new/split.jsonl")}
    assert new[learned] == "test"
    assert {p: s for p, s in new.items() if p in old and p != learned} == {
        p: s for p, s in old.items() if p != learned
    }
    assert json.loads((tmp_path / "new/summary.json").read_text())["moved by new links"] == 1
    said = capsys.readouterr().out
    assert f"1 posts move, linked with posts of a later side\n  {learned}: train -> test\n" in said


def _sides(folder: Path) -> dict[str, str]:
    return {each["post_id"]: each["side"] for each in _lines(folder / "split.jsonl")}


@pytest.mark.parametrize("form", ["json", "jsonl"])
def test_exact_split_stays(tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Linked posts too, which are counted; posts that it does not name are left out."""
    posts = [_post(i, author="all of one") for i in range(40)]
    _corpus(tmp_path, posts)
    ids = [post["post_id"] for post in posts]
    ids_of = {"train": ids[:25], "valid": ids[25:28], "test": [*ids[28:37], "unknown"]}
    lines = [{"post_id": p, "side": side} for side, some in ids_of.items() for p in some]
    path = tmp_path / f"given.{form}"
    path.write_text(
        json.dumps(ids_of) if form == "json" else "\n".join(map(json.dumps, lines)), "utf-8"
    )
    assert _build(tmp_path, "--split", str(path)) == 0
    assert _sides(tmp_path / "out") == {
        p: s for s, some in ids_of.items() for p in some[:25] if p != "unknown"
    }
    left_out = {each["post_id"]: each["reason"] for each in _lines(tmp_path / "out/left_out.jsonl")}
    assert left_out == dict.fromkeys(ids[37:], "not in --split")
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["authors, media and texts on two sides"] == 1
    # A side of its own is enough; and what it says must be a split.
    path.write_text(json.dumps({"train": ids}), "utf-8")
    assert _build(tmp_path, "--split", str(path)) == 0
    assert set(_sides(tmp_path / "out").values()) == {"train"}
    for content, message in (
        ({"train": ids, "test": ids[:1]}, "post 'p0' is on two sides"),
        ({"train": ids, "dev": []}, "'dev' must be one of train, valid, test"),
        ({"train": [7]}, "a post_id must be a text: got 7"),
    ):
        path.write_text(json.dumps(content), "utf-8")
        assert _build(tmp_path, "--split", str(path), out="none") == 2
        assert message in capsys.readouterr().err


def test_a_split_by_time_holds_every_later_post(tmp_path: Path) -> None:
    """And no earlier one, whoever its author is; the earlier posts are dealt in their groups."""
    posts = [
        _post(i, author=f"a{i % 30}", created=f"2026-0{1 + i // 30}-{1 + i % 28:02}T12:00:00Z")
        for i in range(120)
    ]
    posts.append(_post(120, created=None))
    _corpus(tmp_path, posts)
    assert _build(tmp_path, "--test_since", "2026-04-01") == 0
    sides = _sides(tmp_path / "out")
    assert {p for p, side in sides.items() if side == "test"} == {f"p{i}" for i in range(90, 120)}
    assert all(len({sides[f"p{i + n}"] for n in (0, 30, 60)}) == 1 for i in range(30))
    assert 3 <= list(sides.values()).count("valid") <= 15
    [left_out] = _lines(tmp_path / "out/left_out.jsonl")
    assert (left_out["post_id"], left_out["reason"]) == ("p120", "created is not known")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ((), "label 'nowhere' is not in the label map; --unknown"),
        (("--valid", "0.6", "--test", "0.5"), "nothing would be left"),
        (("--valid", "-1"), "a share is 0 or more"),
        (("--split", "a", "--keep", "b"), "--split: not allowed with --keep"),
        (("--split", "a", "--valid", "0.2"), "--valid: not allowed with --split"),
        (("--test_since", "2026-01-01", "--test", "0.2"), "--test: not allowed with --test_since"),
        (("--test_since", "soon"), "--test_since soon: write it as"),
        (("--seed", "-1"), "'--seed'"),
        (("--keep", "none.jsonl", "--unknown", "skip_tag"), "no such data file"),
        (("--manifest", "none.jsonl"), "no such data file"),
        (("--duplicates", "none.jsonl", "--unknown", "skip_tag"), "no such data file"),
    ],
)
def test_mistakes_end_with_2_and_one_line(
    tmp_path: Path, more: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _corpus(tmp_path, [*(_post(i) for i in range(20)), _post(20, labels=["nowhere", "tag1"])])
    assert _build(tmp_path, *more) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_full_temporary_folder_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The index has no room: exit 1, a line with the way out, nothing written."""
    _corpus(tmp_path, [_post(i) for i in range(400)])
    monkeypatch.setattr(index, "_TABLES", index._TABLES + "PRAGMA max_page_count = 12;")
    assert _build(tmp_path) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "TMPDIR" in said
    assert "full" in said
    assert not (tmp_path / "out").exists()


def test_a_label_map_is_made_from_posts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Most frequent first, equal ones by name, rare ones named and left out; an old map stays."""
    posts = [*(_post(i, labels=["b", "a"]) for i in range(3)), _post(3, labels=["c"]), "no json"]
    lines = [post if isinstance(post, str) else json.dumps(post) for post in posts]
    (tmp_path / "posts.jsonl").write_text("\n".join(lines))
    out = tmp_path / "map.json"
    asked = ["--input", str(tmp_path / "posts.jsonl"), "--out", str(out)]
    assert label_map.main([*asked, "--min_posts", "2"]) == 0
    assert LabelMap.load(out).names == ("a", "b")
    said = capsys.readouterr().out
    assert "c (1)" in said
    assert "1 broken lines" in said
    out.write_text(json.dumps({"0": "z", "1": "b"}))
    assert label_map.main([*asked, "--base", str(out)]) == 0
    assert LabelMap.load(out).names == ("z", "b", "a", "c")
