"""``insighttag tune-host``: measures in real workers, and writes what the daemon then takes."""

import json
import os
import time
from functools import partial
from pathlib import Path

import pytest
import yaml

import workers.tuning
from common.processes import process_identity
from config.load import load_settings
from config.settings import Settings
from king.status import write_health
from scripts.cli import run
from tests.support.tiny_models import tiny_features
from tests.support.workers.toys import TASK_CPU_S, WORKING_TOY
from workers import runner
from workers.pool.placement import place
from workers.pool.pool import ProcessPool
from workers.pool.supervisor import ROLES
from workers.tuning import measure_batches


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Settings that leave the numbers of workers open, with tiny encoders."""
    values = {
        "features": tiny_features().model_dump(mode="json"),
        "workers": {"host_file": str(tmp_path / "host.yaml")},
        "king": {"health_file": str(tmp_path / "king.json")},
        "fusion": {"bundle": str(tmp_path / "none")},
        "log": {"format": "json"},
    }
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    return file


def test_what_was_measured_is_what_the_daemon_takes(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Extractors are stand-ins: the real ones would load for half a minute of CPU."""
    roles = {**ROLES, "extract": WORKING_TOY}
    monkeypatch.setattr(runner, "ProcessPool", partial(ProcessPool, roles=roles))
    monkeypatch.setattr(workers.tuning, "LEAST_TURN_S", 0.5)
    options = ("--seconds", "5", "--videos", "0", "--images", "1", "--json")
    assert run(["tune-host", "--config", str(config), *options]) == 0
    said = capsys.readouterr()
    measured = json.loads(said.out)
    assert {stage["name"] for stage in measured["stages"]} == {
        "decode", "video", "image", "audio", "text",
    }  # fmt: skip
    costs = {stage["name"]: stage["cpu_ms"] for stage in measured["stages"]}
    task_ms = 1000 * TASK_CPU_S
    assert task_ms - 1 < costs["image"] < 1.5 * task_ms, costs  # a post has one
    assert task_ms - 1 < costs["text"], costs
    for name in ("video", "audio"):  # no post has one, and a worker that waits takes little
        assert costs[name] < 0.25 * task_ms, costs
    assert all(min(trial["posts_per_s"]) > 0 for trial in measured["trials"])
    assert "no bundle, so fusion is not measured" in said.err

    placement = place(load_settings(config))
    assert placement.source == measured["written"] == str(config.with_name("host.yaml"))
    best = next(trial for trial in measured["trials"] if trial["name"] == measured["best"])
    assert placement.settings.decode.processes == best["values"]["decode"]["processes"]
    # Nothing of the measurement stays but the file and its locks.
    names = {each.name for each in config.parent.iterdir()}
    assert names == {"settings.yaml", "host.yaml", ".host.yaml.lock", ".host.yaml.tuning"}


def test_a_king_that_runs_here_refuses_it(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    health = {"pid": os.getpid(), "process": process_identity(os.getpid())}
    write_health(config.with_name("king.json"), {**health, "updated_at": time.time()})
    assert run(["tune-host", "--config", str(config)]) == 2
    assert capsys.readouterr().err == (
        f"insighttag: a King runs here (pid {os.getpid()}), and would share the cores: stop it "
        "first\n"
    )


def test_settings_that_leave_nothing_open_are_refused(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = ("workers.extractors=[{threads: 1}]", "workers.slots=4", "decode.processes=1")
    options = [word for each in sets for word in ("--set", each)]
    assert run(["tune-host", "--config", str(config), *options]) == 2
    assert "nothing is left to choose" in capsys.readouterr().err


def test_batches_are_measured_of_every_encoder() -> None:
    rates = measure_batches(Settings(features=tiny_features()).features, "cpu")
    assert {rate.extractor for rate in rates} == {"video", "image", "audio", "text"}
    assert all(rate.rows_per_s > 0 for rate in rates)
