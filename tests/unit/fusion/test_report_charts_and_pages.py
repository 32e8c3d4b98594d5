"""A report's tables, charts of any number of tags, page, and pictures of posts."""

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.html import Advice, render
from config.train import ReportSettings
from fusion.metrics.calibration import reliability
from fusion.report import charts
from fusion.report import predictions as tables
from fusion.report.predictions import Predictions, worst
from fusion.report.view import media_name, view_post
from fusion.report.write import ReportInput, write_report
from tests.support.fusion.runs import some_predictions


def test_scores_come_back_from_their_file(tmp_path: Path) -> None:
    """Every array, names in any script, and no pickle."""
    wanted = some_predictions(name="猫")
    wanted.save(tmp_path / "scores.npz")
    found = Predictions.load(tmp_path / "scores.npz")
    assert (found.post_ids, found.names) == (wanted.post_ids, wanted.names)
    for key in ("raw", "scores", "targets", "thresholds"):
        np.testing.assert_array_equal(getattr(found, key), getattr(wanted, key))


def test_confusions_are_counted_post_by_post() -> None:
    some = some_predictions(80, 6)
    wanted = np.zeros((6, 6), int)
    for truth, given in zip(some.targets, some.given, strict=True):
        for i in np.flatnonzero(truth & ~given):
            for j in np.flatnonzero(given & ~truth):
                wanted[i, j] += 1
    np.testing.assert_array_equal(tables.confusion_counts(some), wanted)
    pairs = tables.confusions(some)
    assert [p.posts for p in pairs] == sorted((p.posts for p in pairs), reverse=True)
    assert all(wanted[p.missed, p.given] == p.posts for p in pairs)
    assert wanted.trace() == 0


def test_the_worst_mistakes_have_the_highest_loss() -> None:
    some = some_predictions(50, 4)
    found = worst(some, 7)
    for mistakes, is_given in ((found["wrongly given"], True), (found["missed"], False)):
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
    found = reliability([0.0, 1.0, 0.5], [0, 1, 1], bins=4)
    assert found.counts.tolist() == [1, 0, 1, 1]
    assert np.isnan(found.right[1])
    assert found.error == pytest.approx(0.5 / 3)
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
    given, truth = some.given, some.targets
    right = (given & truth).sum()
    recall, precision = right / truth.sum(), right / given.sum()
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
    given = ReportInput(
        "a", "b", {"epochs": 1, "best epoch": 1}, some_predictions(40, tags, name=name)
    )
    page = write_report(tmp_path / "report", given, ReportSettings()).read_text()
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
    found = view_post(
        "p 1", entry, data_file=data_file, report=report, post_url=None, thumbnails=True
    )
    assert found.text == "hello world"
    assert [(item.name, item.href) for item in found.media] == [
        ("a b.png", "../../media/a%20b.png"),
        ("broken.jpg", "../../media/broken.jpg"),
        ("v.mp4", "https://x.test/v.mp4"),
    ]
    assert [bool(item.thumbnail) for item in found.media] == [True, False, False]
    assert len(found.media[0].thumbnail) < 5000
    pixels = Image.open(io.BytesIO(base64.b64decode(found.media[0].thumbnail.partition(",")[2])))
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
