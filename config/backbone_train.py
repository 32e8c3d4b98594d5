"""Typed settings of the training of a backbone by `train_net.py`: ``task`` names which kind."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from config.features import LstmSizes
from config.fusion_models import Share
from config.learning import OptimizerSettings, Rate
from config.settings import PositiveInt, Section
from config.train import Count, TrainerSettings


class BackboneDataSettings(Section):
    """What is learned from: data files that name pictures or videos."""

    train: Path = Path("data/train.json")
    valid: Path | None = Path("data/valid.json")
    """Chooses the best epoch; null trains without."""
    labels: Path = Path("config/idx2name_cls103.json")
    loaders: Count | None = None
    """Processes that read and decode media; 0 decodes in a thread of the training process. null
    takes that on a CPU, and up to 8 processes for each GPU."""
    max_items: PositiveInt = 4
    """Pictures or videos of one post in a batch: random ones in training, evenly spaced ones in
    validation."""
    skip_bad: bool = False
    """Media that cannot be decoded are left out and listed in log/skipped.jsonl; otherwise the
    first one ends the run. Decodes every file once before the training."""


class BackboneSettings(Section):
    """The timm model."""

    arch: str = "efficientnet_b5"
    weights: str = "scratch"
    """Where it starts: ``scratch``, ``pretrained``, or the path of a state dict."""
    image_size: PositiveInt = 456
    """Side of the square input in pixels; must be what ``features`` gives to the extractor."""
    dropout: Share = 0.2
    """In front of the classifier."""
    augment: bool = True
    """Shift pictures a little and change their light."""


class TsnSettings(Section):
    """Temporal segment network: a picture model over segments of a clip."""

    segments: PositiveInt = 3
    """Frames of a clip in training: a random one of each of so many equal segments."""
    test_segments: PositiveInt = 8
    """Frames of a clip in validation: the centre one of each segment."""
    frames: PositiveInt = 300
    """Frames that its features are extracted from for the LSTM."""


class LstmTrainSettings(LstmSizes):
    """The attention LSTM over the frames' features, trained after the TSN."""

    epochs: PositiveInt = 30
    batch_size: PositiveInt = 32
    learning_rate: Rate = 1e-3


class BackboneTrainSettings(Section):
    """All settings of `train_net.py` for a backbone."""

    task: Literal["image_backbone", "video_backbone"]
    data: BackboneDataSettings = BackboneDataSettings()
    backbone: BackboneSettings = BackboneSettings()
    tsn: TsnSettings = TsnSettings()
    """Of ``video_backbone`` only."""
    lstm: LstmTrainSettings = LstmTrainSettings()
    """Of ``video_backbone`` only."""
    optimizer: OptimizerSettings = OptimizerSettings()
    trainer: TrainerSettings = TrainerSettings(save_dir=Path("workshop/backbone"))
