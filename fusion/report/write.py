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
from fusion.report import charts
from fusion.report.predictions import (
    SCORES,
    Predictions,
    TagRow,
    confusions,
    reliabilities,
    tag_rows,
)
from fusion.report.subsets import SubsetGap
from fusion.report.worst import Mistake, PostView, worst

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fusion.metrics.calibration import Reliability

PAGE, NUMBERS = "report.html", "report.json"
_TEMPLATE = Path(__file__).with_name("report.html.j2")
_BEST_TAGS = 4  # highest scores that the card of a mistake shows

_SHOWN_METRICS = {
    "gap": "GAP@20",
    "map": "mAP",
    "hit_at_1": "Hit@1",
    "perr": "PERR",
    "f1_micro": "micro F1",
    "f1_macro": "macro F1",
    "accuracy": "accuracy of decisions",
    "accuracy_exact": "posts wholly right",
}


@dataclass(frozen=True)
class ReportInput:
    """The content of a report.

    Attributes:
        title: Name of the bundle.
        subtitle: Names the posts that the numbers are of.
        facts: About the run; shown as they are, and in ``report.json``.
        predictions: Of validation posts; None leaves out everything that needs them.
        runs: Events of each training's log.
        subsets: The best first; empty leaves their chapter out.
        calibration: Kind that was fitted.
        view: Returns the views of the posts of some rows, where they can be read.
    """

    title: str
    subtitle: str
    facts: Mapping[str, Any]
    predictions: Predictions | None
    runs: Sequence[Sequence[Mapping[str, Any]]] = ()
    subsets: Sequence[SubsetGap] = ()
    calibration: str = "none"
    view: Callable[[Sequence[int]], Mapping[int, PostView]] = field(default=lambda _: {})


def write_report(
    folder: Path, content: ReportInput, settings: ReportSettings, *, progress: bool = False
) -> Path:
    """Write the folder; an older one is replaced in one step.

    Returns:
        The page.

    Raises:
        ConfigError: The folder cannot be written.
    """
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
    predictions = content.predictions
    numbers: dict[str, Any] = {"facts": dict(content.facts)}
    shown: dict[str, Any] = {"predictions": False, "subsets": []}
    figures: dict[str, Callable[[], Figure | None]] = {}
    if any(event["event"] == "epoch" for run in content.runs for event in run):
        figures["training"] = lambda: charts.training_curves(content.runs)
    if predictions is not None and len(predictions.post_ids):
        predictions.save(folder / SCORES)
        rows, mistakes = tag_rows(predictions), worst(predictions, settings.mistakes)
        reliability = reliabilities(predictions)
        numbers |= _numbers(content, predictions, rows, reliability, mistakes)
        shown |= _tables(content, predictions, rows, mistakes)
        shown["predictions"] = True
        shown["figure_rows"] = [
            (round(numbers["metrics"][key], 4), name, "")
            for key, name in _SHOWN_METRICS.items()
            if key in numbers["metrics"]
        ]
        figures |= {
            "precision_recall": lambda: charts.pr_curves(predictions, rows),
            "tags": lambda: charts.tag_precisions(predictions, rows),
            "calibration": lambda: charts.calibration(*reliability, content.calibration),
            "confusion": lambda: charts.confusion(predictions),
        }
        if content.subsets:
            figures["subsets"] = lambda: charts.subsets(content.subsets)
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
        runs=len(content.runs),
        facts=[(name, _fact(value)) for name, value in content.facts.items()],
        charts={name: drawn.get(name) for name in (*figures, "training")},
        **shown,
    )
    (folder / PAGE).write_text(page, encoding="utf-8")
    text = json.dumps(numbers, ensure_ascii=False, indent=1) + "\n"
    (folder / NUMBERS).write_text(text, encoding="utf-8")
    bar.advance()


def _tables(
    content: ReportInput,
    predictions: Predictions,
    rows: Sequence[TagRow],
    mistakes: tuple[list[Mistake], list[Mistake]],
) -> dict[str, Any]:
    """Return the rows and cards of the page."""
    names = predictions.names
    views = content.view([mistake.row for some in mistakes for mistake in some])
    return {
        "tags": [
            (r.name, r.support, r.ap, r.threshold, r.given, r.precision, r.recall, r.f1)
            for r in rows
        ],
        "subsets": [
            (s.name.replace("+", " + "), s.gap, s.posts, s.gap_of_posts) for s in content.subsets
        ],
        "confusions": [
            (names[c.missed], names[c.given], c.posts, c.share) for c in confusions(predictions)
        ],
        "mistakes": [
            (kind, [_card(predictions, mistake, views.get(mistake.row)) for mistake in some])
            for kind, some in zip(("Wrongly given", "Missed"), mistakes, strict=True)
        ],
    }


def _card(predictions: Predictions, mistake: Mistake, view: PostView | None) -> dict[str, Any]:
    row, names = mistake.row, predictions.names
    view = view or PostView()
    true = ", ".join(names[i] for i in predictions.targets[row].nonzero()[0]) or "none"
    order = predictions.scores[row].argsort()[::-1][:_BEST_TAGS]
    lines = [
        f"score {mistake.score:.3f}, threshold {predictions.thresholds[mistake.tag]:.3f}",
        f"true: {true}",
        "highest: " + ", ".join(f"{names[i]} {predictions.scores[row, i]:.2f}" for i in order),
    ]
    if view.text:
        lines.append(f"“{view.text}”")
    title = f"{names[mistake.tag]}: post {predictions.post_ids[row]}"
    return {"title": title, "lines": lines, "view": view}


def _numbers(
    content: ReportInput,
    predictions: Predictions,
    rows: Sequence[TagRow],
    reliability: tuple[Reliability, Reliability],
    mistakes: tuple[list[Mistake], list[Mistake]],
) -> dict[str, Any]:
    """Return the content of ``report.json``, but for the facts."""
    before, after = reliability
    return {
        "metrics": predictions.summary(),
        "tags": [asdict(row) for row in rows],
        "subsets": [{**asdict(s), "modalities": list(s.modalities)} for s in content.subsets],
        "calibration": {
            "kind": content.calibration,
            "before": before.as_json(),
            "after": after.as_json(),
        },
        "confusions": [asdict(confusion) for confusion in confusions(predictions)],
        "mistakes": [
            {
                "kind": mistake.kind,
                "post_id": predictions.post_ids[mistake.row],
                "tag": predictions.names[mistake.tag],
                "score": mistake.score,
                "threshold": float(predictions.thresholds[mistake.tag]),
                "loss": mistake.loss,
            }
            for some in mistakes
            for mistake in some
        ],
    }


def _fact(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return "–" if value is None else ("yes" if value else "no")
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.4g}" if isinstance(value, float) else str(value)
