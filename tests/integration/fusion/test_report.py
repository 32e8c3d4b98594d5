"""The report of a real training: its numbers are those of the model that is served."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, precision_recall_fscore_support

import infer_net
from common.errors import ConfigError
from common.post import Modality
from config.train import ReportSettings
from extractors.feature_file import read_features
from fusion.bundle import bundle
from fusion.data.dataset import FeatureFiles
from fusion.infer.inferer import Inferer
from fusion.report.subsets import SubsetGap, subsets_of
from fusion.report.view import view_post
from fusion.report.write import HeldOutFigures, ReportInput, write_report
from fusion.train.training import TrainReport, train
from tests.support.fusion import runs, support
from tests.support.media import quadrants, write_png
from tests.support.web.reports import assert_readable

Trained = tuple[Path, TrainReport]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("report")
    support.write_posts(folder, "train", 90, 1)
    support.write_posts(folder, "valid", 70, 2)
    support.write_posts(folder, "test", 20, 3)
    settings = support.train_settings(
        folder,
        data={"test": str(folder / "test.json")},
        trainer={"epochs": 3},
        bundle={"calibration": "temperature"},
        report={"enabled": True, "mistakes": 5, "post_url": "https://x.test/p?id={post_id}"},
    )
    return folder, train(settings, FeatureFiles())


def numbers(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(
        (folder / "run" / "latest" / "report" / "report.json").read_text()
    )
    return content


def test_three_ways_to_gap_agree(trained: Trained, tmp_path: Path) -> None:
    """Training's, inference's over its written scores, and plain Python's: equal to 1e-9."""
    folder, report = trained
    output = tmp_path / "tags.jsonl"
    arguments = ["--best_model", str(report.bundle), "--input", str(folder / "valid.json")]
    sets = ["--n_gpus", "0", "--set", "progress=false", "--set", "threads=1"]
    assert infer_net.main([*arguments, "--output", str(output), *sets]) == 0
    rows = []
    predictions = runs.predictions(folder)
    written = {line["post_id"]: line for line in map(json.loads, output.read_text().splitlines())}
    assert len(written) == 70
    for post_id, scores in zip(predictions.post_ids, predictions.scores, strict=True):
        line = written[post_id]
        # Text and back changes no bit.
        np.testing.assert_array_equal(line["scores"], scores)
        rows.append((line["scores"], [int(n in line["labels"]) for n in support.LABELS.names]))
    gap = support.plain_gap(rows)
    assert report.metrics["gap"] == pytest.approx(gap, abs=1e-9)
    assert numbers(folder)["metrics"]["gap"] == pytest.approx(gap, abs=1e-9)
    assert bundle.load_bundle(report.bundle).metrics["gap"] == pytest.approx(gap, abs=1e-9)


def test_the_numbers_are_those_of_the_written_scores(trained: Trained) -> None:
    """Every tag's row and the calibration errors, recomputed by scikit-learn and by hand."""
    folder, report = trained
    predictions, report_numbers = runs.predictions(folder), numbers(folder)
    predicted = predictions.scores >= predictions.thresholds
    precision, recall, f1, support_ = precision_recall_fscore_support(
        predictions.targets, predicted, zero_division=0
    )
    for i, row in enumerate(report_numbers["tags"]):
        assert (row["id"], row["name"]) == (i, support.LABELS.names[i])
        assert (row["support"], row["given"]) == (support_[i], predicted[:, i].sum())
        assert row["ap"] == pytest.approx(
            average_precision_score(predictions.targets[:, i], predictions.scores[:, i])
        )
        assert (row["precision"] or 0) == pytest.approx(precision[i])
        assert (row["recall"], row["f1"]) == (pytest.approx(recall[i]), pytest.approx(f1[i]))
    assert report_numbers["metrics"]["f1_macro"] == pytest.approx(f1.mean())
    assert report_numbers["metrics"] == dict(report.metrics)
    for kind, scores in (("before", predictions.raw), ("after", predictions.scores)):
        assert report_numbers["calibration"][kind]["error"] == pytest.approx(
            plain_ece(scores.ravel().tolist(), predictions.targets.ravel().tolist())
        )
    loaded = bundle.load_bundle(report.bundle)
    np.testing.assert_array_equal(predictions.thresholds, loaded.thresholds)


def plain_ece(scores: list[float], truth: list[bool], bins: int = 15) -> float:
    total = 0.0
    for i in range(bins):
        inside = [
            (s, t) for s, t in zip(scores, truth, strict=True) if min(int(s * bins), bins - 1) == i
        ]
        if inside:
            total += abs(sum(s for s, _ in inside) - sum(t for _, t in inside))
    return total / len(scores)


