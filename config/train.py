"""Typed settings of the fusion training: `train_net.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from pydantic import Field, field_validator, model_validator

from common.precision import Precision
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
from config.report import EnsembleSettings, ReportSettings
from config.settings import PositiveInt, Section

__all__ = [
    "BundleSettings",
    "CalibrationName",
    "DataSettings",
    "EnsembleSettings",
    "LossName",
    "LossSettings",
    "ModalityName",
    "ModelName",
    "ModelSettings",
    "OptimizerName",
    "OptimizerSettings",
    "ReportSettings",
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
    loaders: Count | None = None
    """Processes that read feature files; 0 reads in a thread of the training process. null takes
    that on a CPU, and up to 8 processes for each GPU."""
    cache_mb: Count = 256
    """Features kept in memory between epochs, for training and validation together; loader
    processes keep none."""
    skip_bad: bool = False
    """Posts with labels that are not in the map, or features that are missing, broken, made
    otherwise or not finite, are left out and listed in log/skipped.jsonl; otherwise the first one
    ends the run. Reads every feature file once before the training."""

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
    """Posts of one batch, over all processes together."""
    n_gpu: Count | None = None
    """GPUs of this host, a process for each; 0 trains on the CPU, null takes one where there is
    one. Under torchrun its processes count, on all hosts."""
    processes: PositiveInt = 1
    """Processes of a training on the CPU; under torchrun its own number counts."""
    precision: Precision = "auto"
    threads: PositiveInt | None = None
    """CPU threads; null leaves torch's own choice."""
    valid_interval: Count = 1
    """Epochs between validations; 0 validates only at the end."""
    log_interval: PositiveInt = 10
    """Steps between two lines of the log."""
    checkpoint_interval: Count = 0
    """Steps between two checkpoints inside an epoch; 0 saves at the end of an epoch only."""
    patience: Count = 0
    """Validations without a better GAP after which training stops; 0 never stops early."""
    fix_random_seed: bool = False
    seed: Count = 0
    """Counts when ``fix_random_seed`` is set; otherwise every run draws its own."""
    allow_pickle: bool = False
    """Let --resume load a .pth that is a whole pickled model; loading it runs code in the file."""
    save_dir: Path = Path("workshop/train")
    """Holds ckpt/, log/ and report/."""
    tensorboard: bool = True
    """Curves for TensorBoard, in log/tensorboard."""
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

    task: Literal["fusion"] = "fusion"
    """Backbones are trained by other settings: config/backbone_train.py."""
    data: DataSettings = DataSettings()
    model: ModelSettings = ModelSettings()
    loss: LossSettings = LossSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    trainer: TrainerSettings = TrainerSettings()
    bundle: BundleSettings = BundleSettings()
    ensemble: EnsembleSettings = EnsembleSettings()
    report: ReportSettings = ReportSettings()

    @model_validator(mode="after")
    def _cycles(self) -> TrainSettings:
        count = self.ensemble.snapshots
        if count == 1:
            return self
        if self.trainer.epochs % count:
            raise ValueError(
                f"ensemble.snapshots: {self.trainer.epochs} epochs are no multiple of {count}"
            )
        if self.optimizer.schedule != "cosine" or self.optimizer.cycles not in (1, count):
            raise ValueError(
                "ensemble.snapshots: optimizer.schedule must be cosine, which then has as many "
                "cycles as there are snapshots"
            )
        if self.trainer.patience:
            raise ValueError("ensemble.snapshots: trainer.patience must be 0")
        return self
