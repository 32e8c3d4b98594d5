"""Fusion models and losses, each model with its own learning rate, on features that are fixed.

On openclipart each seed has a fold of authors of its own: the models train on authors of the other
folds and are measured on it; a quarter of the training authors is kept apart to choose. (One author
drew 551 of all posts: where they are not measured, they are among the training posts, since as
kept-apart posts they would hide all others.) Of the demo's features (``--demo``, the folder of a
finished demo) the validation posts choose and the posts of the online run are measured. The
choosing posts decide on

- the rate of each model and seed, out of ``--rates``, with the first loss;
- the epoch of each training.

Each seed draws its own training posts, the same for all cells, so that differences from the default
are taken within a seed; the other losses train at the rate of the first. One cell is better than
another where the mean of the differences is over two standard errors of it. ``linear_probe`` has
neither loss nor rate.

Small on purpose: at most ``--posts`` posts and few epochs, each model in its default size or, with
``--width``, a smaller one. Absolute figures are below those of ``bench/openclipart.py``, which has
TF-IDF too.

Run: ``python bench/heads.py --work DIR [--demo DIR] [--seeds 3] [--posts 1200]`` with the posts and
features of ``bench/openclipart.py``; a training that ended is not repeated, and with ``--minutes``
none begins later. ``--only demo`` needs no openclipart. Results: ``bench/results/heads.json``,
which keeps the rows of other sets, sizes and widths.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import random
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, repeat
from pathlib import Path
from typing import Any, Final, get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs as a plain script too

from openclipart import FOLDS, author_of, dealt, figures, side_by_side, split_posts
from results_file import FOLDER, write_results

from common.files import write_whole
from common.progress import notice, progress_bar
from config.fusion_models import DEFAULT_MODEL, ModelName
from config.labels import LabelMap
from config.load import validate
from config.train import LossName, TrainSettings

PROBE: Final = "linear_probe"
MODELS: tuple[ModelName, ...] = (PROBE, "concat_mlp", "ml_decoder", "mbt", "token_transformer")
LOSSES: tuple[LossName, ...] = ("bce", "asymmetric", "two_way")
RATES = (1e-3, 4e-3)
EMA = 0.99
"""Of steps: a run has some 300, so that 0.999 would still hold the start."""
SETS = ("openclipart", "demo")
BATCH = 32


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
    width: int = 0


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
    file = options.out / "heads.json"
    results = json.loads(file.read_text(encoding="utf-8"))["results"] if file.exists() else []
    with side_by_side(options.jobs) as each:
        for name in options.only:
            if name == "demo" and options.demo is None:
                continue
            rows = summarise(name, measure(each, name, options))
            print(table(rows))
            again = {setting_of(row) for row in rows}
            results = [row for row in results if setting_of(row) not in again] + rows
    seeds = max(row["seeds"] for row in results)
    print(f"written to {write_results('heads', seeds, results, options.out)}")
    return 0


def measure(
    each: Callable[..., Iterator[Run]], name: str, options: argparse.Namespace
) -> list[Run]:
    """Return the runs of one set of posts: of the better rates, then of other losses."""
    loss, *others = options.losses
    run = functools.partial(run_all, each, until=options.until)
    rates = [
        Job(data, model, loss, rate, seed, 0.0, options.epochs, options.width)
        for seed in range(options.seeds)
        for data in [folder_of(name, options, options.posts, seed)]
        for model in options.models
        for rate in (options.rates[:1] if model == PROBE else options.rates)
    ]
    best: dict[tuple[int, str], Run] = {}
    for trial in run(rates, f"{name}: rates"):
        key = trial.job.seed, trial.job.model
        best[key] = max(best.get(key, trial), trial, key=of_valid)
    trained = [trial.job for trial in best.values() if trial.job.model != PROBE]
    cells = [replace(job, ema=options.ema) for job in trained if options.ema]
    cells += [replace(job, loss=it) for job in trained for it in others]
    return [*best.values(), *run(cells, f"{name}: losses")]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("workshop/openclipart"))
    parser.add_argument("--demo", type=Path, help="folder of a finished demo")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--posts", type=int, default=1200, help="training posts at most")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--width", type=int, default=0, help="of attention models; 0: their own")
    parser.add_argument("--only", nargs="+", choices=SETS, default=SETS)
    parser.add_argument("--models", nargs="+", choices=get_args(ModelName), default=MODELS)
    parser.add_argument("--losses", nargs="+", choices=get_args(LossName), default=LOSSES)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="to choose from")
    parser.add_argument("--ema", type=float, default=EMA, help="of the averaged cells; 0: none")
    parser.add_argument("--jobs", type=int, default=1, help="trainings side by side")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the result")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start none after these")
    options = parser.parse_args(arguments)
    options.until = time.time() + 60 * options.minutes
    return options


def folder_of(name: str, options: argparse.Namespace, count: int, seed: int) -> Path:
    """Write the data files of a set, with a seed's choice of training posts; return their folder.

    They are ``train``, ``valid`` and ``test.json``, and ``labels.json``.
    """
    work = options.work.absolute()
    sides, labels = openclipart(work, seed) if name == "openclipart" else demo_posts(options.demo)
    folder: Path = work / f"heads-{name}-{count}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(labels, folder / "labels.json")
    for side, posts in sides.items():
        some = posts
        if side == "train" and len(posts) > count:
            some = random.Random(seed).sample(posts, count)
        (folder / f"{side}.json").write_text(json.dumps(some), encoding="utf-8")
    return folder


def openclipart(work: Path, seed: int) -> tuple[dict[str, list[Any]], Path]:
    """Return the posts of each side, in the fold of the seed, and the file of labels."""
    from extractors.feature_file import feature_path

    posts = json.loads((work / "posts" / "posts.json").read_text("utf-8"))
    for post in posts:
        post["features"] = str(feature_path(work / "features", post["post_id"]))
    number = seed % FOLDS
    fold = split_posts(posts, "author")[number]
    groups = {post["post_id"]: author_of(post) for post in fold["train"]}
    largest, valid, *others = dealt(fold["train"], groups, seed=1 + number)
    train = [post for part in (largest, *others) for post in part]
    return {"train": train, "valid": valid, "test": fold["test"]}, work / "posts" / "idx2name.json"


def demo_posts(demo: Path) -> tuple[dict[str, list[Any]], Path]:
    """Return the posts of a finished demo by side, and the file of labels."""
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
    return sides, LABELS


def run_all(
    each: Callable[..., Iterator[Run | None]], jobs: Sequence[Job], title: str, *, until: float
) -> list[Run]:
    """Return the runs that were started in time, or had ended before."""
    runs: list[Run] = []
    with progress_bar(title, len(jobs)) as bar:
        for run in each(functools.partial(train_one, until=until), jobs):
            if run is None:
                continue
            runs.append(run)
            job = run.job
            note = f"{job.model} {job.loss} {job.rate:g} ema {job.ema:g}"
            bar.update(len(runs), note)
            notice(f"  {note} seed {job.seed}: valid {run.valid:.4f} gap {run.gap:.4f}")
    return runs


def train_one(job: Job, until: float = math.inf) -> Run | None:
    """Train one model, and score the posts that nothing was chosen by; of one that ended, read."""
    import numpy as np

    from common.logs import configure_logs
    from fusion.data.dataset import FeatureFiles
    from fusion.infer.inferer import Inferer
    from fusion.train.training import train

    configure_logs("pretty", "error")
    cell = f"{job.model}-{job.loss}-{job.rate:g}-{job.ema:g}-{job.epochs}-{job.width}"
    out, file = job.data / cell, job.data / f"{cell}.json"
    if file.exists():
        return Run(job, **json.loads(file.read_text(encoding="utf-8")))
    if time.time() > until:
        return None
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
    measured = figures(scores, truth)
    run = {"valid": report.metrics["gap"], "gap": measured["gap"], "mean_ap": measured["map"]}
    write_whole(file, json.dumps(run))
    return Run(job, **run)


def settings_of(job: Job, out: Path) -> TrainSettings:
    width = {"width": job.width} if job.width else {}
    values: dict[str, Any] = {
        "data": {side: job.data / f"{side}.json" for side in ("train", "valid")},
        "model": {
            "name": job.model,
            "mbt": width,
            "ml_decoder": width,
            "token_transformer": width,
        },
        "loss": {"name": job.loss},
        "optimizer": {"learning_rate": job.rate, "ema_decay": job.ema},
        "trainer": {
            "epochs": job.epochs,
            "batch_size": BATCH,
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
    """Return a row for each cell that has all seeds: means and their standard errors, best first.

    ``over_default``: the mean difference of GAP@20 from the default model with the first loss, on
    the same training posts, and its standard error.
    """
    cells: dict[tuple[Any, ...], dict[int, Run]] = {}
    for run in runs:
        posts = len(json.loads((run.job.data / "train.json").read_text(encoding="utf-8")))
        cells.setdefault((posts, run.job.model, run.job.loss, run.job.ema), {})[run.job.seed] = run
    first = runs[0].job.loss
    rows = []
    seeds = max(map(len, cells.values()))
    for (posts, model, loss, ema), own in cells.items():
        if len(own) < seeds:  # the time was up
            continue
        row: dict[str, Any] = {"data": name, "posts": posts, "model": model, "loss": loss}
        job = next(iter(own.values())).job
        rates = [run.job.rate for run in own.values()]
        row |= {"ema": ema, "learning_rates": rates, "epochs": job.epochs, "width": job.width}
        row["seeds"] = seeds
        for key, values in figures_of(list(own.values())):
            row[key], row[f"{key}_se"] = mean_and_error(values)
        default = cells.get((posts, DEFAULT_MODEL, first, 0.0), {})
        pairs = [own[seed].gap - default[seed].gap for seed in own if seed in default]
        row["over_default"], row["over_default_se"] = mean_and_error(pairs)
        rows.append(row)
    return sorted(rows, key=lambda row: (row["posts"], -float(row["gap"])))


def setting_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["data"], row["posts"], row["width"]


def mean_and_error(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Return the mean and its standard error; null where there are too few values."""
    if not values:
        return None, None
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return round(statistics.fmean(values), 4), None if error is None else round(error, 4)


