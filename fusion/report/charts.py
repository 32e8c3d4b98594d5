"""The charts of a training's report; draw them inside `common.charts.style`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from common.charts import BLUE, GREEN, GREY, ORANGE, PINK, RED, SKY, shown_names, whole_numbers
from common.charts import figure as new_figure
from common.post import MODALITIES
from fusion.metrics import ranking as metrics
from fusion.metrics.calibration import Reliability
from fusion.report.predictions import Predictions, TagRow, confusion_counts
from fusion.report.subsets import SubsetGap

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MANY = (BLUE, ORANGE, GREEN, RED, PINK, SKY, "#333333")
_DASHES = ("-", "--", ":", "-.", (0, (5, 1)))
# Bars and cells that fit on a page and can still be read; the tables hold the rest.
_MOST_TAGS, _MOST_CONFUSED = 48, 24
# Points of a curve: more than a chart has pixels.
_POINTS = 1500
# Of a curve over all tags: sorting more takes minutes.
_MOST_DECISIONS = 20_000_000

_VALID = (
    ("gap", "GAP@20", BLUE, "-"),
    ("map", "mAP", ORANGE, "--"),
    ("hit_at_1", "Hit@1", GREEN, ":"),
    ("f1_micro", "micro F1 at 0.5", PINK, "-."),
)


def training_curves(runs: Sequence[Sequence[Mapping[str, Any]]], *, seen: bool = False) -> Figure:
    """Draw loss, validation and learning rate over the epochs, as far as they were logged.

    Of several runs validation shows GAP alone; ``seen`` posts were trained on.
    """
    figure, (left, middle, right) = new_figure(11, 3.4, columns=3)
    for number, events in enumerate(runs):
        look: dict[str, Any] = {
            "color": _MANY[number % len(_MANY)],
            "ls": _DASHES[number % len(_DASHES)],
        }
        epochs, valid, steps = (
            [e for e in events if e["event"] == kind] for kind in ("epoch", "valid", "step")
        )
        left.plot([e["epoch"] for e in epochs], [e["loss"] for e in epochs], marker=".", **look)
        begin = next((e for e in events if e["event"] == "begin"), {"steps": 1})
        at = [e["epoch"] - 1 + e["step"] / begin["steps"] for e in steps]
        right.plot(at, [e["learning_rate"] for e in steps], **look)
        if len(runs) > 1:
            points = [(e["epoch"], e["gap"]) for e in valid]
            middle.plot(*_columns(points), marker=".", label=f"fold {number + 1}", **look)
        else:
            _validation(middle, valid)
    if middle.lines:
        middle.legend(loc="lower right", fontsize=9)
    left.set_title("Training loss")
    title = "Validation" if len(runs) == 1 else "GAP@20 of the posts left out"
    middle.set_title(f"{title} (training posts)" if seen else title)
    right.set_title("Learning rate")
    right.yaxis.set_major_formatter("{x:.3g}")
    for axes in (left, middle, right):
        axes.set_xlabel("epoch")
        whole_numbers(axes.xaxis)
        if not axes.lines:
            axes.text(0.5, 0.5, "not logged", color=GREY, ha="center", transform=axes.transAxes)
            axes.set(xticks=[], yticks=[])
    return figure


def _validation(axes: Axes, valid: Sequence[Mapping[str, Any]]) -> None:
    for key, name, colour, dash in _VALID:
        points = [(e["epoch"], e[key]) for e in valid if key in e]
        if points:
            axes.plot(*_columns(points), color=colour, ls=dash, marker=".", label=name)
    if valid:
        best = max(valid, key=lambda e: (e["gap"], e["epoch"]))
        axes.axvline(best["epoch"], color=GREY, lw=0.8)


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def pr_curves(predictions: Predictions, rows: Sequence[TagRow]) -> Figure:
    """Draw precision over recall: all tags together, then the five best and the five worst tags."""
    figure, axes = new_figure(11, 3.9, columns=3)
    step = max(1, predictions.scores.size // _MOST_DECISIONS)
    scores, truth = predictions.scores[::step], predictions.targets[::step]
    curve = metrics.precision_recall(scores, truth)
    _curve(axes[0], curve, BLUE, "-", None)
    given = predictions.given
    right = float((given & predictions.targets).sum())
    point = (right / max(1, predictions.targets.sum()), right / max(1, given.sum()))
    axes[0].plot(*point, "o", color=RED, label="at the thresholds")
    axes[0].legend(loc="lower left")
    axes[0].set_title("All tags together (micro)")
    names = shown_names(predictions.names)
    measured = sorted((r for r in rows if r.ap is not None), key=lambda r: -(r.ap or 0))
    half = min(5, -(-len(measured) // 2))
    for area, chosen, title in (
        (axes[1], measured[:half], "Best tags"),
        (axes[2], measured[half:][-5:], "Worst tags"),
    ):
        for row, colour, dash in zip(
            chosen, (BLUE, ORANGE, GREEN, RED, PINK), _DASHES, strict=False
        ):
            curve = metrics.precision_recall(
                predictions.scores[:, row.id], predictions.targets[:, row.id]
            )
            _curve(area, curve, colour, dash, f"{names[row.id]}  {row.ap:.2f}")
        area.set_title(f"{title} (average precision)")
        if chosen:
            area.legend(loc="lower left", fontsize=8.5)
    for area in axes:
        area.set(xlabel="recall", ylabel="precision", xlim=(0, 1.01), ylim=(0, 1.03))
    return figure


def tag_precisions(predictions: Predictions, rows: Sequence[TagRow]) -> Figure:
    """Draw the average precision and support of every tag; of many, a histogram and the worst."""
    measured = sorted((r for r in rows if r.ap is not None), key=lambda r: (r.ap or 0, r.id))
    shown = measured[:_MOST_TAGS]
    many = len(measured) > len(shown)
    height = max(2.6, 0.24 * len(shown) + 1)
    names = shown_names(predictions.names, 30)
    if many:
        figure, (top, area) = new_figure(9, height + 2.8, rows=2, ratios=(2.2, height))
        top.hist([r.ap or 0 for r in measured], bins=40, range=(0, 1), color=BLUE)
        top.set(title=f"All {len(measured)} tags", xlabel="average precision", ylabel="tags")
    else:
        figure, (area,) = new_figure(9, height)
    places = np.arange(len(shown))[::-1]
    bars = [r.ap or 0 for r in shown]
    area.barh(places, bars, color=BLUE, height=0.72)
    for place, row in zip(places, shown, strict=True):
        area.text(
            (row.ap or 0) + 0.008, place, f"{row.ap:.3f}   {row.support}", va="center", size=8
        )
    area.set_yticks(places, [names[r.id] for r in shown], size=9)
    area.set(xlim=(0, 1.16), ylim=(-0.7, len(shown) - 0.3), xlabel="average precision")
    area.set_xticks(np.arange(0, 1.01, 0.2))
    area.grid(visible=False, axis="y")
    which = f"The {len(shown)} worst tags" if many else "Tags, the worst first"
    area.set_title(f"{which}: average precision, and posts that have the tag")
    return figure


def calibration(before: Reliability, after: Reliability, fitted: str) -> Figure:
    """Draw how often scores are right: a calibrated model lies on the diagonal."""
    figure, (left, right) = new_figure(9.5, 4.4, columns=2)
    left.plot([0, 1], [0, 1], color=GREY, lw=0.9)
    same = fitted == "none"
    kinds = (
        [(after, BLUE, "o-", "scores")]
        if same
        else [
            (before, ORANGE, "s--", "before"),
            (after, BLUE, "o-", f"after {fitted}"),
        ]
    )
    edges = np.linspace(0, 1, len(after.counts) + 1)
    for values, colour, look, name in kinds:
        filled = values.counts > 0
        left.plot(
            values.scores[filled],
            values.right[filled],
            look,
            color=colour,
            ms=4.5,
            label=f"{name}: ECE {values.error:.4f}",
        )
        right.stairs(values.counts, edges, color=colour, label=name, lw=1.6, ls=look[1:])
    left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    left.set(title="Share that is true", xlabel="score", xlim=(0, 1), ylim=(0, 1.02))
    left.set_aspect("equal")
    right.set(title="Decisions at each score", xlabel="score", yscale="log")
    right.yaxis.set_major_formatter("{x:,.0f}")
    if not same:
        right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    return figure


def subsets(gaps: Sequence[SubsetGap]) -> Figure:
    """Draw the GAP of every subset of the modalities, the best first, with dots for its parts."""
    used = {m for subset in gaps for m in subset.modalities}
    order = [m for m in MODALITIES if m in used]
    width = max(6.0, 0.34 * len(gaps) + 2)
    figure, (top, bottom) = new_figure(
        width, 3 + 0.3 * len(order), rows=2, ratios=(2.6, 0.28 * len(order))
    )
    places = range(len(gaps))
    alone = [len(s.modalities) == 1 for s in gaps]
    top.bar(places, [s.gap for s in gaps], color=[ORANGE if a else BLUE for a in alone], width=0.7)
    for place, subset in zip(places, gaps, strict=True):
        number = f"{subset.gap:.3f}"
        top.text(place, subset.gap + 0.015, number, ha="center", va="bottom", size=8, rotation=90)
    top.set(ylim=(0, 1.2), ylabel="GAP@20", title="GAP by the modalities shown (orange: one alone)")
    top.set_yticks(np.arange(0, 1.01, 0.2))
    top.grid(visible=False, axis="x")
    rows = {m: len(order) - 1 - i for i, m in enumerate(order)}
    for place, subset in zip(places, gaps, strict=True):
        inside = [rows[m] for m in subset.modalities]
        bottom.plot([place] * len(order), range(len(order)), "o", color="#dddddd", ms=7, zorder=1)
        bottom.plot([place] * len(inside), inside, "o-", color="#333333", ms=7, lw=1.4, zorder=2)
    bottom.set_yticks(list(rows.values()), list(rows))
    for axes in (top, bottom):
        axes.set_xlim(-0.6, len(gaps) - 0.4)
        axes.set_xticks([])
    bottom.set_ylim(-0.5, len(order) - 0.5)
    bottom.grid(visible=False)
    for spine in bottom.spines.values():
        spine.set_visible(False)
    return figure


def confusion(predictions: Predictions) -> Figure | None:
    """Draw how many posts have one tag missed and another wrongly given; None where none has."""
    counts = confusion_counts(predictions)
    weight = counts.sum(axis=0) + counts.sum(axis=1)
    chosen = np.sort(np.argsort(-weight, kind="stable")[:_MOST_CONFUSED])
    chosen = chosen[weight[chosen] > 0]
    if not len(chosen):
        return None
    part = counts[np.ix_(chosen, chosen)]  # (tags, tags)
    side = max(3.6, 0.3 * len(chosen) + 2.4)
    figure, (area,) = new_figure(side + 0.6, side)
    area.imshow(part, cmap="Blues", vmin=0, vmax=max(1, part.max() * 1.25))
    for i, j in np.argwhere(part).tolist():
        dark = part[i, j] > 0.75 * part.max()
        area.text(j, i, part[i, j], ha="center", va="center", size=8, color="w" if dark else "k")
    names = shown_names(predictions.names, 16)
    labels = [names[i] for i in chosen]
    area.set_xticks(range(len(chosen)), labels, rotation=90, size=9)
    area.set_yticks(range(len(chosen)), labels, size=9)
    area.set(ylabel="missed", xlabel="wrongly given in its place")
    area.set_title("Posts in which one tag was missed\nand another wrongly given")
    area.grid(visible=False)
    return figure


def _curve(
    axes: Axes, curve: metrics.PrecisionRecall, colour: str, dash: Any, label: str | None
) -> None:
    points: npt.NDArray[np.intp] = np.unique(
        np.linspace(0, max(0, len(curve.recall) - 1), _POINTS).round().astype(np.intp)
    )
    if len(curve.recall):
        recall = np.append(0.0, curve.recall[points])
        precision = np.append(curve.precision[0], curve.precision[points])
        axes.plot(recall, precision, color=colour, ls=dash, label=label, lw=1.5)
