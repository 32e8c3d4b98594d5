"""Charts of reports: where lines, columns and their names lie."""

import re
from itertools import pairwise
from typing import Any

import pytest

from common.charts import BOTTOM, LEFT, RIGHT, TOP, Axis, Line, columns, lines, number


def places(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"([\d.]+) ([\d.]+)", path)]


def test_points_lie_where_their_numbers_say() -> None:
    """The lowest at the bottom left, the highest at the top right, the middle between."""
    chart: Any = lines("t", [Line("", [(0, 0), (5, 1), (10, 2)])], Axis(), Axis())
    middle = (LEFT + RIGHT) / 2, (BOTTOM + TOP) / 2
    assert places(chart.lines[0].path) == [(LEFT, BOTTOM), middle, (RIGHT, TOP)]
    assert [tick.text for tick in chart.x] == ["0", "2", "4", "6", "8", "10"]
    assert [dot.title for dot in chart.dots] == ["0 at 0", "1 at 5", "2 at 10"]


def test_a_logarithmic_side_has_powers_of_ten() -> None:
    chart: Any = lines("t", [Line("", [(1, 1), (1000, 10)])], Axis(log=True), Axis(log=True))
    assert [tick.text for tick in chart.x] == ["1", "10", "100", "1,000"]


def test_the_higher_a_count_the_higher_its_column() -> None:
    chart: Any = columns("t", ["a", "b", "c"], [4, 0, 2], "unit")
    assert [column.title for column in chart.columns] == ["a: 4", "c: 2"]
    tops = [float(re.findall(r"V([\d.]+)h", column.path)[0]) for column in chart.columns]
    assert tops == [TOP, (TOP + BOTTOM) / 2]


def test_names_under_columns_never_touch() -> None:
    """Of many or long ones some are left out; the first stays."""
    names = [f"{i}00-{i + 1}00" for i in range(40)]
    chart: Any = columns("t", names, [1] * 40, "")
    shown = chart.names
    assert shown[0].text == names[0]
    assert 3 < len(shown) < 12
    for a, b in pairwise(shown):
        assert b.at - a.at > 6 * (len(a.text) + len(b.text)) / 2


def test_long_lines_keep_their_ends() -> None:
    chart: Any = lines("t", [Line("", [(i, i % 7) for i in range(100_000)])], Axis(), Axis())
    points = places(chart.lines[0].path)
    assert len(points) < 300
    assert (points[0][0], points[-1][0]) == (LEFT, RIGHT)
    assert chart.dots == ()


def test_there_are_no_charts_of_nothing() -> None:
    assert columns("t", [], [], "") is None
    assert columns("t", ["a"], [0], "") is None
    assert lines("t", [Line("", [])], Axis(), Axis()) is None
    assert lines("t", [Line("", [(0, 1), (1, 1)], "ref")], Axis(), Axis()) is None


@pytest.mark.parametrize("points", [[(0.0, 0.0)], [(3.0, 5.0), (3.0, 5.0)]])
def test_a_single_place_is_a_chart(points: list[tuple[float, float]]) -> None:
    chart: Any = lines("t", [Line("", points)], Axis(low=0), Axis(low=0))
    assert len(chart.dots) == len(points)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.25, "0.25"), (5e-4, "5e-4"), (1200, "1,200"), (1.5e6, "1.5M"), (2e9, "2G")],
)
def test_numbers_take_few_letters(value: float, text: str) -> None:
    assert number(value) == text