def figures_of(runs: Sequence[Run]) -> Iterator[tuple[str, list[float]]]:
    yield "valid_gap", [run.valid for run in runs]
    yield "gap", [run.gap for run in runs]
    yield "map", [run.mean_ap for run in runs]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of docs/models.md: a line for each model of a set, a column for each loss.

    A cell is GAP@20 and its difference from the default model with the first loss.
    """
    columns = list(dict.fromkeys(column_of(row) for row in rows))
    columns.sort(key=lambda column: (column != LOSSES[0], column))
    lines = [
        f"| posts | model | {' | '.join(columns)} | mAP ({LOSSES[0]}) |",
        f"| --- | --- |{' --- |' * len(columns)} ---: |",
    ]
    sets: dict[tuple[Any, ...], dict[str, dict[str, Mapping[str, Any]]]] = {}
    for row in rows:
        models = sets.setdefault(setting_of(row), {})
        models.setdefault(row["model"], {})[column_of(row)] = row
    for (data, posts, width), models in sets.items():
        seeds = next(row["seeds"] for cells in models.values() for row in cells.values())
        name = f"{data}, {posts:,}" + f", width {width}" * bool(width) + f"; {seeds} seeds"
        order = sorted(models.items(), key=lambda item: -item[1][LOSSES[0]]["gap"])
        for (model, cells), title in zip(order, chain([name], repeat("")), strict=False):
            texts = [cell(cells.get(column)) for column in columns]
            lines.append(
                f"| {title} | `{model}` | {' | '.join(texts)} | {cells[LOSSES[0]]['map']:.3f} |"
            )
    return "\n".join(lines)


def column_of(row: Mapping[str, Any]) -> str:
    return f"{row['loss']}, EMA" if row["ema"] else str(row["loss"])


def cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    over, error = row["over_default"], row["over_default_se"]
    if (
        over is None
        or error is None
        or (row["model"], column_of(row)) == (DEFAULT_MODEL, LOSSES[0])
    ):
        return f"{row['gap']:.3f}"
    return f"{row['gap']:.3f}, {over:+.3f} ± {error:.3f}"


if __name__ == "__main__":
    sys.exit(main())
