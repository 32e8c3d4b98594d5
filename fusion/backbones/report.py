"""The report of a backbone's training: like that of fusion, for the validation posts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np

from config.train import BackboneTrainSettings, TrainerSettings
from fusion.backbones.media import MediaDataset
from fusion.data.data_file import entries
from fusion.report.predictions import Predictions
from fusion.report.view import PostView, view_post
from fusion.report.write import ReportInput, write_report
from fusion.train.run_log import RunLog, read_run
from fusion.train.trainer import Scored, TrainData

# Name of a stage -> the key that names its weights, and the script that uses them.
_USED: dict[str, tuple[str, str]] = {
    "image": ("image.weights", "image"),
    "tsn": ("video.weights", "video"),
    "lstm": ("video.lstm.weights", "video"),
    "audio": ("audio.weights", "audio"),
    "text": ("text.weights", "text"),
}


@dataclass(frozen=True)
class BackboneReport:
    """The values that the stages of a run share; ``again`` is the command in words."""

    settings: BackboneTrainSettings
    names: tuple[str, ...]
    run: Path
    again: Sequence[str]

    def write(
        self,
        name: str,
        data: TrainData,
        scored: Scored | None,
        *,
        log: RunLog,
        trainer: TrainerSettings,
        facts: Mapping[str, Any],
    ) -> Path | None:
        """Write the folder ``report`` of a stage next to its checkpoints; return the page.

        ``scored`` are logits and targets of the validation posts.
        """
        settings = self.settings
        if not settings.report.enabled:
            return None
        predictions, subtitle = None, "There are no validation posts: nothing was measured."
        if scored is not None:
            logits, targets = (np.asarray(each, np.float64) for each in scored)
            scores = 1 / (1 + np.exp(-logits))
            half = np.full(len(self.names), 0.5, np.float32)
            ids = cast("MediaDataset", data.valid).post_ids
            predictions = Predictions(ids, self.names, scores, scores, targets > 0.5, half)
            what = "training" if data.seen else "validation"
            subtitle = f"Measured on {len(ids):,} {what} posts, at thresholds of 0.5."
        key, kind = _USED[name]
        weights = str(facts["weights"])
        content = ReportInput(
            title=f"the {name} backbone",
            subtitle=subtitle,
            facts={
                "task": settings.task,
                "architecture": settings.backbone.arch,
                "trained on": len(cast("MediaDataset", data.train)),
                "tags": len(self.names),
                "batch size": trainer.batch_size,
                "key of the weights": f"features.{key}",
                **facts,
            },
            predictions=predictions,
            run=self.run,
            again=self.again,
            use=f"python scripts/extract_{kind}_features.py --config SETTINGS.yaml "
            f"--set features.{key}={weights} --input POSTS.jsonl --features FEATURES",
            runs=[read_run(log.path)],
            frequencies=cast("MediaDataset", data.train).targets.mean(axis=0),
            seen_posts=0 if predictions is None or not data.seen else len(predictions.post_ids),
            view=partial(self._views, predictions, trainer.save_dir / "report"),
        )
        return write_report(trainer.save_dir / "report", content, settings.report)

    def _views(
        self, predictions: Predictions | None, folder: Path, rows: Sequence[int]
    ) -> Mapping[int, PostView]:
        """Return views of some posts, from the validation file."""
        file, report = self.settings.data.valid, self.settings.report
        if predictions is None or file is None:
            return {}
        rows_of = {predictions.post_ids[row]: row for row in rows}
        views: dict[int, PostView] = {}
        for entry in entries(file):
            value = entry.value if isinstance(entry.value, dict) else {}
            row = rows_of.get(str(value.get("post_id")))
            if row is not None:
                views[row] = view_post(
                    predictions.post_ids[row],
                    value,
                    data_file=file,
                    report=folder,
                    post_url=report.post_url,
                    thumbnails=report.thumbnails,
                )
        return views
