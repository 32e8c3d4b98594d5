"""Fusion models and losses, each pair with its own learning rate, on features that are fixed.

On openclipart the models train on authors of three folds and are measured on those of the first; a
quarter of the training authors is kept apart to choose learning rate and epoch. Of the demo's
features (``--demo``, the folder of a finished demo) the validation posts choose and the posts of
the online run are measured. Every cell has its rate of `RATES`, by the kept-apart posts and seed 0,
then more seeds; and every model with the first loss once more with a moving average of the weights.
One is better than another where the difference of the means is over two standard errors of it.

Small on purpose: one fold, at most ``--posts`` posts, few epochs, and 22 queries in ``ml_decoder``.
Absolute figures are below those of ``bench/openclipart.py``, which has TF-IDF too.

Run: ``python bench/heads.py --work DIR [--demo DIR] [--seeds 3] [--posts 1200]`` with the posts and
features of ``bench/openclipart.py``. Results: ``bench/results/heads.json``.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs as a plain script too

from openclipart import figures, side_by_side, split_posts
from results_file import FOLDER, write_results

from common.progress import notice, progress_bar
from config.fusion_models import ModelName
from config.labels import LabelMap
from config.load import validate
from config.train import LossName, TrainSettings

MODELS: tuple[ModelName, ...] = ("concat_mlp", "mbt", "ml_decoder", "token_transformer")
LOSSES: tuple[LossName, ...] = ("bce", "asymmetric", "two_way")
RATES = (1e-3, 4e-3)
EMA = 0.99
"""Of steps: a run has some 150, so that 0.999 would still hold the start."""


@dataclass(frozen=True)
class Job:
    """One training; its data files are ``train``, ``valid`` and ``test`` of the folder."""

    data: Path
    model: ModelName
    loss: LossName
    rate: float
    seed: int
    ema: float = 0.0
    epochs: int = 8


@dataclass(frozen=True)
class Run:
    """One training's figures; ``valid`` chose, the others were only measured."""

    job: Job
    valid: float
    gap: float
    mean_ap: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Train every cell, print the table, and write the results."""
    options = parse(arguments)
    sets = {"openclipart": openclipart_files(options.work, options.posts)}
    if options.demo is not None:
        sets["demo"] = demo_files(options.work, options.demo, options.posts)
    results: list[dict[str, Any]] = []
    with side_by_side(options.jobs) as each:
        for name, folder in sets.items():
            first = [
                Job(folder, model, loss, rate, 0, epochs=options.epochs)
                for model in options.models
                for loss in options.losses
                for rate in RATES
            ]
            searched = run_all(each, first, f"{name}: rates")
            best = [
                max((r for r in searched if (r.job.model, r.job.loss) == cell), key=of_valid)
                for cell in dict.fromkeys((job.model, job.loss) for job in first)
            ]
            seeds = range(1, options.seeds)
            more = [replace(run.job, seed=seed) for run in best for seed in seeds]
            averaged = [
                replace(run.job, seed=seed, ema=EMA)
                for run in best
                if run.job.loss == options.losses[0]
                for seed in range(options.seeds)
            ]
            runs = [*best, *run_all(each, [*more, *averaged], f"{name}: seeds")]
            rows = summarise(name, runs)
            show(rows)
            results += rows
    print(f"written to {write_results('heads', options.seeds, results, options.out)}")
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("workshop/openclipart"))
    parser.add_argument("--demo", type=Path, help="folder of a finished demo")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--posts", type=int, default=1200, help="training posts at most")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--models", nargs="+", choices=get_args(ModelName), default=MODELS)
    parser.add_argument("--losses", nargs="+", choices=get_args(LossName), default=LOSSES)
    parser.add_argument("--jobs", type=int, default=1, help="trainings side by side")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the result")
    return parser.parse_args(arguments)


def openclipart_files(work: Path, count: int) -> Path:
    """Write the data files of the first fold; return their folder."""
    from extractors.feature_file import feature_path

    folder, posts = work.absolute(), json.loads((work / "posts" / "posts.json").read_text("utf-8"))
    for post in posts:
        post["features"] = str(feature_path(folder / "features", post["post_id"]))
    test = split_posts(posts, "author")[0]["test"]
    chosen = split_posts(posts, "choose")[0]
    sides = {"train": chosen["train"], "valid": chosen["test"], "test": test}
    labels = folder / "posts" / "idx2name.json"
    return write_sides(folder / "heads", sides, labels, count)


def demo_files(work: Path, demo: Path, count: int) -> Path:
    """Write data files for the features of a finished demo; return their folder."""
    from demo.layout import Layout
    from demo.training import LABELS
    from extractors.feature_file import feature_path

    layout = Layout(demo.absolute())
    sides = {}
    for side, split in (("train", "train"), ("valid", "valid"), ("test", "online")):
        text = layout.posts(split).read_text("utf-8")  # type: ignore[arg-type]
        sides[side] = [{**post, "features": ""} for post in json.loads(text)]
        for post in sides[side]:
            post["features"] = str(feature_path(layout.features, post["post_id"]))
    return write_sides(work.absolute() / "heads-demo", sides, LABELS, count)


def write_sides(folder: Path, sides: Mapping[str, list[Any]], labels: Path, count: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(labels, folder / "labels.json")
    for side, posts in sides.items():
        some = posts
        if side == "train" and len(posts) > count:
            some = random.Random(0).sample(posts, count)
        (folder / f"{side}.json").write_text(json.dumps(some), encoding="utf-8")
    return folder


def run_all(each: Callable[..., Iterator[Run]], jobs: Sequence[Job], title: str) -> list[Run]:
    runs: list[Run] = []
    with progress_bar(title, len(jobs)) as bar:
        for run in each(train_one, jobs):
            runs.append(run)
            job = run.job
            note = f"{job.model} {job.loss} {job.rate:g} ema {job.ema:g}"
            bar.update(len(runs), note)
            notice(f"  {note} seed {job.seed}: valid {run.valid:.4f} gap {run.gap:.4f}")
    return runs


def train_one(job: Job) -> Run:
    """Train one model, and score the posts that nothing was chosen by."""
    import numpy as np

    from common.logs import configure_logs
    from fusion.data.dataset import FeatureFiles
    from fusion.infer.inferer import Inferer
    from fusion.train.training import train

    configure_logs("pretty", "error")
    out = job.data / f"{job.model}-{job.loss}-{job.rate:g}-{job.seed}-{job.ema:g}"
    shutil.rmtree(out, ignore_errors=True)
    report = train(settings_of(job, out), FeatureFiles())
    inferer = Inferer.load(report.bundle, threads=1)
    posts = json.loads((job.data / "test.json").read_text(encoding="utf-8"))
    labels = LabelMap.load(job.data / "labels.json")
    truth = np.zeros((len(posts), len(labels)), np.float32)
    for row, post in zip(truth, posts, strict=True):
        row[labels.encode(post["labels"])] = 1
    files = FeatureFiles()
    scores = inferer.scores(
        [files.features(p["post_id"], Path(p["features"]), inferer.fingerprints) for p in posts]
    )
    shutil.rmtree(out)
    found = figures(scores, truth)
    return Run(job, report.metrics["gap"], found["gap"], found["map"])


def settings_of(job: Job, out: Path) -> TrainSettings:
    values: dict[str, Any] = {
        "data": {side: job.data / f"{side}.json" for side in ("train", "valid")},
        "model": {"name": job.model, "ml_decoder": {"queries": 22}},
        "loss": {"name": job.loss},
        "optimizer": {"learning_rate": job.rate, "ema_decay": job.ema},
        "trainer": {
            "epochs": job.epochs,
            "batch_size": 64,
            "n_gpu": 0,
            "precision": "fp32",
            "threads": 1,
            "fix_random_seed": True,
            "seed": job.seed,
            "save_dir": out,
            "tensorboard": False,
            "progress": False,
        },
        "bundle": {"out": out / "bundle"},
        "report": {"enabled": False},
    }
    values["data"]["labels"] = job.data / "labels.json"
    return validate(TrainSettings, values, "heads")


def of_valid(run: Run) -> float:
    return run.valid


def summarise(name: str, runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return a row for each cell: means over the seeds and their standard errors, best first."""
    cells = dict.fromkeys((r.job.model, r.job.loss, r.job.ema) for r in runs)
    rows = []
    for cell in cells:
        own = [r for r in runs if (r.job.model, r.job.loss, r.job.ema) == cell]
        row: dict[str, Any] = {"data": name, "model": cell[0], "loss": cell[1], "ema": cell[2]}
        row["learning_rate"], row["seeds"] = own[0].job.rate, len(own)
        for key, values in figures_of(own):
            row[key] = round(statistics.fmean(values), 4)
            error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
            row[f"{key}_se"] = None if error is None else round(error, 4)
        rows.append(row)
    return sorted(rows, key=lambda row: -float(row["gap"]))


def figures_of(runs: Sequence[Run]) -> Iterator[tuple[str, list[float]]]:
    yield "valid_gap", [run.valid for run in runs]
    yield "gap", [run.gap for run in runs]
    yield "map", [run.mean_ap for run in runs]


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the table in Markdown."""
    print("| data | model | loss | EMA | rate | GAP@20 | se | mAP | se |")
    print("| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for row in rows:
        print(
            f"| {row['data']} | `{row['model']}` | {row['loss']} | {row['ema']:g} "
            f"| {row['learning_rate']:g} | {row['gap']:.3f} | {row['gap_se'] or 0:.3f} "
            f"| {row['map']:.3f} | {row['map_se'] or 0:.3f} |"
        )


if __name__ == "__main__":
    sys.exit(main())
