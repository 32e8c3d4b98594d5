"""Several processes learn what one does, and end together."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from torch.distributed.launcher.api import elastic_launch
from torch.distributed.run import config_from_args, get_args_parser

import train_net
from common.errors import FeatureError
from extractors.feature_file import feature_path
from tests.support import forked
from tests.support.fusion import runs
from tests.support.ports import free_port

pytestmark = pytest.mark.usefixtures("quick_processes")

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


def is_forkserver(process: psutil.Process) -> bool:
    """Tell if it is one; a child that an earlier test has ended has no command line."""
    try:
        return "forkserver" in " ".join(process.cmdline())
    except psutil.Error:
        return False


def kill_the_first(log: Path) -> list[psutil.Process]:
    """Kill one of the processes once they learn: the one with the store through which they talk."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (log.exists() and '"step"' in log.read_text()):
        time.sleep(0.05)
    servers = [p for p in psutil.Process().children() if is_forkserver(p)]
    children = [child for server in servers for child in server.children()]
    min(children, key=lambda child: (child.create_time(), child.pid)).kill()
    return children


def test_one_death_ends_the_others(few_posts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = runs.config_file(
        few_posts, trainer={"epochs": 100_000, "processes": 2, "log_interval": 1, "batch_size": 4}
    )
    log = few_posts / "run" / "latest" / "log" / "train.jsonl"
    with ThreadPoolExecutor() as threads:
        killing = threads.submit(kill_the_first, log)
        assert train_net.main(["--model_config", str(config)]) == 1
        children = killing.result()
    assert len(children) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1, said
    assert "process 1 of 2 of this training was ended by signal 9" in said[0]
    assert f"--resume {few_posts / 'run'}" in said[0]
    assert psutil.wait_procs(children, 30)[1] == []


def torchrun(host: int, port: int, said: Path, *command: str) -> None:
    """Be torchrun on one of two hosts, which forks its process instead of loading torch anew."""
    address = f"--master-addr 127.0.0.1 --master-port {port} --node-rank {host}"
    options = f"--nnodes 2 --nproc-per-node 1 {address} train_net.py"
    config, _, _ = config_from_args(get_args_parser().parse_args(options.split()))
    config.start_method = "fork"
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 1)
    assert list(elastic_launch(config, train_net.main)(command).values()) == [0]


def test_torchrun_starts_them_on_several_hosts(few_posts: Path) -> None:
    """Two torchruns with one process each learn what one does; the first one reports."""
    once = options(1, "one", epochs=1, tensorboard=False)
    runs.run(few_posts, **{**once, "trainer": {**once["trainer"], "save_dir": few_posts / "one"}})
    command = ["--model_config", str(runs.config_file(few_posts, **once))]
    command += ["--save_dir", str(few_posts / "hosts")]
    port, said = free_port(), [few_posts / f"said{host}" for host in range(2)]
    started = [forked.start(torchrun, host, port, said[host], *command) for host in range(2)]
    for process in started:
        process.join(240)
    assert [process.exitcode for process in started] == [0, 0]
    assert [file.read_text().count("\nbundle ") for file in said] == [1, 0]
    assert runs.apart(runs.weights(few_posts, "one"), runs.weights(few_posts, "hosts")) < WEIGHTS
