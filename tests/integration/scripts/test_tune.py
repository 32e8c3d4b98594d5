"""``insighttag tune``: trials, the best values as a config, going on, mistakes in one line."""

from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

import train_net
from config.load import read_yaml
from fusion.train.tuning import Range
from scripts.cli import run
from tests.support.fusion import runs

RATES = ("--search", "optimizer.learning_rate=1e-3..1e-1")


def asked(folder: Path, trials: int, *more: str, **sections: Any) -> list[str]:
    config = str(runs.config_file(folder, trainer={"epochs": 2}, **sections))
    out = str(folder / "tune")
    return ["tune", "--model_config", config, "--out", out, "--trials", str(trials), *more]


def journal(folder: Path) -> optuna.Study:
    storage = JournalStorage(JournalFileBackend(str(folder / "tune" / "trials.log")))
    return optuna.load_study(study_name="tune", storage=storage)


def test_the_best_values_are_a_config_and_a_killed_search_goes_on(
    few_posts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trials that ended are not done again, one that was killed is; nothing else stays behind."""
    more = (*RATES, "--search", "loss.name=bce|two_way", "--set", "bundle.min_positives=3")
    assert run(asked(few_posts, 2, *more)) == 0
    journal(few_posts).ask()
    assert run(asked(few_posts, 4, *more)) == 0
    trials = journal(few_posts).trials
    ended = [trial for trial in trials if trial.state.is_finished() and trial.value is not None]
    failed = [trial.number for trial in trials if trial.state == optuna.trial.TrialState.FAIL]
    assert (len(ended), failed) == (4, [2])
    assert len({trial.params["optimizer.learning_rate"] for trial in ended}) == 4
    names = {path.name for path in (few_posts / "tune").iterdir()}
    assert names <= {"best.yaml", "trials.log", "lock"}

    best = max(ended, key=lambda trial: trial.value or 0)
    config = read_yaml(few_posts / "tune" / "best.yaml")
    assert config["loss"]["name"] == best.params["loss.name"]
    rate = best.params["optimizer.learning_rate"]
    assert config["optimizer"]["learning_rate"] == pytest.approx(rate, rel=0.005)
    assert config["bundle"]["min_positives"] == 3
    said = capsys.readouterr().out
    assert f"train_net.py --model_config {few_posts / 'tune' / 'best.yaml'}" in said
    file = str(few_posts / "tune" / "best.yaml")
    assert train_net.main(["--model_config", file, "--fix_random_seed"]) == 0
    assert f"gap {best.value:.4f}" in capsys.readouterr().out


def test_a_diverging_trial_ends_alone(few_posts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A learning rate without a finite loss is one bad trial, and no end of the search."""
    hopeless = ("--search", "optimizer.learning_rate=1e30|2e30")
    assert run(asked(few_posts, 3, *hopeless)) == 2
    assert "no trial gave a finite loss" in capsys.readouterr().err
    assert {trial.state for trial in journal(few_posts).trials} == {optuna.trial.TrialState.PRUNED}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--search", "optimizer.learning_rat=1..2"), "did you mean 'learning_rate'"),
        (("--search", "optimizer.learning_rate=1e-2..1e-3"), "the lower one"),
        (("--search", "optimizer.learning_rate"), "write it as KEY=LOW..HIGH or KEY=A|B|C"),
        (("--search", "optimizer.learning_rate=0..1"), "greater than 0"),
        (("--search", "trainer.epochs=1|2", "--search", "trainer.epochs=3|4"), "named twice"),
        (("--set", "data.valid=null"), "data.valid: without validation posts"),
        (("--set", "trainer.processes=2"), "a trial trains in one process"),
        (("--set", "task=image_backbone"), "only trainings of fusion models"),
    ],
)
def test_mistakes_are_one_line(
    more: tuple[str, ...], message: str, few_posts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(asked(few_posts, 1, *more)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (few_posts / "tune").exists()


def test_a_folder_holds_one_search(few_posts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A search over other keys would not go on from these trials."""
    assert run(asked(few_posts, 1, *RATES)) == 0
    assert run(asked(few_posts, 2, *RATES, "--search", "loss.mixup=0.0|0.2")) == 2
    assert "holds a search with other settings or other keys" in capsys.readouterr().err


def test_ranges_of_several_sizes_are_searched_by_their_logarithm() -> None:
    """A range says by its ends what it is; numbers of a trial have three digits."""
    assert Range.parse("a.b=1e-4..1e-2").logarithmic
    assert not Range.parse("a.b=0.1..0.5").logarithmic
    assert not Range.parse("a.b=0..0.5").logarithmic
    assert Range.parse("a.b=1e-4..1e-2").value(0.00123456) == 0.00123
    assert Range.parse("a.b=null|x|2|0.5").choices == (None, "x", 2, 0.5)
