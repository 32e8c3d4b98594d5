"""Typed settings of how a fusion model learns: its loss, its optimizer, and the thresholds."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field, model_validator

from config.fusion_models import Share, Weight
from config.settings import PositiveInt, Section

LossName: TypeAlias = Literal["bce", "focal", "asymmetric"]
OptimizerName: TypeAlias = Literal["adamw", "adam", "sgd", "rmsprop"]
ScheduleName: TypeAlias = Literal["cosine", "one_cycle", "step", "constant"]
CalibrationName: TypeAlias = Literal["none", "temperature", "isotonic"]
Rate = Annotated[float, Field(gt=0)]
Positive = Annotated[float, Field(gt=0, lt=1)]


class FocalSettings(Section):
    """Focal loss: what is already right counts less."""

    gamma: Weight = 2.0
    """How much less; 0 is the plain cross entropy."""
    alpha: Positive | None = None
    """Weight of positives, 1 - alpha of negatives; null weighs both 1. The paper has 0.25."""


class AsymmetricSettings(Section):
    """Asymmetric loss (ASL): focal for negatives, which are many, less so for positives."""

    gamma_positive: Weight = 0.0
    gamma_negative: Weight = 4.0
    margin: Share = 0.05
    """Negatives that score less cost nothing."""


class LossSettings(Section):
    """What is minimised: ``name`` chooses which of the sections below counts."""

    name: LossName = "bce"
    focal: FocalSettings = FocalSettings()
    asymmetric: AsymmetricSettings = AsymmetricSettings()
    class_balance: Share = 0.0
    """β of weights by the effective number of a tag's positives: rarer tags weigh more. 0 is off,
    0.999 is strong."""
    label_smoothing: Share = 0.0
    """ε: targets become ε/2 and 1 - ε/2."""
    mixup: Weight = 0.0
    """α of the beta distribution that posts of a batch are mixed by; 0 is off."""


class GroupRates(Section):
    """Learning rates of parts of the model; null takes ``learning_rate``."""

    modality: Rate | None = None
    """What sees one modality only: norms, projections, pooling, "missing" vectors."""
    fusion: Rate | None = None
    """What joins the modalities."""
    head: Rate | None = None
    """The layers that give logits."""


class OptimizerSettings(Section):
    """The optimizer and its schedule; shares are of all steps."""

    name: OptimizerName = "adamw"
    learning_rate: Rate = 1e-3
    """The highest; the schedule leads up to it and down from it."""
    group_rates: GroupRates = GroupRates()
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Each layer below the head learns at this times the rate of the one above; 1 is off."""
    weight_decay: Weight = 0.05
    """Of matrices and filters. Apart from the gradient in adamw, a part of it in the others."""
    momentum: Share = 0.9
    """Of sgd and rmsprop."""
    schedule: ScheduleName = "cosine"
    """one_cycle goes up and down in cosines, from 1/25 of the rate to 1/250,000."""
    cycles: PositiveInt = 1
    """Of the schedule ``cosine``: how often it runs, each time from the start of its warm-up."""
    warm_up: Share = 0.1
    """Share in which the rate goes up; in one_cycle this is its first part."""
    steps_at: tuple[Positive, ...] = (0.5, 0.75)
    """Of the schedule ``step``: where the rate is multiplied by ``step_factor``."""
    step_factor: Positive = 0.1
    gradient_clip: Rate | None = 1.0
    """Highest norm of all gradients together; null does not clip."""
    accumulate: PositiveInt = 1
    """Batches whose gradients make one step."""
    ema_decay: Share = 0.0
    """Of a moving average of the weights that is validated and saved instead; 0 is off."""

    @model_validator(mode="after")
    def _steps(self) -> OptimizerSettings:
        if list(self.steps_at) != sorted(set(self.steps_at)):
            raise ValueError("steps_at must rise")
        return self
