"""Every fusion model on the same features: which tags best, how large, how slow.

2,000 demo posts are made with noise and missing modalities, so that no model is near the ceiling:
1,500 to train on, 200 that choose the epoch, 300 that are only measured. Their features come
from the demo's encoders, which saw none of these posts, and no noise. Every model has its
default size, the same optimizer, the same number of epochs and the same seeds; what differs is
the model and its learning rate (`RATES`), which ``--search`` chose on the 200, never on the 300.
Times are seconds of one core (each training has one thread), whatever else the machine does.

Run: ``python bench/fusion_zoo.py [--seeds 3] [--epochs 12] [--jobs 2] [--search]``; makes what is
missing under ``workshop/zoo``, and takes its backbones from the demo, which it prepares when it is
missing. Results: ``bench/results/fusion_zoo.json``, a table on standard output.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, get_args

from results_file import write_results

from common.logs import configure_logs
from common.post import Features, Post
from common.progress import notice, progress_bar
from config.fusion_models import ModelName
from config.labels import LabelMap
from config.load import load_settings, validate
from config.settings import Settings
from config.train import TrainSettings
from demo.__main__ import CONFIG, ROOT
from demo.layout import Layout, Sizes
from demo.posts.plan import SPLITS, Split
from demo.training import LABELS
from fusion.data.data_file import read_whole_posts

FOLDER = Path("workshop/zoo")
POSTS: dict[Split, int] = {"train": 1500, "valid": 200, "online": 300}
SEED, NOISE, MISSING = 11, 0.25, 0.06
MODELS: tuple[ModelName, ...] = get_args(ModelName)
SEARCHED = (5e-4, 1e-3, 2e-3)
RATES: dict[ModelName, float] = {
    "token_transformer": 1e-3,
    "concat_mlp": 1e-3,
    "concat_se": 2e-3,
    "gmu": 2e-3,
    "nextvlad_se": 2e-3,
    "attention_lstm": 1e-3,
    "mbt": 1e-3,
    "ml_decoder": 1e-3,
    "late": 1e-3,
    "linear_probe": 1e-3,
    "knn": 1e-3,
    "tag_text": 1e-3,
}
"""The best of `SEARCHED` by the GAP on the validation posts, with seed 0; not so the last four, of
which the linear probe and k-NN take none."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One training: what it gave on the posts that were only measured.

    Attributes:
        train_s: Seconds of one core, reading of features and validation included.
        ms_per_post: Milliseconds of one core, in batches of 64.
    """

    model: str
    seed: int
    learning_rate: float
    valid_gap: float
    gap: float
    mean_ap: float
    parameters: int
    train_s: float
    ms_per_post: float


def prepare(settings: Settings) -> Layout:
    """Make posts and their features, once."""
    from demo.stages import make_splits
    from demo.stages import prepare as prepare_demo

    prepare_demo(Layout(ROOT), settings, Sizes(), seed=7)
    layout = Layout(FOLDER)
    if not all(layout.posts(split).exists() for split in SPLITS):
        make_splits(layout, POSTS, SEED, noise=NOISE, missing=MISSING)
    _extract(layout, settings)
    return layout


def _extract(layout: Layout, settings: Settings) -> None:
    """Extract features of all posts; again when the extractors have changed since."""
    from common.stages import run_stage
    from demo.features import extract_posts
    from demo.stages import code_digest, digest

    features = digest(settings.features.model_dump(mode="json"), code_digest("extractors"))
    weights = digest(*(_weights(settings)))
    inputs = digest(features, weights)
    posts = [post for split in SPLITS for post in read_whole_posts(layout.posts(split))]

    def extract() -> None:
        shutil.rmtree(layout.features, ignore_errors=True)
        extract_posts(layout, settings, posts)

    run_stage(layout.root / "stamps" / "features", inputs, (layout.features,), extract)


def _weights(settings: Settings) -> Iterator[str]:
    from demo.backbones import outputs

    for path in outputs(settings):
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        yield from (
            f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files
        )


@dataclasses.dataclass(frozen=True)
class Job:
    """One training to do."""

    model: ModelName
    seed: int
    learning_rate: float
    epochs: int

    @property
    def folder(self) -> Path:
        """Return the folder of its checkpoints and bundle while it runs."""
        return FOLDER / "runs" / f"{self.model}-{self.seed}-{self.learning_rate:g}"


def train_one(job: Job) -> Run:
    """Train one model and measure its bundle on the posts that nothing was chosen by."""
    from fusion.data.dataset import FeatureFiles
    from fusion.infer.inferer import Inferer
    from fusion.train.training import train

    configure_logs("pretty", "error")
    layout, out = Layout(FOLDER), job.folder
    shutil.rmtree(out, ignore_errors=True)
    started = time.process_time()
    report = train(_settings(layout, job), FeatureFiles(layout.features))
    train_s = time.process_time() - started
    inferer = Inferer.load(out / "bundle", threads=1)
    posts = read_whole_posts(layout.posts("online"))
    gap, mean_ap, seconds = _measure(inferer, layout, posts)
    shutil.rmtree(out, ignore_errors=True)
    return Run(
        model=job.model,
        seed=job.seed,
        learning_rate=job.learning_rate,
        valid_gap=report.metrics["gap"],
        gap=gap,
        mean_ap=mean_ap,
        parameters=report.parameters,
        train_s=train_s,
        ms_per_post=1000 * seconds / len(posts),
    )


def _settings(layout: Layout, job: Job) -> TrainSettings:
    values: dict[str, Any] = {
        "data": {
            "train": layout.posts("train"),
            "valid": layout.posts("valid"),
            "labels": LABELS,
        },
        "model": {"name": job.model},
        "optimizer": {"learning_rate": job.learning_rate},
        "trainer": {
            "epochs": job.epochs,
            "n_gpu": 0,
            "precision": "fp32",
            "threads": 1,
            "fix_random_seed": True,
            "seed": job.seed,
            "save_dir": job.folder,
            "progress": False,
        },
        "bundle": {"name": f"zoo-{job.model}", "out": job.folder / "bundle"},
        "report": {"enabled": False},  # its charts are no part of the training
    }
    return validate(TrainSettings, values, "zoo")


def _measure(inferer: Any, layout: Layout, posts: Sequence[Post]) -> tuple[float, float, float]:
    """Return GAP@20, mAP, and seconds of a core for all posts in batches of 64."""
    import numpy as np

    from extractors.feature_file import read_features
    from fusion.metrics import ranking as metrics

    labels = LabelMap.load(LABELS)
    truth = np.zeros((len(posts), len(labels)), np.float32)
    for row, post in zip(truth, posts, strict=True):
        row[labels.encode(post.labels)] = 1
    features: list[Features] = [
        read_features(layout.features, post.post_id, inferer.fingerprints) for post in posts
    ]
    inferer.predict(features[:64])  # warms up
    started = time.process_time()
    predictions = inferer.predict(features)
    seconds = time.process_time() - started
    scores = np.stack([tags.scores for tags in predictions])
    gap = metrics.global_average_precision(scores, truth)
    return gap, metrics.mean_average_precision(scores, truth), seconds


def summarise(runs: Sequence[Run]) -> dict[str, Any]:
    """Return one model's entry of the results."""
    gaps = [run.gap for run in runs]
    return {
        "model": runs[0].model,
        "gap": round(statistics.fmean(gaps), 6),
        "gap_sd": round(statistics.stdev(gaps), 6) if len(gaps) > 1 else 0.0,
        "gaps": [round(gap, 6) for gap in gaps],
        "valid_gap": round(statistics.fmean(run.valid_gap for run in runs), 6),
        "map": round(statistics.fmean(run.mean_ap for run in runs), 6),
        "params": runs[0].parameters,
        "learning_rate": runs[0].learning_rate,
        "train_s": round(statistics.median(run.train_s for run in runs), 2),
        "ms_per_post": round(statistics.median(run.ms_per_post for run in runs), 4),
    }


