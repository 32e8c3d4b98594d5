"""The charts of a training's report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from common.charts import Axis, Chart, Line, columns, lines
from fusion.metrics import ranking as metrics
from fusion.metrics.calibration import Reliability
from fusion.report.predictions import Predictions, TagRow

# Colours of the page; lines of more folds repeat them.
_LOOKS = 5
# Tags whose curves are drawn: more could not be told apart.
_CURVES = 4
# Of a curve over all tags: sorting more takes minutes.
_MOST_DECISIONS = 20_000_000
_SHARE = Axis(low=0, high=1)
_VALID = (("gap", "GAP@20"), ("map", "mAP"), ("hit_at_1", "Hit@1"), ("f1_micro", "micro F1 at 0.5"))


def training_curves(
    runs: Sequence[Sequence[Mapping[str, Any]]],
    *,
    seen: bool = False,
    baseline: float | None = None,
) -> list[Chart]:
    """Return loss, validation and learning rate over the epochs, as far as they were logged.

    Of several runs validation shows GAP alone; ``seen`` posts were trained on.
    """
    loss, valid, rate = [], [], []
    epochs = Axis("epoch", low=0, whole=True)
    for number, events in enumerate(runs):
        name, look = f"fold {number + 1}" if len(runs) > 1 else "", number % _LOOKS
        kinds = {
            kind: [e for e in events if e["event"] == kind] for kind in ("epoch", "valid", "step")
        }
        loss.append(Line(name, [(e["epoch"], e["loss"]) for e in kinds["epoch"]], look))
        steps = next((e["steps"] for e in events if e["event"] == "begin"), 1)
        rates = [(e["epoch"] - 1 + e["step"] / steps, e["learning_rate"]) for e in kinds["step"]]
        rate.append(Line(name, rates, look))
        shown = _VALID if len(runs) == 1 else (("gap", name),)
        valid += [
            Line(title, [(e["epoch"], e[key]) for e in kinds["valid"] if key in e], look + i)
            for i, (key, title) in enumerate(shown)
        ]
    some = [x for line in valid for x, _ in line.points]
    if some and baseline is not None:
        ends = [(0, baseline), (max(some), baseline)]
        valid.append(Line("GAP@20 of the baseline", ends, "ref"))
    title = "Validation" if len(runs) == 1 else "GAP@20 of the posts left out"
    drawn = (
        lines("Training loss", loss, epochs, Axis(low=0)),
        lines(f"{title} (training posts)" if seen else title, valid, epochs, Axis(low=0)),
        lines("Learning rate", rate, epochs, Axis(low=0)),
    )
    return [chart for chart in drawn if chart is not None]


def pr_curves(predictions: Predictions, rows: Sequence[TagRow]) -> list[Chart]:
    """Return precision over recall: all tags together, then the best and the worst tags."""
    step = max(1, predictions.scores.size // _MOST_DECISIONS)
    predicted, truth = predictions.predicted, predictions.targets
    right = float((predicted & truth).sum())
    point = (right / max(1, truth.sum()), right / max(1, predicted.sum()))
    curve = _curve(predictions.scores[::step], truth[::step], "", 0)
    measured = sorted((r for r in rows if r.ap is not None), key=lambda r: -(r.ap or 0))
    half = min(_CURVES, -(-len(measured) // 2))
    shown = {
        "all tags together": [curve, Line("at the thresholds", [point], 1)],
        "best tags": _tag_curves(predictions, measured[:half]),
        "worst tags": _tag_curves(predictions, measured[half:][-_CURVES:]),
    }
    axes = Axis("recall", 0, 1), _SHARE
    drawn = (lines(f"Precision: {title}", some, *axes) for title, some in shown.items())
    return [chart for chart in drawn if chart is not None]


def _tag_curves(predictions: Predictions, rows: Sequence[TagRow]) -> list[Line]:
    scores, truth = predictions.scores, predictions.targets
    return [
        _curve(scores[:, row.id], truth[:, row.id], f"{row.name} {row.ap:.2f}", look)
        for look, row in enumerate(rows)
    ]


def _curve(scores: Any, truth: Any, name: str, look: int) -> Line:
    curve = metrics.precision_recall(scores, truth)
    points = list(zip(curve.recall.tolist(), curve.precision.tolist(), strict=True))
    return Line(name, [(0.0, points[0][1]), *points] if points else [], look)


def calibration(before: Reliability, after: Reliability, fitted: str) -> list[Chart]:
    """Return how often scores are right, a calibrated model on the diagonal, and their counts."""
    kinds = [(after, "scores" if fitted == "none" else f"after {fitted}", 0)]
    if fitted != "none":
        kinds.append((before, "before", 1))
    drawn = [Line("as often as the score says", [(0, 0), (1, 1)], "ref")]
    for values, name, look in kinds:
        some = values.counts > 0
        points = zip(values.scores[some].tolist(), values.right[some].tolist(), strict=True)
        drawn.append(Line(f"{name}: ECE {values.error:.3f}", list(points), look))
    bins = len(after.counts)
    names = [f"{i / bins:.2g}" for i in range(bins)]
    reliability = lines("Share that is true", drawn, Axis("score", 0, 1), _SHARE)
    # Nearly all decisions are near 0.
    counted = columns("Decisions at each score", names, after.counts.tolist(), "score", log=True)
    return [chart for chart in (reliability, counted) if chart is not None]
