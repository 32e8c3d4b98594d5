"""A report folder: the page, ``report.json`` with its numbers, and the scores."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from common.errors import told
from common.files import new_folder
from common.fingerprint import digest
from common.html import counted, render
from config.train import ReportSettings
from fusion.metrics.calibration import reliability
from fusion.metrics.ranking import TITLES, summary
from fusion.report import charts
from fusion.report.advice import next_steps
from fusion.report.predictions import (
    SCORES,
    Predictions,
    confusion_counts,
    confusions,
    tag_rows,
    worst,
)
from fusion.report.subsets import SubsetGap
from fusion.report.view import PostView

PAGE, NUMBERS = "report.html", "report.json"
_TEMPLATE = Path(__file__).with_name("report.html.j2")
_BEST_TAGS = 4  # highest scores that the card of a mistake shows
_MOST_CONFUSED = 24  # tags of the matrix: more cells cannot be read
_TILES = ("gap", "map", "hit_at_1", "f1_micro")
_RANKS = ("gap", "map", "hit_at_1", "perr")  # metrics without thresholds


@dataclass(frozen=True)
class HeldOutFigures:
    """Metrics of held-out posts; ``seen_posts`` of them were trained on, or 0."""

    posts: int
    metrics: Mapping[str, float]
    seen_posts: int = 0


@dataclass(frozen=True)
class ReportInput:
    """The content of a report.

    Attributes:
        subtitle: Names the posts that the numbers are of.
        facts: About the run; shown as they are, and in ``report.json``.
        predictions: Of validation posts; None leaves out everything that needs them.
        run: Its folder; one that began before next to it, with a report in the same place, is
            compared with.
        again: Words of the command that trains again; ``use`` is the one that uses the result.
        runs: Events of each training's log.
        subsets: The best first; empty leaves their chapter out.
        calibration: Kind that was fitted.
        frequencies: Of the tags in the training posts, ``(classes,)``: scores of the baseline.
        test: Of held-out posts.
        seen_posts: Posts that the numbers are of, where the model was trained on all; else 0.
        view: Returns the views of the posts of some rows, where they can be read.
    """

    title: str
    subtitle: str
    facts: Mapping[str, Any]
    predictions: Predictions | None
    run: Path | None = None
    again: Sequence[str] = ("python", "train_net.py", "--model_config", "CONFIG.yaml")
    use: str = ""
    runs: Sequence[Sequence[Mapping[str, Any]]] = ()
    subsets: Sequence[SubsetGap] = ()
    calibration: str = "none"
    frequencies: npt.NDArray[np.floating] | None = None
    test: HeldOutFigures | None = None
    seen_posts: int = 0
    view: Callable[[Sequence[int]], Mapping[int, PostView]] = field(default=lambda _: {})


def write_report(folder: Path, content: ReportInput, settings: ReportSettings) -> Path:
    """Write the folder, in place of an older one in one step; return the page."""
    with told(f"{folder}: the report cannot be written"), new_folder(folder) as part:
        _write(part, folder, content, settings)
    return folder / PAGE


def _write(part: Path, folder: Path, content: ReportInput, settings: ReportSettings) -> None:
    numbers: dict[str, Any] = {"facts": dict(content.facts)}
    if content.seen_posts:
        numbers["seen_posts"] = content.seen_posts
    shown: dict[str, Any] = {"predictions": False, "figure_rows": ()}
    if content.test is not None:
        numbers["test"], note = asdict(content.test), f"test, {counted(content.test.posts, 'post')}"
        values = content.test.metrics
        shown["figure_rows"] = [(f"{values[key]:.3f}", TITLES[key], note) for key in _TILES]
    if content.predictions is not None and len(content.predictions.post_ids):
        content.predictions.save(part / SCORES)
        numbers, shown = _measured(content, content.predictions, settings, numbers)
        shown |= _compared(numbers, _earlier(folder, content.run))
    base = numbers.get("baseline") or {}
    page = render(
        _TEMPLATE,
        title=f"Training of {content.title}",
        subtitle=content.subtitle,
        seen=content.seen_posts,
        next_steps=next_steps(numbers, content.runs, content.again, content.use),
        training_charts=charts.training_curves(
            content.runs, seen=bool(content.seen_posts), baseline=base.get("gap")
        ),
        facts=[(name, _fact(value)) for name, value in content.facts.items()],
        subsets=[(_joined(s.modalities), s.gap, s.posts, s.gap_of_posts) for s in content.subsets],
        subset_bars=_subset_bars(content.subsets),
        **shown,
    )
    (part / PAGE).write_text(page, encoding="utf-8")
    text = json.dumps(numbers, ensure_ascii=False, indent=1) + "\n"
    (part / NUMBERS).write_text(text, encoding="utf-8")


def _measured(
    content: ReportInput,
    predictions: Predictions,
    settings: ReportSettings,
    numbers: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what ``report.json`` and the page have of predictions."""
    names, targets = predictions.names, predictions.targets
    rows, mistakes = tag_rows(predictions), worst(predictions, settings.mistakes)
    confused = confusions(predictions)
    before, after = (reliability(s, targets) for s in (predictions.raw, predictions.scores))
    views = content.view([mistake.row for some in mistakes.values() for mistake in some])
    baseline = None
    if content.frequencies is not None:
        every = summary(np.broadcast_to(content.frequencies, targets.shape), targets)
        baseline = {key: every[key] for key in _RANKS}
    more = {
        "posts": len(predictions.post_ids),
        "measured_on": str(digest({"posts": predictions.post_ids, "tags": names})),
        "metrics": summary(predictions.scores, targets, predictions.thresholds),
        "baseline": baseline,
        "test": numbers.get("test"),
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
    measured = sorted((r for r in rows if r.ap is not None), key=lambda r: (r.ap or 0, r.id))
    shown = {
        "predictions": True,
        "tags": [row[1:] for row in rows],
        "tag_bars": [
            (r.name, r.ap, f"{r.ap:.3f} · {counted(r.support, 'post')}") for r in measured
        ],
        "confusions": [(names[c.missed], names[c.given], c.posts, c.share) for c in confused],
        "confused": _matrix(predictions),
        "mistakes": [
            (kind.capitalize(), [_card(predictions, *m[:3], views.get(m.row)) for m in some])
            for kind, some in mistakes.items()
        ],
        "pr_charts": charts.pr_curves(predictions, rows),
        "calibration_charts": charts.calibration(before, after, content.calibration),
    }
    return {**numbers, **more}, shown


def _earlier(folder: Path, run: Path | None) -> dict[str, Any] | None:
    """Return the numbers of the report of the run before this one, where there is one.

    Runs are named by the time when they began.
    """
    if run is None:
        return None
    numbers_file = folder.relative_to(run) / NUMBERS
    for other in sorted(run.parent.glob("*"), reverse=True):
        if other.name >= run.name:
            continue
        try:
            numbers = json.loads((other / numbers_file).read_text(encoding="utf-8"))
            if isinstance(numbers["facts"], dict) and isinstance(numbers["metrics"]["gap"], float):
                return dict(numbers)
        except (OSError, ValueError, KeyError, TypeError):
            continue  # of another version, or without figures
    return None


def _compared(numbers: Mapping[str, Any], earlier: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the page's figures: this run next to the baseline, the previous run, and the test."""
    sides: dict[str, Mapping[str, float]] = {}
    notes = []
    if numbers["baseline"] is not None:
        sides["baseline"] = numbers["baseline"]
        notes.append("Baseline: the score of every tag is its frequency in training.")
    if earlier is not None:
        sides["earlier run"] = earlier["metrics"]
        if earlier.get("measured_on") != numbers["measured_on"]:
            notes.append("The earlier run was measured on other posts: compare with care.")
    sides["this run"] = numbers["metrics"]
    test = numbers["test"]
    if test is not None:
        sides["test"] = test["metrics"]
        what = "all trained on: not a test" if test["seen_posts"] else "not used to choose anything"
        notes.append(f"Test: {counted(test['posts'], 'post')}, {what}.")
    before = {} if earlier is None else earlier["metrics"]
    tiles = []
    for key in _TILES:
        value, was = numbers["metrics"][key], before.get(key)
        test_value = sides.get("test", {}).get(key)
        note = [] if was is None else [f"{value - was:+.3f} to the earlier run"]
        note += [] if test_value is None else [f"test {test_value:.3f}"]
        if not note and key in sides.get("baseline", {}):
            note = [f"baseline {sides['baseline'][key]:.3f}"]
        tiles.append((f"{value:.3f}", TITLES[key], ", ".join(note)))
    facts = [] if earlier is None else [
        (name, _fact(earlier["facts"].get(name)), _fact(value))
        for name, value in numbers["facts"].items()
        if earlier["facts"].get(name) != value
    ]  # fmt: skip
    return {
        "figure_rows": tiles,
        "compared_heads": ("", *sides),
        "compared": [
            (title, *(side.get(key) for side in sides.values())) for key, title in TITLES.items()
        ],
        "compared_notes": notes,
        "changed": facts,
    }


def _subset_bars(subsets: Sequence[SubsetGap], others: int = 3) -> list[tuple[str, float, str]]:
    """Return bars of all modalities, each alone, and the best of the other subsets."""
    most = max((len(s.modalities) for s in subsets), default=0)
    rest = [s for s in subsets if 1 < len(s.modalities) < most][:others]
    shown = [s for s in subsets if len(s.modalities) in (1, most) or s in rest]
    every = next((s.modalities for s in subsets if len(s.modalities) == most), ())

    def name(some: Sequence[str]) -> str:
        missing = [m for m in every if m not in some]
        if len(missing) > 1 or len(some) == 1:
            return _joined(some)
        return f"all but {missing[0]}" if missing else "all"

    return [(name(s.modalities), s.gap, f"{s.gap:.3f}") for s in shown]


def _joined(names: Sequence[str]) -> str:
    return " + ".join(names)


def _matrix(predictions: Predictions) -> list[tuple[str, list[tuple[float, str, str] | None]]]:
    """Return how many posts have one tag missed (rows) and another wrongly given (columns)."""
    counts, names = confusion_counts(predictions), predictions.names
    weight = counts.sum(axis=0) + counts.sum(axis=1)
    chosen = np.sort(np.argsort(-weight, kind="stable")[:_MOST_CONFUSED])
    some = chosen[weight[chosen] > 0].tolist()
    top = max(1, int(counts.max(initial=0)))

    def cell(i: int, j: int) -> tuple[float, str, str] | None:
        count = int(counts[i, j])
        note = f"{names[i]} missed, {names[j]} given: {count:,}"
        return (0.4 * count / top, str(count), note) if count else None

    return [(names[i], [cell(i, j) for j in some]) for i in some]


def _card(
    predictions: Predictions, row: int, tag: int, score: float, view: PostView | None
) -> dict[str, Any]:
    names = predictions.names
    true = ", ".join(names[i] for i in predictions.targets[row].nonzero()[0]) or "none"
    order = predictions.scores[row].argsort()[::-1][:_BEST_TAGS]
    best = ", ".join(f"{names[i]} {predictions.scores[row, i]:.2f}" for i in order)
    return {
        "title": f"{names[tag]} {score:.2f}",
        "lines": [
            f"true: {true}",
            f"highest: {best}",
            f"post {_short(predictions.post_ids[row])}, "
            f"threshold {predictions.thresholds[tag]:.2f}",
        ],
        "view": view or PostView(),
    }


def _short(post_id: str) -> str:
    return post_id if len(post_id) <= 40 else f"{post_id[:32]}…"


def _fact(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}"
    return f"{value:,}" if isinstance(value, int) else str("–" if value is None else value)
