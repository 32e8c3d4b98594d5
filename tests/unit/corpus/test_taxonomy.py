"""Label maps that change, and data files that follow."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import ConfigError
from config.labels import LabelMap
from corpus import taxonomy
from corpus.taxonomy import Migration, change, load, migrations_path, read_migrations
from scripts.cli import run

NAMES = ("sun", "rain", "snow", "food", "drink")


def _map(folder: Path, names: tuple[str, ...] = NAMES) -> Path:
    path = folder / "idx2name_cls5.json"
    path.write_text(json.dumps(LabelMap(names).as_json()), encoding="utf-8")
    return path


def _data(folder: Path, labels: list[list[str]], name: str = "train.json") -> Path:
    entries = [{"post_id": f"p{i}", "labels": each, "own": i} for i, each in enumerate(labels)]
    path = folder / name
    if name.endswith(".json"):
        path.write_text(json.dumps(entries), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(e) + "\n" for e in entries), encoding="utf-8")
    return path


def _labels(path: Path) -> list[list[str]]:
    text = path.read_text(encoding="utf-8")
    entries: list[Any] = (
        json.loads(text) if path.suffix == ".json" else [json.loads(x) for x in text.splitlines()]
    )
    assert [entry["own"] for entry in entries] == list(range(len(entries)))  # other keys stay
    return [entry["labels"] for entry in entries]


@pytest.mark.parametrize(
    ("arguments", "names", "ids"),
    [
        (("rename", ["sun"], ["sunshine"]), "sunshine rain snow food drink", [0, 1, 2, 3, 4]),
        (("merge", ["snow", "rain"], ["wet"]), "sun wet food drink", [0, 1, 1, 2, 3]),
        (("merge", ["drink"], ["food"]), "sun rain snow food", [0, 1, 2, 3, 3]),
        (("merge", ["sun", "snow"], ["snow"]), "snow rain food drink", [0, 1, 0, 2, 3]),
        (
            ("split", ["rain"], ["mist", "hail"]),
            "sun mist snow food drink hail",
            [0, None, 2, 3, 4],
        ),
        (("split", ["rain"], ["rain", "hail"]), "sun rain snow food drink hail", [0, 1, 2, 3, 4]),
        (("retire", ["sun", "food"], []), "rain snow drink", [None, 0, 1, None, 2]),
    ],
)
def test_each_change_renumbers_without_gaps(
    arguments: tuple[Any, list[str], list[str]], names: str, ids: list[int | None]
) -> None:
    after, migration = change(LabelMap(NAMES), *arguments, version=1)
    assert after.names == tuple(names.split())
    assert list(migration.ids) == ids


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("rename", ["fog"], ["mist"]), "'fog' is not in"),
        (("rename", ["sun"], ["rain"]), "merge joins two tags"),
        (("split", ["sun"], ["rain", "mist"]), "'rain' is in the label map already"),
        (("split", ["sun"], ["mist", "mist"]), "appears twice"),
        (("rename", ["sun"], [" "]), "is empty"),
        (("retire", list(NAMES), []), "no tag would be left"),
    ],
)
def test_impossible_changes_are_refused_by_name(
    arguments: tuple[Any, list[str], list[str]], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        change(LabelMap(NAMES), *arguments, version=1)


@pytest.mark.parametrize("name", ["train.json", "train.jsonl"])
def test_a_data_file_follows_every_change_once(tmp_path: Path, name: str) -> None:
    """Labels of posts are rewritten in order; a second run changes nothing."""
    labels = _map(tmp_path)
    data = _data(tmp_path, [["sun", "rain"], ["snow", "rain", "food"], ["drink"], ["food"]], name)
    for verb in (
        ["rename", str(labels), "sun", "sunshine"],
        ["merge", str(labels), "rain", "snow", "--into", "wet"],
        ["retire", str(labels), "drink"],
        ["rename", str(labels), "food", "sun"],  # a name that was given up may be used again
    ):
        assert run(["labels", *verb]) == 0
    assert run(["labels", "apply", str(labels), "--data", str(data)]) == 0
    assert _labels(data) == [["sunshine", "wet"], ["wet", "sun"], [], ["sun"]]
    before = data.read_bytes()
    assert run(["labels", "apply", str(labels), "--data", str(data)]) == 0
    assert data.read_bytes() == before
    assert LabelMap.load(labels).names == ("sunshine", "wet", "sun")


def test_killed_between_file_and_note_a_change_is_not_made_twice(tmp_path: Path) -> None:
    """A swap of two names, done twice, would be undone: the note of the content prevents it."""
    labels = _map(tmp_path)
    data = _data(tmp_path, [["sun"], ["rain"]])
    for old, new in (("sun", "x"), ("rain", "sun"), ("x", "rain")):
        assert run(["labels", "rename", str(labels), old, new]) == 0
    _, migrations = load(labels)
    taxonomy.apply(data, migrations, {})
    done = data.read_bytes()
    digest = hashlib.sha256(done).hexdigest()
    pending = {"version": 0, "pending_version": 3, "pending_sha256": digest}
    taxonomy.note_path(data).write_text(json.dumps(pending), encoding="utf-8")
    assert taxonomy.apply(data, migrations, {}).posts == 0
    assert data.read_bytes() == done
    assert _labels(data) == [["rain"], ["sun"]]


def test_killed_between_record_and_map_the_change_is_completed(tmp_path: Path) -> None:
    """The record is written first; the next command finds that the map lacks it."""
    labels = _map(tmp_path)
    changed, migration = change(LabelMap(NAMES), "retire", ["sun"], [], 1)
    migrations_path(labels).write_text(migration.line() + "\n", encoding="utf-8")
    assert load(labels)[0] == LabelMap(NAMES)  # who only looks changes nothing
    present, _ = load(labels, complete=True)
    assert present == changed == LabelMap.load(labels)


def test_a_tag_put_back_is_a_conflict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Looking at a map never changes it, whatever its record says."""
    labels = _map(tmp_path)
    assert run(["labels", "retire", str(labels), "drink"]) == 0
    by_hand = json.dumps(LabelMap(("drink", "sun", "rain", "snow", "food")).as_json())
    labels.write_text(by_hand, encoding="utf-8")
    assert run(["labels", "history", str(labels)]) == 0
    assert run(["labels", "check", str(labels)]) == 2
    assert "'drink' is in the map, but the retire of version 1" in capsys.readouterr().out
    assert labels.read_text(encoding="utf-8") == by_hand


