"""Training of backbones out of data files: what `train_net.py` does for tasks of backbones.

    image_backbone    pictures -> <arch>.safetensors
    video_backbone    segments of clips -> tsn.safetensors
                      its features of every frame -> attention LSTM -> video_lstm.safetensors

The newest files are ``<save_dir>/weights/*``, which ``features.*.weights`` name; those of each run
stay in ``weights`` of its own folder.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from lightning_fabric import Fabric
from torch import nn

from common.errors import ConfigError, FeatureError, MediaError
from common.files import new_file
from common.post_set import PostSet
from common.progress import notice, progress_bar
from config.settings import VideoSettings
from config.train import BackboneTrainSettings, LossSettings, OptimizerSettings, TrainerSettings
from extractors.learned import posts_of_weights
from extractors.media.decode import read_frames
from extractors.models.visual import VideoExtractor
from fusion.backbones.media import (
    CollateMedia,
    FrameDataset,
    MediaDataset,
    MediaItems,
    MediaPost,
    PixelDataset,
    Posts,
    all_media,
    prepare,
)
from fusion.backbones.model import (
    LstmTagger,
    MediaObjective,
    MediaTagger,
    create_backbone,
    save_weights,
)
from fusion.data.loading import default_loaders
from fusion.data.schema import Collate
from fusion.metrics import ranking as metrics
from fusion.train import distributed
from fusion.train.checkpoint import LAST, Start, find_start, signature
from fusion.train.distributed import all_ranks
from fusion.train.losses import Objective, TaggingLoss
from fusion.train.run_folder import link_latest, located, run_folder
from fusion.train.trainer import OnEpochEnd, TrainData, Trainer


@dataclass(frozen=True)
class StageReport:
    """The outcome of one training.

    Attributes:
        name: ``image``, ``tsn`` or ``lstm``.
        weights: What the extractors load.
        metrics: On the validation posts, of the epoch that was kept; empty without validation.
        seen: These were all learned from.
        best_epoch: That epoch, from 1.
    """

    name: str
    weights: Path
    metrics: Mapping[str, float]
    seen: bool
    best_epoch: int
    epochs: int
    parameters: int
    posts: int
    seconds: float


def train_backbones(
    settings: BackboneTrainSettings, reader: MediaItems, *, resume: Path | None = None
) -> tuple[StageReport, ...]:
    """Train what ``task`` names, and write weights for the extractors.

    What an earlier run has left in the folder, weights included, is kept.

    Args:
        settings: All of them.
        reader: Decodes media; pickles, where there are several distributed.
        resume: Folder of a run to go on with; of ``image_backbone`` also a checkpoint.

    Raises:
        ConfigError: Settings, data files, labels or a checkpoint are wrong, or the loss is NaN.
        MediaError: A file cannot be decoded, and ``data.skip_bad`` is not set.
        WorkerDied: A process of the training was killed.
    """
    return distributed.run(settings.trainer, partial(_train, settings, reader, resume))


def _train(
    settings: BackboneTrainSettings, reader: MediaItems, resume: Path | None, fabric: Fabric
) -> tuple[StageReport, ...]:
    """Train in one of the processes of a training; the first one reports."""
    images, save_dir = settings.task == "image_backbone", settings.trainer.save_dir
    resume = located(resume)
    if not images and resume is not None and not resume.is_dir():
        raise ConfigError(f"{resume}: --resume takes the folder of a run here, with tsn/ in it")
    folder = run_folder(fabric, save_dir, resume)
    posts = prepare(settings, reader, "images" if images else "videos", folder, fabric)
    task = _Task(settings, reader, fabric, posts, folder, PostSet())
    stages: tuple[StageReport, ...]
    if images:
        start = task.start("image", resume)
        task = task.without_learned(start)
        link_latest(fabric, folder)
        stages = (task.pixels("image", f"{settings.backbone.arch}.safetensors", folder, start),)
    else:
        tsn_start = task.start("tsn", resume and resume / "tsn")
        begun = resume is not None and (resume / "lstm" / "ckpt" / LAST).exists()
        lstm_start = task.start("lstm", resume / "lstm" if resume and begun else None)
        task = task.without_learned(tsn_start)
        link_latest(fabric, folder)
        tsn = task.pixels("tsn", "tsn.safetensors", folder / "tsn", tsn_start)
        stages = (tsn, task.lstm(tsn.weights, lstm_start))
    return stages if fabric.is_global_zero else ()


@dataclass(frozen=True)
class _Task:
    settings: BackboneTrainSettings
    reader: MediaItems
    fabric: Fabric
    posts: Posts
    folder: Path
    learned_from: PostSet
    seen: bool = False

    def without_learned(self, start: Start | None) -> _Task:
        """Validate on posts that nothing has learned from; where there are none, on seen posts."""
        weights = Path(self.settings.backbone.weights)
        learned = PostSet.of(post.post_id for post in self.posts.train)
        learned |= posts_of_weights(weights) if weights.exists() else PostSet()
        learned |= PostSet() if start is None else start.learned_from
        valid = self.posts.valid or ()
        new = tuple(post for post in valid if post.post_id not in learned)
        if len(new) < len(valid):
            rest = "they are left out of validation" if new else "its figures are of seen posts"
            notice(
                f"warning: {len(valid) - len(new)} of {len(valid)} validation posts were learned "
                f"from: {rest}",
                enabled=self.fabric.is_global_zero,
            )
        posts = replace(self.posts, valid=new or self.posts.valid)
        return replace(self, posts=posts, learned_from=learned, seen=bool(valid) and not new)

    def start(self, name: str, resume: Path | None) -> Start | None:
        """Return the start of a stage; None begins from scratch.

        Raises:
            ConfigError: As `fusion.train.checkpoint.find_start`.
        """
        signed = _signature(self.settings, self.posts, name)
        return all_ranks(
            self.fabric, lambda: None if resume is None else find_start(resume, signed)
        )

    def pixels(self, name: str, file: str, folder: Path, start: Start | None) -> StageReport:
        """Train a picture model, on pictures or, as ``tsn``, on segments of clips."""
        settings, backbone = self.settings, self.settings.backbone
        trainer = settings.trainer.model_copy(update={"save_dir": folder})
        clips, classes = name == "tsn", len(self.posts.labels)
        run = self._run(name, trainer, settings.optimizer, start)
        build = partial(
            PixelDataset,
            classes=classes,
            reader=self.reader,
            size=backbone.image_size,
            max_items=settings.data.max_items,
        )
        train = build(
            self.posts.train,
            segments=settings.tsn.segments if clips else None,
            seed=run.seed,
            augmented=backbone.augment,
        )
        valid = self.posts.valid and build(
            self.posts.valid, segments=settings.tsn.test_segments if clips else None
        )

        def model() -> nn.Module:
            size = (backbone.image_size, backbone.image_size)
            made = create_backbone(backbone.arch, "picture", size, backbone.weights)
            tagger = MediaTagger(made, size, classes, backbone.dropout)
            return tagger.to(memory_format=torch.channels_last)

        def save(tagger: MediaTagger, out: Path) -> None:
            side = backbone.image_size
            about = {"arch": backbone.arch, "kind": "picture", "height": side, "width": side}
            save_weights(tagger.backbone, out, "backbone", about, self.learned_from)

        data = self._data(train, valid or None)
        return run.train(data, train.targets, model, save, self._weights(file))

    def lstm(self, frames_weights: Path, start: Start | None) -> StageReport:
        """Extract the frames of every clip with the trained model, and train the LSTM on them."""
        settings, options = self.settings, self.settings.lstm
        classes = len(self.posts.labels)
        everything = (*self.posts.train, *(self.posts.valid or ()))
        extract = partial(
            extract_frames, settings, self.reader, frames_weights, everything, self.fabric
        )
        store = all_ranks(self.fabric, extract)
        self.fabric.barrier()
        trainer = settings.trainer.model_copy(
            update={
                "save_dir": self.folder / "lstm",
                "epochs": options.epochs,
                "batch_size": options.batch_size,
            }
        )
        rate = {"learning_rate": options.learning_rate}
        optimizer = settings.optimizer.model_copy(update=rate)
        run = self._run("lstm", trainer, optimizer, start)
        build = partial(
            FrameDataset, classes=classes, read=store.read, max_items=settings.data.max_items
        )
        train = build(self.posts.train, seed=run.seed)
        valid = self.posts.valid and build(self.posts.valid)

        def save(tagger: LstmTagger, out: Path) -> None:
            sizes = options.model_dump(include={"projection", "hidden", "join", "width"})
            about = {**sizes, "frames_dim": store.dim}
            save_weights(tagger.lstm, out, "lstm", about, self.learned_from)

        model = partial(LstmTagger, store.dim, options, classes)
        data, files = self._data(train, valid or None), self._weights("video_lstm.safetensors")
        return run.train(data, train.targets, model, save, files)

    def _weights(self, file: str) -> tuple[Path, Path]:
        """Return where weights are written: in the run's folder, and where extractors load them."""
        return (
            self.folder / "weights" / file,
            self.settings.trainer.save_dir / "weights" / file,
        )

    def _run(
        self,
        name: str,
        trainer: TrainerSettings,
        optimizer: OptimizerSettings,
        start: Start | None,
    ) -> BackboneRun:
        signed = _signature(self.settings, self.posts, name)
        seed = _seed(self.fabric, trainer, start)
        return BackboneRun(name, self.fabric, trainer, optimizer, signed, seed, start)

    def _data(self, train: MediaDataset, valid: MediaDataset | None) -> TrainData:
        loaders = self.settings.data.loaders
        if loaders is None:
            loaders = default_loaders(self.fabric.device.type, distributed.on_this_host())
        collate = cast("Collate", CollateMedia())
        return TrainData(
            train, valid, collate, len(train), self.learned_from, seen=self.seen, loaders=loaders
        )


