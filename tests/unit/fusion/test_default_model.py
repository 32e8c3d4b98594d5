"""The defaults of fusion and docs/models.md agree with what ``bench/heads.py`` measured."""

import json
from pathlib import Path
from typing import Any

import heads
import pytest
from results_file import FOLDER

from config.fusion_models import DEFAULT_MODEL, ModelSettings
from config.train import TrainSettings
from fusion.models import chosen

ROWS: list[dict[str, Any]] = json.loads((FOLDER / "heads.json").read_text("utf-8"))["results"]
ORDERED = {"demo": True, "openclipart": False}


def test_the_page_of_models_shows_what_was_measured() -> None:
    page = (Path(__file__).parents[3] / "docs" / "models.md").read_text(encoding="utf-8")
    assert heads.table(ROWS) in page


def test_no_model_loss_or_average_beats_the_defaults_by_two_standard_errors() -> None:
    """Only the linear probe may, which `auto` takes where it does."""
    settings = TrainSettings()
    assert settings.model.name == DEFAULT_MODEL
    assert (settings.loss.name, settings.optimizer.ema_decay) == (heads.LOSSES[0], 0)
    others = [row for row in ROWS if row["model"] != heads.PROBE]
    assert all(row["seeds"] > 1 for row in others)
    assert not [row for row in others if row["over_default"] > 2 * row["over_default_se"] > 0]


@pytest.mark.parametrize("data", heads.SETS)
def test_auto_takes_the_model_with_the_best_mean(data: str) -> None:
    sets = {
        (r["posts"], r["width"]) for r in ROWS if r["data"] == data and r["model"] == heads.PROBE
    }
    assert sets
    for posts, width in sets:
        rows = [r for r in ROWS if (r["data"], r["posts"], r["width"]) == (data, posts, width)]
        best = max((r for r in rows if r["loss"] == heads.LOSSES[0] and not r["ema"]), key=_gap)
        took = chosen(ModelSettings(name="auto"), posts, ordered=ORDERED[data])
        assert took.name == best["model"]


def _gap(row: dict[str, Any]) -> float:
    return float(row["gap"])
