"""A training's report: tables, charts, pages, advice, and the agreement of two models."""

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from common.html import Advice, render
from config.train import ReportSettings
from fusion.metrics.agreement import Agreement, Scored
from fusion.metrics.calibration import reliability
from fusion.metrics.ranking import global_average_precision
from fusion.report import charts
from fusion.report import predictions as tables
from fusion.report.advice import next_steps
from fusion.report.predictions import Predictions, worst
from fusion.report.view import media_name, view_post
from fusion.report.write import ReportInput, write_report
from tests.support.fusion.runs import some_predictions

AGAIN = ("python", "train_net.py", "--model_config", "my config.yaml")


def numbers(**changes: Any) -> dict[str, Any]:
    """Those of a training with which nothing is wrong."""
    good: dict[str, Any] = {
        "facts": {"epochs": 9, "best epoch": 6, "calibration": "none", "bundle": "b"},
        "posts": 500,
        "metrics": {"gap": 0.8, "map": 0.7},
        "baseline": {"gap": 0.2},
        "test": {"posts": 100, "seen_posts": 0, "metrics": {"gap": 0.79}},
        "tags": [{"id": i, "name": name, "support": 50, "ap": 0.7} for i, name in enumerate("abc")],
        "subsets": [
            {"modalities": ["image", "text"], "gap": 0.8},
            {"modalities": ["image"], "gap": 0.6},
            {"modalities": ["text"], "gap": 0.5},
        ],
        "calibration": {"after": {"error": 0.01}},
        "confusions": [],
        "mistakes": [],
    }
    return {**good, **changes}


def events(*gaps: float) -> list[list[dict[str, Any]]]:
    return [[{"event": "valid", "epoch": i, "gap": gap} for i, gap in enumerate(gaps, 1)]]


def pair(missed: int, given: int, posts: int) -> dict[str, int]:
    return {"missed": missed, "given": given, "posts": posts}


@pytest.mark.parametrize(
    ("changes", "text", "command"),
    [
        ({"seen_posts": 5}, "Measure on new posts", "insighttag out-of-fold"),
        ({"baseline": {"gap": 0.79}}, "GAP 0.800 is hardly above the 0.790", "insighttag inspect"),
        (
            {"test": {"posts": 9, "seen_posts": 0, "metrics": {"gap": 0.7}}},
            "the test has GAP 0.700 where the 500 validation posts",
            "insighttag build --input",
        ),
        (
            {"confusions": [pair(0, 2, 3), pair(2, 0, 2)]},
            "Tell a and c apart, or make them one: in 5 posts",
            "insighttag labels merge LABELS.json a c --into a",
        ),
        ({"mistakes": [{"score": 0.99}] * 3}, "3 contradict scores", ""),
        ({"posts": 7}, "each of the 7 posts", "insighttag build --input"),
        (
            {"tags": [{"id": 0, "name": "rare", "support": 4, "ap": 0.1}]},
            "Label more posts of rare (4)",
            "insighttag label-map --input POSTS.jsonl --min-posts 50",
        ),
        (
            {
                "subsets": [
                    {"modalities": ["image", "text"], "gap": 0.8},
                    {"modalities": ["image"], "gap": 0.799},
                    {"modalities": ["text"], "gap": 0.5},
                ]
            },
            "Try without text",
            "--set 'data.modalities=[image]'",
        ),
        (
            {"calibration": {"after": {"error": 0.09}}},
            "off by 0.090",
            "'my config.yaml' --set bundle.calibration=temperature",
        ),
        (
            {"facts": {"best epoch": 6, "share of steps spent waiting for data": 0.4}},
            "40% of the steps' time was waiting",
            "data.loaders=4",
        ),
    ],
)
def test_each_shortcoming_has_its_advice(changes: dict[str, Any], text: str, command: str) -> None:
    assert next_steps(numbers(), events(), AGAIN, "") == []
    (step,) = next_steps(numbers(**changes), events(), AGAIN, "")
    assert text in step.text
    assert command in step.command


@pytest.mark.parametrize(
    ("gaps", "best", "text", "command"),
    [
        ((0.1, 0.2, 0.3), 3, "still rising in the last of 3 epochs", "trainer.epochs=6"),
        ((0.1, 0.5, 0.4, 0.3), 2, "best after 2 of 4 epochs (0.500) and fell to 0.300", "mixup"),
        ((0.1, 0.5, 0.499, 0.495), 2, "", ""),
        ((0.3,), 1, "", ""),
    ],
)
def test_the_number_of_epochs_is_judged_by_the_curve(
    gaps: tuple[float, ...], best: int, text: str, command: str
) -> None:
    steps = next_steps(numbers(facts={"best epoch": best, "bundle": ""}), events(*gaps), AGAIN, "")
    assert len(steps) == bool(text)
    assert all(text in step.text and command in step.command for step in steps)


