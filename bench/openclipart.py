"""Real drawings from files to tags: GAP@20 and mAP by author, against linear models.

Debian's openclipart packages become posts (``make_openclipart_posts.py``), the scripts extract the
preset ``small``, and for each of four folds of authors ``train_net.py`` counts the TF-IDF of the
other authors' texts, then trains the fusion model on them, which starts from texts about the tags
(``openclipart_tags.yaml``), and ``infer_net.py`` tags the fold. ``--choose`` leaves the fold out
altogether, and tags a quarter of the other authors instead: `TRAINING` was chosen so. The same
again with a random split is printed next to it: an author's drawings resemble each other, so that
one flatters. Linear models of scikit-learn, one tag against the rest, see the same features, and
TF-IDF alone.

The vectors of MiniLM, those of the tags' texts too, are extracted once; those of TF-IDF differ from
fold to fold and are joined to them by the extractor's own code.

Run: ``python bench/openclipart.py --source DIR [--seeds 3] [--jobs 2]``, DIR with svg/ and png/ of
the packages. Posts and features stay in ``--work``, and are not made again, also when settings of
this file have changed since. Results:
``bench/results/openclipart.json``.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import random
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs as a plain script too

from floors import finish
from results_file import FOLDER

from common.post import Features
from common.progress import notice, progress_bar
from config.labels import LabelMap
from config.presets import merge
from config.tags import TagEntry, TagTexts, load_tag_texts

ROOT = Path(__file__).resolve().parents[1]
TAGS = Path(__file__).with_name("openclipart_tags.yaml")
FOLDS = 4
SplitName: TypeAlias = Literal["author", "random", "choose"]
Entries: TypeAlias = Sequence[Mapping[str, Any]]
Floats: TypeAlias = npt.NDArray[np.float32]
PRESET = ("--set", "features.preset=small", "--set", "features.ocr.enabled=false")
PADDED = ("--set", "features.image.padded=true")
TRAINING: dict[str, Any] = {
    "model": {
        "name": "linear_probe",
        "linear_probe": {"penalties": [0.1], "alone": True, "unit": True, "calibrate": True},
    },
}
"""Chosen on the posts of ``--choose``."""


@dataclass(frozen=True)
class Job:
    """One training on the features of one fold, with one seed."""

    folder: Path
    seed: int
    training: Mapping[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Make, extract, train, score, print, and write the results."""
    options = parse(arguments)
    work: Path = options.work
    entries = make_posts(options.source, work, options.posts)
    labels = LabelMap.load(work / "posts" / "idx2name.json")
    extract(work, labels)
    splits: list[SplitName] = ["choose"] if options.choose else ["author", "random"]
    training = merge(TRAINING, json.loads(options.training))
    results: list[dict[str, Any]] = []
    for split in splits:
        folders = [
            make_fold(work, split, fold, sides, entries)
            for fold, sides in enumerate(split_posts(entries, split))
        ]
        seeds = 1 if split == "random" else options.seeds
        jobs = [Job(folder, seed, training) for seed in range(seeds) for folder in folders]
        scores = run_all(jobs, options.jobs)
        rows = {"fusion": [scores[i : i + FOLDS] for i in range(0, len(scores), FOLDS)]}
        if split == "author":
            rows |= linear_models(folders, options.jobs)
        results += [summary(split, name, seeds) for name, seeds in rows.items()]
    show(results)
    if options.choose:
        return 0
    facts = {"posts": len(entries), "tags": len(labels), "training": training}
    results = [facts, *results]
    return finish("openclipart", options.seeds, results, options.out, check=not options.posts)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--source", type=Path, default=Path("/usr/share/openclipart"))
    parser.add_argument("--work", type=Path, default=Path("workshop/openclipart"))
    parser.add_argument("--posts", type=int, default=0, help="a sample of the posts; 0: all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="trainings side by side")
    parser.add_argument("--training", default="{}", help="JSON over TRAINING")
    parser.add_argument("--choose", action="store_true", help="score the posts kept apart")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the result")
    return parser.parse_args(arguments)


def script(*words: str | Path) -> None:
    """Run one of the project's scripts; what it says is seen."""
    subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, check=True)


