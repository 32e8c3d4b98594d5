"""A report's tables, charts of any number of tags, page, and pictures of posts."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.charts import png, shown_names, style
from common.html import render
from fusion.metrics.calibration import reliability
from fusion.report import charts
from fusion.report import predictions as tables
from fusion.report.predictions import Predictions, worst
from fusion.report.subsets import SubsetGap, subsets_of
from fusion.report.view import view_post
from tests.support.fusion import support


def some_predictions(
    posts: int = 60, tags: int = 5, seed: int = 0, name: str = "tag"
) -> Predictions:
    chance = np.random.default_rng(seed)
    targets = chance.random((posts, tags)) < 0.3
    scores = 0.35 * targets + 0.65 * chance.random((posts, tags))
    return Predictions(
        tuple(f"p{i}" for i in range(posts)),
        tuple(f"{name} {i}" for i in range(tags)),
        scores**2,
        scores,
        targets,
        np.full(tags, 0.5, np.float32),
    )


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


@pytest.mark.parametrize("tags", [1, 60])
def test_charts_of_any_number_of_tags(tags: int) -> None:
    """Drawn without a warning, with names of every kind; no text leaves the picture."""
    some = some_predictions(40, tags, name="$x_{1 long name of a tag in a deep taxonomy 猫 \u0627")
    rows = tables.tag_rows(some)
    subsets = [SubsetGap(s, 0.5, 3, 0.6) for s in subsets_of(support.MODALITIES)]
    before, after = (reliability(s, some.targets) for s in (some.raw, some.scores))
    with style():
        figures = [
            charts.training_curves([[]]),
            charts.pr_curves(some, rows),
            charts.tag_precisions(some, rows),
            charts.calibration(before, after, "isotonic"),
            charts.subsets(subsets),
            charts.confusion(some),
        ]
        for figure in figures:
            if figure is None:  # a single tag is not mistaken for another
                assert tags == 1
                continue
            with Image.open(io.BytesIO(png(figure))) as picture:
                assert picture.width > 300
                edge = np.asarray(picture.convert("L"))
            assert edge[:, [0, -1]].min() > 200, "nothing is cut off at the sides"
            assert edge.min() < 100


def test_names_that_no_font_can_draw_are_numbers() -> None:
    """Otherwise a chart would show boxes; long names are cut by their width."""
    found = shown_names(["cat", "\U0001f9ff\u0fff", "a" * 40, "$x$"], width=10)
    assert found == ["cat", "#1", "aaaaaaaaa…", "$x$"]
    assert len(subsets_of(("text", "video"))) == 3


def test_pages_escape_everything(tmp_path: Path) -> None:
    template = tmp_path / "page.html.j2"
    template.write_text(
        '{% extends "base.html.j2" %}'
        '{% from "parts.html.j2" import bars, chips, figures, section, table %}'
        "{% block body %}{% call section(bad) %}{{ table((bad,), [(bad,)]) }}{{ bars({bad: 1}) }}"
        "{{ chips([bad]) }}{{ chips({bad: 1}) }}{{ figures([(bad, bad, bad)]) }}{% endcall %}"
        "{% endblock %}"
    )
    bad = '<script>alert("x")</script>'
    text = render(template, title=bad, bad=bad)
    assert "<script" not in text
    assert '"x"' not in text
    assert text.count("&lt;script&gt;") == 12


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
    assert [href for _, href in found.links] == [
        "../../media/a%20b.png",
        "../../media/broken.jpg",
        "https://x.test/v.mp4",
    ]
    assert len(found.thumbnails) == 1
    assert len(found.thumbnails[0]) < 5000
    pixels = Image.open(io.BytesIO(base64.b64decode(found.thumbnails[0].partition(",")[2])))
    assert np.asarray(pixels)[5, 5].min() > 250, "the model sees white where nothing is drawn"
    url = view_post(
        "p/1&",
        {},
        data_file=data_file,
        report=report,
        post_url="https://x/{post_id}",
        thumbnails=True,
    )
    assert [href for _, href in url.links] == ["https://x/p%2F1%26"]
