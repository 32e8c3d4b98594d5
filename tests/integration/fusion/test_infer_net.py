"""`infer_net.py` on feature files: every option, the outputs, and what is wrong."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from extractors.feature_file import feature_path, write_features
from fusion.bundle.bundle import load_bundle
from fusion.data.dataset import FeatureFiles
from tests.support.fusion import support
from tests.support.scripts import infer_rig as rig


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return rig.make(tmp_path)


def expected_scores(folder: Path, post_ids: list[str]) -> np.ndarray[Any, Any]:
    bundle = load_bundle(folder / "bundle")
    scores = []
    for post_id in post_ids:
        features = FeatureFiles(folder / "features").features(post_id, None, None)
        batch = support.batch([features], of=bundle.schema)
        with torch.no_grad():
            scores.append(torch.sigmoid(bundle.model(batch))[0].numpy())
    return np.array(scores)


def test_input_and_output_of_the_readme(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``--infer_config F --input X.json --output O``: tags by their thresholds, and the metrics."""
    output = folder / "tags.jsonl"
    assert rig.infer(folder, "--output", str(output)) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    lines = rig.lines(output)
    truth = [[name in line["labels"] for name in support.LABELS.names] for line in lines]
    gap = support.plain_gap(zip((line["scores"] for line in lines), truth, strict=True))
    assert printed.out.startswith(f"posts 40  labelled 40  gap {gap:.4f}  hit_at_1")
    assert "posts/s" in printed.out
    assert [line["post_id"] for line in lines] == [f"posts{i}" for i in range(40)]
    expected = expected_scores(folder, [line["post_id"] for line in lines])
    np.testing.assert_allclose(np.array([line["scores"] for line in lines]), expected, atol=1e-6)
    for line in lines:
        by_name = {tag["name"]: tag["score"] for tag in line["tags"]}
        assert by_name == {f"tag{i}": round(s, 6) for i, s in enumerate(line["scores"]) if s >= 0.5}
        assert set(line["modalities"].values()) <= {"ok", "missing"}
    assert [p.name for p in folder.glob("*tags*")] == ["tags.jsonl"]