def make_posts(source: Path, work: Path, count: int) -> list[Any]:
    """Return the entries of ``posts.json``, made when it is missing."""
    file = work.absolute() / "posts" / "posts.json"
    if not file.exists():
        made = ROOT / "scripts" / "data_scripts" / "make_openclipart_posts.py"
        script(made, "--source", source.absolute(), "--out", file.parent)
        if count:
            entries = json.loads(file.read_text(encoding="utf-8"))
            file.write_text(json.dumps(random.Random(0).sample(entries, count)), encoding="utf-8")
    chosen: list[Any] = json.loads(file.read_text(encoding="utf-8"))
    return chosen


def extract(work: Path, labels: LabelMap) -> None:
    """Extract pictures and texts, unless that is done: the scripts look at every file again."""
    folder = work.absolute()
    for kind, posts, out in (
        ("image", "posts.json", "features"),
        ("text", "posts.json", "features"),
        ("text", "tags.json", "tag_features"),
    ):
        if (folder / out / f"summary_{kind}.json").exists():
            continue
        notice(f"{kind} {out}")
        file = folder / "posts" / posts
        if posts == "tags.json":
            file.write_text(json.dumps(tag_sentences(tag_texts(labels))), encoding="utf-8")
        paths = ("--input", file, "--features", folder / out)
        script(ROOT / "scripts" / f"extract_{kind}_features.py", *paths, *PRESET, *PADDED)


def author_of(entry: Mapping[str, Any]) -> str:
    """Return the author; a post without one stands alone."""
    return str(entry["author"] or entry["post_id"])


def split_posts(entries: Entries, split: SplitName) -> list[dict[str, list[Any]]]:
    """Return ``train`` and ``test`` of each fold; groups stay together.

    With ``choose`` both are of the fold's training posts, dealt out once more.
    """
    groups = {e["post_id"]: e["post_id"] if split == "random" else author_of(e) for e in entries}
    parts = dealt(entries, groups)
    sides = []
    for fold in range(FOLDS):
        rest = [e for i, part in enumerate(parts) if i != fold for e in part]
        test = parts[fold]
        if split == "choose":
            test, *others = dealt(rest, groups, seed=1 + fold)
            rest = [e for part in others for e in part]
        sides.append({"train": rest, "test": test})
    return sides


def dealt(entries: Entries, groups: Mapping[str, str], seed: int = 0) -> list[list[Any]]:
    """Deal groups to `FOLDS` parts: the largest first, each to the part that is the smallest."""
    members: dict[str, list[Any]] = {}
    for entry in entries:
        members.setdefault(groups[entry["post_id"]], []).append(entry)
    order = list(members.values())
    random.Random(seed).shuffle(order)  # among groups of one size
    parts: list[list[Any]] = [[] for _ in range(FOLDS)]
    for group in sorted(order, key=len, reverse=True):
        min(parts, key=len).extend(group)
    return parts


def make_fold(
    work: Path, split: SplitName, fold: int, sides: Mapping[str, list[Any]], entries: Entries
) -> Path:
    """Write a fold's data files, TF-IDF and features; return its folder."""
    folder = work.absolute() / f"{split}-{fold}"
    if (folder / "texts" / "bundle.yaml").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shutil.copy(work / "posts" / "idx2name.json", folder / "labels.json")
    from extractors.feature_file import feature_path

    for side, posts in sides.items():
        lines = [
            {**post, "features": str(feature_path(folder / "features", post["post_id"]))}
            for post in posts
        ]
        (folder / f"{side}.json").write_text(json.dumps(lines), encoding="utf-8")
    text = {
        "task": "text_backbone",
        "data": {"train": str(folder / "train.json"), "valid": None},
        "backbone": {"arch": "tfidf"},
        "trainer": {"n_gpu": 0, "save_dir": str(folder / "text"), "progress": False},
    }
    command("train_net", {"model_config": text}, folder)
    join_tfidf(work / "features", folder, entries)
    write_start(work, folder, LabelMap.load(folder / "labels.json"))
    return folder