@dataclass(frozen=True)
class BackboneRun:
    """The training of one model, by the one training loop.

    Attributes:
        name: Of the stage, for the report.
        signature: Of what its checkpoints fit.
        start: None begins from scratch.
    """

    name: str
    fabric: Fabric
    trainer: TrainerSettings
    optimizer: OptimizerSettings
    signature: str
    seed: int
    start: Start | None = None
    on_epoch_end: OnEpochEnd | None = None

    def train(
        self,
        data: TrainData,
        targets: npt.NDArray[np.float32],
        build: Callable[[], Any],
        save: Callable[[Any, Path], None],
        files: tuple[Path, ...],
    ) -> StageReport:
        """Train a model, and save what the extractors load.

        Args:
            data: The posts.
            targets: Of the training posts, ``(posts, classes)``.
            build: Makes the model: `start_at`, and a `Batch` in, logits ``(posts, classes)`` out.
            save: Writes what an extractor loads.
            files: Where; the report names the last one.

        Raises:
            ConfigError: The loss is not finite, or a file cannot be written.
        """
        started = time.monotonic()
        truth = torch.from_numpy(targets)
        torch.manual_seed(self.seed)
        model = build()
        model.start_at(truth.mean(dim=0))
        trainer = Trainer(
            self.fabric,
            self.trainer,
            self.optimizer,
            signature=self.signature,
            seed=self.seed,
            on_epoch_end=self.on_epoch_end,
        )
        kind = MediaObjective if isinstance(model, MediaTagger) else Objective
        objective = kind(model, TaggingLoss(LossSettings(), truth.sum(dim=0)))
        progress = trainer.fit(objective, data, self.start)
        scores: dict[str, float] = {}
        if data.valid is not None:
            scores = metrics.summary(*trainer.logits(model, data, data.valid), thresholds=0.0)
        if self.fabric.is_global_zero:
            for out in files:
                try:
                    save(model, out)
                except OSError as error:
                    raise ConfigError(f"{out}: cannot be written: {error}") from error
        trainer.log.write("weights", file=str(files[-1]), best_epoch=progress.best_epoch, **scores)
        self.fabric.barrier()
        return StageReport(
            name=self.name,
            weights=files[-1],
            metrics=scores,
            seen=data.seen,
            best_epoch=progress.best_epoch,
            epochs=progress.epoch,
            parameters=sum(p.numel() for p in model.parameters()),
            posts=data.train_count,
            seconds=time.monotonic() - started,
        )


