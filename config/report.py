"""Typed settings of what `train_net.py` does around one training: its report, and ensembles."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from config.settings import PositiveInt, Section

Count = Annotated[int, Field(ge=0)]


class ReportSettings(Section):
    """The folder ``report/`` that is written at the end of a training."""

    enabled: bool = True
    post_url: str | None = None
    """Address of a post, with ``{post_id}`` in it; null links the files of the data file."""
    mistakes: Count = 24
    """Wrongly given tags, and as many missed ones, that are shown with their posts."""
    thumbnails: bool = True
    """Small copies of local pictures stand in the page."""
    subset_posts: Count = 5000
    """Validation posts over which every subset of the modalities is tried, evenly spaced; 0 leaves
    this out. k modalities take 2^k - 1 passes."""

    @field_validator("post_url")
    @classmethod
    def _template(cls, value: str | None) -> str | None:
        if value is not None and not (
            value.startswith(("http://", "https://")) and "{post_id}" in value
        ):
            raise ValueError("must begin with http:// or https:// and hold {post_id}")
        return value


class EnsembleSettings(Section):
    """Several models that answer as one."""

    folds: Count = 0
    """k models, each trained on all but one k-th of the posts; 0 and 1 train one."""
    pool_valid: bool = True
    """The folds are of training and validation posts together, and what is fitted and measured is
    so on the parts that were left out. false leaves the validation posts out of the folds, and
    fits and measures the whole ensemble on them."""
    snapshots: PositiveInt = 1
    """Models taken from one training, each at the end of a cycle of the learning rate; the epochs
    must be a multiple of it."""
    averaging: Literal["probabilities", "logits"] = "probabilities"
    """What the models' mean is taken of."""

    @field_validator("folds")
    @classmethod
    def _folds(cls, value: int) -> int:
        return 0 if value == 1 else value
