"""Features out of fold: each post's are made by backbones that were not trained on it.

For every fold a backbone is trained on the other posts, and extracts the fold's; one more is
trained on all posts, for serving, and the features stand under its fingerprint. Vectors of
different folds are comparable only if all backbones start from the same weights: name pretrained
ones in the backbone's settings.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from common.cli import ConfigFile, Overrides, Script, option, say
from common.errors import ConfigError, told
from common.files import write_whole
from common.fingerprint import digest
from common.post import Modality, Post, Stream
from common.progress import notice
from common.urls import is_url
from config.labels import LabelMap
from config.load import load_settings
from config.train import BackboneTrainSettings
from corpus.extract.local import FeatureStore
from corpus.extract.run import main as extract
from corpus.extract.work import MODALITIES_OF, Kind, Work
from corpus.records import AtomicLines
from extractors.feature_file import feature_path, read_features, read_header
from extractors.suite import ExtractorSuite
from fusion.data.data_file import MEDIA_KEYS, relative_to_file
from fusion.data.posts import PostList, stratified_folds
from fusion.train.options import TrainOptions, train_settings

_ABOUT = (
    "Extract features of a backbone's own training posts, by backbones that did not see them.\n\n"
    "Each post's features are made by a backbone that was not trained on it; the backbones are "
    "trained for it. Run it again to go on."
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command line."""

    model_config: Annotated[
        Path, option("config of train_net.py for the backbone", "F", "--model_config")
    ]
    config: ConfigFile = None
    overrides: Overrides
    model_set: Annotated[
        list[str],
        typer.Option(
            "--model_set",
            metavar="K=V",
            default_factory=list,
            show_default=False,
            help="override a key of --model_config",
        ),
    ]
    features: Annotated[Path, option("root of feature files", "DIR")]
    folds: Annotated[int, typer.Option("--folds", min=2, metavar="N")] = 5
    seed: Annotated[int, option("seed of the folds", "N", min=0)] = 0
    work: Annotated[
        Path | None, option("folder of the folds; default: out_of_fold in trainer.save_dir", "DIR")
    ] = None


def _run(options: Options) -> int:
    settings = train_settings(
        TrainOptions(model_config=options.model_config, overrides=options.model_set)
    )
    if not isinstance(settings, BackboneTrainSettings):
        raise ConfigError(
            f"{options.model_config}: task: must be image_backbone or video_backbone: only these "
            "are trained on posts"
        )
    work = options.work or settings.trainer.save_dir / "out_of_fold"
    data = settings.data
    posts = PostList.read(data.train, LabelMap.load(data.labels))
    if len(posts) < 2 * options.folds:
        raise ConfigError(f"--folds {options.folds}: {len(posts)} posts are too few")
    _check_same(work, options, settings, posts)
    ends, labels = posts.label_rows()
    parts = stratified_folds(ends, labels, len(posts.labels), options.folds, options.seed)
    kind: Kind = "image" if settings.task == "image_backbone" else "video"
    serving = _train(settings, work / "all", data.train)
    fingerprints = _fingerprints(options, kind, serving)
    store = FeatureStore(options.features, MODALITIES_OF[kind], fingerprints)
    for fold in range(options.folds):
        notice(f"fold {fold + 1} of {options.folds}")
        folder = work / f"fold-{fold + 1}"
        rest, out = folder / "rest.jsonl", folder / "fold.jsonl"
        for file, rows in ((rest, parts != fold), (out, parts == fold)):
            _write_posts(file, posts, np.flatnonzero(rows))
        weights = _train(settings, folder, rest)
        code = extract(kind, _command(options, out, folder / "features", weights))
        if code:
            return code
        ids = (record.post_id for record in posts.take(np.flatnonzero(parts == fold)))
        _take_over(store, folder / "features", ids)
    names = "  ".join(weight.partition("=")[2] for weight in serving)
    say(
        f"{len(posts)} posts, each by weights that were not trained on it: {options.features}\n"
        f"to serve: {names}\n"
    )
    return 0


