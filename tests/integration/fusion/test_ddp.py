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

from common.errors import ConfigError, FeatureError
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


def test_a_run_of_two_goes_on_with_one(few_posts: Path) -> None:
    """The checkpoint does not know how many processes made it."""
    runs.run(few_posts, **options(1, str(few_posts / "one")))
    runs.run(few_posts, **options(2, str(few_posts / "two"), epochs=1))
    runs.run(few_posts, few_posts / "two", **options(1, str(few_posts / "two")))
    # The schedule of one epoch is another one than that of three.
    found = runs.checkpoint(few_posts, "two")["progress"]
    assert found["epoch"] == 3
    assert np.isfinite(found["best_gap"])


def test_mistakes_of_any_process_are_one_line(few_posts: Path) -> None:
    """Mistakes of all processes, and of one in the middle of training, as in one process."""
    with pytest.raises(ConfigError, match="1 posts do not make a batch for 2 processes"):
        runs.run(few_posts, **options(2, str(few_posts / "run"), batch_size=1))
    bad = {"learning_rate": 1e30, "warm_up": 0.0, "schedule": "constant"}
    two = {**options(2, str(few_posts / "run"), epochs=9), "optimizer": bad}
    with pytest.raises(ConfigError, match=r"epoch 1, step \d+: the loss is"):
        runs.run(few_posts, **two)
    feature_path(few_posts / "features", "train20").write_bytes(b"broken")
    with pytest.raises(FeatureError, match=r"train20\.safetensors: cannot be read"):
        runs.run(few_posts, **options(2, str(few_posts / "run")))


def test_processes_are_for_the_cpu(few_posts: Path) -> None:
    """More GPUs than there are is an error, whatever ``processes`` says."""
    with pytest.raises(ConfigError, match="99 GPUs wanted"):
        runs.run(few_posts, trainer={"n_gpu": 99, "processes": 2})


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


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_ends_the_others(victim: int, few_posts: Path) -> None:
    """One line says which and how to go on; nothing is left running."""
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
        os.kill(children[victim].pid, signal.SIGKILL)
        _, said = process.communicate(timeout=150)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 1
    lines = said.strip().splitlines()
    assert len(lines) == 1, said
    assert f"process {victim + 1} of 2 of this training was ended by signal 9" in lines[0]
    assert f"--resume {few_posts / 'run'}" in lines[0]
    assert psutil.wait_procs(children, 30)[1] == []


def test_torchrun_starts_them_on_one_host_or_several(few_posts: Path) -> None:
    """Two processes of one torchrun, and two torchruns with one each, learn what one does."""
    runs.run(few_posts, **options(1, str(few_posts / "one")))
    config = runs.config_file(few_posts, **options(1, "one"))
    torchrun = (sys.executable, "-m", "torch.distributed.run")
    local = (*torchrun, "--nproc-per-node", "2", "--master-addr", "127.0.0.1")
    port = ("--master-port", str(free_port()))
    given = ("--model_config", config, "--save_dir")
    status, out, err = runs.command(*given, few_posts / "local", launcher=(*local, *port))
    assert status == 0, err
    assert out.count("\nbundle ") == 1
    assert runs.apart(runs.weights(few_posts, "one"), runs.weights(few_posts, "local")) < WEIGHTS

    hosts = (*torchrun, "--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1")
    port = ("--master-port", str(free_port()))
    started = [
        runs.start_command(
            *given, few_posts / "hosts", launcher=(*hosts, *port, "--node-rank", str(n))
        )
        for n in range(2)
    ]
    said = [process.communicate(timeout=240) for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    assert ["bundle" in out for out, _ in said] == [True, False]
    assert runs.apart(runs.weights(few_posts, "one"), runs.weights(few_posts, "hosts")) < WEIGHTS
