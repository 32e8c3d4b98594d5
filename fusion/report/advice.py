"""The steps to take after a training, derived from the figures of its report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from common.html import Advice, command, counted

# Steps that a person takes before the next training; more are not read.
_MOST = 6
# Differences of GAP that another seed makes too.
_NOISE = 0.01
# With fewer validation posts, each one changes the figures by 0.01 or more.
_LITTLE = 100
# With a lower mAP a mistake is more often the model's than the label's.
_TRUSTED = 0.5
# Fewer positives say nothing of a tag.
_FEW = 10
_SHOWN = 4
_FILES = ("--features", "FEATURES", "--labels", "LABELS.json", "--out", "DATA")
_SPLIT = ("insighttag", "build", "--input", "POSTS.jsonl", *_FILES)
_LABEL_MAP = ("insighttag", "label-map", "--input", "POSTS.jsonl", "--min-posts", "50")


def next_steps(
    numbers: Mapping[str, Any],
    runs: Sequence[Sequence[Mapping[str, Any]]],
    again: Sequence[str],
    use: str,
) -> list[Advice]:
    """Return the steps that follow from the numbers of ``report.json``, the most useful first.

    ``again`` is the command that trains once more, in words; ``use`` the one that uses the result.
    """
    steps = list(_steps(numbers, runs, again))[:_MOST]
    return [*steps, Advice("Use what was trained.", use)] if use else steps


def _steps(
    numbers: Mapping[str, Any], runs: Sequence[Sequence[Mapping[str, Any]]], again: Sequence[str]
) -> Iterator[Advice]:
    def with_(*sets: str) -> str:
        return command(*again, *(word for each in sets for word in ("--set", each)))

    facts = numbers["facts"]
    if numbers.get("seen_posts"):
        yield Advice(
            "Measure on new posts: all of these were trained on. Give a validation file of others, "
            "or extract the features out of fold, each post's by a backbone without it.",
            "insighttag out-of-fold --model-config BACKBONE.yaml --config SETTINGS.yaml "
            "--features FEATURES",
        )
    if "metrics" not in numbers:
        yield Advice("Measure: name a file of validation posts.", with_("data.valid=VALID.json"))
        return
    metrics, base, test = numbers["metrics"], numbers["baseline"], numbers.get("test")
    gap, posts = metrics["gap"], numbers["posts"]
    own = again[0] == "insighttag"  # of `insighttag train`, which splits and leaves tags out itself
    larger = command(*(again if own else _SPLIT), "--valid", "0.2")
    if posts < _LITTLE:
        yield Advice(
            f"Measure on more posts: each of the {counted(posts, 'post')} changes the figures by "
            "0.01 or more.",
            larger,
        )
    if base is not None and gap < base["gap"] + 2 * _NOISE:
        yield Advice(
            f"Look at what the encoders see: GAP {gap:.3f} is hardly above the {base['gap']:.3f} "
            "of giving every post the most frequent tags.",
            "insighttag inspect FILE --config SETTINGS.yaml",
        )
    if not numbers.get("seen_posts"):
        yield from _length(facts, runs, with_)
    few = posts < _LITTLE  # which is said once
    if test and not few and not test["seen_posts"] and test["metrics"]["gap"] < gap - 0.05:
        yield Advice(
            f"Choose on more posts: the test has GAP {test['metrics']['gap']:.3f} where the "
            f"{posts:,} validation posts, which chose epoch and thresholds, have {gap:.3f}.",
            larger,
        )
    yield from _tags(numbers, (*again, "--min-posts", "10") if own else _LABEL_MAP)
    yield from _modalities(numbers, with_)
    error = numbers["calibration"]["after"]["error"]
    if error > 0.03 and facts.get("calibration") == "none" and not numbers.get("seen_posts"):
        yield Advice(
            f"Calibrate to use scores as probabilities: they are off by {error:.3f} on average.",
            with_("bundle.calibration=temperature"),
        )
    if (wait := facts.get("share of steps spent waiting for data", 0)) > 0.1:
        yield Advice(
            f"Read features in more processes: {wait:.0%} of the steps' time was waiting for data.",
            with_("data.loaders=4"),
        )


def _length(
    facts: Mapping[str, Any], runs: Sequence[Sequence[Mapping[str, Any]]], with_: Any
) -> Iterator[Advice]:
    """Advise on the number of epochs, by the validation of a single run."""
    gaps = {e["epoch"]: e["gap"] for e in runs[0] if e["event"] == "valid"} if runs else {}
    best, last = facts["best epoch"], max(gaps, default=0)
    if len(runs) != 1 or len(gaps) < 2 or best not in gaps:
        return
    if any(event.get("method") == "solved" for event in runs[0]):
        return  # its epochs are penalties that were tried: there are no more of them
    if best == last:
        yield Advice(
            f"Train longer: GAP was still rising in the last of {last} epochs.",
            with_(f"trainer.epochs={2 * last}"),
        )
    elif best <= last / 2 and gaps[best] - gaps[last] > _NOISE:
        more = "loss.mixup=0.4" if "bundle" in facts else "backbone.dropout=0.4"
        yield Advice(
            f"Prevent overfitting: GAP was best after {best} of {last} "
            f"epochs ({gaps[best]:.3f}) and fell to {gaps[last]:.3f}.",
            with_(more, f"trainer.patience={max(3, best)}"),
        )


def _tags(numbers: Mapping[str, Any], fewer: Sequence[str]) -> Iterator[Advice]:
    """Advise on labels that contradict each other, and on tags with few posts."""
    counts = {(c["missed"], c["given"]): c for c in numbers["confusions"]}
    for (one, other), pair in counts.items():
        back = counts.get((other, one))
        if back is not None and pair["posts"] + back["posts"] >= 4:
            a, b = (numbers["tags"][i]["name"] for i in (one, other))
            yield Advice(
                f"Tell {a} and {b} apart, or make them one: in {pair['posts'] + back['posts']:,} "
                "posts one was given in the other's place.",
                command("insighttag", "labels", "merge", "LABELS.json", a, b, "--into", a),
            )
            break
    surest = [m for m in numbers["mistakes"] if abs(m["score"] - 0.5) > 0.4]
    if len(surest) > 2 and numbers["metrics"]["map"] > _TRUSTED:
        yield Advice(
            f"Check the labels of the posts below under Worst mistakes: {len(surest)} contradict "
            "scores above 0.9 or below 0.1, and a wrong label is learned like a right one."
        )
    weak = sorted(
        (t for t in numbers["tags"] if t["ap"] is not None and t["support"] < _FEW),
        key=lambda t: t["ap"],
    )
    weak = [tag for tag in weak if tag["ap"] < numbers["metrics"]["map"]]
    if weak:
        names = ", ".join(f"{t['name']} ({t['support']})" for t in weak[:_SHOWN])
        more = f" and {len(weak) - _SHOWN:,} more" if len(weak) > _SHOWN else ""
        yield Advice(
            f"Label more posts of {names}{more}: with fewer than {_FEW} validation posts they are "
            "neither learned well nor measured well. Or leave rare tags out.",
            command(*fewer),
        )


def _modalities(numbers: Mapping[str, Any], with_: Any) -> Iterator[Advice]:
    gaps = {frozenset(s["modalities"]): s["gap"] for s in numbers["subsets"]}
    if len(gaps) < 2:
        return
    every = max(gaps, key=len)
    loss = {m: gaps[every] - gaps[every - {m}] for m in sorted(every)}
    useless = [m for m, lost in loss.items() if lost < 0.002]
    if useless and len(useless) < len(every):
        rest = ",".join(m for m in sorted(every) if m not in useless)
        yield Advice(
            f"Try without {' and '.join(useless)}: hidden from this model, GAP falls by less than "
            "0.002. Where a model knows its training posts by one modality, it ignores the others; "
            "then hide modalities in training instead (model.modality_dropout=0.5).",
            with_(f"data.modalities=[{rest}]"),
        )