def show(results: Sequence[dict[str, Any]]) -> None:
    """Return the table, best first, in Markdown."""
    print("| model | GAP@20 | ± | mAP | parameters | learning rate | training s | ms per post |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for entry in sorted(results, key=lambda entry: -float(entry["gap"])):
        print(
            f"| {entry['model']} | {entry['gap']:.4f} | {entry['gap_sd']:.4f} "
            f"| {entry['map']:.4f} | {entry['params']:,} | {entry['learning_rate']:g} "
            f"| {entry['train_s']:.0f} | {entry['ms_per_post']:.2f} |"
        )


def run_all(jobs: Sequence[Job], processes: int) -> list[Run]:
    """Run every job, in processes of one thread each; the order of the results is the jobs'."""
    runs: dict[Job, Run] = {}
    context = multiprocessing.get_context("spawn")  # forked threads of torch may hang
    with (
        progress_bar("fusion zoo", len(jobs)) as bar,
        ProcessPoolExecutor(processes, mp_context=context) as pool,
    ):
        running = {pool.submit(train_one, job): job for job in jobs}
        for future in as_completed(running):
            run = runs[running[future]] = future.result()
            note = f"{run.model} {run.learning_rate:g} valid {run.valid_gap:.4f}"
            bar.update(len(runs), note)
            notice(f"  {note} gap {run.gap:.4f} {run.train_s:.0f} s")
    return [runs[job] for job in jobs]


def main() -> int:
    """Train, print, write ``bench/results/fusion_zoo.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--jobs", type=int, default=2, help="trainings side by side")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--search", action="store_true", help="choose learning rates; no results")
    options = parser.parse_args()
    configure_logs("pretty", "error")
    prepare(load_settings(CONFIG))
    if options.search:
        rates = [Job(m, 0, rate, options.epochs) for m in options.models for rate in SEARCHED]
        for run in run_all(rates, options.jobs):
            print(f"{run.model:<18} {run.learning_rate:<8g} valid GAP {run.valid_gap:.4f}")
        return 0
    jobs = [
        Job(m, s, RATES[m], options.epochs) for m in options.models for s in range(options.seeds)
    ]
    runs = run_all(jobs, options.jobs)
    results = [summarise([r for r in runs if r.model == model]) for model in options.models]
    show(results)
    print(f"posts {POSTS}, noise {NOISE}, missing {MISSING}, {options.epochs} epochs")
    if list(options.models) == list(MODELS):
        print(f"written to {write_results('fusion_zoo', options.seeds, results)}")
    else:
        sys.stderr.write("not all models were asked for: nothing written\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