def join_tfidf(base: Path, folder: Path, entries: Entries) -> None:
    """Write the features with the text's vectors as ``features.text.tfidf`` would give them."""
    from extractors.feature_file import read_features, read_header, write_features

    joined = encoder(base, folder, entries)
    for entry in entries:
        post_id = entry["post_id"]
        post = read_features(base, post_id, None)
        arrays = dict(post.arrays)
        made = dict(read_header_of(base, post_id, read_header).fingerprints)
        if "text" in arrays:
            (arrays["text"],) = joined.forward([joined.preprocess(entry["text"])])
        made["text"] = joined.fingerprint
        content = Features(post_id, arrays, post.statuses, post.failures)
        write_features(folder / "features", content, made)


def encoder(base: Path, folder: Path, entries: Entries) -> Any:
    """Return MiniLM with a fold's TF-IDF, for texts whose features of MiniLM lie in ``base``."""
    from extractors.feature_file import read_features, read_header
    from extractors.models.base import Extractor, unit_rows
    from extractors.models.tfidf import TfidfExtractor, WithTfidf

    class Extracted(Extractor):
        """The vectors that MiniLM has given, as an encoder."""

        name = "text"

        def embed_texts(self, texts: Sequence[str]) -> Floats:
            return unit_rows(self, texts)

        def preprocess(self, item: Any) -> Any:
            return sentences[item]

        def forward(self, items: Sequence[Any]) -> list[npt.NDArray[np.float16]]:
            return list(items)

        def close(self) -> None: ...

        def _load(self) -> Mapping[str, Any]:
            self.dim = next(iter(sentences.values())).shape[1]
            return {"of": sorted(fingerprints)}

    sentences: dict[str, npt.NDArray[np.float16]] = {}
    fingerprints: set[str] = set()
    for entry in entries:
        arrays = read_features(base, entry["post_id"], None).arrays
        if "text" in arrays:
            sentences[entry["text"]] = arrays["text"]
            header = read_header_of(base, entry["post_id"], read_header)
            fingerprints.add(header.fingerprints["text"])
    tfidf = TfidfExtractor(str(folder / "text" / "weights" / "tfidf.safetensors"), "text")
    joined = WithTfidf(Extracted(), tfidf)
    joined.load()
    return joined


def write_start(work: Path, folder: Path, labels: LabelMap) -> None:
    """Write the bundle that the probe starts from, as ``insighttag zeroshot --labels`` would.

    The posts are shown to it without labels: they centre the vectors and do not calibrate. Inside
    the training folds the stronger pull that this gives was the better one.
    """
    from fusion.bundle.bundle import save_bundle
    from fusion.bundle.tag_vectors import TagRows, zero_shot
    from fusion.data.dataset import FeatureFiles
    from fusion.data.posts import PostList
    from fusion.models.base import FeatureManifest

    texts = tag_texts(labels)
    joined = encoder(work.absolute() / "tag_features", folder, tag_sentences(texts))
    pool, posts = folder / "pool.json", json.loads((folder / "train.json").read_text("utf-8"))
    pool.write_text(json.dumps([{**post, "labels": []} for post in posts]), encoding="utf-8")
    manifest = FeatureManifest({"text": joined.dim}, {"text": joined.fingerprint})
    bundle = zero_shot(
        texts,
        {"text": TagRows.of(texts, joined.embed_texts)},
        manifest,
        PostList.read(pool, labels),
        FeatureFiles(),
        name="texts",
    )
    save_bundle(folder / "texts", bundle)


def tag_texts(labels: LabelMap) -> TagTexts:
    """Return what is written about the tags; one that the file lacks has its name."""
    known = {tag.name: tag for tag in load_tag_texts(TAGS).tags}
    return TagTexts(tags=tuple(known.get(name, TagEntry(name=name)) for name in labels.names))


def tag_sentences(texts: TagTexts) -> list[dict[str, Any]]:
    """Return a post of text for each sentence that zero-shot tagging makes of a tag's texts."""
    groups = (group for tag in texts.tags for group in texts.sentences(tag))
    each = dict.fromkeys(sentence for group in groups for sentence in group)
    none: dict[str, Any] = {"labels": [], "images": [], "videos": [], "audios": []}
    digests = {text: hashlib.sha256(text.encode()).hexdigest()[:16] for text in each}
    return [{"post_id": digests[text], "text": text, **none} for text in each]