def test_open_questions_stay_open_until_they_are_answered(tmp_path: Path) -> None:
    """A later change or half of the answers keeps the other posts of a split tag on the list."""
    labels, said = _map(tmp_path), tmp_path / "said.jsonl"
    data = _data(tmp_path, [["rain"], ["rain", "sun"], ["food"], ["rain"]])
    assert run(["labels", "split", str(labels), "rain", "--into", "mist", "--into", "hail"]) == 0
    apply = ["labels", "apply", str(labels), "--data", str(data)]
    said.write_text('{"post_id": "p3", "labels": ["hail"]}\n', encoding="utf-8")
    assert run([*apply, "--by-post", str(said)]) == 0
    assert _labels(data) == [[], ["sun"], ["food"], ["hail"]]
    assert run(["labels", "rename", str(labels), "hail", "hailstorm"]) == 0
    assert run(apply) == 0

    def listed() -> list[str]:
        text = taxonomy.relabel_path(data).read_text(encoding="utf-8")
        return [json.loads(line)["post_id"] for line in text.splitlines()]

    assert listed() == ["p0", "p1"]
    said.write_text('{"post_id": "p1", "labels": ["hail"]}\n', encoding="utf-8")
    assert run([*apply, "--by-post", str(said)]) == 0
    # By its name of today.
    assert _labels(data) == [[], ["sun", "hailstorm"], ["food"], ["hailstorm"]]
    assert listed() == ["p0"]
    said.write_text('{"post_id": "p0", "labels": ["nonsense"]}\n', encoding="utf-8")
    assert run([*apply, "--by-post", str(said)]) == 2
    said.write_text('{"post_id": "p0", "labels": ["mist"]}\n', encoding="utf-8")
    assert run([*apply, "--by-post", str(said)]) == 0
    assert not taxonomy.relabel_path(data).exists()


def test_check_finds_planted_conflicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Look-alikes, unknown tags, tags that were renamed, tags without posts, another bundle."""
    clean = _map(tmp_path)
    data = _data(tmp_path, [[name] for name in NAMES])
    assert run(["labels", "check", str(clean), "--data", str(data)]) == 0
    labels = _map(tmp_path, ("Sun", "sun ", "rain", "snow", "food"))
    assert run(["labels", "rename", str(labels), "rain", "wet"]) == 0
    data = _data(tmp_path, [["Sun", "rain"], ["fog", "snow"], ["food"]])
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    (bundle / "labels.json").write_text(json.dumps(LabelMap(("Sun", "rain")).as_json()))
    capsys.readouterr()
    asked = ["labels", "check", str(labels), "--data", str(data), "--bundle", str(bundle)]
    assert run(asked) == 2
    said = capsys.readouterr()
    for part in (
        "differ only in case",
        "has space around it",
        "'fog' of 1 posts: not in the map",
        "'rain' of 1 posts: rename it: labels apply",
        "'wet' has 0 posts",
        "names tags that are not in the map: ['rain']",
    ):
        assert part in said.out
    assert "conflicts in" in said.err
    assert run([*asked, "--json"]) == 2
    assert [*json.loads(capsys.readouterr().out)["conflicts"]] == said.out.splitlines()
    assert run(["labels", "history", str(labels), "--json"]) == 0
    [change] = json.loads(capsys.readouterr().out)
    assert (change["operation"], change["old"], change["new"]) == ("rename", ["rain"], ["wet"])


def test_a_broken_record_is_named(tmp_path: Path) -> None:
    labels = _map(tmp_path)
    migrations_path(labels).write_text('{"version": 1}\n', encoding="utf-8")
    with pytest.raises(ConfigError, match="line 1: no migration"):
        read_migrations(labels)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_names_follow_the_ids(data: st.DataObject) -> None:
    """After any changes, a tag's name reached through the ids is the one reached through names."""
    present = LabelMap(NAMES)
    migrations: list[Migration] = []
    for version in range(1, data.draw(st.integers(1, 5)) + 1):
        verb = data.draw(st.sampled_from(["rename", "merge", "retire"]))
        old = [data.draw(st.sampled_from(present.names))]
        if verb == "retire" and len(present) == 1:
            continue
        new = [] if verb == "retire" else [f"new{version}"]
        if verb == "merge" and len(present) > 1:
            old.append(data.draw(st.sampled_from([n for n in present.names if n not in old])))
        present, migration = change(present, verb, old, new, len(migrations) + 1)  # type: ignore[arg-type]
        migrations.append(migration)
    for start, name in enumerate(NAMES):
        place: int | None = start
        for migration in migrations:
            place = None if place is None else migration.ids[place]
        followed, _ = taxonomy.follow([name], migrations)
        assert followed == ([] if place is None else [present.names[place]])