SCRIPT = Script(
    "out_of_fold_features.py",
    Options,
    _run,
    about=_ABOUT,
    interrupted="interrupted; run it again to continue",
    again="; run it again to continue",
)
main = SCRIPT.main


def _check_same(
    work: Path, options: Options, settings: BackboneTrainSettings, posts: PostList
) -> None:
    """Refuse a folder of other posts, folds or settings; record those of a new folder."""
    made_of = settings.model_dump(mode="json", exclude={"trainer": {"save_dir", "progress"}})
    parts = {"train": made_of, "posts": posts.digest(), "folds": [options.folds, options.seed]}
    path, current = work / "folds.json", digest(parts)
    with told(f"{path}: cannot be used", OSError, ValueError):
        if path.exists() and json.loads(path.read_text(encoding="utf-8")) != current:
            raise ConfigError(
                f"{path}: those folds belong to other posts, folds or settings: name another --work"
            )
        write_whole(path, json.dumps(current))


def _train(settings: BackboneTrainSettings, folder: Path, posts: Path) -> list[str]:
    """Train on posts, or resume that; return the settings that name the weights."""
    # Imported here: --help and a mistake in the options need no torch.
    from fusion.backbones import training
    from fusion.backbones.media import MediaItems
    from fusion.train.checkpoint import LAST
    from fusion.train.run_folder import LATEST

    images = settings.task == "image_backbone"
    keys = {"features.image.weights": f"{settings.backbone.arch}.safetensors"}
    if not images:
        keys = {
            "features.video.weights": "tsn.safetensors",
            "features.video.lstm.weights": "video_lstm.safetensors",
        }
    files = {key: folder / "weights" / name for key, name in keys.items()}
    if not all(file.exists() for file in files.values()):
        begun = folder / LATEST / ("ckpt" if images else "tsn/ckpt") / LAST
        sections = {
            "data": settings.data.model_copy(update={"train": posts}),
            "trainer": settings.trainer.model_copy(update={"save_dir": folder}),
        }
        training.train_backbones(
            settings.model_copy(update=sections),
            MediaItems(),
            resume=folder if begun.exists() else None,
        )
    return [f"{key}={file.absolute()}" for key, file in files.items()]


def _fingerprints(options: Options, kind: Kind, weights: list[str]) -> dict[Stream, str]:
    settings = load_settings(options.config, [*options.overrides, *weights])
    suite = ExtractorSuite(settings.features, names=(kind,))
    suite.load()
    try:
        return suite.fingerprints
    finally:
        suite.close()


def _command(options: Options, posts: Path, features: Path, weights: list[str]) -> list[str]:
    """Return the command line of the script that extracts a fold."""
    config = [] if options.config is None else ["--config", str(options.config)]
    sets = [part for each in (*options.overrides, *weights) for part in ("--set", each)]
    return ["--input", str(posts), "--features", str(features), *config, *sets]


def _write_posts(path: Path, posts: PostList, rows: Iterable[int]) -> None:
    """Write some posts as a data file of its own: with whole paths, and without feature files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with AtomicLines(path) as lines:
        for row in rows:
            entry = {k: v for k, v in posts.entry(row).items() if k != "features"}
            for key in MEDIA_KEYS.values():
                sources = entry.get(key) or []
                entry[key] = [
                    s if is_url(s) else str(relative_to_file(s, posts.file(row)).absolute())
                    for s in sources
                ]
            lines.write(json.dumps(entry, ensure_ascii=False))


def _take_over(store: FeatureStore, root: Path, post_ids: Iterable[str]) -> None:
    """Merge a fold's features into the common root, under the serving weights' fingerprint."""
    for post_id in post_ids:
        inputs = dict(read_header(feature_path(root, post_id), post_id).inputs)
        digests: dict[Modality, str] = {m: inputs.get(m, "") for m in store.modalities}
        store.put(Work(0, Post(post_id), digests), read_features(root, post_id))
