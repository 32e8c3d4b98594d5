"""``insighttag doctor``: what keeps the daemon from tagging is a line with its remedy."""

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from common.processes import process_identity
from extractors.suite import ExtractorSuite
from king.status import write_health
from scripts.cli import run
from tests.support.tiny_models import tiny_features
from tests.support.workers.small_bundle import write_bundle


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Settings that nothing is wrong with, and their bundle."""
    folder = tmp_path_factory.mktemp("site")
    suite = ExtractorSuite(tiny_features())
    suite.load()
    write_bundle(folder / "bundle", suite)
    suite.close()
    content = {
        "features": tiny_features().model_dump(mode="json"),
        "fusion": {"bundle": str(folder / "bundle")},
        "embedded": {"folder": str(folder / "embedded")},
        "fetch": {"spool": str(folder / "spool"), "max_bytes": 1024},
        "king": {"health_file": str(folder / "run" / "king.json")},
        "http": {"port": free_port()},
    }
    (folder / "settings.yaml").write_text(yaml.safe_dump(content))
    return folder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def checks(
    capsys: pytest.CaptureFixture[str], site: Path, *sets: str, code: int
) -> dict[str, dict[str, Any]]:
    """Return the checks by name."""
    words = [word for each in sets for word in ("--set", each)]
    assert run(["doctor", "--json", "--config", str(site / "settings.yaml"), *words]) == code
    out, err = capsys.readouterr()
    assert err == "" or "loading the encoders" in err
    return {check["name"]: check for check in json.loads(out)["checks"]}


def test_where_nothing_is_wrong_it_ends_with_0_and_starts_nothing(
    capsys: pytest.CaptureFixture[str], site: Path
) -> None:
    found = checks(capsys, site, code=0)
    assert {check["state"] for check in found.values()} == {"ok"}
    assert "fits the encoders" in found["bundle"]["said"]
    assert not (site / "embedded").exists()


def test_servers_that_are_down_are_named_within_seconds(
    capsys: pytest.CaptureFixture[str], site: Path
) -> None:
    began = time.monotonic()
    words = ["doctor", "--quick", "--config", str(site / "settings.yaml")]
    words += ["--set", "broker.url=redis://:secret@127.0.0.1:1"]
    words += ["--set", "store.url=mongodb://127.0.0.1:1"]
    assert run(words) == 1
    out, err = capsys.readouterr()
    assert time.monotonic() - began < 20
    assert "broker redis://" in err
    assert "database mongodb://127.0.0.1:1: waiting at most 2 s" in err
    assert "secret" not in out + err
    assert "failed   broker: " in out
    assert "-> start it, or set broker.url; embedded:// needs no server" in out
    assert "failed   database: " in out
    assert "2 failed, 0 warnings" in out


@pytest.mark.parametrize(
    ("sets", "name", "state", "said", "remedy"),
    [
        (["fusion.bundle=/none"], "bundle", "failed", "no bundle there", "insighttag train POSTS"),
        (
            ["features.text.weights=random:9"],
            "bundle",
            "failed",
            "modality text: the bundle needs",
            "as the bundle was trained",
        ),
        (
            ["features.image.arch=me/x", "features.image.weights=pretrained"],
            "weights of image",
            "failed",
            "me/x: missing",
            "insighttag weights get me/x",
        ),
        (["fusion.device=cuda:9"], "devices", "failed", "cuda:9", "set workers.extractors"),
        (
            ["fetch.spool=SITE/settings.yaml/spool"],
            "fetch.spool",
            "failed",
            "cannot be written",
            "fetch.spool",
        ),
        (["fetch.max_bytes=9000000000000000"], "fetch.spool", "failed", "may grow", "make room"),
        (
            ["cache.url=SITE/cache", "cache.max_mb=900000000"],
            "cache.url",
            "warning",
            "may grow",
            "room",
        ),
    ],
)
def test_a_fault_has_its_remedy(
    *,
    capsys: pytest.CaptureFixture[str],
    site: Path,
    sets: list[str],
    name: str,
    state: str,
    said: str,
    remedy: str,
) -> None:
    given = [each.replace("SITE", str(site)) for each in sets]
    check = checks(capsys, site, *given, code=1 if state == "failed" else 0)[name]
    assert check["state"] == state
    assert said in check["said"]
    assert remedy in check["remedy"]


def test_a_taken_port_and_a_king_that_died_are_warnings(
    capsys: pytest.CaptureFixture[str], site: Path
) -> None:
    health = site / "run" / "king.json"
    health.parent.mkdir(exist_ok=True)
    content = {"pid": os.getpid(), "phase": "serving", "updated_at": time.time()}
    write_health(health, {**content, "process": "another"})
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        found = checks(capsys, site, f"http.port={taken.getsockname()[1]}", code=0)
    assert found["http.port"]["state"] == "warning"
    assert "set http.port to another" in found["http.port"]["remedy"]
    assert found["king"]["state"] == "warning"
    assert "insighttag work starts it again" in found["king"]["remedy"]
    write_health(health, {**content, "process": process_identity(os.getpid())})
    assert checks(capsys, site, code=0)["king"]["said"].startswith("serving, pid ")
    health.unlink()


def test_wrong_settings_end_with_2(capsys: pytest.CaptureFixture[str], site: Path) -> None:
    assert run(["doctor", "--set", "broker.urll=x"]) == 2
    assert "broker.urll" in capsys.readouterr().err