def read_header_of(base: Path, post_id: str, read_header: Any) -> Any:
    from extractors.feature_file import feature_path

    return read_header(feature_path(base, post_id))


def command(name: str, configs: Mapping[str, Any], folder: Path, *more: str | Path) -> None:
    """Run ``train_net.py`` or ``infer_net.py`` in this process; a mistake ends the benchmark."""
    import importlib

    words: list[str] = []
    for option, content in configs.items():
        file = folder / f"{option}-{name}.yaml"
        file.write_text(json.dumps(content), encoding="utf-8")
        words += [f"--{option}", str(file)]
    code = importlib.import_module(name).main([*words, *map(str, more)])
    if code:
        raise SystemExit(code)


def score(job: Job) -> dict[str, npt.NDArray[Any]]:
    """Train one model, tag with it, and return scores and truth of the posts that were tagged."""
    import os

    run = job.folder / f"run-{job.seed}-{os.getpid()}"
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir()
    own = {
        "data": {
            "train": str(job.folder / "train.json"),
            "valid": None,
            "labels": str(job.folder / "labels.json"),
            "modalities": ["image", "text"],
        },
        "trainer": {
            "n_gpu": 0,
            "precision": "fp32",
            "threads": 1,
            "fix_random_seed": True,
            "seed": job.seed,
            "save_dir": str(run / "train"),
            "tensorboard": False,
            "progress": False,
        },
        "bundle": {"out": str(run / "bundle")},
        "report": {"enabled": False},
    }
    infer = {"progress": False, "output": str(run / "tags.jsonl")}
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        start = {"model": {"linear_probe": {"start": str(job.folder / "texts")}}}
        command("train_net", {"model_config": merge(merge(start, job.training), own)}, run)
        tagged = ("--input", job.folder / "test.json", "--best_model", run / "bundle")
        command("infer_net", {"infer_config": infer}, run, *tagged, "--n_gpus", "0")
    lines = [json.loads(line) for line in (run / "tags.jsonl").read_text("utf-8").splitlines()]
    labels = LabelMap.load(job.folder / "labels.json")
    shutil.rmtree(run)
    return {
        "scores": np.array([line["scores"] for line in lines]),
        "truth": truth_of(lines, labels),
    }


def truth_of(entries: Entries, labels: LabelMap) -> Floats:
    truth = np.zeros((len(entries), len(labels)), np.float32)
    for row, entry in zip(truth, entries, strict=True):
        row[labels.encode(entry["labels"])] = 1
    return truth


@contextlib.contextmanager
def side_by_side(processes: int) -> Iterator[Callable[..., Iterator[Any]]]:
    """Yield a ``map`` that works in that many processes; with one, in this one."""
    if processes == 1:
        yield map
        return
    context = multiprocessing.get_context("spawn")  # forked threads of torch may hang
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        yield pool.map


def run_all(jobs: Sequence[Job], processes: int) -> list[dict[str, float]]:
    """Return the figures of every job, in their order."""
    results = []
    with progress_bar("fusion", len(jobs)) as bar, side_by_side(processes) as each:
        for result in each(score, jobs):
            results.append(figures(result["scores"], result["truth"]))
            bar.update(len(results), f"gap {results[-1]['gap']:.4f}")
            notice(f"  {jobs[len(results) - 1].folder.name} {results[-1]}")
    return results


def figures(scores: npt.NDArray[Any], truth: npt.NDArray[Any]) -> dict[str, float]:
    from fusion.metrics.ranking import global_average_precision, mean_average_precision

    gap, mean_ap = global_average_precision(scores, truth), mean_average_precision(scores, truth)
    return {"gap": round(gap, 6), "map": round(mean_ap, 6)}


