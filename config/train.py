"""Typed settings of the fusion training: `train_net.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from pydantic import Field, field_validator

from config.fusion_models import ModelName, ModelSettings, TokenLimits
from config.learning import (
    CalibrationName,
    LossName,
    LossSettings,
    OptimizerName,
    OptimizerSettings,
    Positive,
    ScheduleName,
)
from config.settings import PositiveInt, Precision, Section

__all__ = [
    "BundleSettings",
    "CalibrationName",
    "DataSettings",
    "LossName",
    "LossSettings",
    "ModalityName",
    "ModelName",
    "ModelSettings",
    "OptimizerName",
    "OptimizerSettings",
    "ScheduleName",
    "TokenLimits",
    "TrainSettings",
    "TrainerSettings",
]

ModalityName: TypeAlias = Literal["video", "image", "audio", "text", "ocr"]
Count = Annotated[int, Field(ge=0)]


class DataSettings(Section):
    """What is learned from."""

    train: Path = Path("data/train.json")
    valid: Path | None = Path("data/valid.json")
    """Chooses the best epoch and the thresholds; null trains without."""
    labels: Path = Path("config/idx2name_cls24.json")
    modalities: tuple[ModalityName, ...] = ("video", "image", "audio", "text", "ocr")
    image_as_frames: bool = False
    """Images join the video's frames; both must then have features of one length."""
    ocr_mode: Literal["append", "separate"] = "separate"
    """How the features were extracted; stands in the bundle."""
    loaders: Count = 0
    """Processes that read feature files; 0 reads in the training process."""
    cache_mb: Count = 1024
    """Features kept in memory between epochs."""

    @field_validator("modalities")
    @classmethod
    def _some(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value or len(set(value)) != len(value):
            raise ValueError("name at least one modality, and each once")
        return value


class TrainerSettings(Section):
    """The training loop."""

    epochs: PositiveInt = 30
    batch_size: PositiveInt = 32
    n_gpu: Count | None = None
    """0 trains on the CPU; null takes one GPU where there is one."""
    precision: Precision = "auto"
    threads: PositiveInt | None = None
    """CPU threads; null leaves torch's own choice."""
    valid_interval: Count = 1
    """Epochs between validations; 0 validates only at the end."""
    log_interval: PositiveInt = 10
    """Steps between two lines of the log."""
    patience: Count = 0
    """Validations without a better GAP after which training stops; 0 never stops early."""
    fix_random_seed: bool = False
    seed: Count = 0
    """Counts when ``fix_random_seed`` is set; otherwise every run draws its own."""
    save_dir: Path = Path("workshop/train")
    """Holds ckpt/ and log/."""
    progress: bool = True


class BundleSettings(Section):
    """What is deployed at the end."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")] = "insight"
    out: Path | None = None
    """Folder of the bundle; null is workshop/weights/<name>."""
    min_positives: PositiveInt = 5
    """Tags with fewer positives in validation take the threshold that suits all tags together."""
    precision: Positive | None = None
    """Share of given tags that shall be right: thresholds are the lowest that give it. null takes
    the thresholds with the best F1."""
    calibration: CalibrationName = "none"
    """How scores are made probabilities, fitted on validation before the thresholds."""

    @property
    def folder(self) -> Path:
        """Where the bundle is written."""
        return self.out if self.out is not None else Path("workshop/weights") / self.name


class TrainSettings(Section):
    """All settings of `train_net.py`."""

    data: DataSettings = DataSettings()
    model: ModelSettings = ModelSettings()
    loss: LossSettings = LossSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    trainer: TrainerSettings = TrainerSettings()
    bundle: BundleSettings = BundleSettings()
