"""A worker knows nothing that leads from a hostile file to the broker or the database."""

from pathlib import Path

from config.settings import BrokerSettings, FetchSettings, Settings, StoreSettings
from workers.pool.channel import encode
from workers.pool.pool import ProcessPool
from workers.pool.supervisor import pinned_environment, worker_specs


def test_workers_get_no_passwords(tmp_path: Path) -> None:
    """Neither the first message nor the environment of any worker holds a URL with credentials."""
    settings = Settings(
        broker=BrokerSettings(url="amqp://tagger:hunter2@queue.internal/"),
        store=StoreSettings(url="mongodb://tagger:hunter2@base.internal/"),
        fetch=FetchSettings(spool=tmp_path, user_agent="Ours/1"),
    )
    environ = {
        "INSIGHTTAG_STORE__URL": "mongodb://u:hunter2@h/",
        "insighttag_broker__url": "redis://:hunter2@h/",
        "PATH": "/bin",
    }
    pool = ProcessPool(settings)
    for spec in worker_specs(settings):
        sent = encode(pool._launch(spec))
        assert b"hunter2" not in sent
        assert b".internal" not in sent
        assert b"Ours/1" in sent
        pinned = pinned_environment(spec, environ)
        assert "hunter2" not in str(pinned)
        assert pinned["PATH"] == "/bin"
    pool.stop(0)