def test_solved_weights_are_not_told_to_train_longer() -> None:
    """Their epochs are penalties, and all of them were tried."""
    runs = events(0.1, 0.2, 0.3)
    runs[0].append({"event": "epoch", "epoch": 3, "method": "solved"})
    assert next_steps(numbers(facts={"best epoch": 3, "bundle": ""}), runs, AGAIN, "") == []


def test_a_folder_of_insighttag_train_is_told_its_own_command_once() -> None:
    """Few validation posts and a worse test ask for the same split, which is said once."""
    train = ("insighttag", "train", "pictures", "--out", "OTHER")
    changes = {
        "posts": 7,
        "test": {"posts": 9, "seen_posts": 0, "metrics": {"gap": 0.7}},
        "tags": [{"id": 0, "name": "rare", "support": 4, "ap": 0.1}],
    }
    assert [step.command for step in next_steps(numbers(**changes), events(), train, "")] == [
        "insighttag train pictures --out OTHER --valid 0.2",
        "insighttag train pictures --out OTHER --min-posts 10",
    ]


def test_without_figures_validation_posts_are_asked_for() -> None:
    """And the command that uses the result always comes last."""
    first, last = next_steps({"facts": {}}, [], AGAIN, "use it")
    assert "data.valid=VALID.json" in first.command
    assert last.command == "use it"


def test_scores_come_back_from_their_file(tmp_path: Path) -> None:
    saved = some_predictions(name="猫")
    saved.save(tmp_path / "scores.npz")
    loaded = Predictions.load(tmp_path / "scores.npz")
    assert (loaded.post_ids, loaded.names) == (saved.post_ids, saved.names)
    for key in ("raw", "scores", "targets", "thresholds"):
        np.testing.assert_array_equal(getattr(loaded, key), getattr(saved, key))


def test_confusions_are_counted_post_by_post() -> None:
    some = some_predictions(80, 6)
    counts = np.zeros((6, 6), int)
    for truth, predicted in zip(some.targets, some.predicted, strict=True):
        for i in np.flatnonzero(truth & ~predicted):
            for j in np.flatnonzero(predicted & ~truth):
                counts[i, j] += 1
    np.testing.assert_array_equal(tables.confusion_counts(some), counts)
    pairs = tables.confusions(some)
    assert [p.posts for p in pairs] == sorted((p.posts for p in pairs), reverse=True)
    assert all(counts[p.missed, p.given] == p.posts for p in pairs)
    assert counts.trace() == 0


def test_the_worst_mistakes_have_the_highest_loss() -> None:
    some = some_predictions(50, 4)
    mistakes_of = worst(some, 7)
    for mistakes, is_given in (
        (mistakes_of["wrongly given"], True),
        (mistakes_of["missed"], False),
    ):
        losses = []
        for row in range(50):
            for tag in range(4):
                score = float(some.scores[row, tag])
                if some.targets[row, tag] != is_given and (score >= 0.5) == is_given:
                    losses.append(-np.log(1 - score if is_given else score))
        losses.sort(reverse=True)
        assert [m.loss for m in mistakes] == pytest.approx(losses[:7])


def test_tags_that_no_post_has_and_no_post_gets() -> None:
    some = some_predictions(10, 3)
    some.targets[:, 1] = False
    some.scores[:, 1] = 0
    row = tables.tag_rows(some)[1]
    assert (row.support, row.given) == (0, 0)
    assert (row.ap, row.precision, row.recall, row.f1) == (None, None, None, None)


def test_reliability_of_edges_and_nothing() -> None:
    """Scores of 0 and 1 have a bin, empty bins are no number, and no scores have no error."""
    measured = reliability([0.0, 1.0, 0.5], [0, 1, 1], bins=4)
    assert measured.counts.tolist() == [1, 0, 1, 1]
    assert np.isnan(measured.right[1])
    assert measured.error == pytest.approx(0.5 / 3)
    assert reliability([], []).error == 0