def _signature(settings: BackboneTrainSettings, posts: Posts, stage: str) -> str:
    """Return everything that must be equal for the weights of one run to fit another."""
    parts: dict[str, Any] = {
        "stage": stage,
        "arch": settings.backbone.arch,
        "image_size": settings.backbone.image_size,
        "labels": list(posts.labels.names),
    }
    if stage == "lstm":
        sizes = settings.lstm.model_dump(include={"projection", "hidden", "join", "width"})
        parts |= {"lstm": sizes, "frames": settings.tsn.frames}
    return signature(parts)


def _seed(fabric: Fabric, trainer: TrainerSettings, start: Start | None) -> int:
    seed = trainer.seed if trainer.fix_random_seed else secrets.randbits(31)
    if start is not None and start.exact:
        seed = start.checkpoint.progress.seed
    return int(fabric.broadcast(seed))


class FrameStore:
    """One file for each video, by the fingerprint of its features and the video's own state."""

    def __init__(self, folder: Path, fingerprint: str, dim: int) -> None:
        self._folder = folder / fingerprint[:16]
        self.dim = dim

    def has(self, path: Path) -> bool:
        return self._place(path).exists()

    def write(self, path: Path, features: npt.NDArray[np.float16]) -> None:
        """Keep the features ``(frames, dim)`` of a video; the file is whole or not there."""
        place = self._place(path)
        try:
            with new_file(place, sync=False, shared=True) as file:
                np.save(file, features, allow_pickle=False)
        except OSError as error:
            raise ConfigError(f"{place}: cannot be written: {error}") from error

    def read(self, path: Path) -> npt.NDArray[np.float16]:
        """Return the features ``(frames, dim)`` of a video."""
        place = self._place(path)
        try:
            found: npt.NDArray[np.float16] = np.load(place, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise FeatureError(f"{place}: cannot be read; delete it and go on with --resume") from (
                error
            )
        return found

    def _place(self, path: Path) -> Path:
        try:
            facts = path.stat()
            version = f" {facts.st_size} {facts.st_mtime_ns}".encode()
        except OSError:
            version = b""  # its reader says what is wrong
        name = hashlib.sha256(os.fsencode(path.absolute()) + version).hexdigest()[:40]
        return self._folder / name[:2] / f"{name}.npy"


def extract_frames(
    settings: BackboneTrainSettings,
    reader: MediaItems,
    weights: Path,
    posts: Sequence[MediaPost],
    fabric: Fabric,
) -> FrameStore:
    """Run the trained frame model over all videos; those that are done already are kept.

    Raises:
        ConfigError: The model cannot be loaded, or a file cannot be written.
        MediaError: A video cannot be decoded.
    """
    device = str(fabric.device) if fabric.device.type == "cuda" else "cpu"
    video = VideoSettings(
        arch=settings.backbone.arch,
        weights=str(weights),
        image_size=settings.backbone.image_size,
        frames=settings.tsn.frames,
        short_clips="repeat",
    )
    extractor = VideoExtractor(video, device)
    extractor.load()
    try:
        store = FrameStore(
            settings.trainer.save_dir / "frames", extractor.fingerprint, extractor.dim
        )
        todo = [(post_id, path) for post_id, path in all_media(posts) if not store.has(path)]
        mine = todo[fabric.global_rank :: fabric.world_size]
        shown = settings.trainer.progress and fabric.is_global_zero
        with progress_bar("frames", len(mine), enabled=shown) as bar:
            for post_id, path in mine:
                try:
                    pixels = read_frames(
                        path,
                        count=video.frames,
                        side=video.image_size,
                        limits=reader.limits,
                        mode=video.decode,
                    )
                except MediaError as error:
                    raise MediaError(f"post {post_id}: {path}: {error}") from error
                [features] = extractor.forward([extractor.preprocess(pixels)])
                store.write(path, features)
                bar.advance()
    finally:
        extractor.close()
    return store
