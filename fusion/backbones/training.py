"""Training of backbones out of data files: what `train_net.py` does for tasks of backbones.

    image_backbone    pictures -> <arch>.safetensors
    audio_backbone    patches of sound -> audio.safetensors
    text_backbone     texts -> tfidf.safetensors, or the folder bert
    video_backbone    segments of clips -> tsn.safetensors
                      its features of every frame -> attention LSTM -> video_lstm.safetensors

The newest files are ``<save_dir>/weights/*``, which ``features.*.weights`` name; those of each run
stay in ``weights`` of its own folder.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
from lightning_fabric import Fabric
from torch import nn

from common.errors import ConfigError, FeatureError, MediaError, replaced, told
from common.files import new_file
from common.post import Post
from common.post_set import PostSet
from common.progress import notice, progress_bar
from config.features import FeatureSettings, VideoSettings
from config.labels import LabelMap
from config.train import BackboneTrainSettings, LossSettings, OptimizerSettings, TrainerSettings
from extractors.learned import posts_of_weights
from extractors.media.decode import read_frames
from extractors.models.visual import VideoExtractor
from extractors.parts import FrameChoice
from fusion.backbones.media import (
    Chance,
    Item,
    MediaDataset,
    MediaItems,
    MediaPost,
    Posts,
    all_media,
    collate_media,
    pixels,
    prepare,
)
from fusion.backbones.model import (
    LstmTagger,
    MediaObjective,
    MediaTagger,
    create_backbone,
    save_weights,
)
from fusion.backbones.report import BackboneReport
from fusion.backbones.small import BackboneName, SmallBackbone
from fusion.backbones.text import fit_tfidf
from fusion.data.data_file import entries, parse_post, read_whole_posts
from fusion.infer.inference import shown
from fusion.metrics import ranking as metrics
from fusion.report.write import ReportInput
from fusion.train import distributed
from fusion.train.checkpoint import LAST, Start, find_start, seed_of, signature
from fusion.train.distributed import all_ranks
from fusion.train.losses import Objective, TaggingLoss
from fusion.train.prepare import Skipped, loaders_of
from fusion.train.run_folder import link_latest, located, run_folder
from fusion.train.trainer import OnEpochEnd, TrainData, Trainer

AnyPost = TypeVar("AnyPost", Post, MediaPost)


@dataclass(frozen=True)
class StageReport:
    """The outcome of one training.

    Attributes:
        name: ``image``, ``tsn``, ``lstm``, ``audio``, ``text`` or ``tfidf``.
        weights: What the extractors load.
        metrics: On the validation posts, of the epoch that was kept; empty without validation.
        seen: These were all trained on.
        page: The report's, or None if it is switched off.
    """

    name: str
    weights: Path
    metrics: Mapping[str, float]
    seen: bool
    best_epoch: int
    epochs: int
    seconds: float
    page: Path | None = None

    @property
    def text(self) -> str:
        """Return the outcome in lines for a person."""
        text = (
            f"{self.name}: epochs {self.epochs}  best epoch {self.best_epoch}  "
            f"{shown(self.metrics, seen=self.seen)}\n"
            f"weights {self.weights}  {self.seconds:.1f} s\n"
        )
        return text if self.page is None else f"{text}report {self.page}\n"


def train_backbones(
    settings: BackboneTrainSettings,
    reader: MediaItems,
    *,
    resume: Path | None = None,
    again: Sequence[str] = ReportInput.again,
) -> tuple[StageReport, ...]:
    """Train what ``task`` names, and write weights for the extractors, and reports.

    What an earlier run has left in the folder, weights included, is kept. ``resume`` is the folder
    of a run; of pictures also what `fusion.train.checkpoint.find_start` takes. ``again`` are the
    words of the command, for the advice of the reports.
    """
    return distributed.run(settings.trainer, partial(_train, settings, reader, resume, again))


def _train(
    settings: BackboneTrainSettings,
    reader: MediaItems,
    resume: Path | None,
    again: Sequence[str],
    fabric: Fabric,
) -> tuple[StageReport, ...]:
    """Train in one of the processes of a training; the first one reports."""
    if settings.task == "text_backbone" and settings.backbone.arch == "tfidf":
        folder = run_folder(fabric, settings.trainer.save_dir, None)
        link_latest(fabric, folder)
        report = all_ranks(fabric, partial(_count_texts, settings, fabric, folder))
        return (report,) if fabric.is_global_zero else ()
    if settings.task in ("text_backbone", "audio_backbone"):
        return _train_in_memory(settings, reader, resume, again, fabric)
    images, save_dir = settings.task == "image_backbone", settings.trainer.save_dir
    resume = located(resume)
    if not images and resume is not None and not resume.is_dir():
        raise ConfigError(f"{resume}: --resume takes the folder of a run here, with tsn/ in it")
    if not images and settings.backbone.out is not None:
        raise ConfigError("backbone.out: a video_backbone writes two files: leave it out")
    folder = run_folder(fabric, save_dir, resume)
    posts = prepare(settings, reader, "images" if images else "videos", folder, fabric)
    about = BackboneReport(settings, posts.labels.names, folder, again)
    task = _Task(settings, reader, fabric, posts, folder, PostSet(), about)
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


def _train_in_memory(
    settings: BackboneTrainSettings,
    reader: MediaItems,
    resume: Path | None,
    again: Sequence[str],
    fabric: Fabric,
) -> tuple[StageReport, ...]:
    """Train on sounds or texts."""
    name: BackboneName = "text" if settings.task == "text_backbone" else "audio"
    backbone, data = settings.backbone, settings.data
    if name == "text" and backbone.arch != "bert":
        raise ConfigError(f"backbone.arch: text_backbone takes tfidf or bert, not {backbone.arch}")
    resume = located(resume)
    folder = run_folder(fabric, settings.trainer.save_dir, resume)
    labels = all_ranks(fabric, partial(LabelMap.load, data.labels))
    signed = signature({"stage": name, "arch": backbone.arch, "labels": list(labels.names)})
    start = all_ranks(fabric, lambda: None if resume is None else find_start(resume, signed))
    train, valid = (
        all_ranks(fabric, partial(read_whole_posts, path)) if path is not None else []
        for path in (data.train, data.valid)
    )
    learned = PostSet.of(post.post_id for post in train) | _learned(settings, start)
    new = _new_posts(valid, learned, fabric)
    link_latest(fabric, folder)
    trainer = settings.trainer.model_copy(update={"save_dir": folder})
    seed, seen = seed_of(fabric, trainer, start), bool(valid) and not new
    features = {"audio": {"arch": backbone.arch}} if name == "audio" else {}
    first = fabric.is_global_zero
    skipped = Skipped(folder / "log" / "skipped.jsonl", enabled=data.skip_bad and first)

    def parts() -> tuple[TrainData, Callable[[], Any], Callable[[Any, Path], None]]:
        shown = trainer.progress and first and name == "audio"
        count = len(train) + len(new or valid)
        with skipped, progress_bar("decode", count, enabled=shown) as bar:
            return SmallBackbone(
                name,
                train,
                new or valid,
                labels,
                FeatureSettings.model_validate(features),
                reader.limits,
                weights=backbone.weights,
                dropout=backbone.dropout,
                augment=backbone.augment,
                max_items=(data.max_items, data.max_items),
                seed=seed,
                decoded=lambda *_: bar.advance(),
                skip=skipped.add if data.skip_bad else None,
            ).parts(learned, seen=seen)

    posts, build, save = all_ranks(fabric, parts)
    report = train_model(
        fabric,
        posts,
        build,
        save,
        _files(settings, folder, "bert" if name == "text" else "audio.safetensors"),
        trainer_settings=trainer,
        optimizer=settings.optimizer,
        name=name,
        signature=signed,
        seed=seed,
        start=start,
        about=BackboneReport(settings, labels.names, folder, again),
    )
    return (report,) if fabric.is_global_zero else ()


def _files(settings: BackboneTrainSettings, folder: Path, name: str) -> tuple[Path, ...]:
    """Return where weights are kept: with the run, and where extractors load them."""
    served = settings.backbone.out or settings.trainer.save_dir / "weights" / name
    return folder / "weights" / name, served


def _count_texts(settings: BackboneTrainSettings, fabric: Fabric, folder: Path) -> StageReport:
    """Count the n-grams of the training posts' texts, read ones too; there is nothing to resume."""
    started, ids, files = time.monotonic(), [], _files(settings, folder, "tfidf.safetensors")

    def texts() -> Iterator[str]:
        for entry in entries(settings.data.train):
            post = parse_post(entry.value, entry.where).post
            ids.append(post.post_id)
            yield from (post.text, post.ocr or "")

    if fabric.is_global_zero:
        tfidf = fit_tfidf(texts(), settings.tfidf.vocabulary)
        for out in files:
            _saved(partial(tfidf.save, learned_from=PostSet.of(ids)), out)
    seconds = time.monotonic() - started
    return StageReport("tfidf", files[-1], {}, seen=False, best_epoch=0, epochs=0, seconds=seconds)