def test_curves_show_what_was_measured() -> None:
    """Three charts of the run, of folds one line each; the point at the thresholds; two bins."""
    events = [{"event": "begin", "steps": 2}] + [
        {"event": kind, "epoch": e, "step": 2, "loss": 1 / e, "gap": e / 9, "learning_rate": 0.1}
        for kind in ("epoch", "valid", "step")
        for e in (1, 2, 3)
    ]
    one = charts.training_curves([events], baseline=0.1)
    assert [chart.title for chart in one] == ["Training loss", "Validation", "Learning rate"]
    assert [name for _, name in one[1].legend] == ["GAP@20", "GAP@20 of the baseline"]
    folds = charts.training_curves([events, events])
    assert [name for _, name in folds[1].legend] == ["fold 1", "fold 2"]
    assert "training posts" in charts.training_curves([events], seen=True)[1].title
    assert charts.training_curves([[]]) == []
    some = some_predictions(40, 60)
    drawn = charts.pr_curves(some, tables.tag_rows(some))
    assert [len(chart.lines) for chart in drawn] == [1, 4, 4]
    predicted, truth = some.predicted, some.targets
    right = (predicted & truth).sum()
    recall, precision = right / truth.sum(), right / predicted.sum()
    assert drawn[0].dots[-1].title == f"at the thresholds: {precision:.4g} at {recall:.4g}"
    before, after = (reliability(s, some.targets) for s in (some.raw, some.scores))
    names = [name for _, name in charts.calibration(before, after, "isotonic")[0].legend]
    assert names[1:] == [
        f"after isotonic: ECE {after.error:.3f}",
        f"before: ECE {before.error:.3f}",
    ]


@pytest.mark.parametrize("tags", [1, 60])
def test_reports_of_any_number_of_tags(tags: int, tmp_path: Path) -> None:
    """Names in any script stand on the page as they are, escaped."""
    name = "$x_{1 <b>long name</b> in a deep taxonomy 猫 \u0627"
    content = ReportInput(
        "a", "b", {"epochs": 1, "best epoch": 1}, some_predictions(40, tags, name=name)
    )
    page = write_report(tmp_path / "report", content, ReportSettings()).read_text()
    assert "&lt;b&gt;long name&lt;/b&gt; in a deep taxonomy 猫 \u0627 0" in page
    assert "<b>long" not in page


def test_pages_escape_everything(tmp_path: Path) -> None:
    template = tmp_path / "page.html.j2"
    template.write_text(
        '{% extends "base.html.j2" %}'
        '{% from "parts.html.j2" import bars, chips, section, table %}'
        "{% block body %}{% call section(bad) %}{{ table((bad,), [(bad,)]) }}{{ bars({bad: 1}) }}"
        "{{ chips([bad]) }}{{ chips({bad: 1}) }}{% endcall %}"
        "{% endblock %}"
    )
    bad = '<script>alert("x")</script>'
    rows, steps = [(bad, bad, bad)], [Advice(bad, bad)]
    text = render(template, title=bad, subtitle="", figure_rows=rows, next_steps=steps, bad=bad)
    assert "<script" not in text
    assert '"x"' not in text
    assert text.count("&lt;script&gt;") == 15


def test_posts_are_linked_and_shown(tmp_path: Path) -> None:
    """Local files relative to the report, addresses as they are, pictures small; junk is left."""
    (tmp_path / "media").mkdir()
    drawing = Image.new("RGBA", (800, 600))
    drawing.paste("red", (200, 150, 600, 450))
    drawing.save(tmp_path / "media" / "a b.png")
    (tmp_path / "media" / "broken.jpg").write_bytes(b"no picture")
    entry = {
        "text": "hello  world",
        "images": ["media/a b.png", "media/broken.jpg", "media/none.jpg", 7],
        "videos": ["https://x.test/v.mp4", "javascript:alert(1)"],
        "features": "",
    }
    data_file, report = tmp_path / "posts.json", tmp_path / "run" / "report"
    view = view_post(
        "p 1", entry, data_file=data_file, report=report, post_url=None, thumbnails=True
    )
    assert view.text == "hello world"
    assert [(item.name, item.href) for item in view.media] == [
        ("a b.png", "../../media/a%20b.png"),
        ("broken.jpg", "../../media/broken.jpg"),
        ("v.mp4", "https://x.test/v.mp4"),
    ]
    assert [bool(item.thumbnail) for item in view.media] == [True, False, False]
    assert len(view.media[0].thumbnail) < 5000
    pixels = Image.open(io.BytesIO(base64.b64decode(view.media[0].thumbnail.partition(",")[2])))
    assert np.asarray(pixels)[5, 5].min() > 250, "the model sees white where nothing is drawn"
    url = view_post(
        "p/1&",
        {},
        data_file=data_file,
        report=report,
        post_url="https://x/{post_id}",
        thumbnails=True,
    )
    assert [item.href for item in url.media] == ["https://x/p%2F1%26"]


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("media/cat.png", "cat.png"),
        (f"media/{'0f' * 32}.png", "picture 2"),
        (f"https://h/{'0f' * 20}.jpg?w=9", "picture 2"),
        ("https://h/a/cat.jpg?x=1", "cat.jpg"),
    ],
)
def test_files_that_are_named_by_a_hash_get_a_name(source: str, name: str) -> None:
    assert media_name(source, "image", 2) == name


