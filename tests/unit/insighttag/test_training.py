"""Wrong arguments of `insighttag.train`, which are found before anything is read or written."""

from pathlib import Path
from typing import Any

import pytest

from insighttag import ConfigError, train
from tests.support.mistakes import one_line


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"valid": 2.0}, "valid: must be a share, from 0 to below 1: got 2.0"),
        ({"test": "a"}, "test: must be a share, from 0 to below 1: got 'a'"),
        ({"seed": -1}, "seed: must be a whole number, at least 0: got -1"),
        ({"min_posts": 0}, "min_posts: must be a whole number, at least 1: got 0"),
        ({"config": "none.yaml"}, "none.yaml: no such file"),
        ({"preset": "tiny"}, "overrides: features.preset: Input should be 'classic'"),
        ({"overrides": {"trainr.epochs": 1}}, "overrides: trainr: unknown key; did you mean 'tra"),
        ({"overrides": {"data.train": "x"}}, "overrides: data.train: insighttag train sets it"),
        ({"overrides": {"data": 5}}, "overrides: data: must hold keys and values, of modalities"),
    ],
)
def test_a_wrong_argument_is_named(tmp_path: Path, arguments: dict[str, Any], named: str) -> None:
    with one_line(ConfigError, named):
        train(tmp_path, tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()
