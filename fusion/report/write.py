"""A report folder: the page, its charts as PNG files, ``report.json`` and the scores."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import charts as drawing
from common.errors import ConfigError
from common.files import new_folder
from common.html import render
from common.progress import Bar, progress_bar
from config.train import ReportSettings
from fusion.metrics.calibration import reliability
from fusion.metrics.ranking import TITLES, summary
from fusion.report import charts
from fusion.report.predictions import SCORES, Predictions, confusions, tag_rows, worst
from fusion.report.subsets import SubsetGap
from fusion.report.view import PostView

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE, NUMBERS = "report.html", "report.json"
_TEMPLATE = Path(__file__).with_name("report.html.j2")
_BEST_TAGS = 4  # highest scores that the card of a mistake shows


@dataclass(frozen=True)
class ReportInput:
    """The content of a report.

    Attributes:
        subtitle: Names the posts that the numbers are of.
        facts: About the run; shown as they are, and in ``report.json``.
        predictions: Of validation posts; None leaves out everything that needs them.
        runs: Events of each training's log.
        subsets: The best first; empty leaves their chapter out.
        calibration: Kind that was fitted.
        seen_posts: Posts that the numbers are of, where the model was trained on all; else 0.
        view: Returns the views of the posts of some rows, where they can be read.
    """

    title: str
    subtitle: str
    facts: Mapping[str, Any]
    predictions: Predictions | None
    runs: Sequence[Sequence[Mapping[str, Any]]] = ()
    subsets: Sequence[SubsetGap] = ()
    calibration: str = "none"
    seen_posts: int = 0
    view: Callable[[Sequence[int]], Mapping[int, PostView]] = field(default=lambda _: {})


def write_report(
    folder: Path, content: ReportInput, settings: ReportSettings, *, progress: bool = False
) -> Path:
    """Write the folder, in place of an older one in one step; return the page."""
    try:
        with (
            new_folder(folder) as part,
            progress_bar("report", 7, enabled=progress) as bar,
        ):
            _write(part, content, settings, bar)
    except OSError as error:
        raise ConfigError(f"{folder}: the report cannot be written: {error}") from error
    return folder / PAGE


def _write(folder: Path, content: ReportInput, settings: ReportSettings, bar: Bar) -> None:
    numbers: dict[str, Any] = {"facts": dict(content.facts)}
    if content.seen_posts:
        numbers["seen_posts"] = content.seen_posts
    shown: dict[str, Any] = {"predictions": False}
    figures: dict[str, Callable[[], Figure | None]] = {}
    if any(event["event"] == "epoch" for run in content.runs for event in run):
        seen = bool(content.seen_posts)
        figures["training"] = lambda: charts.training_curves(content.runs, seen=seen)
    if content.predictions is not None and len(content.predictions.post_ids):
        content.predictions.save(folder / SCORES)
        more, shown, measured = _measured(content, content.predictions, settings)
        numbers |= more
        figures |= measured
    drawn: dict[str, bytes] = {}
    with drawing.style():
        for name, draw in figures.items():
            figure = draw()
            if figure is not None:
                drawn[name] = drawing.png(figure)
                (folder / f"{name}.png").write_bytes(drawn[name])
            bar.advance()
    page = render(
        _TEMPLATE,
        title=f"Training of {content.title}",
        subtitle=content.subtitle,
        seen=content.seen_posts,
        runs=len(content.runs),
        facts=[(name, _fact(value)) for name, value in content.facts.items()],
        subsets=[
            (" + ".join(s.modalities), s.gap, s.posts, s.gap_of_posts) for s in content.subsets
        ],
        charts={name: drawn.get(name) for name in (*figures, "training")},
        **shown,
    )
    (folder / PAGE).write_text(page, encoding="utf-8")
    text = json.dumps(numbers, ensure_ascii=False, indent=1) + "\n"
    (folder / NUMBERS).write_text(text, encoding="utf-8")
    bar.advance()


def _measured(
    content: ReportInput, predictions: Predictions, settings: ReportSettings
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Callable[[], Figure | None]]]:
    """Return what ``report.json``, the page and the charts show of predictions."""
    names, targets = predictions.names, predictions.targets
    rows, mistakes = tag_rows(predictions), worst(predictions, settings.mistakes)
    confused = confusions(predictions)
    metrics = summary(predictions.scores, targets, predictions.thresholds)
    before, after = (reliability(s, targets) for s in (predictions.raw, predictions.scores))
    views = content.view([mistake.row for some in mistakes.values() for mistake in some])
    numbers = {
        "metrics": metrics,
        "tags": [row._asdict() for row in rows],
        "subsets": [{**asdict(s), "modalities": list(s.modalities)} for s in content.subsets],
        "calibration": {
            "kind": content.calibration,
            "before": before.as_json(),
            "after": after.as_json(),
        },
        "confusions": [pair._asdict() for pair in confused],
        "mistakes": [
            {
                "kind": kind,
                "post_id": predictions.post_ids[mistake.row],
                "tag": names[mistake.tag],
                "score": mistake.score,
                "threshold": float(predictions.thresholds[mistake.tag]),
                "loss": mistake.loss,
            }
            for kind, some in mistakes.items()
            for mistake in some
        ],
    }
    shown = {
        "predictions": True,
        "figure_rows": [(round(metrics[key], 4), name, "") for key, name in TITLES.items()],
        "tags": [row[1:] for row in rows],
        "confusions": [(names[c.missed], names[c.given], c.posts, c.share) for c in confused],
        "mistakes": [
            (kind.capitalize(), [_card(predictions, *m[:3], views.get(m.row)) for m in some])
            for kind, some in mistakes.items()
        ],
    }
    figures: dict[str, Callable[[], Figure | None]] = {
        "precision_recall": lambda: charts.pr_curves(predictions, rows),
        "tags": lambda: charts.tag_precisions(predictions, rows),
        "calibration": lambda: charts.calibration(before, after, content.calibration),
        "confusion": lambda: charts.confusion(predictions),
    }
    if content.subsets:
        figures["subsets"] = lambda: charts.subsets(content.subsets)
    return numbers, shown, figures


def _card(
    predictions: Predictions, row: int, tag: int, score: float, view: PostView | None
) -> dict[str, Any]:
    names, view = predictions.names, view or PostView()
    true = ", ".join(names[i] for i in predictions.targets[row].nonzero()[0]) or "none"
    order = predictions.scores[row].argsort()[::-1][:_BEST_TAGS]
    lines = [
        f"score {score:.3f}, threshold {predictions.thresholds[tag]:.3f}",
        f"true: {true}",
        "highest: " + ", ".join(f"{names[i]} {predictions.scores[row, i]:.2f}" for i in order),
    ]
    if view.text:
        lines.append(f"“{view.text}”")
    return {
        "title": f"{names[tag]}: post {predictions.post_ids[row]}",
        "lines": lines,
        "view": view,
    }


def _fact(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}"
    return f"{value:,}" if isinstance(value, int) else str("–" if value is None else value)
