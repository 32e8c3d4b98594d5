"""A whole training: data files in, bundle out. What `train_net.py` runs."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from lightning_fabric import Fabric

from config.errors import ConfigError
from config.labels import LabelMap
from config.settings import Precision
from config.train import TrainSettings
from fusion import metrics
from fusion.bundle import save_bundle
from fusion.calibration import Calibration, calibrated, fit_calibration
from fusion.checkpoint import load_checkpoint, signature
from fusion.collate import Collate
from fusion.dataset import (
    FeatureReader,
    PostDataset,
    encode_targets,
    find_manifest,
    read_data_file,
)
from fusion.device import resolve_precision, set_threads
from fusion.losses import TaggingLoss
from fusion.models import FusionModel, build_model
from fusion.objective import Objective
from fusion.schema import FeatureManifest, InputSchema
from fusion.thresholds import fit_thresholds
from fusion.trainer import TrainData, Trainer

_FABRIC_PRECISION: Mapping[Precision, Literal["32-true", "bf16-mixed", "16-mixed"]] = {
    "fp32": "32-true",
    "bf16": "bf16-mixed",
    "fp16": "16-mixed",
}


@dataclass(frozen=True)
class TrainReport:
    """What came out of a training.

    Attributes:
        bundle: Its folder.
        metrics: On the validation posts, at the bundle's thresholds; empty without validation.
        best_epoch: The epoch that was kept, from 1.
        epochs: Epochs that were done.
    """

    bundle: Path
    version: str
    metrics: Mapping[str, float]
    best_epoch: int
    epochs: int
    parameters: int
    seconds: float


@dataclass(frozen=True)
class _Prepared:
    labels: LabelMap
    manifest: FeatureManifest
    schema: InputSchema
    data: TrainData
    positives: torch.Tensor


def train(
    settings: TrainSettings, reader: FeatureReader, *, resume: Path | None = None
) -> TrainReport:
    """Train a fusion model and write its bundle.

    Args:
        settings: All of them.
        reader: Where features come from.
        resume: A checkpoint to go on from, or the folder of a run, whose last one is taken.

    Raises:
        ConfigError: Settings, data files, labels or a checkpoint are wrong, or the loss is NaN.
        FeatureError: Features are missing, broken, or made by different extractors.
        BundleError: The bundle cannot be written.
    """
    started = time.monotonic()
    set_threads(settings.trainer.threads)
    prepared = prepare(settings, reader)
    fabric = make_fabric(settings)
    fabric.launch()
    mark = _signature(settings, prepared)
    checkpoint = _checkpoint_of(resume)
    seed = int(fabric.broadcast(_seed(settings, checkpoint, mark)))
    torch.manual_seed(seed)
    model = build_model(prepared.schema, settings.model)
    model.start_at(prepared.positives / prepared.data.train_count)
    trainer = Trainer(fabric, settings.trainer, settings.optimizer, signature=mark, seed=seed)
    objective = Objective(
        model,
        TaggingLoss(settings.loss, prepared.positives),
        auxiliary=settings.model.auxiliary,
        mixup=settings.loss.mixup,
    )
    progress = trainer.fit(objective, prepared.data, checkpoint)
    calibration, thresholds, found = _measure(settings, prepared, model, trainer)
    version = ""
    if fabric.is_global_zero:
        version = save_bundle(
            settings.bundle.folder,
            name=settings.bundle.name,
            model=model,
            settings=settings.model,
            manifest=prepared.manifest,
            labels=prepared.labels,
            thresholds=thresholds,
            metrics=found,
            calibration=calibration,
        )
    trainer.log.write("bundle", folder=str(settings.bundle.folder), version=version, **found)
    fabric.barrier()
    return TrainReport(
        bundle=settings.bundle.folder,
        version=version,
        metrics=found,
        best_epoch=progress.best_epoch,
        epochs=progress.epoch,
        parameters=sum(p.numel() for p in model.parameters()),
        seconds=time.monotonic() - started,
    )


def prepare(settings: TrainSettings, reader: FeatureReader) -> _Prepared:
    """Read labels and data files, and find out what the features are.

    Raises:
        ConfigError: A file is missing, empty or wrong, or names a label that is not in the map.
        FeatureError: Features are missing or broken.
    """
    data = settings.data
    labels = LabelMap.load(data.labels)
    records = read_data_file(data.train)
    if len(records) < 2:
        raise ConfigError(f"{data.train}: training takes at least two posts")
    targets = encode_targets(records, labels, str(data.train))
    valid = read_data_file(data.valid) if data.valid is not None else ()
    valid_targets = encode_targets(valid, labels, str(data.valid))
    manifest = find_manifest(records, reader, data)
    schema = InputSchema.of(manifest, settings.model.tokens, len(labels))
    # Loader processes would each keep a cache of their own.
    cache_mb = 0 if data.loaders else data.cache_mb // 2
    build = partial(PostDataset, reader=reader, manifest=manifest, schema=schema, cache_mb=cache_mb)
    return _Prepared(
        labels,
        manifest,
        schema,
        TrainData(
            train=build(records, targets),
            valid=build(valid, valid_targets) if valid else None,
            collate=Collate(schema),
            train_count=len(records),
            loaders=data.loaders,
        ),
        torch.from_numpy(targets.sum(axis=0)),
    )


def make_fabric(settings: TrainSettings) -> Fabric:
    """The device and precision that the settings name.

    Raises:
        ConfigError: There are not as many GPUs.
    """
    there = torch.cuda.device_count()
    wanted = settings.trainer.n_gpu
    count = min(1, there) if wanted is None else wanted
    if count > there:
        raise ConfigError(f"trainer.n_gpu: {count} GPUs wanted, this machine has {there}")
    precision = settings.trainer.precision
    if precision == "auto":
        # A fusion model is small: on a CPU, half precision would save nothing.
        precision = resolve_precision("auto", "cuda") if count else "fp32"
    return Fabric(
        accelerator="cuda" if count else "cpu",
        devices=max(1, count),
        strategy="ddp" if count > 1 else "auto",
        precision=_FABRIC_PRECISION[precision],
    )


def _signature(settings: TrainSettings, prepared: _Prepared) -> str:
    options = settings.model.model_dump(mode="json")
    name = settings.model.name
    return signature(
        {
            "model": {"name": name, "own_heads": options["auxiliary"] > 0, **options[name]},
            "features": dict(prepared.manifest.dims),
            "fingerprints": dict(prepared.manifest.fingerprints),
            "image_as_frames": prepared.manifest.image_as_frames,
            "tokens": dict(prepared.schema.tokens),
            "labels": list(prepared.labels.names),
        }
    )


def _checkpoint_of(resume: Path | None) -> Path | None:
    if resume is None:
        return None
    if resume.is_dir():
        return next(
            (p for p in (resume / "ckpt" / "last.pt", resume / "last.pt") if p.exists()),
            resume / "ckpt" / "last.pt",
        )
    return resume


def _seed(settings: TrainSettings, checkpoint: Path | None, mark: str) -> int:
    if checkpoint is not None:
        return load_checkpoint(checkpoint, mark).progress.seed
    return settings.trainer.seed if settings.trainer.fix_random_seed else secrets.randbits(31)


def _measure(
    settings: TrainSettings, prepared: _Prepared, model: FusionModel, trainer: Trainer
) -> tuple[Calibration | None, npt.NDArray[np.float32], dict[str, float]]:
    """Calibration, thresholds ``(classes,)`` and metrics, from the validation posts.

    Metrics are of the calibrated scores, which are what the bundle gives. Without validation:
    none, 0.5 and none.
    """
    valid = prepared.data.valid
    if valid is None:
        return None, np.full(len(prepared.labels), 0.5, np.float32), {}
    raw, targets = trainer.scores(model, prepared.data, valid)
    calibration = fit_calibration(settings.bundle.calibration, raw, targets)
    scores = calibrated(calibration, raw)
    thresholds = fit_thresholds(
        scores,
        targets,
        min_positives=settings.bundle.min_positives,
        precision=settings.bundle.precision,
    )
    return calibration, thresholds, metrics.summary(scores, targets, thresholds)