def test_subsets_have_the_gap_of_posts_with_only_them(trained: Trained) -> None:
    """31 subsets, each equal to inference on features from which the others were taken away."""
    folder, report = trained
    subsets = {tuple(s["modalities"]): s for s in numbers(folder)["subsets"]}
    assert len(subsets) == 31
    gaps = [s["gap"] for s in subsets.values()]
    assert gaps == sorted(gaps, reverse=True)
    assert subsets[support.MODALITIES]["gap"] == pytest.approx(report.metrics["gap"], abs=1e-12)
    entries = json.loads((folder / "valid.json").read_text())
    targets = [[int(n in e["labels"]) for n in support.LABELS.names] for e in entries]
    inferer = Inferer.load(report.bundle)
    chosen: list[tuple[Modality, ...]] = [("text",), ("video", "ocr"), ("image",)]
    for shown in chosen:
        features = [read_features(folder / "features", e["post_id"], None) for e in entries]
        for post in features:
            for modality in set(post.arrays) - set(shown):
                del post.arrays[modality]  # type: ignore[attr-defined]
        scores = inferer.scores(features).astype(np.float64).tolist()
        have = [bool(post.arrays) for post in features]
        rows = list(zip(scores, targets, strict=True))
        some = [row for row, is_present in zip(rows, have, strict=True) if is_present]
        assert subsets[shown]["posts"] == sum(have)
        assert subsets[shown]["gap_of_posts"] == pytest.approx(support.plain_gap(some), abs=1e-6)
    about = bundle.load_bundle(report.bundle)
    assert about.subsets == pytest.approx({"+".join(k): s["gap"] for k, s in subsets.items()})
    assert subsets[("image",)]["posts"] < 70


def test_the_page_needs_nothing_else(trained: Trained) -> None:
    folder, report = trained
    report_folder = folder / "run" / "latest" / "report"
    assert report.page == report_folder.resolve() / "report.html"
    text = (report_folder / "report.html").read_text(encoding="utf-8")
    titles = re.findall(r"<figcaption>(.*?)</figcaption>", text)
    assert titles[:3] == ["Training loss", "Validation", "Precision: all tags together"]
    assert text.count('<svg viewBox="0 0 340 200"') == len(titles)
    assert sorted(p.name for p in report_folder.iterdir()) == [
        "report.html", "report.json", "scores.npz"
    ]  # fmt: skip
    assert "<script" not in text
    assert not re.findall(r'src="(?!data:)', text)
    assert "default-src 'none'" in text
    mistakes = numbers(folder)["mistakes"]
    assert 0 < len(mistakes) <= 10
    for mistake in mistakes:
        assert f'href="https://x.test/p?id={mistake["post_id"]}"' in text


def test_baseline_and_test_stand_beside_the_figures(trained: Trained, tmp_path: Path) -> None:
    """Scores are the tags' frequencies; ``data.test`` is scored as `infer_net.py` does."""
    folder, report = trained
    report_numbers = numbers(folder)
    predictions = runs.predictions(folder)
    train_posts = json.loads((folder / "train.json").read_text())
    shares = [
        sum(name in post["labels"] for post in train_posts) / 90 for name in support.LABELS.names
    ]
    gap = predicted = hits = 0.0
    # Equal scores, of a tag in every post or of tags that are as frequent, are one threshold.
    for share in sorted(set(shares), reverse=True):
        columns = predictions.targets[:, [each == share for each in shares]]
        predicted, hits = predicted + columns.size, hits + columns.sum()
        gap += columns.sum() / predictions.targets.sum() * hits / predicted
    assert report_numbers["baseline"]["gap"] == pytest.approx(gap, abs=1e-9)
    assert report.test is not None
    assert report_numbers["test"]["posts"] == report.test.posts == 20
    output = tmp_path / "tags.jsonl"
    words = ["--best_model", str(report.bundle), "--input", str(folder / "test.json")]
    sets = ["--n_gpus", "0", "--set", "progress=false", "--set", "threads=1"]
    assert infer_net.main([*words, "--output", str(output), *sets]) == 0
    entries = {post["post_id"]: post for post in json.loads((folder / "test.json").read_text())}
    scored = [
        (
            line["scores"],
            [int(n in entries[line["post_id"]]["labels"]) for n in support.LABELS.names],
        )
        for line in map(json.loads, output.read_text().splitlines())
    ]
    assert report.test.metrics["gap"] == pytest.approx(support.plain_gap(scored), abs=1e-9)


