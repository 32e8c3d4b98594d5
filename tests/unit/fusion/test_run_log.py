"""The files of a run: its log, curves for TensorBoard, and checkpoints that are whole."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common.errors import ConfigError
from fusion.train.checkpoint import Checkpoint, Progress, load_checkpoint, save_checkpoint
from fusion.train.run_log import RunLog, read_run
from tests.support.processes import limited_to


def log(folder: Path, *, tensorboard: bool = True) -> RunLog:
    return RunLog(folder / "log" / "train.jsonl", enabled=True, tensorboard=tensorboard)


def run_epochs(
    folder: Path, first: int, last: int, loss: float, *, done: int = 0, extra: Any = None
) -> RunLog:
    """The log of a trainer with epochs of two steps; ``extra`` is a step that it writes last."""
    run = log(folder)
    run.begin(steps=2, done=done)
    for epoch in range(first, last + 1):
        for step in (1, 2):
            run.write("step", epoch=epoch, step=step, loss=loss + step, learning_rate=0.1)
        run.write("epoch", epoch=epoch, loss=loss, posts=9, seconds=1.0)
        run.write("valid", epoch=epoch, gap=0.5 + epoch / 10)
    if extra is not None:
        run.write("step", learning_rate=0.1, **extra)
    run.close()
    return run


def curves(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder / "log" / "tensorboard"))
    events.Reload()
    return events


def test_scalars_stand_over_steps(tmp_path: Path) -> None:
    """Steps, epochs and validations share one axis, so that curves can be laid over each other."""
    run_epochs(tmp_path, 1, 3, 0.0)
    events = curves(tmp_path)
    assert sorted(events.Tags()["scalars"]) == [
        "epoch/loss",
        "epoch/seconds",
        "step/learning_rate",
        "step/loss",
        "valid/gap",
    ]
    assert [point.step for point in events.Scalars("step/loss")] == [1, 2, 3, 4, 5, 6]
    assert [(p.step, round(p.value, 6)) for p in events.Scalars("valid/gap")] == [
        (2, 0.6),
        (4, 0.7),
        (6, 0.8),
    ]


def test_after_a_resume_no_point_stands_twice(tmp_path: Path) -> None:
    """A run killed in its third epoch goes on from its second: the lost steps disappear."""
    run = run_epochs(tmp_path, 1, 2, 0.0, extra={"epoch": 3, "step": 1, "loss": 77.0})
    with run.path.open("a") as file:
        file.write('{"event": "epoch", "epo')  # cut off by the kill
        file.write("\n")
    run_epochs(tmp_path, 3, 4, 5.0, done=4)
    points = curves(tmp_path).Scalars("step/loss")
    assert [point.step for point in points] == list(range(1, 9))
    assert 77.0 not in [point.value for point in points]
    events = read_run(run.path)
    assert [e["epoch"] for e in events if e["event"] == "epoch"] == [1, 2, 3, 4]
    assert 77.0 not in [e.get("loss") for e in events]


def test_a_resume_inside_an_epoch_keeps_its_first_steps(tmp_path: Path) -> None:
    """Steps before the checkpoint count, those after it are done again."""
    run = run_epochs(tmp_path, 1, 2, 0.0)
    run_epochs(tmp_path, 1, 0, 0.0, done=3, extra={"epoch": 2, "step": 2, "loss": 9.0})
    assert [p.step for p in curves(tmp_path).Scalars("step/loss")] == [1, 2, 3, 4]
    steps = [(e["epoch"], e["step"]) for e in read_run(run.path) if e["event"] == "step"]
    assert steps == [(1, 1), (1, 2), (2, 1), (2, 2)]


def test_a_new_run_in_the_same_folder_hides_the_one_before(tmp_path: Path) -> None:
    """Otherwise its curves would run backwards."""
    for loss in (1.0, 2.0):
        run = run_epochs(tmp_path, 1, 2, loss)
    assert {round(p.value) for p in curves(tmp_path).Scalars("epoch/loss")} == {2}
    assert len(curves(tmp_path).Scalars("epoch/loss")) == 2
    assert [e["loss"] for e in read_run(run.path) if e["event"] == "epoch"] == [2.0, 2.0]


def test_curves_at_the_end(tmp_path: Path) -> None:
    run = log(tmp_path)
    run.begin(steps=2)
    chance = np.random.default_rng(0)
    run.curves(chance.random((20, 3)) < 0.5, chance.random((20, 3)), [0.5, 0.7], at=3)
    run.close()
    events = curves(tmp_path)
    assert events.Tags()["histograms"] == ["valid/ap_of_tags"]
    assert events.Histograms("valid/ap_of_tags")[0].step == 6
    assert events.Tags()["tensors"] == ["valid/all_tags"]


def test_without_tensorboard_there_is_no_folder(tmp_path: Path) -> None:
    """Lines alone; and a process that does not speak writes nothing at all."""
    run = log(tmp_path, tensorboard=False)
    run.begin(steps=2)
    run.write("step", epoch=1, step=1, loss=0.0, learning_rate=0.1)
    run.curves(np.ones((1, 1)), np.ones((1, 1)), [1.0], at=1)
    assert [p.name for p in (tmp_path / "log").iterdir()] == ["train.jsonl"]
    silent = RunLog(tmp_path / "other" / "train.jsonl", enabled=False, tensorboard=True)
    silent.begin(steps=2)
    silent.write("epoch", epoch=1)
    assert not (tmp_path / "other").exists()
    assert read_run(tmp_path / "other" / "train.jsonl") == []


def test_a_log_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("a file in the way")
    with pytest.raises(ConfigError, match=r"train.jsonl: the log cannot be written"):
        log(tmp_path).begin(steps=1)


@pytest.mark.parametrize("content", [b"", b"no checkpoint", None])
def test_a_broken_checkpoint_is_refused(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=str(path)):
        load_checkpoint(path, "{}")


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.pop("signature"),
        lambda content: content.update(progress=None),
        lambda content: content["progress"].update(samples=3),
    ],
    ids=["no signature", "no progress", "more progress"],
)
def test_a_checkpoint_of_another_release_is_refused(change: Any, tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(path, Checkpoint("{}", Progress(1), {}))
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)
    with pytest.raises(ConfigError, match=rf"{path}: is a checkpoint of another release"):
        load_checkpoint(path, "{}")


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    """The system refuses to write in the midst of the file: one line, and nothing is left of it."""
    path, weights = tmp_path / "last.pt", {"w": torch.zeros(50_000)}
    save_checkpoint(path, Checkpoint("{}", Progress(1, epoch=3), weights))
    full = limited_to(path.stat().st_size // 2)
    with full, pytest.raises(ConfigError, match=r"the checkpoint cannot be written"):
        save_checkpoint(path, Checkpoint("{}", Progress(1, epoch=4), weights))
    assert load_checkpoint(path, "{}").progress.epoch == 3
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]
