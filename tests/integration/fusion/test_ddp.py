"""Several processes learn what one does, and end together."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from common.errors import FeatureError
from extractors.feature_file import feature_path
from tests.support.fusion import runs
from tests.support.ports import free_port

EXACT: dict[str, Any] = {
    "model": {"modality_dropout": 0.0, "auxiliary": 0.3},
    "optimizer": {"ema_decay": 0.9, "accumulate": 2},
    "loss": {"class_balance": 0.9},
}
METRICS = 1e-6
WEIGHTS = 1e-4


def options(processes: int, name: str, **trainer: Any) -> dict[str, Any]:
    """37 posts by 8: the last batch has five, which two processes cannot share equally."""
    both = {"epochs": 3, "batch_size": 8, "processes": processes, "save_dir": name}
    return {**EXACT, "trainer": {**both, **trainer}}


def valid_events(folder: Path, name: str) -> list[dict[str, Any]]:
    return [e for e in runs.events(folder, name) if e["event"] == "valid"]


def test_two_processes_learn_what_one_does(few_posts: Path) -> None:
    """Weights to 1e-4 and the metrics of all epochs to 1e-6, with uneven batches and shards."""
    one = runs.run(few_posts, **options(1, str(few_posts / "one")))
    two = runs.run(few_posts, **options(2, str(few_posts / "two")))
    assert runs.apart(runs.weights(few_posts, "one"), runs.weights(few_posts, "two")) < WEIGHTS
    assert one.metrics.keys() == two.metrics.keys()
    for key, value in one.metrics.items():
        assert two.metrics[key] == pytest.approx(value, abs=METRICS), key
    pairs = zip(valid_events(few_posts, "one"), valid_events(few_posts, "two"), strict=True)
    for alone, together in pairs:
        for key in alone.keys() - {"event", "time"}:
            assert together[key] == pytest.approx(alone[key], abs=METRICS), key
    losses = [
        [e["loss"] for e in runs.events(few_posts, name) if e["event"] == "epoch"]
        for name in ("one", "two")
    ]
    np.testing.assert_allclose(losses[0], losses[1], atol=1e-5)
    assert all(e["posts"] == 37 for e in runs.events(few_posts, "two") if e["event"] == "epoch")
    # The checkpoint does not know how many processes made it.
    runs.run(few_posts, few_posts / "two", **options(1, str(few_posts / "two"), epochs=4))
    assert runs.checkpoint(few_posts, "two")["progress"]["epoch"] == 4


def test_a_mistake_of_one_process_is_one_line(few_posts: Path) -> None:
    feature_path(few_posts / "features", "train20").write_bytes(b"broken")
    with pytest.raises(FeatureError, match=r"train20\.safetensors: cannot be read"):
        runs.run(few_posts, **options(2, str(few_posts / "run")))


def children_of(pid: int, at_least: int) -> list[psutil.Process]:
    """The training processes, once so many of them have begun to learn."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        found = [
            child
            for child in psutil.Process(pid).children()
            if "spawn_main" in " ".join(child.cmdline())
        ]
        if len(found) >= at_least:
            return found
        time.sleep(0.05)
    raise TimeoutError("the processes did not start")


def test_a_process_that_dies_ends_the_others(few_posts: Path) -> None:
    """One line says which and how to go on; nothing is left running.

    The first process dies: it holds the store through which the others talk.
    """
    config = runs.config_file(
        few_posts,
        trainer={"epochs": 100_000, "processes": 2, "log_interval": 1, "batch_size": 4},
    )
    process = runs.start_command("--model_config", config)
    try:
        children = children_of(process.pid, 2)
        log = few_posts / "run" / "latest" / "log" / "train.jsonl"
        deadline = time.monotonic() + 120
        while not (log.exists() and '"step"' in log.read_text()):
            assert time.monotonic() < deadline
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        children.sort(key=lambda child: child.create_time())
        os.kill(children[0].pid, signal.SIGKILL)
        _, said = process.communicate(timeout=150)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 1
    lines = said.strip().splitlines()
    assert len(lines) == 1, said
    assert "process 1 of 2 of this training was ended by signal 9" in lines[0]
    assert f"--resume {few_posts / 'run'}" in lines[0]
    assert psutil.wait_procs(children, 30)[1] == []


def test_torchrun_starts_them_on_several_hosts(few_posts: Path) -> None:
    """Two torchruns with one process each learn what one does; the first one reports."""
    once = options(1, "one", epochs=1, tensorboard=False)
    runs.run(few_posts, **{**once, "trainer": {**once["trainer"], "save_dir": few_posts / "one"}})
    given = ("--model_config", runs.config_file(few_posts, **once), "--save_dir")
    torchrun = f"{sys.executable} -m torch.distributed.run --nnodes 2 --nproc-per-node 1"
    address = f"--master-addr 127.0.0.1 --master-port {free_port()} --node-rank"
    launcher = (*torchrun.split(), *address.split())
    started = [
        runs.start_command(*given, few_posts / "hosts", launcher=(*launcher, str(rank)))
        for rank in range(2)
    ]
    said = [process.communicate(timeout=240) for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    assert [out.count("\nbundle ") for out, _ in said] == [1, 0]
    assert runs.apart(runs.weights(few_posts, "one"), runs.weights(few_posts, "hosts")) < WEIGHTS
