"""URLs without passwords, label maps, the error tree, and log set-up."""

import inspect
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import structlog

from common import errors
from common.errors import ConfigError, PermanentError, RetryableError, TaggingError
from common.logs import configure_logs
from common.urls import redact
from config.labels import LabelMap
from tests.support.mistakes import one_line


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("amqp://guest:guest@127.0.0.1:5672//", "amqp://guest:***@127.0.0.1:5672//"),
        ("redis://:secret@h:6379/0", "redis://:***@h:6379/0"),
        ("mongodb://u:p%40ss@a:1,b:2/db?replicaSet=r", "mongodb://u:***@a:1,b:2/db?replicaSet=r"),
        ("mongodb+srv://u:p@cluster.example/db", "mongodb+srv://u:***@cluster.example/db"),
        ("redis://h:6379/0", "redis://h:6379/0"),
        ("embedded://", "embedded://"),
        ("amqp://u@h", "amqp://u@h"),
        ("http://[broken:secret@h", "<unreadable URL>"),
        ("amqp://u:se/c@r#et@h/v", "amqp://u:***@h/v"),
        ("mongodb://u:se?cret@h/db", "mongodb://u:***@h/db"),
        ("mongodb://u:p@h/db?mail=a@b", "mongodb://u:***@h/db?mail=a@b"),
        ("rediss://h/0?ssl_password=secret&db=1", "rediss://h/0?ssl_password=***&db=1"),
        ("u:secret@h", "u:***@h"),
        ("broker.url:amqp://u:secret@h", "broker.url:amqp://u:***@h"),
    ],
)
def test_passwords_are_hidden_and_the_rest_is_not(url: str, shown: str) -> None:
    assert redact(url) == shown


def label_file(folder: Path, content: object) -> Path:
    file = folder / "idx2name.json"
    file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return file


def test_label_map_round_trip(tmp_path: Path) -> None:
    labels = LabelMap.load(label_file(tmp_path, {"1": "狗", "0": "cat", "10": "k"} | _rest()))
    assert labels.names[:2] == ("cat", "狗")
    assert labels.names[10] == "k"
    assert len(labels) == 11
    assert labels.encode(["狗", "cat"]) == [1, 0]
    assert LabelMap.from_mapping(labels.as_json(), "again") == labels
    with pytest.raises(
        ConfigError, match=r"data\.json: label 'bird' is not in the label map .*\.json$"
    ):
        labels.encode(["cat", "bird"], where="data.json")


def _rest() -> dict[str, str]:
    return {str(i): f"tag{i}" for i in range(2, 10)}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ([], "must map index to name"),
        ({}, "indices must run from 0"),
        ({"1": "a"}, "indices must run from 0"),
        ({"0": "a", "2": "b"}, "indices must run from 0"),
        ({"a": "b"}, "every key must be an index"),
        ({"0": 5}, "every name must be text"),
        ({"0": ""}, "every name must be text"),
        ({"0": "a", "1": "a"}, "name 'a' appears twice"),
    ],
)
def test_wrong_label_maps_are_refused(tmp_path: Path, content: object, told: str) -> None:
    file = label_file(tmp_path, content)
    with one_line(ConfigError, told, str(file)):
        LabelMap.load(file)


def test_a_name_that_stands_twice_is_found_in_a_large_map() -> None:
    """In one pass: comparing every name with every other one would take minutes."""
    names = {str(i): f"tag{i}" for i in range(100_000)}
    began = time.monotonic()
    with pytest.raises(ConfigError, match="name 'tag7' appears twice"):
        LabelMap.from_mapping({**names, "100000": "tag7"}, "map")
    with pytest.raises(ConfigError, match="name 'tag99999' appears twice"):
        LabelMap.from_mapping({**names, "100000": "tag99999"}, "map")
    assert time.monotonic() - began < 30


def test_missing_and_broken_label_maps_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such label map"):
        LabelMap.load(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ConfigError, match="not a JSON label map"):
        LabelMap.load(tmp_path / "bad.json")


def test_every_error_is_either_retryable_or_permanent_or_configuration() -> None:
    """No class is left whose retry nobody decided, and none is both."""
    leaves = [
        cls
        for _, cls in inspect.getmembers(errors, inspect.isclass)
        if issubclass(cls, TaggingError) and cls is not TaggingError
    ]
    kinds = (RetryableError, PermanentError, ConfigError)
    for cls in leaves:
        assert sum(issubclass(cls, kind) for kind in kinds) == 1, cls
        assert (cls.__doc__ or "").strip(), cls


@pytest.mark.parametrize("format", ["json", "pretty", "auto"])
def test_logs_go_to_standard_error(format: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One line per event, at or above the level, and nothing on standard output."""
    try:
        configure_logs(format, "warning")  # type: ignore[arg-type]
        log = structlog.get_logger()
        log.info("king.quiet")
        log.warning("king.post_acked", post_id="帖子", attempt=1)
        out, err = capsys.readouterr()
    finally:
        structlog.reset_defaults()
    assert out == ""
    assert "king.quiet" not in err
    assert err.count("king.post_acked") == 1
    if format != "pretty":
        event = json.loads(err)
        assert event["post_id"] == "帖子"
        assert event["level"] == "warning"
        assert event["timestamp"].endswith("Z")


def test_a_line_is_one_write_where_nothing_is_buffered(tmp_path: Path) -> None:
    """As with PYTHONUNBUFFERED in containers: lines of two processes would be mixed."""
    program = """if True:
        import io, sys, structlog
        from common.logs import configure_logs

        class Raw(io.FileIO):
            def write(self, data):
                super().write(bytes(data) + b"|")
                return len(data)

        sys.stderr = io.TextIOWrapper(Raw(sys.argv[1], "w"), write_through=True)
        configure_logs("json")
        structlog.get_logger().info("king.ready")
    """
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "log")], check=True)
    assert (tmp_path / "log").read_text().count("|") == 1
