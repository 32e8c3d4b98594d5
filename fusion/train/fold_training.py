"""k-fold training: k models, each scored on the posts that it has not learned from."""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from lightning_fabric import Fabric

from common.errors import ConfigError
from common.files import write_whole
from common.progress import notice
from config.train import TrainSettings
from fusion.data.folds import stratified_folds
from fusion.data.pool import PostPool
from fusion.models import FusionModel
from fusion.train import distributed as processes
from fusion.train.measure import Held, score_held
from fusion.train.members import Trained, joined, model_of, seed_of, train_one
from fusion.train.prepare import Prepared
from fusion.train.resume import BEST, LAST, find_start
from fusion.train.run_log import RunLog

FOLDS, DONE, SCORES = "folds.json", "done.json", "scores.npy"


def pool_of(settings: TrainSettings, prepared: Prepared) -> PostPool:
    """The posts that the folds share out.

    Raises:
        ConfigError: They are too few, or one stands in both data files.
    """
    pooled = [prepared.posts]
    if settings.ensemble.pool_valid and prepared.valid is not None:
        pooled.append(prepared.valid)
    pool, count = PostPool(pooled), settings.ensemble.folds
    if len(pool) < 2 * count:
        raise ConfigError(f"ensemble.folds: {len(pool)} posts are too few for {count}")
    pool.refuse_repeats()
    return pool


class FoldTraining:
    """k trainings in ``fold-1`` and so on; those that are done are not done again."""

    def __init__(
        self,
        fabric: Fabric,
        settings: TrainSettings,
        prepared: Prepared,
        mark: str,
        pool: PostPool,
    ) -> None:
        self._fabric, self._settings, self._prepared = fabric, settings, prepared
        self._mark, self._pool = mark, pool
        self._folder = settings.trainer.save_dir
        self._log = RunLog(self._folder / "log" / "train.jsonl", enabled=fabric.is_global_zero)

    def train(self, resume: Path | None) -> Trained:
        """Train every fold and score what it has not seen.

        Args:
            resume: The folder of the run to go on with, which must be this one's.

        Raises:
            ConfigError: The run there was another one, a file cannot be written, or what
                `fusion.train.members.train_alone` raises.
            FeatureError: Features cannot be read.
        """
        settings, count = self._settings, self._settings.ensemble.folds
        seed = processes.agree(self._fabric, partial(self._begin, resume))
        ends, labels = self._pool.label_rows()
        parts = stratified_folds(ends, labels, len(self._prepared.labels), count, seed)
        done = [self._fold(i, parts == i, seed, resume is not None) for i in range(count)]
        models = [model for some, _, _ in done for model in some]
        model = joined(models, settings)
        held = tuple(part for _, part, _ in done)
        valid = self._prepared.valid
        if valid is not None and not settings.ensemble.pool_valid:
            held = (score_held(self._fabric, settings, self._prepared, model, valid),)
        facts = [fact for _, _, fact in done]
        return Trained(
            model=model,
            held=held,
            best_epoch=int(facts[0]["best_epoch"]),
            epochs=int(facts[0]["epochs"]),
            logs=tuple(self._path(i) / "log" / "train.jsonl" for i in range(count)),
            data_wait=float(np.mean([fact["data_wait"] for fact in facts])),
            log=self._log,
        )

    def _path(self, fold: int) -> Path:
        return self._folder / f"fold-{fold + 1}"

    def _begin(self, resume: Path | None) -> int:
        """Write down which run this is, or see that it is the one to go on with; its seed."""
        wanted = {"run": self._digest(), "folds": self._settings.ensemble.folds}
        path = self._folder / FOLDS
        if resume is not None:
            if not (resume / FOLDS).exists() or resume.resolve() != self._folder.resolve():
                raise ConfigError(
                    f"{resume}: with ensemble.folds, --resume takes the folder of a k-fold run, "
                    "which must be trainer.save_dir too; other weights may have seen the posts "
                    "that are left out"
                )
            found = _read_json(path)
            if {key: found.get(key) for key in wanted} != wanted:
                raise ConfigError(
                    f"{path}: that run had other posts, folds or settings; start without --resume"
                )
            return int(found["seed"])
        seed = int(self._fabric.broadcast(seed_of(self._settings, None)))
        if self._fabric.is_global_zero:
            _write(path, json.dumps({**wanted, "seed": seed}).encode())
        self._fabric.barrier()
        return seed

    def _digest(self) -> str:
        """Of all that makes the models what they are."""
        settings = self._settings.model_dump(mode="json")
        options = {key: settings[key] for key in ("model", "loss", "optimizer", "ensemble")}
        trainer = {key: settings["trainer"][key] for key in ("epochs", "batch_size", "patience")}
        text = json.dumps([self._mark, options, trainer, self._pool.digest()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def _fold(
        self, fold: int, left_out: Any, seed: int, resumed: bool
    ) -> tuple[tuple[FusionModel, ...], Held, dict[str, Any]]:
        """Models, the scores of the posts that were left out, and what is known of the training."""
        folder, fabric = self._path(fold), self._fabric
        trainer = self._settings.trainer.model_copy(update={"save_dir": folder})
        settings = self._settings.model_copy(update={"trainer": trainer})
        rest, out = (self._pool.take(np.flatnonzero(rows)) for rows in (~left_out, left_out))
        count = settings.ensemble.folds
        # Every process looks before one of them may write.
        done = resumed and (folder / DONE).exists()
        fabric.barrier()
        if done:
            notice(f"fold {fold + 1} of {count}: there already", enabled=self._speaks)
            models = self._trained(folder, settings)
            raw = np.load(folder / SCORES, allow_pickle=False)
            return models, Held(joined(models, settings), out, raw), _read_json(folder / DONE)
        notice(f"fold {fold + 1} of {count}", enabled=self._speaks)
        start = None
        if resumed and (folder / "ckpt" / LAST).exists():
            start = processes.agree(fabric, partial(find_start, folder, self._mark))
        prepared = self._prepared if fold == 0 else replace(self._prepared, notes=())
        one = train_one(
            fabric, settings, prepared, (rest, out), mark=self._mark, seed=seed + fold, start=start
        )
        held = score_held(fabric, settings, prepared, one.served(settings), out)
        facts = {
            "best_epoch": one.progress.best_epoch,
            "epochs": one.progress.epoch,
            "data_wait": one.wait.share,
        }
        self._log.write("fold", fold=fold + 1, learned=len(rest), left_out=len(out), **facts)
        if fabric.is_global_zero:
            _write(folder / SCORES, _as_npy(held.raw))
            _write(folder / DONE, json.dumps(facts).encode())
        one.log.close()
        return one.models, held, facts

    def _trained(self, folder: Path, settings: TrainSettings) -> tuple[FusionModel, ...]:
        count = settings.ensemble.snapshots
        files = [BEST] if count == 1 else [f"snapshot-{i}.pt" for i in range(1, count + 1)]
        load = partial(
            model_of,
            settings=settings,
            prepared=self._prepared,
            mark=self._mark,
            device=self._fabric.device,
        )
        return tuple(load(folder / "ckpt" / file) for file in files)

    @property
    def _speaks(self) -> bool:
        return self._settings.trainer.progress and self._fabric.is_global_zero


def _write(path: Path, content: bytes) -> None:
    try:
        write_whole(path, content)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must hold keys and values")
    return content


def _as_npy(values: npt.NDArray[np.float32]) -> bytes:
    held = io.BytesIO()
    np.save(held, values, allow_pickle=False)
    return held.getvalue()