def linear_models(
    folders: Sequence[Path], processes: int
) -> dict[str, list[list[dict[str, float]]]]:
    """Return the figures of linear models for every fold, as those of one seed."""
    folds = []
    with progress_bar("linear models", len(folders)) as bar, side_by_side(processes) as each:
        for models in each(linear_models_of, folders):
            folds.append(models)
            bar.advance()
            notice(f"  {folders[len(folds) - 1].name} {models}")
    return {name: [[models[name] for models in folds]] for name in folds[0]}


def linear_models_of(folder: Path) -> dict[str, dict[str, float]]:
    """Return the figures of each linear model for one fold."""
    inputs = {
        "scikit-learn: Lite0 + MiniLM": ("image", "sentence"),
        "scikit-learn: TF-IDF": ("tfidf",),
        "scikit-learn: all": ("image", "sentence", "tfidf"),
    }
    labels, figures_of = LabelMap.load(folder / "labels.json"), {}
    learned, test = (read_side(folder, side, labels) for side in ("train", "test"))
    for name, parts in inputs.items():
        rows, tested = (np.hstack([side[part] for part in parts]) for side in (learned, test))
        figures_of[name] = figures(probe(rows, learned["truth"], tested), test["truth"])
    return figures_of


def probe(learned: Floats, truth: Floats, test: Floats) -> npt.NDArray[np.float64]:
    """Return probabilities of scikit-learn's logistic regression, one tag against the rest."""
    from scipy.sparse import csr_matrix
    from sklearn.linear_model import LogisticRegression

    sparse = np.count_nonzero(learned) < learned.size / 4
    rows, tested = (csr_matrix(each) if sparse else each for each in (learned, test))
    scores = np.zeros((len(test), truth.shape[1]))
    for tag, of_tag in enumerate(truth.T):
        if of_tag.any() and not of_tag.all():
            model = LogisticRegression(C=10, max_iter=200).fit(rows, of_tag)
            scores[:, tag] = model.predict_proba(tested)[:, 1]
    return scores


def read_side(folder: Path, side: str, labels: LabelMap) -> dict[str, Floats]:
    """Return unit vectors of each part, zeros where a post has none, and the truth."""
    from extractors.feature_file import read_features
    from extractors.models.base import unit

    entries = json.loads((folder / f"{side}.json").read_text(encoding="utf-8"))
    posts = [read_features(folder / "features", e["post_id"], None).arrays for e in entries]
    widths = {s: next(p[s].shape[1] for p in posts if s in p) for s in ("image", "text")}
    image, text = (
        np.stack([p[s][0] if s in p and len(p[s]) else np.zeros(widths[s]) for p in posts])
        for s in ("image", "text")
    )
    sentence = widths["text"] - grams_of(folder)
    parts = {"image": image, "sentence": text[:, :sentence], "tfidf": text[:, sentence:]}
    rows = {name: unit(part.astype(np.float32)) for name, part in parts.items()}
    return {**rows, "truth": truth_of(entries, labels)}


def grams_of(folder: Path) -> int:
    from extractors.models.tfidf import Tfidf

    return len(Tfidf.load(folder / "text" / "weights" / "tfidf.safetensors", "text").idf)


def summary(
    split: SplitName, name: str, seeds: Sequence[Sequence[Mapping[str, float]]]
) -> dict[str, Any]:
    """Return one row: means over folds and seeds, the deviation over seeds, and every fold."""
    row: dict[str, Any] = {"split": split, "model": name}
    for key in ("gap", "map"):
        means = [statistics.fmean(fold[key] for fold in folds) for folds in seeds]
        row[key] = round(statistics.fmean(means), 4)
        row[f"{key}_sd"] = round(statistics.stdev(means), 4) if len(means) > 1 else None
        row[f"{key}_folds"] = [[fold[key] for fold in folds] for folds in seeds]
    return row


def show(results: Sequence[Mapping[str, Any]]) -> None:
    """Print the table in Markdown."""
    print("| split | model | GAP@20 | mAP |\n| --- | --- | ---: | ---: |")
    for row in results:
        print(f"| {row['split']} | {row['model']} | {row['gap']:.3f} | {row['map']:.3f} |")


if __name__ == "__main__":
    sys.exit(main())
