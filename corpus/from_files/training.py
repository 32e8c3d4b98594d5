"""From one's own posts to a bundle in one folder, in stages that an interrupted run goes on with.

    posts -> labels -> split -> encoders -> features -> data -> training
                               (text, sound)                    (bundle, report)

The split comes before the features, since the encoders that are made of the posts themselves (words
for TF-IDF, a network for sound where the preset has none) may see training posts only.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from common.errors import ConfigError, TaggingError, replaced
from common.files import file_digest, write_whole
from common.fingerprint import digest
from common.post import Post
from common.processes import cores
from common.progress import notice, progress_bar
from common.stages import run_stage
from common.urls import is_url
from config.load import CONFIGS, read_yaml, validate
from config.presets import TRAINED, flat, merge
from config.settings import Settings
from config.train import BackboneTrainSettings, TrainSettings
from corpus.build.command import Options as BuildOptions
from corpus.build.command import build
from corpus.build.label_map import count_labels, order_labels
from corpus.extract.options import parse
from corpus.extract.run import extract
from corpus.extract.work import Kind
from corpus.from_files.options import Options
from corpus.from_files.posts import LABELS, PostEntry, read_own_posts
from corpus.records import AtomicLines
from corpus.runs import only_one
from extractors.feature_file import feature_path
from fusion.data.data_file import MEDIA_KEYS, CorpusPost, read_posts

_FEW_POSTS = 10
"""A tag with fewer is named: a tenth of them is one validation post or none."""
_SAMPLE = 5
"""Posts that the estimate measures, behind one that warms the models up. Half says little where
posts differ; double takes longer than it is worth."""
_ESTIMATE_FROM = 40
"""With fewer posts the estimate, which loads the models once more, takes as long as the work."""
_START_S = 10
"""Of the processes of one modality, on two cores; only the estimate counts with it."""


@dataclass(frozen=True)
class OwnTraining:
    """The request, settings of the extractors, and nested values of the training."""

    asked: Options
    settings: Settings
    training: Mapping[str, Any]

    def begun(self) -> dict[str, Any]:
        """Return what a later run into the same folder must have, too."""
        options, labels, source = self.asked, self.asked.labels, self.asked.source
        if labels is None and source.is_dir() and (source / LABELS).is_file():
            labels = source / LABELS
        return {
            "POSTS": str(source.absolute()),
            "--labels": None if labels is None else str(labels.absolute()),
            "content": _digest_of(source, labels),
            "--valid": options.valid,
            "--test": options.test,
            "--seed": options.seed,
            "--min-posts": options.min_posts,
            "--skip-bad": options.skip_bad,
            "features": self.settings.features.model_dump(mode="json"),
            "decode": self.settings.decode.model_dump(mode="json"),
            **json.loads(json.dumps(self.training)),
        }


class TrainingFolder:
    """The files of a training on one's own posts.

    Attributes:
        begun: The settings of the run, which the next one must have too.
        media: Digests of the media, so that copies stay on one side of the split.
        settings: Of the extractors and the bundle, for serving.
        metrics: Figures of the validation posts.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.begun = root, root / "run.json"
        self.posts, self.rejected = root / "posts.jsonl", root / "posts.rejected.jsonl"
        self.media, self.labels = root / "media.jsonl", root / "labels.json"
        self.settings, self.metrics = root / "settings.yaml", root / "metrics.json"
        self.features, self.runs, self.bundle = root / "features", root / "train", root / "bundle"
        self.report = self.runs / "latest" / "report" / "report.html"

    def side(self, name: str, folder: str = "data") -> Path | None:
        """Return the data file of a side of the split; None where it has no posts."""
        return next(iter(sorted((self.root / folder).glob(f"{name}_cls*.json"))), None)


