"""What a training's report advises, by its figures."""

from typing import Any

import pytest

from fusion.report.advice import next_steps

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
    found = next_steps(numbers(facts={"best epoch": best, "bundle": ""}), events(*gaps), AGAIN, "")
    assert len(found) == bool(text)
    assert all(text in step.text and command in step.command for step in found)


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
