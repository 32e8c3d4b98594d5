"""Tags, languages, charts and measurements of ``analyze_posts``."""

from typing import Any

import pytest

from corpus.analyze import page
from corpus.analyze.labels import Labels
from corpus.analyze.tally import Histogram
from corpus.analyze.texts import EMPTY, NO_WORDS, SHORT, language_of


def labels_of(*posts: list[str]) -> Labels:
    labels = Labels()
    for i, tags in enumerate(posts):
        labels.add(f"p{i}", tags)
    return labels


def test_names_that_differ_in_case_space_or_width_are_found() -> None:
    """Case, spaces, separators and full-width letters; the most frequent writing first."""
    counted = labels_of(
        ["Hot Pot"], ["hot-pot"], ["Hot Pot"], ["ＨＯＴpot"], ["美食 旅游"], ["pot"]
    )
    variants = counted.as_dict(1, ["美食旅游"])["variants"]
    assert {frozenset(names) for names in variants} == {
        frozenset({"Hot Pot", "hot-pot", "ＨＯＴpot"}),
        frozenset({"美食 旅游", "美食旅游"}),
    }
    assert next(iter(variants[0])) == "Hot Pot"


def test_tags_that_always_occur_together_are_found() -> None:
    posts = [["a", "b", "x"]] * 12 + [["x"], ["y", "x"], ["y"]]
    facts = labels_of(*posts).as_dict(1, None)
    assert facts["always_together"] == [{"tags": ["a", "b"], "posts": 12}]
    implied = {(item["tag"], item["never_without"]) for item in facts["implied"]}
    assert implied == {("a", "x"), ("b", "x")}


def test_rare_unknown_and_absent_tags_are_told() -> None:
    facts = labels_of(["a"], ["a"], ["b"]).as_dict(2, ["a", "c"])
    assert facts["rare"] == {"b": 1}
    assert facts["map"] == {"tags": 2, "never": ["c"], "unknown": {"b": 1}}


def test_post_with_nearly_every_tag_is_found() -> None:
    """Ten of ten tags are suspicious; four of ten are not."""
    tags = list("abcdefghij")
    facts = labels_of(tags[:4], tags, ["a"], ["a", "a"]).as_dict(1, None)
    assert facts["nearly_all_tags"] == [{"post_id": "p1", "tags": 10}]
    assert facts["repeated_in_a_post"] == 1
    assert facts["per_post"] == {"1": 2, "4": 1, "10": 1}


def test_pairs_are_those_of_counting() -> None:
    """Posts with both, Jaccard, and a symmetric heat map with the tags' own counts."""
    facts = labels_of(["a", "b"], ["b", "a"], ["a"]).as_dict(1, None)
    assert facts["pairs"] == [{"tags": ["a", "b"], "posts": 2, "jaccard": 0.6667}]
    assert facts["heat"] == {"tags": ["a", "b"], "posts": [[3, 2], [2, 2]]}


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", EMPTY),
        ("  \n", EMPTY),
        ("😀 123 !!", NO_WORDS),
        ("ok", SHORT),
        ("今天吃饭了吗", "zh"),
        ("周末 vlog 和朋友去爬山啦", "zh"),
        ("今日はいい天気ですね", "ja"),
        ("오늘 날씨가 좋네요", "ko"),
        ("The weather is lovely today and we are going for a walk", "en"),
        ("Сегодня хорошая погода, и мы идём гулять в парк", "ru"),
        ("Heute ist schönes Wetter und wir gehen im Park spazieren", "de"),
        ("https://example.com/watch?v=1 今天", "zh"),
    ],
)
def test_language_of_a_text(text: str, code: str) -> None:
    """By characters where they tell, else by the model; nothing is guessed from a word."""
    assert language_of(text) == code


def test_histogram_classes_are_closed_below() -> None:
    """A value on an edge belongs to the class above it."""
    counts = Histogram((1, 10))
    for value in (0, 1, 9, 10, 11):
        counts.add(value)
    assert counts.as_dict() == {
        "values": 5, "lowest": 0, "mean": 6.2, "highest": 11, "edges": [1, 10], "counts": [1, 2, 2],
    }  # fmt: skip


def test_there_are_no_charts_of_nothing() -> None:
    assert page.long_tail([], 10) is None
    assert page.histogram("", Histogram((1, 2)).as_dict(), page.plain, "") is None
    assert page.by_time({}) is None


@pytest.mark.parametrize(
    ("days", "columns"),
    [
        ({"2026-01-01": 1}, ["2026-01-01: 1"]),
        ({"2026-01-01": 1, "2026-02-10": 2}, ["2026-01-01: 1", "2026-02-10: 2"]),
        ({"1990-01-01": 1, "2026-02-10": 2}, ["1990-01-01: 1", "2025-05-22: 2"]),
        ({"0001-01-01": 1, "2026-02-20": 2}, ["2026-02-20: 2"]),
    ],
)
def test_posts_are_shown_over_any_time(days: dict[str, int], columns: list[str]) -> None:
    """A day, weeks, years, and a wrong year: not a column for each day."""
    chart: Any = page.by_time(days)
    assert [column.title for column in chart.columns] == columns
    assert len(chart.x) <= 48
