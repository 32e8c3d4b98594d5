"""Tags by their texts on openclipart: without training, and ten tags that are added by text.

Posts are those of ``make_openclipart_posts.py`` with features of the preset ``small`` by the
extracting scripts: ``python bench/zeroshot.py --posts DIR --features DIR``. Pictures are of
EfficientNet-Lite0, which embeds no texts: only the training uses them. An author's posts stand on
one side. Writes ``bench/results/zeroshot.json``.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs as a plain script too

from results_file import write_results

from common.logs import configure_logs
from config.labels import LabelMap
from config.train import TrainSettings
from extractors.feature_file import feature_path
from fusion.data.dataset import FeatureFiles
from fusion.data.posts import PostList
from fusion.infer.inferer import Inferer
from fusion.metrics.ranking import GapMeter, average_precisions
from fusion.train.training import train
from scripts import cli

HIDDEN, FOLDS, SEED = 10, 4, 0
FEW = 10  # posts of a hidden tag on the side that is measured
ENCODERS = ("--set", "features.preset=small", "--set", "features.ocr.enabled=false")

Scores = npt.NDArray[np.float64]


class Bench:
    """The posts, and a folder for bundles and data files."""

    def __init__(self, posts: Path, features: Path, work: Path) -> None:
        self.work, self.reader = work, FeatureFiles(features)
        self.labels = LabelMap.load(posts / "idx2name.json")
        self.entries: list[dict[str, Any]] = json.loads((posts / "posts.json").read_text("utf-8"))
        for entry in self.entries:
            entry["features"] = str(feature_path(features, entry["post_id"]))

    def data(self, name: str, rows: Sequence[int], names: Sequence[str]) -> Path:
        """Write some posts, with the labels of these names only."""
        chosen = [self.entries[row] for row in rows]
        entries = [{**e, "labels": [x for x in e["labels"] if x in names]} for e in chosen]
        path = self.work / f"{name}.json"
        path.write_text(json.dumps(entries), encoding="utf-8")
        return path

    def command(self, *arguments: str, tags: Sequence[str], **more: Any) -> Path:
        """Run a command that makes a bundle of texts; give its folder."""
        out = self.work / f"bundle{len(list(self.work.iterdir()))}"
        file = self.work / "tags.yaml"
        file.write_text(yaml.safe_dump({"tags": list(tags), **more}), encoding="utf-8")
        words = [*arguments, "--tags", str(file), "--out", str(out), *ENCODERS]
        if cli.run(words):
            raise SystemExit(f"insighttag {' '.join(words)} failed")
        return out

    def scores(self, bundle: Path, rows: Sequence[int]) -> tuple[Scores, npt.NDArray[np.bool_]]:
        """Return scores and truth ``(posts, tags)``, in the order of the label map."""
        inferer = Inferer.load(bundle)
        order = inferer.labels.encode(self.labels.names)
        posts = PostList.read(self.data("scored", rows, self.labels.names), self.labels)
        read = [self.reader.features(p.post_id, p.features, inferer.fingerprints) for p in posts]
        return inferer.scores(read)[:, order], posts.targets() > 0

    def without_training(self) -> dict[str, Any]:
        """Measure on all posts; their labels are shown to none of these bundles."""
        rows, names = range(len(self.entries)), self.labels.names
        pool = ("--labels", str(self.data("pool", rows, ())))
        made = {
            "names alone": self.command("zeroshot", tags=names, templates=["{}"]),
            "templates": self.command("zeroshot", tags=names),
            "templates, and posts without labels": self.command("zeroshot", *pool, tags=names),
        }
        return {name: figures(*self.scores(bundle, rows)) for name, bundle in made.items()}

    def sides(self) -> list[list[int]]:
        """Deal the authors out to folds, the busiest first."""
        by_author: dict[str, list[int]] = {}
        for row, entry in enumerate(self.entries):
            by_author.setdefault(entry["author"] or entry["post_id"], []).append(row)
        folds: list[list[int]] = [[] for _ in range(FOLDS)]
        for rows in sorted(by_author.values(), key=len, reverse=True):
            min(folds, key=len).extend(rows)
        return folds

    def trained(self, name: str, rows: Sequence[int], tags: Sequence[str], start: Path) -> Path:
        labels = self.work / "labels.json"
        labels.write_text(json.dumps(LabelMap(tuple(tags)).as_json()), encoding="utf-8")
        settings = TrainSettings.model_validate(
            {
                "data": {
                    "train": self.data(name, rows, tags),
                    "valid": None,
                    "labels": labels,
                    "modalities": ["image", "text"],
                },
                "model": {
                    "name": "tag_text",
                    "tag_text": {"start": start, "projected": {"image": "text"}},
                },
                "optimizer": {"learning_rate": 2e-3},
                "trainer": {
                    "epochs": 15,
                    "save_dir": self.work / name,
                    "progress": False,
                    "fix_random_seed": True,
                },
                "bundle": {"out": self.work / f"{name}-bundle"},
                "report": {"enabled": False},
            }
        )
        return train(settings, self.reader).bundle

    def added(self) -> dict[str, Any]:
        """Hide tags from a training, add them by text, and compare with a training on all."""
        measured, *others = self.sides()
        rows = [row for fold in others for row in fold]
        names = self.labels.names
        truth = np.array([[n in self.entries[r]["labels"] for n in names] for r in measured])
        often = np.flatnonzero(truth.sum(axis=0) >= FEW)
        hidden = np.sort(np.random.default_rng(SEED).choice(often, HIDDEN, replace=False))
        seen = [name for i, name in enumerate(names) if i not in hidden]
        start = self.command("zeroshot", "--labels", str(self.data("s", rows, ())), tags=names)
        whole = self.trained("whole", rows, names, start)
        part = self.trained("part", rows, seen, start)
        grown = self.command("bundle", "add-tags", str(part), tags=[names[i] for i in hidden])
        result: dict[str, Any] = {"hidden": [names[i] for i in hidden], "posts": len(measured)}
        for key, bundle in {"zero-shot": start, "trained on all": whole, "added": grown}.items():
            result[key] = figures(*self.scores(bundle, measured), hidden)
        result["ratio"] = round(
            result["added"]["map_hidden"] / result["trained on all"]["map_hidden"], 4
        )
        return result


def figures(
    scores: Scores, truth: npt.NDArray[np.bool_], hidden: npt.NDArray[np.int64] | None = None
) -> Mapping[str, float]:
    """Return GAP@20 and mAP; of the hidden tags their mAP, too."""
    meter, precisions = GapMeter(), average_precisions(scores, truth)
    meter.add(scores, truth)
    result = {"gap": round(meter.value(), 4), "map": round(float(np.nanmean(precisions)), 4)}
    if hidden is not None:
        result["map_hidden"] = round(float(np.nanmean(precisions[hidden])), 4)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--posts", type=Path, required=True)
    parser.add_argument("--features", type=Path, required=True)
    options = parser.parse_args()
    configure_logs("pretty", "error")
    with tempfile.TemporaryDirectory() as work:
        bench = Bench(options.posts, options.features, Path(work))
        results = {"without training": bench.without_training(), "added by text": bench.added()}
    print(json.dumps(results, indent=1))
    print(f"written to {write_results('zeroshot', 1, results)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
