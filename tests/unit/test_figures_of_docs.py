"""The tables of docs/ show what ``bench/results`` holds, and its figures reach their goals."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from results_file import FOLDER

Row = Mapping[str, Any]
DOCS = Path(__file__).parents[2] / "docs"

OPENCLIPART = {
    "fusion": "`linear_probe`, all",
    "scikit-learn: Lite0 + MiniLM": "scikit-learn: Lite0 + MiniLM",
    "scikit-learn: TF-IDF": "scikit-learn: TF-IDF",
    "scikit-learn: all": "scikit-learn: all",
}
NO_WEIGHTS = {
    "linear probe: both": "`linear_probe`, both modalities",
    "linear probe: TF-IDF": "the same, texts alone",
    "linear probe: HOG": "the same, pictures alone",
    "mean of the two": "mean of the logits of these two",
    "baseline: TF-IDF + HOG, logistic regression": "TF-IDF + HOG by scikit-learn's recipe, "
    "logistic regression with C = 10",
}
ENCODERS = {
    "tf_efficientnet_lite0": "EfficientNet-Lite0",
    "test_resnet": "`test_resnet`, 0.96 s",
    "sentence-transformers/all-MiniLM-L6-v2": "`all-MiniLM-L6-v2`",
    "PP-OCRv6 small": "PP-OCRv6 small, in the wheel of `rapidocr`",
    "vit_large_patch16_224": "`vit_large_patch16_224`",
    "vggish": "VGGish, 0.96 s",
}
ZERO_SHOT = {
    "names alone": "names alone",
    "templates": "names in the templates",
    "templates, and posts without labels": "and 2,999 posts without labels",
    "zero-shot": "`insighttag zeroshot`",
    "trained on all": "trained on all tags",
    "added": "trained without the ten, which are added",
}


def results(name: str) -> Any:
    return json.loads((FOLDER / f"{name}.json").read_text("utf-8"))["results"]


def folds_of(row: Row, *keys: str) -> list[str]:
    """The means over the folds, then the figures of all folds, as cells."""
    figures = [row[f"{key}_folds"][0] for key in ("gap", "map")]
    means = [f"{fmean(each):.3f}" for each in figures]
    shown = [row[f"{key}_folds"][0] for key in keys]
    return means + [", ".join(f"{value:.3f}" for value in each) for each in shown]


def openclipart() -> list[list[str]]:
    rows = results("openclipart")[1:]
    return [[r["split"], OPENCLIPART[r["model"]], *folds_of(r, "gap", "map")] for r in rows]


def no_weights() -> list[list[str]]:
    rows = results("openclipart_no_weights")[1:]
    return [[NO_WEIGHTS[row["model"]], *folds_of(row, "gap")] for row in rows]


def zero_shot() -> list[list[str]]:
    parts = results("zeroshot")
    rows = {**parts["without training"], **parts["added by text"]}
    keys = ("gap", "map", "map_hidden")
    return [
        [title, *(f"{rows[name][key]:.4f}" for key in keys if key in rows[name])]
        for name, title in ZERO_SHOT.items()
    ]


def forward() -> list[list[str]]:
    rates = ("eager_fp32_per_s", "bf16_per_s", "bf16_compiled_per_s", "items_per_s", "limit_per_s")
    rows = [row for row in results("forward") if "limit_per_s" in row]
    return [
        [
            f"`{row['encoder'].rpartition('/')[2]}`",
            *(f"{row[key]:,.{0 if row[key] > 10 else 1}f}" for key in rates),
            f"{row['share_of_limit']:.2f}",
        ]
        for row in rows
    ]


def zoo() -> list[list[str]]:
    formats = {
        **dict.fromkeys(("gap", "gap_sd", "map"), ".4f"),
        "params": ",",
        "learning_rate": "g",
        "train_s": ".0f",
        "ms_per_post": ".2f",
    }
    rows = results("fusion_zoo")
    return [[f"`{r['model']}`", *(f"{r[k]:{form}}" for k, form in formats.items())] for r in rows]


@pytest.mark.parametrize(
    ("page", "rows"),
    [
        ("benchmarks.md", openclipart),
        ("models.md", no_weights),
        ("performance.md", forward),
        ("models.md", zoo),
        ("zeroshot.md", zero_shot),
    ],
)
def test_a_table_shows_what_was_measured(page: str, rows: Callable[[], list[list[str]]]) -> None:
    lines = (DOCS / page).read_text(encoding="utf-8").replace("**", "").splitlines()
    for cells in rows():
        assert f"| {' | '.join(cells)} |" in lines


def test_the_cost_of_encoders_is_what_was_measured() -> None:
    lines = (DOCS / "models.md").read_text(encoding="utf-8").splitlines()
    for row in results("forward"):
        [line] = [each for each in lines if f"| {ENCODERS[row['encoder']]} |" in each]
        assert f"| {row['ms']:{',.0f' if row['ms'] > 10 else '.1f'}} |" in line


@pytest.mark.parametrize("other", ["mean of the two", "baseline"])
def test_without_weights_both_modalities_together_win(other: str) -> None:
    """Over the mean of their own probes, and over scikit-learn's recipe; by GAP in every fold."""
    rows = {row["model"]: row for row in results("openclipart_no_weights")[1:]}
    [less] = [row for name, row in rows.items() if name.startswith(other)]
    both = rows["linear probe: both"]
    assert all(a > b for a, b in zip(both["gap_folds"][0], less["gap_folds"][0], strict=True))
    assert fmean(both["map_folds"][0]) > fmean(less["map_folds"][0])


def test_tags_by_text_reach_their_goals() -> None:
    """Names alone on openclipart, and ten hidden tags next to a training on them."""
    measured = results("zeroshot")
    assert measured["without training"]["names alone"]["gap"] >= 0.27
    hidden = measured["added by text"]
    assert len(hidden["hidden"]) == 10
    assert hidden["added"]["map_hidden"] >= 0.6 * hidden["trained on all"]["map_hidden"]
