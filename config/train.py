"""Typed settings of `train_net.py`: of a fusion model (`TrainSettings`), and of a backbone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from pydantic import Field, field_validator, model_validator

from common.precision import Precision
from config.features import LstmSizes
from config.fusion_models import ModelSettings, Share, Weight
from config.section import PositiveInt, Section
from config.settings import Count

ModalityName: TypeAlias = Literal["video", "image", "audio", "text", "ocr", "asr"]
LossName: TypeAlias = Literal["bce", "focal", "asymmetric", "two_way"]
OptimizerName: TypeAlias = Literal["adamw", "adam", "sgd", "rmsprop"]
ScheduleName: TypeAlias = Literal["cosine", "one_cycle", "step", "constant"]
CalibrationName: TypeAlias = Literal["none", "temperature", "isotonic"]
Rate = Annotated[float, Field(gt=0)]
Positive = Annotated[float, Field(gt=0, lt=1)]


class DataSettings(Section):
    """The posts to train on."""

    train: Path = Path("data/train.json")
    valid: Path | None = Path("data/valid.json")
    """Chooses the best epoch and the thresholds; null trains without."""
    test: Path | None = None
    """Posts that choose nothing: the bundle is measured on them at the end, for the report."""
    labels: Path = Path("config/idx2name_cls24.json")
    modalities: tuple[ModalityName, ...] = ("video", "image", "audio", "text", "ocr")
    image_as_frames: bool = False
    """Images join the video's frames; both must then have features of one length."""
    ocr_mode: Literal["append", "separate"] = "separate"
    """Mode that the features were extracted with; stands in the bundle."""
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
    """Holds a folder for each run, with ckpt/, log/ and report/; latest leads to the newest one."""
    tensorboard: bool = True
    """Curves for TensorBoard, in log/tensorboard."""
    progress: bool = True


class BundleSettings(Section):
    """The bundle that is deployed at the end."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")] = "insight"
    out: Path | None = None
    """Folder of the bundle; null is workshop/weights/<name>."""
    min_positives: PositiveInt = 5
    """Tags with fewer positives in validation take the threshold that suits all tags together."""
    precision: Positive | None = None
    """Share of given tags that should be right: thresholds are the lowest that give it. null takes
    the thresholds with the best F1."""
    calibration: CalibrationName = "none"
    """Method that makes scores probabilities, fitted on validation before the thresholds."""

    @property
    def folder(self) -> Path:
        """Return the folder of the bundle."""
        return self.out if self.out is not None else Path("workshop/weights") / self.name


class FocalSettings(Section):
    """Focal loss: what is already right counts less."""

    gamma: Weight = 2.0
    """Strength of that; 0 is the plain cross entropy."""
    alpha: Positive | None = None
    """Weight of positives, 1 - alpha of negatives; null weighs both 1. The paper has 0.25."""


class AsymmetricSettings(Section):
    """Asymmetric loss (ASL): focal for negatives, which are many, less so for positives."""

    gamma_positive: Weight = 0.0
    gamma_negative: Weight = 4.0
    margin: Share = 0.05
    """Negatives that score less cost nothing."""


class TwoWaySettings(Section):
    """Temperatures: the higher, the more the tags other than the hardest one count."""

    positive: Rate = 4.0
    negative: Rate = 1.0


class LossSettings(Section):
    """The loss: ``name`` chooses which of the sections below counts."""

    name: LossName = "bce"
    focal: FocalSettings = FocalSettings()
    asymmetric: AsymmetricSettings = AsymmetricSettings()
    two_way: TwoWaySettings = TwoWaySettings()
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
    """Layers that see one modality only: norms, projections, pooling, "missing" vectors."""
    fusion: Rate | None = None
    """Layers that join the modalities."""
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
    """Values that the models' mean is taken of."""

    @field_validator("folds")
    @classmethod
    def _folds(cls, value: int) -> int:
        return 0 if value == 1 else value


class TrainSettings(Section):
    """All settings of `train_net.py`."""

    task: Literal["fusion"] = "fusion"
    """Backbones are trained by other settings: config/train.py."""
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
                f"ensemble.snapshots: {self.trainer.epochs} epochs are not a multiple of {count}"
            )
        if self.optimizer.schedule != "cosine" or self.optimizer.cycles not in (1, count):
            raise ValueError(
                "ensemble.snapshots: optimizer.schedule must be cosine, which then has as many "
                "cycles as there are snapshots"
            )
        if self.trainer.patience:
            raise ValueError("ensemble.snapshots: trainer.patience must be 0")
        return self


class BackboneDataSettings(Section):
    """The posts to train on: data files that name pictures or videos."""

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
    """The timm model; of texts, ``arch: tfidf`` or ``bert``, a small one with its own words."""

    arch: str = "efficientnet_b5"
    weights: str = "scratch"
    """Start of the weights: ``scratch``, ``pretrained``, or a state dict's path; not of text."""
    out: Path | None = None
    """Where the extractors load it; null is <save_dir>/weights/<name>, as for videos always."""
    image_size: PositiveInt = 456
    """Side of the square input in pixels; must be what ``features`` gives to the extractor."""
    dropout: Share = 0.2
    """In front of the classifier."""
    augment: bool = True
    """Shift pictures a little and change their light."""
    flip: bool = False
    """With ``augment``, mirror every second one; not where left and right matter to a label."""
    crop: Share = 0.0
    """With ``augment``, up to this share of each side is cut off, and the rest enlarged."""


class TsnSettings(Section):
    """Temporal segment network: a picture model over segments of a clip."""

    segments: PositiveInt = 3
    """Frames of a clip in training: a random one of each of that many equal segments."""
    test_segments: PositiveInt = 8
    """Frames of a clip in validation: the centre one of each segment."""
    frames: PositiveInt = 300
    """Frames that its features are extracted from for the LSTM."""


class LstmTrainSettings(LstmSizes):
    """The attention LSTM over the frames' features, trained after the TSN."""

    epochs: PositiveInt = 30
    batch_size: PositiveInt = 32
    learning_rate: Rate = 1e-3


class TfidfSettings(Section):
    """Character n-grams of texts, for ``features.text``; labels are not looked at."""

    vocabulary: PositiveInt = 8192
    """N-grams of a vector: those in the most texts. On 2,250 posts 4096 cost 0.010 of 0.388 GAP,
    and all 11,000 won 0.002."""


class BackboneTrainSettings(Section):
    """All settings of `train_net.py` for a backbone."""

    task: Literal["image_backbone", "video_backbone", "audio_backbone", "text_backbone"]
    data: BackboneDataSettings = BackboneDataSettings()
    backbone: BackboneSettings = BackboneSettings()
    tsn: TsnSettings = TsnSettings()
    """Of ``video_backbone`` only."""
    lstm: LstmTrainSettings = LstmTrainSettings()
    """Of ``video_backbone`` only."""
    tfidf: TfidfSettings = TfidfSettings()
    """Of ``text_backbone`` only."""
    optimizer: OptimizerSettings = OptimizerSettings()
    trainer: TrainerSettings = TrainerSettings(save_dir=Path("workshop/backbone"))
    report: ReportSettings = ReportSettings()