def test_text_lists_and_json_lines_are_read(folder: Path) -> None:
    """IDs and feature files in a ``.txt``, a post a line in a ``.jsonl``: the same tags."""
    entries = json.loads((folder / "posts.json").read_text())[:4]
    assert rig.infer(folder, "--output", str(folder / "json.jsonl")) == 0
    lines = rig.lines(folder / "json.jsonl")[:4]
    listed = [entries[0]["post_id"], entries[1]["features"], "", entries[2]["post_id"]]
    (folder / "some.txt").write_text("\n".join(listed))
    (folder / "some.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries))
    for name, count in (("some.txt", 3), ("some.jsonl", 4)):
        assert rig.infer(folder, "--output", str(folder / f"{name}.out"), posts=name) == 0
        listed_lines = rig.lines(folder / f"{name}.out")
        assert [line["post_id"] for line in listed_lines] == [w["post_id"] for w in lines[:count]]
        scores = [[line["scores"] for line in side] for side in (listed_lines, lines[:count])]
        np.testing.assert_allclose(scores[0], scores[1], atol=1e-6)
        assert ("labels" in listed_lines[0]) == (name == "some.jsonl")


def test_csv_is_safe_in_a_spreadsheet(tmp_path: Path) -> None:
    """By the output's name or ``--format csv``; IDs that look like formulas are text."""
    folder = rig.make(tmp_path, posts=3)
    odd = '=HYPERLINK("x"), a'
    path = write_features(folder / "features", support.features(odd), support.FINGERPRINTS)
    entries = json.loads((folder / "posts.json").read_text())
    entries.append({"post_id": odd, "features": str(path.relative_to(folder))})
    (folder / "posts.json").write_text(json.dumps(entries))
    assert rig.infer(folder, "--output", str(folder / "t.csv")) == 0
    assert rig.infer(folder, "--output", str(folder / "t.txt"), "--format", "csv") == 0
    assert (folder / "t.csv").read_bytes() == (folder / "t.txt").read_bytes()
    assert rig.infer(folder, "--output", str(folder / "t.jsonl")) == 0
    rows = rig.rows(folder / "t.csv")
    assert [row["post_id"] for row in rows] == ["posts0", "posts1", "posts2", f"'{odd}"]
    for row, line in zip(rows, rig.lines(folder / "t.jsonl"), strict=True):
        assert [float(row[f"score {n}"]) for n in support.LABELS.names] == line["scores"]
        assert row["tags"] == "|".join(tag["name"] for tag in line["tags"])
        assert [float(s) for s in row["scores"].split("|") if s] == [
            tag["score"] for tag in line["tags"]
        ]


def test_standard_output_holds_tags_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Messages for people go to standard error; without scores lines are short."""
    assert rig.infer(folder, "--set", "scores=false") == 0
    printed = capsys.readouterr()
    lines = [json.loads(line) for line in printed.out.splitlines()]
    assert len(lines) == 40
    assert "scores" not in lines[0]
    assert "posts 40" in printed.err


def test_json_is_one_object_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = folder / "json" / "tags.jsonl"
    output.parent.mkdir()
    assert rig.infer(folder, "--output", str(output), "--json") == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert (report["out"], report["posts"], report["labelled"]) == (str(output), 40, 40)
    assert f"gap {report['metrics']['gap']:.4f}" in printed.err
    assert "--json: the tags go to standard output" in rig.mistake(capsys, folder, "--json")


def test_a_terminal_obeys_no_stored_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On standard output JSON stays JSON with the same characters in it; a table shows escapes."""
    folder = rig.make(tmp_path, posts=1)
    hostile = "p\x1b]0;owned\x07\x7f\x9b31m\u202e"
    path = write_features(folder / "features", support.features(hostile), support.FINGERPRINTS)
    entries = json.loads((folder / "posts.json").read_text())
    entries.append({"post_id": hostile, "features": str(path.relative_to(folder))})
    entries.append({"post_id": f"{hostile} gone", "features": f"gone {hostile}"})
    (folder / "posts.json").write_text(json.dumps(entries))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for words in ((), ("--format", "csv")):
        assert rig.infer(folder, "--skip_bad", *words) == 0
        printed = capsys.readouterr()
        said = printed.out + printed.err
        assert [c for c in said if not (c.isprintable() or c == "\n")] == []
        assert "owned" in printed.out
        assert "skipped p\\u001b]0;owned" in printed.err
        if not words:
            post_ids = [json.loads(line)["post_id"] for line in printed.out.splitlines()]
            assert post_ids == ["posts0", hostile]


@pytest.mark.usefixtures("quick_processes")
def test_several_processes_give_the_same_file(folder: Path) -> None:
    assert rig.infer(folder, "--output", str(folder / "one.jsonl")) == 0
    assert rig.infer(folder, "--output", str(folder / "two.jsonl"), "--processes", "2") == 0
    assert (folder / "one.jsonl").read_bytes() == (folder / "two.jsonl").read_bytes()


def test_gpus_that_are_not_there(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``--n_gpus`` beyond what the machine has is one line; 0 is the CPU."""
    gpus = torch.cuda.device_count()
    said = rig.mistake(capsys, folder, "--n_gpus", str(gpus + 2))
    assert said == f"infer_net.py: n_gpus: {gpus + 2} GPUs requested, but this machine has {gpus}\n"
    assert rig.infer(folder, "--n_gpus", "0", "--output", str(folder / "t.jsonl")) == 0


@pytest.mark.gpu
def test_gpus_give_the_same_scores(folder: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    scores = []
    for count in ("0", "1"):
        assert rig.infer(folder, "--n_gpus", count, "--output", str(folder / "t.jsonl")) == 0
        scores.append([line["scores"] for line in rig.lines(folder / "t.jsonl")])
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-3)


def test_best_model_is_a_folder_its_weights_or_a_pth(folder: Path) -> None:
    rig.write_bundle(folder / "best", seed=5)
    state = load_bundle(folder / "best").model.state_dict()
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, folder / "best.pth")
    scores: dict[str, Any] = {}
    for model in ("best", "best/model.safetensors", "best.pth", "bundle"):
        options = ["--best_model", str(folder / model), "--output", str(folder / "t.jsonl")]
        assert rig.infer(folder, *options) == 0
        scores[model] = [line["scores"] for line in rig.lines(folder / "t.jsonl")]
    assert scores["best"] == scores["best/model.safetensors"] == scores["best.pth"]
    assert scores["best"] != scores["bundle"]


BAD: dict[str, str] = {
    "posts3": "no such feature file",
    "posts8": "cannot be read as a feature file",
    "posts9": "audio was made with audio-2, but audio-1 is needed",
    "posts20": "text features are not finite",
    "posts21": "the model takes (n, 12)",
    "posts22": "label 'nope' is not in the label map",
}


def spoil(folder: Path) -> None:
    root, entries = folder / "features", json.loads((folder / "posts.json").read_text())
    feature_path(root, "posts3").unlink()
    feature_path(root, "posts8").write_bytes(b"\x00" * 40)
    support.spoil_features(folder, "posts9", audio="audio-2")
    support.spoil_features(folder, "posts20", value=np.inf)
    narrow = support.features("posts21")
    narrow.arrays["video"] = narrow.arrays["video"][:, :5]  # type: ignore[index]
    write_features(root, narrow, support.FINGERPRINTS)
    entries[22]["labels"] = ["nope"]
    (folder / "posts.json").write_text(json.dumps(entries))


def test_bad_posts_are_left_out_and_listed(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """``--skip_bad``: counted, listed with reasons, the others tagged as ever."""
    assert rig.infer(folder, "--output", str(folder / "all.jsonl")) == 0
    spoil(folder)
    capsys.readouterr()
    output = folder / "t.jsonl"
    assert rig.infer(folder, "--output", str(output), "--skip_bad") == 0
    assert "posts 34  labelled 34  skipped 6" in capsys.readouterr().out
    listed = rig.lines(folder / "t.jsonl.skipped.jsonl")
    # In the order of the input, though one was known before its features were read.
    assert [line["post_id"] for line in listed] == list(BAD)
    for line in listed:
        assert BAD[line["post_id"]] in line["reason"]
    good = [line for line in rig.lines(folder / "all.jsonl") if line["post_id"] not in BAD]
    lines = rig.lines(output)
    assert [line["post_id"] for line in lines] == [line["post_id"] for line in good]
    sides = [[line["scores"] for line in side] for side in (lines, good)]
    np.testing.assert_allclose(sides[0], sides[1], atol=1e-6)
    assert rig.infer(folder, "--skip_bad") == 0
    assert "skipped posts3: " in capsys.readouterr().err


@pytest.mark.parametrize("bad", list(BAD))
def test_a_bad_post_ends_a_run(bad: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil(folder)
    entries = json.loads((folder / "posts.json").read_text())
    alone = [e for e in entries if e["post_id"] == bad or e["post_id"] not in BAD]
    (folder / "posts.json").write_text(json.dumps(alone))
    said = rig.mistake(capsys, folder, "--output", str(folder / "t.jsonl"))
    assert bad in said
    assert BAD[bad] in said
    assert not (folder / "t.jsonl").exists()


def test_a_broken_line_is_a_bad_post(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of JSON lines one may be broken; of a JSON list everything is."""
    text = (folder / "posts.json").read_text()
    good = json.dumps(json.loads(text)[0])
    (folder / "x.jsonl").write_text(f'{good}\n{{"post_id": "q\n{{"labels": []}}\n')
    options = ["--output", str(folder / "t.jsonl"), "--skip_bad"]
    assert "x.jsonl: line 2: not JSON" in rig.mistake(capsys, folder, *options[:2], posts="x.jsonl")
    assert rig.infer(folder, *options, posts="x.jsonl") == 0
    listed = rig.lines(folder / "t.jsonl.skipped.jsonl")
    assert ["line 2: not JSON" in listed[0]["reason"], "line 3: must have" in listed[1]["reason"]]
    (folder / "posts.json").write_text(text[:-20])
    assert "not a JSON data file" in rig.mistake(capsys, folder, *options)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("bundel: x", "bundel: unknown key; did you mean 'bundle'?"),
        ("{bundle: x, broker: {queue: q}}", "keep one kind"),
        ("output: mongodb://u:secret@h/db", "must end in /database.collection"),
        ("{bundle: none}", "none: holds no bundle"),
        ("{bundle: none, processes: 0}", "processes"),
        ("broker: {queue: 3}", "broker.queue"),
    ],
)
def test_a_mistake_in_the_config_is_one_line(
    content: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "infer.yaml").write_text(content)
    (tmp_path / "posts.json").write_text('[{"post_id": "p"}]')
    said = rig.mistake(capsys, tmp_path)
    assert says in said
    assert "secret" not in said


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--format", "mongodb"], "format: mongodb takes --output mongodb://"),
        (["--format", "xml"], "options: format"),
        (["--output", "."], ".: cannot be written: is a folder"),
        (["--n_gpus", "many"], "options: n_gpus"),
        (["--best_model", "none.pth"], "none.pth: no such file"),
        (["--set", "batch_size=0"], "--set: batch_size"),
    ],
)
def test_a_mistake_in_the_options_is_one_line(
    options: list[str], says: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert says in rig.mistake(capsys, folder, *options)