def _learned(settings: BackboneTrainSettings, start: Start | None) -> PostSet:
    """Return the posts that the weights which a training begins with have learned from."""
    weights = Path(settings.backbone.weights)
    learned = posts_of_weights(weights) if weights.exists() else PostSet()
    return learned | (PostSet() if start is None else start.learned_from)


def _new_posts(valid: Sequence[AnyPost], learned: PostSet, fabric: Fabric) -> list[AnyPost]:
    """Return the posts that nothing was trained on; a warning counts the others."""
    new = [post for post in valid if post.post_id not in learned]
    if len(new) < len(valid):
        rest = "they are left out of validation" if new else "its figures are on training posts"
        notice(
            f"warning: {len(valid) - len(new)} of {len(valid)} validation posts were learned "
            f"from: {rest}",
            enabled=fabric.is_global_zero,
        )
    return new


@dataclass(frozen=True)
class _Task:
    settings: BackboneTrainSettings
    reader: MediaItems
    fabric: Fabric
    posts: Posts
    folder: Path
    learned_from: PostSet
    about: BackboneReport
    seen: bool = False

    def without_learned(self, start: Start | None) -> _Task:
        """Validate on posts that nothing was trained on; if there are none, on training posts."""
        learned = PostSet.of(post.post_id for post in self.posts.train)
        learned |= _learned(self.settings, start)
        valid = self.posts.valid or ()
        new = tuple(_new_posts(valid, learned, self.fabric))
        posts = replace(self.posts, valid=new or self.posts.valid)
        return replace(self, posts=posts, learned_from=learned, seen=bool(valid) and not new)

    def start(self, name: str, resume: Path | None) -> Start | None:
        """Return the start of a stage; None begins from scratch."""
        signed = _signature(self.settings, self.posts, name)
        return all_ranks(
            self.fabric, lambda: None if resume is None else find_start(resume, signed)
        )

    def pixels(self, name: str, file: str, folder: Path, start: Start | None) -> StageReport:
        """Train a picture model, on pictures or, as ``tsn``, on segments of clips."""
        settings, backbone = self.settings, self.settings.backbone
        trainer = settings.trainer.model_copy(update={"save_dir": folder})
        clips, classes = name == "tsn", len(self.posts.labels)
        item = partial(pixels, reader=self.reader, size=backbone.image_size)
        train = partial(
            item,
            segments=settings.tsn.segments if clips else None,
            augmented=backbone.augment,
            flip=backbone.flip,
            crop=backbone.crop,
        )
        valid = partial(item, segments=settings.tsn.test_segments if clips else None)
        size = (backbone.image_size, backbone.image_size)

        def model() -> nn.Module:
            made = create_backbone(backbone.arch, "picture", size, backbone.weights)
            tagger = MediaTagger(made, size, classes, backbone.dropout)
            return tagger.to(memory_format=torch.channels_last)

        def save(tagger: MediaTagger, out: Path) -> None:
            about = {"arch": backbone.arch, "kind": "picture", "height": size[0], "width": size[1]}
            save_weights(tagger.backbone, out, "backbone", about, self.learned_from)

        return self._train(
            name,
            start,
            (train, valid),
            model,
            save,
            file=file,
            trainer=trainer,
            optimizer=settings.optimizer,
        )

    def lstm(self, frames_weights: Path, start: Start | None) -> StageReport:
        """Extract the frames of every clip with the trained model, and train the LSTM on them."""
        settings, options = self.settings, self.settings.lstm
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

        def save(tagger: LstmTagger, out: Path) -> None:
            sizes = options.model_dump(include={"projection", "hidden", "join", "width"})
            about = {**sizes, "frames_dim": store.dim}
            save_weights(tagger.lstm, out, "lstm", about, self.learned_from)

        model = partial(LstmTagger, store.dim, options, len(self.posts.labels))
        return self._train(
            "lstm",
            start,
            (store.read, store.read),
            model,
            save,
            file="video_lstm.safetensors",
            trainer=trainer,
            optimizer=optimizer,
        )

    def _train(
        self,
        name: str,
        start: Start | None,
        items: tuple[Item, Item],
        model: Callable[[], nn.Module],
        save: Callable[[Any, Path], None],
        *,
        file: str,
        trainer: TrainerSettings,
        optimizer: OptimizerSettings,
    ) -> StageReport:
        """Train one stage; ``items`` make media ready for training and for validation."""
        settings, classes = self.settings, len(self.posts.labels)
        seed = seed_of(self.fabric, trainer, start)
        build = partial(MediaDataset.of_files, classes=classes, max_items=settings.data.max_items)
        train = build(self.posts.train, item=items[0], seed=seed)
        valid = self.posts.valid and build(self.posts.valid, item=items[1])
        data = TrainData(
            train,
            valid or None,
            collate_media,
            len(train),
            self.learned_from,
            seen=self.seen,
            loaders=loaders_of(settings.data.loaders, self.fabric),
        )
        return train_model(
            self.fabric,
            data,
            model,
            save,
            _files(settings, self.folder, file),
            trainer_settings=trainer,
            optimizer=optimizer,
            name=name,
            signature=_signature(settings, self.posts, name),
            seed=seed,
            start=start,
            about=self.about,
        )


