"""``insighttag`` with one configuration, and what it leaves in queue and database."""

import json
from pathlib import Path
from typing import Any

import pymongo
import pytest
import yaml

from config.load import load_settings
from deploy import embedded
from king.broker.base import Delivery
from king.broker.connect import open_broker
from king.messages import PostMessage, parse_message
from scripts.cli import run

Database = pymongo.database.Database[dict[str, Any]]


class Command:
    """Runs commands with one configuration and keeps what they print."""

    def __init__(
        self, folder: Path, capsys: pytest.CaptureFixture[str], **sections: dict[str, Any]
    ) -> None:
        self.config = folder / "settings.yaml"
        values = {
            "embedded": {"folder": str(folder / "embedded")},
            "king": {"health_file": str(folder / "king.json")},
            "fusion": {"bundle": str(folder / "bundle")},
        }
        self.config.write_text(yaml.safe_dump({**values, **sections}))
        self.settings = load_settings(self.config)
        self._capsys = capsys

    def __call__(self, *words: str) -> tuple[int, str, str]:
        code = run([*words, "--config", str(self.config)])
        out, err = self._capsys.readouterr()
        return code, out, err

    def json(self, *words: str) -> Any:
        code, out, err = self(*words, "--json")
        assert (code, err) == (0, "")
        return json.loads(out)

    def queued(self) -> list[PostMessage]:
        """Take everything off the queue."""
        broker = open_broker(embedded.resolve(self.settings).broker)
        broker.connect()
        bodies: list[bytes] = []

        def take(delivery: Delivery) -> None:
            bodies.append(delivery.body)
            broker.ack(delivery)

        broker.consume(take)
        while broker.drain(0.5):
            pass
        broker.close()
        return [parse_message(body) for body in bodies]
