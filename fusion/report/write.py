"""A report folder: the page, its charts as PNG files, ``report.json`` and the scores."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from common.errors import ConfigError
from common.files import new_folder
from common.progress import progress_bar
from config.train import ReportSettings
from fusion.report import charts, tables
from fusion.report.judged import SCORES, Judged
from fusion.report.page import Card, Cell, Chapter, Table, page
from fusion.report.subsets import SubsetGap
from fusion.report.worst import Mistake, PostView, worst

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE, NUMBERS = "report.html", "report.json"


@dataclass(frozen=True)
class ReportInput:
    """What a report is made of.

    Attributes:
        title: Name of the bundle.
        subtitle: Of what the numbers are.
        facts: About the run; shown as they are, and in ``report.json``.
        judged: Validation posts; None leaves out everything that needs them.
        runs: Events of each training's log.
        subsets: The best first; empty leaves their chapter out.
        calibration: Kind that was fitted.
        view: Rows of posts ─► what is known of these posts.
    """

    title: str
    subtitle: str
    facts: Mapping[str, Any]
    judged: Judged | None
    runs: Sequence[Sequence[Mapping[str, Any]]] = ()
    subsets: Sequence[SubsetGap] = ()
    calibration: str = "none"
    view: Callable[[Sequence[int]], Mapping[int, PostView]] = field(default=lambda _: {})


def write_report(
    folder: Path, given: ReportInput, settings: ReportSettings, *, progress: bool = False
) -> Path:
    """Write the folder; one that is there is replaced in one step.

    Returns:
        The page.

    Raises:
        ConfigError: The folder cannot be written.
    """
    try:
        with new_folder(folder) as part:
            chapters, numbers = _content(part, given, settings, progress=progress)
            top = _top(numbers.get("metrics", {}))
            text = page(f"Training of {given.title}", given.subtitle, top, chapters)
            (part / PAGE).write_text(text, encoding="utf-8")
            (part / NUMBERS).write_text(
                json.dumps(numbers, ensure_ascii=False, indent=1) + "\n", encoding="utf-8"
            )
    except OSError as error:
        raise ConfigError(f"{folder}: the report cannot be written: {error}") from error
    return folder / PAGE


def _content(
    folder: Path, given: ReportInput, settings: ReportSettings, *, progress: bool
) -> tuple[list[Chapter], dict[str, Any]]:
    """The chapters, and the content of ``report.json``; writes charts and scores."""
    judged = given.judged
    numbers: dict[str, Any] = {"facts": dict(given.facts)}
    with progress_bar("report", 7, enabled=progress) as bar:

        def draw(name: str, figure: Callable[[], Figure | None]) -> dict[str, bytes]:
            with charts.style():
                made = figure()
                content = None if made is None else _png(made)
            bar.advance()
            if content is None:
                return {}
            (folder / f"{name}.png").write_bytes(content)
            return {name.replace("_", " "): content}

        chapters = [_run(given, draw)]
        if judged is not None and len(judged.post_ids):
            judged.save(folder / SCORES)
            rows = tables.tag_rows(judged)
            mistakes = worst(judged, settings.mistakes)
            numbers |= _numbers(given, judged, rows, mistakes)
            chapters += [
                _curves(judged, rows, draw),
                _tags(judged, rows, draw),
                *_subsets(given, draw),
                _calibrated(given, judged, draw),
                _confused(judged, draw),
                _mistakes(given, judged, mistakes),
            ]
            bar.advance()
    return chapters, numbers


Drawn: TypeAlias = Callable[[str, "Callable[[], Figure | None]"], "dict[str, bytes]"]
Mistakes: TypeAlias = tuple[list[Mistake], list[Mistake]]


def _run(given: ReportInput, draw: Drawn) -> Chapter:
    epochs = any(event["event"] == "epoch" for run in given.runs for event in run)
    drawn = draw("training", lambda: charts.training_curves(given.runs)) if epochs else {}
    facts = Table(("fact", "value"), [(k, _fact(v)) for k, v in given.facts.items()])
    text = ""
    if len(given.runs) > 1:
        text = "One line for each fold; validation is on the posts that were left out of it."
    elif given.judged is not None:
        text = "The grey line is the epoch with the best GAP."
    return Chapter("The run", text, drawn, facts)


def _curves(judged: Judged, rows: list[tables.TagRow], draw: Drawn) -> Chapter:
    text = (
        "How many of the given tags are right (precision) against how many of the true ones are "
        "given (recall), as the threshold falls. The red point: at the bundle's thresholds."
    )
    return Chapter(
        "Precision and recall",
        text,
        draw("precision_recall", lambda: charts.pr_curves(judged, rows)),
    )


def _tags(judged: Judged, rows: list[tables.TagRow], draw: Drawn) -> Chapter:
    text = (
        "Average precision needs no threshold; precision, recall and F1 are at the threshold of "
        "the tag. Tags of few posts say little: look at the support first."
    )
    names = ("tag", "posts", "average precision", "threshold", "given", "precision", "recall", "F1")
    table = Table(
        names,
        [
            (r.name, r.support, r.ap, r.threshold, r.given, r.precision, r.recall, r.f1)
            for r in rows
        ],
    )
    chart = draw("tags", lambda: charts.tag_precisions(judged, rows))
    return Chapter("Tags", text, chart, table)


def _subsets(given: ReportInput, draw: Drawn) -> list[Chapter]:
    if not given.subsets:
        return []
    text = (
        "The same model, shown only some of the modalities. A post that has none of them gets what "
        "the model says when it knows nothing; the last column leaves such posts out."
    )
    table = Table(
        ("modalities", "GAP@20", "posts that have one of them", "GAP@20 of these posts"),
        [(s.name.replace("+", " + "), s.gap, s.posts, s.gap_of_posts) for s in given.subsets],
    )
    chart = draw("subsets", lambda: charts.subsets(given.subsets))
    return [Chapter("Modalities", text, chart, table)]


def _calibrated(given: ReportInput, judged: Judged, draw: Drawn) -> Chapter:
    before, after = tables.reliabilities(judged)
    text = (
        "Of the decisions with a score near 0.8, eight in ten are true where scores are "
        "probabilities: points lie on the diagonal. ECE is the mean distance from it, weighed by "
        "the decisions. A calibration is fitted to the same posts, and looks a little better here "
        "than it will on new ones."
    )
    return Chapter(
        "Calibration",
        text,
        draw("calibration", lambda: charts.calibration(before, after, given.calibration)),
    )


def _confused(judged: Judged, draw: Drawn) -> Chapter:
    text = (
        "Posts in which one tag was missed and another wrongly given. A pair that stands out both "
        "ways is often two names for one thing, or labelled in both ways."
    )
    table = Table(
        ("missed", "wrongly given", "posts", "share of the posts where it was missed"),
        [
            (judged.names[c.missed], judged.names[c.given], c.posts, c.share)
            for c in tables.confusions(judged)
        ],
    )
    return Chapter("Confusions", text, draw("confusion", lambda: charts.confusion(judged)), table)


def _mistakes(given: ReportInput, judged: Judged, mistakes: Mistakes) -> Chapter:
    wrong, missed = mistakes
    views = given.view([mistake.row for mistake in (*wrong, *missed)])
    text = (
        "Where the model was surest and wrong. Look at the posts: a tag that is plainly right, or "
        "plainly absent, is a mistake of the labels."
    )
    groups = tuple(
        (name, [_card(judged, mistake, views.get(mistake.row)) for mistake in some])
        for name, some in (("Wrongly given", wrong), ("Missed", missed))
    )
    return Chapter("Worst mistakes", text, cards=groups)


def _card(judged: Judged, mistake: Mistake, view: PostView | None) -> Card:
    row, names = mistake.row, judged.names
    true = ", ".join(names[i] for i in judged.targets[row].nonzero()[0]) or "none"
    order = judged.scores[row].argsort()[::-1][:4]
    best = ", ".join(f"{names[i]} {judged.scores[row, i]:.2f}" for i in order)
    lines = [
        f"score {mistake.score:.3f}, threshold {judged.thresholds[mistake.tag]:.3f}",
        f"true: {true}",
        f"highest: {best}",
    ]
    if view is None:
        view = PostView()
    if view.text:
        lines.append(f"“{view.text}”")
    links = [(link.text, link.href) for link in view.links]
    title = f"{names[mistake.tag]}: post {judged.post_ids[row]}"
    return Card(title, lines, links, view.thumbnails)


def _mistake(judged: Judged, mistake: Mistake) -> dict[str, Any]:
    return {
        "kind": mistake.kind,
        "post_id": judged.post_ids[mistake.row],
        "tag": judged.names[mistake.tag],
        "score": mistake.score,
        "threshold": float(judged.thresholds[mistake.tag]),
        "loss": mistake.loss,
    }


def _numbers(
    given: ReportInput, judged: Judged, rows: list[tables.TagRow], mistakes: Mistakes
) -> dict[str, Any]:
    before, after = tables.reliabilities(judged)
    return {
        "metrics": tables.summary(judged),
        "tags": tables.rows_as_json(rows),
        "subsets": [
            {
                "modalities": list(s.modalities),
                "gap": s.gap,
                "posts": s.posts,
                "gap_of_posts": s.gap_of_posts,
            }
            for s in given.subsets
        ],
        "calibration": {
            "kind": given.calibration,
            "before": tables.as_json(before),
            "after": tables.as_json(after),
        },
        "confusions": tables.rows_as_json(tables.confusions(judged)),
        "mistakes": [_mistake(judged, mistake) for some in mistakes for mistake in some],
    }


_SHOWN = {
    "gap": "GAP@20",
    "map": "mAP",
    "hit_at_1": "Hit@1",
    "perr": "PERR",
    "f1_micro": "micro F1",
    "f1_macro": "macro F1",
    "accuracy": "accuracy of decisions",
    "accuracy_exact": "posts wholly right",
}


def _top(found: Mapping[str, float]) -> dict[str, Cell]:
    return {name: round(found[key], 4) for key, name in _SHOWN.items() if key in found}


def _fact(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return "–" if value is None else ("yes" if value else "no")
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def _png(figure: Figure) -> bytes:
    held = io.BytesIO()
    figure.savefig(held, format="png")
    return held.getvalue()
