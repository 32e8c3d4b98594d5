"""Every option of `train_net.py` runs for real and has the effect that it promises."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

import train_net
from common.errors import ConfigError
from config.train import BackboneTrainSettings, TrainSettings
from fusion.bundle.bundle import load_bundle
from fusion.train.options import train_options, train_settings
from tests.support.fusion import runs


def trained(folder: Path, *options: str | Path, epochs: int = 1, **sections: Any) -> None:
    """Run the command on the folder's config; it must succeed."""
    trainer = {"epochs": epochs, **sections.pop("trainer", {})}
    config = runs.config_file(folder, trainer=trainer, **sections)
    assert train_net.main(["--model_config", str(config), *map(str, options)]) == 0


def of(folder: Path, event: str, name: str = "run") -> list[dict[str, Any]]:
    return [e for e in runs.events(folder, name) if e["event"] == event]


def test_model_config(few_posts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file's model is trained; the end says the metrics, the bundle and the data wait."""
    trained(few_posts, model={"name": "gmu"})
    about = yaml.safe_load((few_posts / "bundle" / "bundle.yaml").read_text())
    assert about["model"]["name"] == "gmu"
    said = capsys.readouterr().out
    assert f"bundle {few_posts / 'bundle'}" in said
    assert "waiting for data" in said


def test_batch_size(few_posts: Path) -> None:
    """37 posts by 10 are four steps, three of them logged in full."""
    trained(few_posts, "--batch_size", "10", "--log_interval", "1")
    assert [e["step"] for e in of(few_posts, "step")] == [1, 2, 3, 4]


def test_learning_rate(few_posts: Path) -> None:
    schedule = {"schedule": "constant", "warm_up": 0.0}
    trained(few_posts, "--learning_rate", "4e-4", "--log_interval", "1", optimizer=schedule)
    assert {e["learning_rate"] for e in of(few_posts, "step")} == {4e-4}


def test_epoch(few_posts: Path) -> None:
    """A number counts, and 0 takes the config's."""
    trained(few_posts, "--epoch", "3")
    assert runs.checkpoint(few_posts)["progress"]["epoch"] == 3
    trained(few_posts, "--epoch", "0", epochs=2)
    assert runs.checkpoint(few_posts)["progress"]["epoch"] == 2


def test_save_dir(few_posts: Path) -> None:
    trained(few_posts, "--save_dir", few_posts / "elsewhere")
    assert (few_posts / "elsewhere" / "latest" / "ckpt" / "last.pt").exists()
    assert (few_posts / "elsewhere" / "latest" / "log" / "train.jsonl").exists()
    assert not (few_posts / "run").exists()


def test_valid_interval(few_posts: Path) -> None:
    """Every second epoch and the last one; 0 validates at the end only."""
    trained(few_posts, "--valid_interval", "2", epochs=5)
    assert [e["epoch"] for e in of(few_posts, "valid")] == [2, 4, 5]
    trained(few_posts, "--valid_interval", "0", "--save_dir", few_posts / "two", epochs=3)
    assert [e["epoch"] for e in of(few_posts, "valid", "two")] == [3]


def test_log_interval(few_posts: Path) -> None:
    """Nine batches by 4: lines at every third."""
    trained(few_posts, "--log_interval", "3", "--batch_size", "4")
    assert [e["step"] for e in of(few_posts, "step")] == [3, 6, 9]


def test_fix_random_seed(few_posts: Path) -> None:
    """With it two runs are bit-equal; without it, or with false, they are not."""
    states = []
    option = "--fix_random_seed"
    for given in ([], [option], [option, "True"], [option, "False"]):
        trained(few_posts, *given, trainer={"fix_random_seed": False})
        states.append(runs.weights(few_posts))
    none, bare, true, false = states
    assert runs.equal(bare, true)
    assert not runs.equal(none, bare)
    assert not runs.equal(none, false)


def test_n_gpu(few_posts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """0 trains on the CPU; more than there are is one line and exit 2."""
    trained(few_posts, "--n_gpu", "0")
    config = runs.config_file(few_posts)
    capsys.readouterr()
    assert train_net.main(["--model_config", str(config), "--n_gpu", "99"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert "trainer.n_gpu: 99 GPUs wanted, this machine has" in said[0]


def test_resume_goes_on_from_a_run(few_posts: Path) -> None:
    """A folder or its last checkpoint: the epochs that are done are not done again."""
    trained(few_posts, epochs=2)
    for start in (few_posts / "run", few_posts / "run" / "latest" / "ckpt" / "last.pt"):
        trained(few_posts, "--resume", start, "--epoch", "3", "--save_dir", few_posts / "more")
        assert [e["epoch"] for e in of(few_posts, "epoch", "more")] == [3]


KINDS = ["best.pt", "bundle", "model.safetensors", "plain.safetensors", "weights.pth"]


@pytest.mark.parametrize("kind", KINDS)
def test_resume_takes_weights(kind: str, few_posts: Path) -> None:
    """A new run starts at epoch 1 with just these: with a rate of almost 0 they stay."""
    trained(few_posts, epochs=2)
    model = load_bundle(few_posts / "bundle").model
    wanted = {key: value.clone() for key, value in model.state_dict().items()}
    start = few_posts / "old"
    (few_posts / "bundle").rename(start)
    if kind == "best.pt":
        start = few_posts / "run" / "latest" / "ckpt" / kind
    elif kind == "model.safetensors":
        start /= kind
    elif kind == "plain.safetensors":
        start = few_posts / kind
        save_file(wanted, start)
    elif kind == "weights.pth":
        start = few_posts / kind
        torch.save({"state_dict": {f"module.{key}": value for key, value in wanted.items()}}, start)
    still = {"learning_rate": 1e-12, "weight_decay": 0.0}
    given = ("--resume", start, "--save_dir", few_posts / "new")
    trained(few_posts, *given, "--epoch", "1", optimizer=still)
    assert runs.apart(wanted, runs.weights(few_posts, "new")) < 1e-6
    assert [e["epoch"] for e in of(few_posts, "epoch", "new")] == [1]


def test_resume_refuses_what_does_not_fit(
    few_posts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another architecture, other labels, no weights at all: one line that says what differs."""
    trained(few_posts)
    bundle = few_posts / "bundle"
    plain = few_posts / "plain.safetensors"
    save_file({"x": torch.zeros(1)}, plain)
    other = runs.config_file(few_posts, model={"name": "gmu"})
    bad = {
        bundle: "made with another model",
        bundle / "model.safetensors": "made with another model",
        few_posts / "run": "made with another model",
        plain: "does not fit this model",
        few_posts / "none": "no such checkpoint",
        few_posts / "none.pth": "none.pth",
    }
    for path, says in bad.items():
        capsys.readouterr()
        assert train_net.main(["--model_config", str(other), "--resume", str(path)]) == 2
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1
        assert says in said[0]


class _Trap:
    """A pickled model that runs code when it is loaded."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.file,))


def test_resume_runs_no_code_of_a_file(few_posts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A pickled model is refused, with the key that would allow it, and nothing in it ran."""
    trap = few_posts / "sprung"
    torch.save(_Trap(trap), few_posts / "model.pth")
    config = runs.config_file(few_posts)
    given = ["--model_config", str(config), "--resume", str(few_posts / "model.pth")]
    assert train_net.main(given) == 2
    assert "trainer.allow_pickle" in capsys.readouterr().err
    assert not trap.exists()


def test_set(few_posts: Path) -> None:
    """Any key, over options and file."""
    trained(few_posts, "--epoch", "3", "--set", "trainer.epochs=2", "--set", "model.name=gmu")
    assert runs.checkpoint(few_posts)["progress"]["epoch"] == 2
    about = yaml.safe_load((few_posts / "bundle" / "bundle.yaml").read_text())
    assert about["model"]["name"] == "gmu"


def test_the_task_chooses_what_is_trained(tmp_path: Path) -> None:
    """Options keep their keys for a backbone; a task that is none is one line."""
    for task, kind in (("fusion", TrainSettings), ("image_backbone", BackboneTrainSettings)):
        file = tmp_path / "c.yaml"
        file.write_text(json.dumps({"task": task}))
        given = ["--batch_size", "7", "--learning_rate", "0.5", "--epoch", "9", "--skip_bad"]
        given += ["--n_gpu", "0", "--valid_interval", "3", "--log_interval", "4"]
        found = train_settings(train_options(["--model_config", str(file), *given]))
        assert isinstance(found, kind)
        assert (found.trainer.batch_size, found.trainer.epochs) == (7, 9)
        assert (found.optimizer.learning_rate, found.data.skip_bad) == (0.5, True)
        assert (found.trainer.valid_interval, found.trainer.log_interval) == (3, 4)
    with pytest.raises(ConfigError, match="task: must be one of fusion, image_backbone, video"):
        train_settings(train_options(["--set", "task=magic"]))


def test_the_sample_config_is_whole() -> None:
    file = runs.ROOT / "config" / "train_config.yaml"
    found = train_settings(train_options(["--model_config", str(file)]))
    assert isinstance(found, TrainSettings)
    assert found.bundle.name == "insight"
