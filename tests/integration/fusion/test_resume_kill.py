"""A training that is killed with SIGKILL goes on and ends with the weights of one that was not."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.support.fusion import runs

EVERYTHING: dict[str, Any] = {
    "optimizer": {"ema_decay": 0.9, "accumulate": 2},
    "loss": {"mixup": 0.4},
    "model": {"modality_dropout": 0.2, "token_transformer": {"dropout": 0.1}},
}
STEPS = 8  # of an epoch: 120 posts by 8, two together


def killed_at(config: Path, folder: Path, step: int, *more: str | Path) -> None:
    """Start `train_net.py` and kill it once its log holds so many steps."""
    process = runs.start_command("--model_config", config, *more)
    log = folder / "run" / "latest" / "log" / "train.jsonl"
    before = _steps(log)
    deadline = time.monotonic() + 180
    try:
        while _steps(log) - before < step:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL


def _steps(log: Path) -> int:
    return log.read_text().count('"event": "step"') if log.exists() else 0


@pytest.mark.parametrize(
    ("interval", "loaders"), [(0, 0), (3, 0), pytest.param(3, 1, marks=pytest.mark.slow)]
)
def test_a_killed_run_goes_on_exactly(interval: int, loaders: int, posts: Path) -> None:
    """Killed twice at random steps; weights, optimizer, average and bundle are bit-equal.

    With moving average, accumulation, mixup, dropout, and checkpoints inside the epochs.
    """
    trainer = {
        "epochs": 5,
        "batch_size": 8,
        "log_interval": 1,
        "checkpoint_interval": interval,
    }
    given = {**EVERYTHING, "trainer": trainer, "data": {"loaders": loaders}}
    whole = {**trainer, "save_dir": str(posts / "whole"), "checkpoint_interval": 0}
    runs.run(posts, **{**given, "trainer": whole, "data": {"loaders": 0}})
    bundle = load_file(posts / "bundle" / "model.safetensors")

    chance = random.Random()
    config = runs.config_file(posts, **given)
    first = chance.randint(STEPS + 1, 2 * STEPS)  # behind the first checkpoint
    killed_at(config, posts, first)
    stands = runs.checkpoint(posts)["progress"]
    second = chance.randint(1, STEPS)
    killed_at(config, posts, second, "--resume", posts / "run")
    status, _, err = runs.command("--model_config", config, "--resume", posts / "run")
    assert status == 0, err
    one, other = runs.checkpoint(posts, "whole"), runs.checkpoint(posts)
    context = f"killed after {first} steps ({stands}), and {second} more"
    for part in ("progress", "model", "optimizer", "schedule", "average"):
        assert runs.same(one[part], other[part]), f"{part}: {context}"
    assert runs.equal(bundle, load_file(posts / "bundle" / "model.safetensors"))
    if interval:
        resumed = [e for e in runs.events(posts) if e["event"] == "resumed"]
        assert all(e["step"] % interval == 0 for e in resumed)