def test_the_run_before_is_compared_with(tmp_path: Path) -> None:
    """The newest one that has figures, not a later one; with what was set otherwise."""
    some = runs.some_predictions(40, 6)
    for name, epochs in (("20260101-1", 3), ("20260102-1", 5), ("20260104-1", 9)):
        content = ReportInput(name, "", {"epochs": epochs, "best epoch": 1}, some)
        write_report(tmp_path / name / "report", content, ReportSettings())
    (tmp_path / "20260102-2" / "report").mkdir(parents=True)
    (tmp_path / "20260102-2" / "report" / "report.json").write_text("[]")
    run = tmp_path / "20260103-1"
    worse = replace(some, scores=some.scores[::-1])
    content = ReportInput("now", "", {"epochs": 7, "best epoch": 1}, worse, run=run)
    page = write_report(run / "report", content, ReportSettings()).read_text()
    assert "to the earlier run" in page
    assert re.search(r"<td>epochs</td><td>5</td><td>7</td>", page)
    assert "measured on other posts" not in page
    others = replace(worse, post_ids=tuple(f"other {i}" for i in range(40)))
    content = replace(content, predictions=others)
    page = write_report(run / "report", content, ReportSettings()).read_text()
    assert "measured on other posts" in page


def test_the_page_can_be_read_by_everybody_everywhere(tmp_path: Path) -> None:
    """With long names, an earlier run, a test, and pictures of the worst mistakes."""
    write_png(tmp_path / "a.png", quadrants(300, 200))
    entry = {"text": "a long text of a post " * 9, "images": ["a.png"], "audios": ["a.png"]}
    some = runs.some_predictions(120, 24, name="a tag that is well named")
    run = tmp_path / "runs" / "2"

    def view(rows: object) -> dict[int, object]:
        post = view_post(
            "p",
            entry,
            data_file=tmp_path / "posts.json",
            report=run / "report",
            post_url=None,
            thumbnails=True,
        )
        return dict.fromkeys(range(120), post)

    epochs = [
        {"event": kind, "epoch": i, "loss": 1 / i, "gap": 0.5, "map": 0.4, "hit_at_1": 0.6}
        for kind in ("epoch", "valid")
        for i in range(1, 31)
    ]
    content = ReportInput(
        title="a model",
        subtitle="Measured on 120 validation posts.",
        facts={"model": "mbt", "epochs": 30, "best epoch": 4, "bundle": "b" * 64},
        predictions=some,
        run=run,
        runs=[epochs],
        subsets=[SubsetGap(s, 0.5, 3, 0.6) for s in subsets_of(support.MODALITIES)],
        frequencies=np.full(24, 0.3),
        test=HeldOutFigures(50, {"gap": 0.3, "map": 0.2, "hit_at_1": 0.4, "f1_micro": 0.3}),
        view=view,  # type: ignore[arg-type]
        use="insighttag tag POSTS --out tags.jsonl --bundle workshop/weights/insight",
    )
    earlier = tmp_path / "runs" / "1"
    write_report(earlier / "report", replace(content, run=earlier), ReportSettings())
    assert_readable(write_report(run / "report", content, ReportSettings()), tmp_path / "profile")


def test_without_a_report_nothing_is_measured_twice(tmp_path: Path) -> None:
    support.write_posts(tmp_path, "train", 20, 1)
    support.write_posts(tmp_path, "valid", 10, 2)
    report = train(support.train_settings(tmp_path, trainer={"epochs": 1}), FeatureFiles())
    assert report.page is None
    assert not (tmp_path / "run" / "latest" / "report").exists()
    assert bundle.load_bundle(report.bundle).subsets == {}


@pytest.mark.parametrize("tested", [False, True])
def test_a_report_without_validation_shows_the_run(tmp_path: Path, *, tested: bool) -> None:
    """There are curves of the loss; figures are those of the test, or a sentence says why none."""
    for name, count in (("train", 20), ("test", 10)):
        support.write_posts(tmp_path, name, count, 1 + tested)
    data = {"valid": None, "test": str(tmp_path / "test.json") if tested else None}
    settings = support.train_settings(
        tmp_path, data=data, trainer={"epochs": 1}, report={"enabled": True}
    )
    report: Any = train(settings, FeatureFiles())
    page = report.page.read_text()
    assert "Training loss" in page
    assert ("nothing was measured" in page) is not tested
    if tested:
        assert f"<b>{report.test.metrics['gap']:.3f}</b><span>test, 10 posts" in page
    assert sorted(p.name for p in report.page.parent.iterdir()) == ["report.html", "report.json"]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    content = ReportInput("a", "b", {}, None)
    write_report(tmp_path / "report", content, ReportSettings())
    before = (tmp_path / "report" / "report.html").read_text()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="the report cannot be written"):
        write_report(tmp_path / "file" / "report", content, ReportSettings())
    assert (tmp_path / "report" / "report.html").read_text() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "report"]


@pytest.mark.parametrize("url", ["ftp://x/{post_id}", "https://x.test/", "javascript:{post_id}"])
def test_addresses_of_posts_that_are_none(url: str) -> None:
    with pytest.raises(ValueError, match="must begin with http"):
        ReportSettings(post_url=url)