NAMES = ("cat", "dog", "sea")


def scored(rng: np.random.Generator, posts: int = 40) -> Scored:
    scores = rng.random((posts, len(NAMES)))
    return Scored(scores, scores > 0.6)


def batches(agreement: Agreement, one: Scored, other: Scored, truth: np.ndarray) -> Agreement:
    for start in range(0, len(truth), 7):
        rows = slice(start, start + 7)
        agreement.add(
            [f"p{i}" for i in range(len(truth))[rows]],
            Scored(one.scores[rows], one.predicted[rows]),
            Scored(other.scores[rows], other.predicted[rows]),
            truth[rows],
            np.logical_or.reduce(truth[rows], axis=1),
        )
    return agreement


def test_figures_are_those_of_the_whole_set() -> None:
    rng = np.random.default_rng(1)
    one, other, truth = scored(rng), scored(rng), rng.random((40, 3)) > 0.7
    figures = batches(Agreement(NAMES, NAMES), one, other, truth).result()
    assert figures["posts"] == 40
    assert figures["same_tags"] == (one.predicted == other.predicted).all(axis=1).sum()
    assert figures["tags_given"] == {
        "first": one.predicted.sum(),
        "second": other.predicted.sum(),
        "both": (one.predicted & other.predicted).sum(),
        "only_first": (one.predicted & ~other.predicted).sum(),
        "only_second": (~one.predicted & other.predicted).sum(),
    }
    pair = one.scores.ravel(), other.scores.ravel()
    assert figures["scores"]["compared"] == 120
    assert figures["scores"]["mean_abs_difference"] == pytest.approx(
        np.abs(pair[0] - pair[1]).mean()
    )
    assert figures["scores"]["correlation"] == pytest.approx(np.corrcoef(*pair)[0, 1])
    labelled = truth.any(axis=1)
    assert figures["labelled"] == labelled.sum()
    for gap, each in zip(figures["gap"], (one, other), strict=True):
        expected = global_average_precision(each.scores[labelled], truth[labelled])
        assert gap == pytest.approx(expected)
    by_name = {tag["name"]: tag for tag in figures["tags"]}
    for i, name in enumerate(NAMES):
        differences = other.scores[:, i] - one.scores[:, i]
        assert by_name[name]["mean_difference"] == pytest.approx(differences.mean())
        assert by_name[name]["only_first"] == (one.predicted & ~other.predicted)[:, i].sum()
    changes = [tag["only_first"] + tag["only_second"] for tag in figures["tags"]]
    assert changes == sorted(changes, reverse=True)
    post = figures["differing_posts"][0]
    row = int(post["post_id"][1:])
    assert post["only_first"] == [
        name
        for name, only in zip(NAMES, one.predicted[row] & ~other.predicted[row], strict=True)
        if only
    ]


def test_models_with_other_tags_are_compared_by_name() -> None:
    one = Scored(np.array([[0.9, 0.2]]), np.array([[True, False]]))
    other = Scored(np.array([[0.7, 0.8]]), np.array([[True, True]]))
    agreement = Agreement(("cat", "dog"), ("sea", "cat"))
    assert agreement.names == ("cat", "dog", "sea")
    agreement.add(["p"], one, other, np.array([[False, False, True]]), np.array([True]))
    figures = agreement.result()
    assert list(figures["tags_given"].values()) == [1, 2, 1, 0, 1]
    assert figures["scores"] == {
        "compared": 1,
        "mean_abs_difference": pytest.approx(0.1),
        "correlation": None,
    }
    assert figures["differing_posts"] == [
        {"post_id": "p", "only_first": [], "only_second": ["sea"]}
    ]
    # The first does not know the label: third of three. The second has it behind a wrong tag.
    assert figures["gap"] == [pytest.approx(1 / 3), pytest.approx(1 / 2)]


def test_nothing_is_said_without_scores_or_labels() -> None:
    figures = Agreement((), ()).result()
    assert (figures["posts"], figures["gap"], figures["scores"]["correlation"]) == (0, None, None)