def train_model(
    fabric: Fabric,
    data: TrainData,
    build: Callable[[], Any],
    save: Callable[[Any, Path], None],
    files: tuple[Path, ...],
    *,
    trainer_settings: TrainerSettings,
    optimizer: OptimizerSettings,
    name: str,
    signature: str,
    seed: int,
    start: Start | None = None,
    on_epoch_end: OnEpochEnd | None = None,
    about: BackboneReport | None = None,
) -> StageReport:
    """Train a backbone by the one training loop, and save what the extractors load.

    Args:
        fabric: Launched.
        data: Posts of a `MediaDataset`.
        build: Makes the model: `start_at`, and a `Batch` in, logits ``(posts, classes)`` out.
        save: Writes what an extractor loads.
        files: Where; the report names the last one.
        trainer_settings: Of the trainer.
        optimizer: Its settings.
        name: Of the stage, for the report.
        signature: Of what its checkpoints fit.
        seed: Of weights, order and noise.
        start: None begins from scratch.
        on_epoch_end: As of `Trainer`.
        about: Writes the report; None writes none.
    """
    started = time.monotonic()
    truth = torch.from_numpy(cast("MediaDataset", data.train).targets)
    torch.manual_seed(seed)
    model = build()
    model.start_at(truth.mean(dim=0))
    trainer = Trainer(
        fabric,
        trainer_settings,
        optimizer,
        signature=signature,
        seed=seed,
        on_epoch_end=on_epoch_end,
    )
    kind = MediaObjective if isinstance(model, MediaTagger) else Objective
    objective = kind(model, TaggingLoss(LossSettings(), truth.sum(dim=0)))
    progress = trainer.fit(objective, data, start)
    scores, scored = dict[str, float](), None
    if data.valid is not None:
        scored = trainer.logits(model, data, data.valid)
        scores = metrics.summary(*scored, thresholds=0.0)
    if fabric.is_global_zero:
        for out in files:
            _saved(partial(save, model), out)
    trainer.log.write("weights", file=str(files[-1]), best_epoch=progress.best_epoch, **scores)
    page = None
    if about is not None and fabric.is_global_zero:
        facts = {
            "weights": str(files[-1]),
            "parameters": sum(p.numel() for p in model.parameters()),
            "epochs": progress.epoch,
            "best epoch": progress.best_epoch,
            "seconds": round(time.monotonic() - started, 1),
            "optimizer": optimizer.name,
            "learning rate": optimizer.learning_rate,
        }
        page = about.write(
            name, data, scored, log=trainer.log, trainer=trainer_settings, facts=facts
        )
    fabric.barrier()
    return StageReport(
        name=name,
        page=page,
        weights=files[-1],
        metrics=scores,
        seen=data.seen,
        best_epoch=progress.best_epoch,
        epochs=progress.epoch,
        seconds=time.monotonic() - started,
    )