def train_own_posts(plan: OwnTraining) -> TrainingFolder:
    """Train on posts in files; return the folder with bundle and report.

    With ``restart`` it starts over; features that fit are kept.

    Raises:
        ConfigError: The posts or settings are wrong, or the folder was started with others.
    """
    folder = TrainingFolder(plan.asked.out)
    # Mistakes are told before the first file is written, not after hours of extraction.
    training_settings(plan, plan.settings, folder)
    for path in (plan.asked.source, plan.asked.labels):
        if path is not None and not path.exists():
            raise ConfigError(f"{path}: no such file or folder")
    with only_one(plan.asked.out / ".lock", str(plan.asked.out)):
        inputs = _begin(plan, folder)

        def stage(name: str, outputs: Sequence[Path], work: Callable[[], None]) -> None:
            run_stage(plan.asked.out / "stamps" / name, inputs, tuple(outputs), work)

        stage("posts", [folder.posts, folder.media], partial(_write_posts, plan, folder))
        contents = _contents(folder.posts)
        stage("labels", [folder.labels], partial(_write_labels, plan, folder))
        for line in advice(contents, count_labels([folder.posts])[0]):
            notice(line)
        split = plan.asked.out / "split" / "split.jsonl"
        shares = {name: getattr(plan.asked, name) for name in ("valid", "test", "seed")}
        dealing = partial(_build, folder, "split", None, manifest=folder.media, **shares)
        stage("split", [split], dealing)
        settings = _with_encoders(plan, folder, contents, stage)
        _write_settings(settings, folder)
        kinds = _kinds(settings, contents)
        stage("features", [folder.features], partial(_extract, settings, folder, kinds))
        stage(
            "data",
            [plan.asked.out / "data"],
            partial(_build, folder, "data", folder.features, split=split),
        )
        stage("training", [folder.bundle], partial(_train, plan, settings, folder))
    return folder


def _begin(plan: OwnTraining, folder: TrainingFolder) -> str:
    """Record the settings of a new folder, or refuse one with others; return their digest."""
    now = plan.begun()
    if plan.asked.restart:
        for stamp in (plan.asked.out / "stamps").glob("*"):
            stamp.unlink()
        for latest in plan.asked.out.glob("**/latest"):  # of trainings, which must not go on
            latest.unlink()
    elif (plan.asked.out / "stamps" / "posts").exists():  # before, there is nothing to go on with
        with replaced(
            ConfigError(f"{folder.begun}: broken: --restart starts over"), OSError, ValueError
        ):
            was = json.loads(folder.begun.read_text(encoding="utf-8"))
        _refuse_other(plan, was, now)
    elif not folder.begun.exists() and any(p.name != ".lock" for p in plan.asked.out.iterdir()):
        raise ConfigError(
            f"--out {plan.asked.out}: holds files that insighttag train has not written: name "
            "another, which need not exist"
        )
    write_whole(folder.begun, json.dumps(now, ensure_ascii=False, indent=2))
    return str(digest(now))


