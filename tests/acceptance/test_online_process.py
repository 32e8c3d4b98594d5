"""The daemon as it is started: real workers with small random models, real media, real servers."""

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import online_process
from config.settings import BrokerSettings, Settings, StoreSettings
from king.broker.connect import publish_posts
from king.messages import PostMessage
from king.store.client import StoreClient
from king.store.store import Store
from tests.support import media
from tests.support.king.store_rig import mongo_settings
from tests.support.processes import file_server, python
from tests.support.services import MongoServer, RedisServer
from tests.support.tiny_models import tiny_bundle, tiny_features

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    return python("online_process.py", *arguments, timeout_s=timeout_s)


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """A loopback HTTP server with a picture, a video, a sound, and a file that is none."""
    folder = tmp_path / "web"
    folder.mkdir()
    media.write_jpeg(folder / "a.jpg", media.quadrants(96, 80))
    media.write_video(
        folder / "a.mp4", media.grey_steps(12), audio=media.tone(duration_s=1.5, rate_hz=44100)
    )
    media.write_wav(folder / "a.wav", media.tone(duration_s=1.2))
    media.write_random(folder / "junk.jpg")
    with file_server(folder) as url:
        yield url


@pytest.fixture
def settings(
    tmp_path: Path,
    redis_server: RedisServer,
    mongo_server: MongoServer,
    unique_name: str,
    queue_name: str,
) -> Settings:
    """Small models, loopback servers, everything else in the test's folder."""
    return Settings.model_validate(
        {
            "broker": BrokerSettings(url=redis_server.url, queue=queue_name).model_dump(),
            "store": mongo_settings(mongo_server.url, unique_name).model_dump(),
            "features": tiny_features().model_dump(),
            "fetch": {"spool": tmp_path / "spool", "allow_private_hosts": True},
            "decode": {"processes": 1},
            "fusion": {"bundle": tmp_path / "bundle"},
            "workers": {"slots": 4, "extractors": [{"threads": 1}]},
            "king": {"health_file": tmp_path / "king.json"},
            "log": {"format": "json"},
        }
    )


def write_config(path: Path, settings: Settings) -> str:
    path.write_text(yaml.safe_dump(settings.model_dump(mode="json"), allow_unicode=True))
    return str(path)


@pytest.mark.redis
@pytest.mark.slow
def test_from_message_to_tags_on_real_media(tmp_path: Path, settings: Settings, web: str) -> None:
    """Messages in, tags out: the whole daemon; a broken file costs its modality only.

    The same posts through `workers.local` get the same tags.
    """
    from workers.local import local_runner

    version = tiny_bundle(settings.fusion.bundle, settings.features, threshold=(0.01, 0.01, 0.99))
    store = Store(StoreClient(settings.store))
    files: dict[str, Any] = {
        "images": [f"{web}/a.jpg"],
        "videos": [{"url": f"{web}/a.mp4"}],
        "audios": f"{web}/a.wav",
    }
    store.client.posts.insert_many(
        [
            {"_id": "full", "text": "一只猫 runs", **files},
            {"_id": 7, "text": "only text"},
            {"_id": "junk", "text": "a cat", "images": [f"{web}/junk.jpg", f"{web}/gone.jpg"]},
            {"_id": "nothing", "images": [f"{web}/gone.jpg"]},
        ]
    )
    ids = ["full", "7", "junk", "nothing", "unknown"]
    publish_posts(settings.broker, [PostMessage(i) for i in ids])
    done = run("--config", write_config(tmp_path / "c.yaml", settings), "--drain")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr

    results = {p["_id"]: p["insight"] for p in store.client.posts.find()}
    assert {key: r["status"] for key, r in results.items()} == {
        "full": "tagged",
        7: "tagged",
        "junk": "tagged",
        "nothing": "failed",
    }
    assert results["full"]["version"] == version
    assert results["full"]["modalities"]["video"] == "ok"
    assert results["full"]["modalities"]["audio"] == "ok"
    assert results["junk"]["modalities"]["image"] == "failed"
    assert results["nothing"]["error"]["stage"] == "fetch"
    assert {job.post_id for job in store.queries.dead_letters()} == {"nothing", "unknown"}
    assert not list((tmp_path / "spool").glob("king-*"))

    with local_runner(settings) as runner:
        for post_id in ("full", "7", "junk"):
            stored: Any = store.queries.post(post_id)
            tags = runner.run(stored.post).tags
            assert [t["name"] for t in stored.result["tags"]] == [t.name for t in tags.tags]
            for online, offline in zip(stored.result["tags"], tags.tags, strict=True):
                assert online["score"] == pytest.approx(offline.score, abs=1e-3)
    store.close()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--set", "king.attemps=3"), "king.attemps"),
        (("--config", "/none/absent.yaml"), "absent.yaml"),
        # A database of its own: the embedded one would be started before the queue is looked at.
        (("--set", "broker.url=http://x", "--set", "store.url=mongodb://h/"), "broker.url"),
    ],
)
def test_wrong_settings_are_one_line_and_exit_2(
    arguments: tuple[str, ...], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert online_process.main(arguments) == 2
    said = capsys.readouterr().err
    assert word in said
    assert len(said.strip().splitlines()) == 1


def test_unreachable_servers_are_named_without_passwords(tmp_path: Path) -> None:
    """At the start the daemon says which URL it cannot reach, and tries on.

    What ends it is a mistake of the user, the missing bundle: one line, no traceback, exit 2.
    """
    settings = Settings.model_validate(
        {
            "broker": BrokerSettings(url="redis://:geheim@127.0.0.1:9/0").model_dump(),
            "store": StoreSettings(
                url="mongodb://u:geheim@127.0.0.1:9/", timeout_s=0.3
            ).model_dump(),
            "king": {"health_file": tmp_path / "king.json"},
            "fusion": {"bundle": tmp_path / "bundle"},
            "fetch": {"spool": tmp_path / "spool"},
            "features": tiny_features().model_dump(),
            "log": {"format": "json"},
        }
    )
    done = run("--config", write_config(tmp_path / "c.yaml", settings))
    assert done.returncode == 2
    [line] = [text for text in done.stderr.splitlines() if not text.startswith("{")]
    assert "bundle" in line
    assert "Traceback" not in done.stderr
    assert "king.store_unreachable" in done.stderr
    assert "mongodb://u:***@127.0.0.1:9/" in done.stderr
    assert "redis://:***@127.0.0.1:9/0" in done.stderr
    assert "geheim" not in done.stderr
