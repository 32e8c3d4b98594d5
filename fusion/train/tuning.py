"""A search for the values of a training's keys, by Optuna: trials that may end early, and go on.

Every trial is a whole training with the same seed, in one process. What counts is the GAP of the
validation posts, or with ``ensemble.folds`` of the posts that the folds left out. ``trials.log`` in
the search's folder is all that a search needs to go on after it was killed.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import yaml

from common.errors import ConfigError, replaced
from common.files import lock_file, write_whole
from common.progress import progress_bar
from config.load import nested, validate
from config.presets import merge
from config.train import TrainSettings

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial, Trial

Value: TypeAlias = float | int | str | bool | None

# Trials that a search begins with before it learns from them and ends bad ones: Optuna's own
# numbers are 10 and 5. With half, the first draws decide; at double, a search of 30 is a draw.
_UNLEARNED, _UNPRUNED = 8, 5
_LOG_FROM = 10.0
"""Ratio of the ends of a range from which it is searched by its logarithm."""


@dataclass(frozen=True)
class Range:
    """The values of one key: choices, or all numbers from ``low`` to ``high``."""

    key: str
    choices: tuple[Value, ...] = ()
    low: float = 0.0
    high: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Range:
        """Read ``KEY=LOW..HIGH`` or ``KEY=A|B|C``."""
        key, separator, values = text.partition("=")
        mistake = ConfigError(f"--search {text}: write it as KEY=LOW..HIGH or KEY=A|B|C")
        if not separator or not key.strip() or not values:
            raise mistake
        if ".." not in values:
            try:
                parsed = tuple(yaml.safe_load(each) for each in values.split("|"))
            except yaml.YAMLError as error:
                raise mistake from error
            if any(isinstance(each, (list, dict)) for each in parsed):
                raise mistake
            return cls(key.strip(), choices=parsed)
        try:
            low, high = (float(end) for end in values.split(".."))
        except ValueError as error:
            raise mistake from error
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ConfigError(f"--search {text}: the first number must be the lower one")
        return cls(key.strip(), low=low, high=high)

    @property
    def logarithmic(self) -> bool:
        """Return True where the numbers are of several sizes."""
        return self.low > 0 and self.high / self.low >= _LOG_FROM

    def ends(self) -> tuple[Value, ...]:
        """Return values that stand for all: if the settings take these, they take all."""
        return self.choices or (self.low, self.high)

    def suggest(self, trial: Trial) -> Value:
        if self.choices:
            return trial.suggest_categorical(self.key, self.choices)
        return trial.suggest_float(self.key, self.low, self.high, log=self.logarithmic)

    def value(self, suggested: Any) -> Value:
        """Return what a trial is trained with: numbers have three digits, as people write them."""
        return suggested if self.choices else float(f"{suggested:.3g}")


DEFAULT_SEARCH = (
    "optimizer.learning_rate=1e-4..1e-2",
    "optimizer.weight_decay=1e-3..0.3",
    "optimizer.ema_decay=0.0|0.99|0.999",
)


@dataclass(frozen=True)
class Outcome:
    """The outcome of a search.

    Attributes:
        file: The config with the best values: ``train_net.py --model_config`` takes it.
        rows: Of every trial that ended: number, state, GAP of the last validation, values.
    """

    file: Path
    gap: float
    values: Mapping[str, Value]
    rows: Sequence[tuple[int, str, float | None, Mapping[str, Value]]]


class Search:
    """The search in one folder; `run` does the trials that are still to do."""

    def __init__(self, config: Mapping[str, Any], ranges: Sequence[Range], folder: Path) -> None:
        """Check the settings; ``config`` is the file of a training with ``--set`` merged in."""
        self._config, self._ranges, self._folder = config, ranges, folder
        if len({r.key for r in ranges}) != len(ranges):
            raise ConfigError("--search: a key is named twice")
        self._base = settings = validate(TrainSettings, config, "--model_config")
        for one in ranges:
            for value in one.ends():
                validate(
                    TrainSettings, merge(config, nested({one.key: value}, "--search")), "--search"
                )
        if settings.trainer.processes > 1 or (settings.trainer.n_gpu or 0) > 1:
            raise ConfigError("trainer.processes, trainer.n_gpu: a trial trains in one process")
        if settings.data.valid is None and not settings.ensemble.folds:
            raise ConfigError(
                "data.valid: without validation posts trials cannot be compared; name some"
            )

    def run(self, trials: int) -> Outcome:
        """Do trials until there are that many, write ``best.yaml``, return the outcome."""
        with replaced(
            ConfigError("the search needs Optuna, which is not installed: pip install '.[tune]'"),
            ImportError,
        ):
            import optuna
            from optuna.storages import JournalStorage
            from optuna.storages.journal import JournalFileBackend
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with replaced(ConfigError(f"--out: another search runs in {self._folder}"), TimeoutError):
            lock = lock_file(self._folder / "lock")
        with lock:
            file = self._folder / "trials.log"
            study = optuna.create_study(
                storage=JournalStorage(JournalFileBackend(str(file))),
                study_name="tune",
                direction="maximize",
                load_if_exists=True,
                pruner=optuna.pruners.MedianPruner(
                    n_startup_trials=_UNPRUNED, n_warmup_steps=self._base.trainer.epochs // 4
                ),
            )
            self._check_same(study)
            # Another seed when a search goes on: the same would draw the first trials again.
            study.sampler = optuna.samplers.TPESampler(
                n_startup_trials=_UNLEARNED, seed=len(study.trials)
            )
            self._go_on(study, trials)
            return self._outcome(study)

    def _check_same(self, study: Study) -> None:
        """Refuse a folder that holds a search over something else."""
        config = json.dumps([self._config, [repr(r) for r in self._ranges]], default=str)
        if study.user_attrs.get("search", config) != config:
            raise ConfigError(
                f"{self._folder}: holds a search with other settings or other keys: name another "
                "--out"
            )
        study.set_user_attr("search", config)

    def _go_on(self, study: Study, trials: int) -> None:
        from optuna.trial import TrialState

        for trial in study.trials:
            if trial.state == TrialState.RUNNING:  # of a search that was killed
                study.tell(trial.number, state=TrialState.FAIL)
        ended = (TrialState.COMPLETE, TrialState.PRUNED)
        done = len(study.get_trials(states=ended))
        with progress_bar("tune", trials) as bar:
            bar.update(done, _note(study))
            for number in range(done, trials):
                study.optimize(self._train, n_trials=1)
                bar.update(number + 1, _note(study))

    def _train(self, trial: Trial) -> float:
        """Train once; return the GAP."""
        import optuna

        from fusion.data.dataset import FeatureFiles
        from fusion.train.trainer import Diverged
        from fusion.train.training import train

        folder = self._folder / f"trial-{trial.number}"
        values = {one.key: one.value(one.suggest(trial)) for one in self._ranges}
        own = {
            # One seed: trials differ by their values, not by their luck.
            "trainer": {
                "save_dir": folder,
                "fix_random_seed": True,
                "progress": False,
                "tensorboard": False,
            },
            "bundle": {"out": folder / "bundle"},
            "report": {"enabled": False},
        }
        settings = validate(
            TrainSettings,
            merge(self._config, nested(values, "--search"), own),
            f"trial {trial.number}",
        )
        try:
            report = train(settings, FeatureFiles(), on_validation=partial(_watch, trial))
        except Diverged as error:
            raise optuna.TrialPruned(str(error)) from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        if report.seen_posts or "gap" not in report.metrics:
            raise ConfigError(
                "data.valid: there is no validation post that no part was trained on: their GAP "
                "says nothing about new posts"
            )
        return report.metrics["gap"]

    def _outcome(self, study: Study) -> Outcome:
        from optuna.trial import TrialState

        complete = study.get_trials(states=(TrialState.COMPLETE,))
        if not complete:
            raise ConfigError(
                "--search: no trial gave a finite loss; try lower values, for example of "
                "optimizer.learning_rate"
            )
        best = max(complete, key=lambda trial: trial.value or 0.0)
        values = self._values(best)
        file = self._folder / "best.yaml"
        content = json.loads(
            json.dumps(merge(self._config, nested(values, "--search")), default=str)
        )
        about = f"# The best of {len(complete)} whole trials: GAP {best.value:.4f}\n"
        write_whole(file, about + yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
        rows = [
            (t.number, t.state.name.lower(), _last(t), self._values(t))
            for t in study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED))
        ]
        return Outcome(file, best.value or 0.0, values, rows)

    def _values(self, trial: FrozenTrial) -> dict[str, Value]:
        return {
            one.key: one.value(trial.params[one.key])
            for one in self._ranges
            if one.key in trial.params
        }


def _watch(trial: Trial, epoch: int, gap: float) -> None:
    """Tell Optuna how a trial goes; end it where it is behind the others."""
    import optuna

    trial.report(gap, epoch)
    if trial.should_prune():
        raise optuna.TrialPruned


def _last(trial: FrozenTrial) -> float | None:
    if trial.value is not None:
        return trial.value
    steps = trial.intermediate_values
    return steps[max(steps)] if steps else None


def _note(study: Study) -> str:
    values = [trial.value for trial in study.trials if trial.value is not None]
    return f"best gap {max(values):.4f}" if values else ""
