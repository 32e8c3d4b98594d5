"""The shipped supervisord.conf and systemd units agree with the settings and with each other."""

import configparser
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from config.settings import Settings
from tests.support.deploy.checkout import ROOT, Checkout, eventually
from tests.support.processes import ran
from tests.support.services import MongoServer, RedisServer

UNITS = ROOT / "deploy" / "systemd"
KING = "import time, signal\nsignal.signal(signal.SIGTERM, lambda *_: exit(0))\ntime.sleep(600)\n"


@pytest.fixture
def conf() -> configparser.RawConfigParser:
    """supervisord.conf as supervisord reads it."""
    parser = configparser.RawConfigParser(inline_comment_prefixes=(" ;",))
    parser.read(ROOT / "deploy" / "supervisord.conf")
    return parser


@pytest.fixture
def monitored(
    short_path: Path, unique_name: str, redis_server: RedisServer, mongo_server: MongoServer
) -> Iterator[Checkout]:
    """A checkout with the monitor, on real servers."""
    settings = {
        "broker": {"url": redis_server.url, "queue": unique_name},
        "store": {"url": mongo_server.url, "database": unique_name},
        "log": {"format": "json"},
    }
    made = Checkout(short_path, KING, json.dumps(settings), monitor=True)
    try:
        yield made
    finally:
        made.stop()


def test_the_wait_for_the_king_is_above_its_drain_limit(conf: configparser.RawConfigParser) -> None:
    """Else supervisord or systemd would kill it in the middle of a drain that is in time."""
    settings = Settings()
    longest_s = settings.king.drain_timeout_s + settings.workers.shutdown_timeout_s
    king = conf["program:king"]
    assert int(king["stopwaitsecs"]) > longest_s
    assert (king["stopsignal"], king["stopasgroup"], king["killasgroup"]) == (
        "TERM",
        "false",
        "true",
    )
    unit = (UNITS / "insighttag-king.service").read_text()
    assert "TimeoutStopSec=60\n" in unit
    assert "KillMode=mixed\n" in unit
    assert longest_s < 60


def test_every_program_takes_the_same_options(conf: configparser.RawConfigParser) -> None:
    """KING_ARGS reaches all three; none is restarted over a refused configuration."""
    programs = [section for section in conf.sections() if section.startswith("program:")]
    assert programs == ["program:king", "program:watchdog", "program:mongo_supervisor"]
    for program in programs:
        assert conf[program]["command"].endswith('$KING_ARGS"')
        assert conf[program]["autorestart"] == "unexpected"
    assert conf["program:king"]["exitcodes"] == "0,2"
    assert conf["program:mongo_supervisor"]["exitcodes"] == "0,3"


def test_the_monitor_logs_a_line_for_each_look(monitored: Checkout) -> None:
    """As supervisord starts it, with the settings of KING_ARGS; it ends on SIGTERM."""
    monitored.start()
    log = monitored.run / "mongo_supervisor.log"
    assert eventually(lambda: log.read_text().count("\n") >= 2), monitored.logs()
    line = json.loads(log.read_text().splitlines()[0])
    assert (line["event"], line["state"]) == ("mongo_supervisor.looked", "ok")
    monitored.stop()
    assert "WARN killing" not in (monitored.folder / "out").read_text()


def test_systemd_finds_no_fault_with_the_units(tmp_path: Path) -> None:
    """By systemd's own verifier, with the units installed as their heads say."""
    verifier = shutil.which("systemd-analyze")
    if verifier is None:
        pytest.skip("systemd-analyze is not installed")
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    installed: list[str] = []
    for unit in sorted(UNITS.glob("*.service")):
        copy = tmp_path / unit.name
        copy.write_text(unit.read_text().replace("/srv/insighttag", str(tmp_path)))
        installed.append(str(copy))
    assert [Path(path).name for path in installed] == [
        "insighttag-king.service",
        "insighttag-watchdog.service",
    ]
    done = ran(str(verifier), "verify", "--man=no", *installed)
    assert [line for line in (done.stdout + done.stderr).splitlines() if "insighttag" in line] == []