def _refuse_other(plan: OwnTraining, was: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    before, after = flat(was), flat(now)
    key = next((k for k in {**before, **after} if before.get(k) != after.get(k)), None)
    if key is None:
        return
    anew = "--restart starts over there, and keeps the features that fit"
    if key == "content":
        labels = f" or {now['--labels']}" if now["--labels"] else ""
        raise ConfigError(
            f"{plan.asked.source}{labels}: has changed since --out {plan.asked.out} was started: "
            f"{anew}"
        )
    raise ConfigError(
        f"--out {plan.asked.out}: was started with {key} {_shown(before.get(key))}, this run has "
        f"{_shown(after.get(key))}: name another --out, or {anew}"
    )


def _shown(value: object) -> str:
    return "nothing" if value is None else str(value)


def _digest_of(source: Path, labels: Path | None) -> str:
    """Return a digest of a file, or of the names and sizes under a folder, and of the labels."""
    tables = [] if labels is None or not labels.is_file() else [file_digest(labels)]
    if source.is_file():
        return str(digest({"file": file_digest(source), "labels": tables}))
    sizes = {
        str(path.relative_to(source)): path.stat().st_size
        for path in sorted(source.rglob("*"))
        if path.is_file()
    }
    return str(digest({"files": sizes, "labels": tables}))


def _write_posts(plan: OwnTraining, folder: TrainingFolder) -> None:
    mistakes: list[str] = []

    def refuse(mistake: ConfigError) -> None:
        if not plan.asked.skip_bad:
            raise ConfigError(f"{mistake} (--skip-bad leaves out what cannot be used)")
        mistakes.append(str(mistake))

    labelled = 0
    with (
        AtomicLines(folder.posts) as posts,
        AtomicLines(folder.media) as media,
        progress_bar("posts", None) as bar,
    ):
        for entry in read_own_posts(plan.asked.source, plan.asked.labels, refuse):
            labelled += bool(entry["labels"])
            posts.write(json.dumps(entry, ensure_ascii=False))
            for line in _identities(entry):
                media.write(json.dumps(line, ensure_ascii=False))
            bar.advance()
        if not labelled:
            raise ConfigError(f"{plan.asked.source}: no post has labels: {_way_to_labels(plan)}")
    if mistakes:
        lines = "\n".join(json.dumps({"reason": each}, ensure_ascii=False) for each in mistakes)
        write_whole(folder.rejected, lines)
        notice(f"left out {len(mistakes)}: {folder.rejected}")


def _way_to_labels(plan: OwnTraining) -> str:
    if not plan.asked.source.is_dir():
        return "fill its column or key labels"
    if plan.asked.labels is not None:
        return f"fill the column labels of {plan.asked.labels}"
    return f"--labels names a table with the columns file,labels; or put it there as {LABELS}"


def _identities(entry: PostEntry) -> Iterator[dict[str, str]]:
    """Yield lines as of a manifest for the local media of a post."""
    for source in [s for key in MEDIA_KEYS.values() for s in entry[key]]:
        if not is_url(source):
            yield {"status": "ok", "source": source, "sha256": file_digest(Path(source))}


def _contents(posts: Path) -> Counter[str]:
    """Count the posts that have each kind of content."""
    counts: Counter[str] = Counter()
    for entry in read_posts(posts):
        if isinstance(entry, CorpusPost):
            post = entry.post
            counts.update({MEDIA_KEYS[media.kind] for media in post.media})
            counts.update(n for n in ("text", "ocr", "labels") if getattr(post, n))
            counts["posts"] += 1
    return counts


def advice(contents: Mapping[str, int], tags: Mapping[str, int]) -> list[str]:
    """Return what a person should know of data of this size, a line each."""
    posts = contents["labels"]
    known = f"{posts:,} posts with labels, {len(tags):,} tags"
    if posts < 100:
        lines = [f"{known}: enough to try it; figures of so few say little"]
    elif posts < 5_000:
        lines = [
            f"{known}: under 5,000 posts the encoders stay as they are, and a small model of their "
            "features is trained, in seconds to minutes"
        ]
    elif posts < 100_000:
        lines = [
            f"{known}: from 5,000 posts on a picture encoder that is trained on them may pay, on a "
            "GPU (docs/training.md, Backbones)"
        ]
    else:
        lines = [f"{known}: extract on several GPUs or machines (docs/data.md, step 5)"]
    if without := contents["posts"] - posts:
        lines.append(f"{without:,} posts have no labels and are left out")
    rare = sorted((count, name) for name, count in tags.items() if count < _FEW_POSTS)
    if rare:
        shown = ", ".join(f"{name} ({count})" for count, name in rare[:5])
        more = " ..." if len(rare) > 5 else ""
        lines.append(
            f"tags with fewer than {_FEW_POSTS} posts: {shown}{more}; --min-posts "
            f"{_FEW_POSTS} leaves them out"
        )
    return lines


def _write_labels(plan: OwnTraining, folder: TrainingFolder) -> None:
    counts, _, _ = count_labels([folder.posts])
    labels = order_labels(counts, plan.asked.min_posts)
    write_whole(folder.labels, json.dumps(labels.as_json(), ensure_ascii=False, indent=2))


def _build(folder: TrainingFolder, out: str, features: Path | None, **sides: Any) -> None:
    build(
        BuildOptions(
            input=folder.posts,
            features=features,
            labels=folder.labels,
            out=folder.root / out,
            unknown="skip_tag",
            modalities=[],
            **sides,
        )
    )


def _with_encoders(
    plan: OwnTraining,
    folder: TrainingFolder,
    contents: Mapping[str, int],
    stage: Callable[[str, Sequence[Path], Callable[[], None]], None],
) -> Settings:
    """Return the settings with encoders made of the training posts where they name none."""
    features, encoders = plan.settings.features, folder.root / "encoders"
    text, audio, configured = features.text, features.audio, features.model_dump(mode="json")
    own: dict[str, Any] = {}
    alone = text.arch == "tfidf" and text.weights == "pretrained"
    beside = features.preset == "small" and text.arch != "tfidf" and text.tfidf is None
    if alone or (beside and contents["text"] > 1):
        file = encoders / "tfidf.safetensors"
        config_of = {"task": "text_backbone", "backbone": {"arch": "tfidf", "out": str(file)}}
        stage("texts", [file], partial(_train_encoder, folder, config_of, "text"))
        own["text"] = {"weights" if alone else "tfidf": str(file.absolute())}
    if audio.weights in TRAINED and not Path(audio.weights).exists():
        file = encoders / "audio.safetensors"
        if contents["videos"] or contents["audios"]:
            base = read_yaml(CONFIGS / "train_audio.yaml")
            changes = {
                "backbone": {"arch": audio.arch, "out": str(file)},
                "data": {"skip_bad": True},
            }
            work = partial(_train_encoder, folder, merge(base, changes), "audio")
            stage("sounds", [], partial(_or_without, work))
        weights = str(file.absolute()) if file.exists() else "random:1"
        own["audio"] = {"weights": weights}
    values = plan.settings.model_dump(mode="json")
    values["features"] = merge(configured, own)
    values["fusion"]["bundle"] = str(folder.bundle.absolute())
    return validate(Settings, values, "settings")


def _or_without(work: Callable[[], None]) -> None:
    """Train on sounds; videos may all be silent, which ends nothing."""
    try:
        work()
    except ConfigError as error:
        notice(f"{error}: the network for sound stays untrained")


def _train_encoder(folder: TrainingFolder, values: Mapping[str, Any], name: str) -> None:
    from fusion.backbones.media import MediaItems
    from fusion.backbones.training import train_backbones

    save_dir = folder.root / "encoders" / name
    places: dict[str, dict[str, Any]] = {
        "data": {
            "train": folder.side("train", "split"),
            "valid": folder.side("valid", "split"),
            "labels": folder.labels,
        },
        "trainer": {"save_dir": save_dir, "n_gpu": 0},
    }
    settings = validate(BackboneTrainSettings, merge(values, places), name)
    train_backbones(settings, MediaItems(), resume=_resumable(save_dir))


def _resumable(save_dir: Path) -> Path | None:
    """Return the folder of trainings if the latest can go on."""
    from fusion.train.checkpoint import LAST
    from fusion.train.fold_training import FOLDS
    from fusion.train.run_folder import LATEST

    latest = save_dir / LATEST
    return save_dir if (latest / "ckpt" / LAST).exists() or (latest / FOLDS).exists() else None


def _write_settings(settings: Settings, folder: TrainingFolder) -> None:
    """Write what serving must share with this training; no address and no password."""
    values = settings.model_dump(
        mode="json",
        include={
            "features": True,
            "decode": True,
            "workers": True,
            "fusion": True,
            "fetch": {"max_media"},
        },
    )
    del values["features"]["preset"]  # all of its keys are there
    values = _from_beside(values, f"{folder.root.absolute()}/")
    text = yaml.safe_dump(values, allow_unicode=True, sort_keys=False)
    head = "# Written by insighttag train: the encoders that the bundle needs, and the bundle.\n"
    write_whole(folder.settings, head + text)


def _from_beside(values: Mapping[str, Any], root: str) -> dict[str, Any]:
    """Return settings whose paths into the folder are relative to it, so that it can be moved."""
    return {
        key: _from_beside(value, root)
        if isinstance(value, Mapping)
        else value.removeprefix(root)
        if isinstance(value, str)
        else value
        for key, value in values.items()
    }


def _kinds(settings: Settings, contents: Mapping[str, int]) -> list[Kind]:
    """Return the extractions that these posts need."""
    ocr = settings.features.ocr
    pictures = contents["images"] or (contents["videos"] and ocr.frames)
    needed: dict[Kind, bool] = {
        "text": bool(contents["text"] or contents["ocr"] or (ocr.enabled and pictures)),
        "image": bool(contents["images"]),
        "audio": bool(contents["videos"] or contents["audios"]),
        "video": bool(contents["videos"]),
    }
    return [kind for kind, is_needed in needed.items() if is_needed]


def _extract(settings: Settings, folder: TrainingFolder, kinds: Iterable[Kind]) -> None:
    words = ["--config", str(folder.settings), "--input", str(folder.posts)]
    plans = [parse(kind, [*words, "--features", str(folder.features)]) for kind in kinds]
    unfinished = [
        entry.post
        for entry in read_posts(folder.posts)
        if isinstance(entry, CorpusPost)
        and not feature_path(folder.features, entry.post.post_id).exists()
    ]
    if len(unfinished) >= _ESTIMATE_FROM:
        notice(_estimate(settings, unfinished, len(plans), max(plan.workers for plan in plans)))
    for plan in plans:
        extract(plan)
    folder.features.mkdir(exist_ok=True)


def _estimate(settings: Settings, posts: Sequence[Post], kinds: int, workers: int) -> str:
    """Return how long the extraction will take, by the first posts of the list's parts."""
    from workers.local import local_runner

    sample = posts[:: max(1, len(posts) // _SAMPLE)][: _SAMPLE + 1]
    times = []
    with local_runner(settings, fuse=False) as runner:
        for post in sample:
            began = time.monotonic()
            try:
                runner.run(post)
            except TaggingError:
                continue  # the extraction says why
            times.append(time.monotonic() - began)
    if len(times) < 2:
        return "extraction: no estimate, since the first posts cannot be used"
    each_s = sum(times[1:]) / (len(times) - 1)
    total_s = each_s * len(posts) / workers + _START_S * kinds
    about = f"{total_s:.0f} s" if total_s < 90 else f"{total_s / 60:.0f} min"
    return (
        f"extraction: about {about} for {len(posts):,} posts ({each_s:.2f} s a post, measured on "
        f"{len(times) - 1}); Ctrl-C is safe, the same command continues"
    )


def _train(plan: OwnTraining, settings: Settings, folder: TrainingFolder) -> None:
    from fusion.data.dataset import FeatureFiles
    from fusion.train.training import train

    train_settings = training_settings(plan, settings, folder)
    labels = [] if plan.asked.labels is None else ["--labels", str(plan.asked.labels)]
    report = train(
        train_settings,
        FeatureFiles(folder.features),
        resume=_resumable(folder.runs),
        again=["insighttag", "train", str(plan.asked.source), *labels, "--out", "ANOTHER_FOLDER"],
    )
    write_whole(folder.metrics, json.dumps(dict(report.metrics), indent=2))


def training_settings(
    plan: OwnTraining, settings: Settings, folder: TrainingFolder
) -> TrainSettings:
    """Return the settings of the fusion training; the plan's own go before the defaults here."""
    modalities = ["video", "image", "audio", "text", "ocr"]
    if settings.features.asr.enabled:
        modalities.append("asr")
    values = {
        "data": {
            "train": folder.side("train") or folder.root / "data",  # none before the split
            "valid": folder.side("valid"),
            "test": folder.side("test"),
            "labels": folder.labels,
            "modalities": modalities,
            "image_as_frames": settings.fusion.image_as_frames,
            "ocr_mode": settings.features.ocr_mode,
        },
        "model": {"name": "auto"},
        # torch's own choice, a thread for each core, is far slower next to any other work.
        "trainer": {"save_dir": folder.runs, "threads": max(1, cores() // 2)},
        "bundle": {"out": folder.bundle},
    }
    return validate(TrainSettings, merge(values, plan.training), "--set")