def _saved(save: Callable[[Path], None], out: Path) -> None:
    with told(f"{out}: cannot be written"):
        save(out)


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
        with told(f"{place}: cannot be written"), new_file(place, sync=False, shared=True) as file:
            np.save(file, features, allow_pickle=False)

    def read(self, path: Path, _: Chance | None = None) -> npt.NDArray[np.float16]:
        """Return the features ``(frames, dim)`` of a video, as an `Item`."""
        place = self._place(path)
        with replaced(
            FeatureError(f"{place}: cannot be read; delete it and continue with --resume"),
            OSError,
            ValueError,
            EOFError,
        ):
            features: npt.NDArray[np.float16] = np.load(place, allow_pickle=False)
        return features

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
    """Run the trained frame model over all videos; those that are done already are kept."""
    device = str(fabric.device) if fabric.device.type == "cuda" else "cpu"
    video = VideoSettings(
        arch=settings.backbone.arch,
        weights=str(weights),
        image_size=settings.backbone.image_size,
        frames=settings.tsn.frames,
        decode="accurate",  # the LSTM is trained on frames at equal distances
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
                with told(f"post {post_id}: {path}", MediaError, as_=MediaError):
                    pixels = read_frames(
                        path,
                        choice=FrameChoice.of(video),
                        side=video.image_size,
                        limits=reader.limits,
                    )
                [features] = extractor.forward([extractor.preprocess(pixels)])
                store.write(path, features)
                bar.advance()
    finally:
        extractor.close()
    return store
