"""Posts with a cache: the same features as without, and nothing is done twice."""

import hashlib
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import cv2
import numpy as np
import pytest

from common.post import Features, Media, Post
from config.settings import Settings
from extractors.suite import ExtractorSuite
from tests.support import media
from tests.support.tiny_models import tiny_features
from workers import local
from workers.cache.store import open_store
from workers.local import local_runner
from workers.roles import batched

KINDS = {".png": "image", ".mp4": "video", ".wav": "audio"}
_LOADED: dict[str, Any] = {}
NAMES = ("sign.png", "v.mp4", "s.wav", "broken.mp4")


class _Handler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    sign = np.full((120, 300, 3), 255, np.uint8)
    cv2.putText(sign, "HELLO", (20, 80), cv2.FONT_HERSHEY_SIMPLEX, 2, (20, 20, 120), 4)
    media.write_png(folder / "sign.png", sign)
    sound = media.tone(duration_s=2, rate_hz=44100)
    media.write_video(folder / "v.mp4", media.grey_steps(30), audio=sound)
    media.write_wav(folder / "s.wav", media.tone(duration_s=1.5))
    media.write_random(folder / "broken.mp4")
    return folder


class World:
    """A media server and runners whose work is counted."""

    def __init__(self, files: Path, folder: Path) -> None:
        self.files = files
        self.downloads: Counter[str] = Counter()
        self.work: Counter[str] = Counter()
        self.cache = folder / "cache"
        handler = partial(self._handler(), directory=str(files))
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.thread = Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def _handler(self) -> type[SimpleHTTPRequestHandler]:
        downloads = self.downloads

        class Counting(_Handler):
            def do_GET(self) -> None:
                downloads[self.path.lstrip("/")] += 1
                super().do_GET()

        return Counting

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def settings(self, **sections: Any) -> Settings:
        features = tiny_features(ocr=True).model_dump()
        for name, content in sections.pop("features", {}).items():
            features[name] = {**features[name], **content}
        values = {
            "features": features,
            "fetch": {"allow_private_hosts": True, "total_timeout_s": 5},
            "cache": {"url": str(self.cache)},
        }
        for name, content in sections.items():
            values[name] = {**values.get(name, {}), **content}
        return Settings.model_validate(values)

    def post(self, *names: str, query: str = "") -> Post:
        listed = [Media(KINDS[Path(n).suffix], f"{self.url}/{n}{query}") for n in names]  # type: ignore[arg-type]
        return Post("p", "a cat", tuple(listed))

    def features(self, post: Post, settings: Settings) -> Features:
        """Run one post in a runner of its own; `work` says what it did."""
        self.work.clear()
        self.downloads.clear()
        with local_runner(settings, fuse=False) as runner:
            return runner.run(post).features


@pytest.fixture
def world(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    made = World(files, tmp_path)
    run, decode, load = ExtractorSuite.run, batched.run_decode, ExtractorSuite.load

    def loaded_once(suite: ExtractorSuite, *_names: str) -> None:
        """Models are loaded once for all tests."""
        key = suite.features.model_dump_json(exclude={"ocr_mode"})
        if key not in _LOADED:
            load(suite)
            _LOADED[key] = suite._extractors
        suite._extractors = _LOADED[key]

    def counted_run(suite: ExtractorSuite, name: Any, items: Sequence[Any]) -> list[Any]:
        made.work[name] += len(items)
        return run(suite, name, items)

    def counted_decode(task: Any, *more: Any) -> Any:
        made.work["decode"] += 1
        return decode(task, *more)

    monkeypatch.setattr(ExtractorSuite, "load", loaded_once)
    monkeypatch.setattr(ExtractorSuite, "close", lambda _suite: None)
    monkeypatch.setattr(ExtractorSuite, "run", counted_run)
    monkeypatch.setattr(local, "run_decode", counted_decode)
    with closing(made):
        yield made


def same(one: Features, other: Features) -> None:
    """Bit for bit."""
    assert (one.statuses, one.failures, one.ocr_text) == (
        other.statuses,
        other.failures,
        other.ocr_text,
    )
    assert set(one.arrays) == set(other.arrays)
    for stream, array in one.arrays.items():
        assert array.tobytes() == other.arrays[stream].tobytes(), stream


@pytest.mark.parametrize("mode", ["separate", "append"])
def test_second_time_needs_nothing(world: World, mode: str) -> None:
    settings = world.settings()
    features = settings.features.model_copy(update={"ocr_mode": mode})
    settings = settings.model_copy(update={"features": features})
    post = world.post(*NAMES)
    plain = world.features(post, settings.model_copy(update={"cache": Settings().cache}))
    assert plain.ocr_text == "HELLO"
    assert plain.statuses["video"] == "ok"
    assert plain.failures["video"].type == "MediaError"
    first = world.features(post, settings)
    assert world.downloads == dict.fromkeys(NAMES, 1)
    assert world.work == {
        "decode": 4,
        "video": 1,
        "image": 1,
        "audio": 2,
        "ocr": 2,
        "text": (2 if mode == "separate" else 1),
    }
    world.close()
    second = world.features(post, settings)
    assert not world.downloads
    assert not world.work
    same(plain, first)
    same(plain, second)


def test_other_weights_of_one_extractor(world: World) -> None:
    """Only the extractor whose weights changed runs again."""
    post = world.post("sign.png", "v.mp4", "s.wav")
    before = world.features(post, world.settings())
    changed = world.settings(features={"audio": {"weights": "random:2"}})
    after = world.features(post, changed)
    assert world.work == {"decode": 2, "audio": 2}
    assert set(world.downloads) == {"v.mp4", "s.wav"}
    assert after.arrays["audio"].tobytes() != before.arrays["audio"].tobytes()
    assert after.arrays["video"].tobytes() == before.arrays["video"].tobytes()
    same(after, world.features(post, changed.model_copy(update={"cache": Settings().cache})))


def test_same_file_under_another_url(world: World) -> None:
    names = ("sign.png", "v.mp4")
    first = world.features(world.post(*names), world.settings())
    second = world.features(world.post(*names, query="?signature=2"), world.settings())
    assert sum(world.downloads.values()) == 2
    # The pictures' text was not known before the download, so that only it is embedded again.
    assert set(world.work) <= {"text"}
    same(first, second)


def test_url_that_is_not_trusted(world: World, tmp_path: Path) -> None:
    """With `sources_ttl_s: 0` a changed file under an old URL is seen; with null it is not."""
    folder = tmp_path / "changing"
    shutil.copytree(world.files, folder)
    world.close()
    other = World(folder, tmp_path)
    try:
        other.work = world.work
        post = other.post("sign.png")
        trusting = other.settings()
        careful = other.settings(cache={"sources_ttl_s": 0})
        before = other.features(post, careful)
        media.write_png(folder / "sign.png", media.quadrants(90, 70))
        after = other.features(post, careful)
        assert after.arrays["image"].tobytes() != before.arrays["image"].tobytes()
        assert after.ocr_text is None
        other.features(post, trusting)
        media.write_png(folder / "sign.png", media.halves(90, 70))
        stale = other.features(post, trusting)
        assert stale.arrays["image"].tobytes() == after.arrays["image"].tobytes()
    finally:
        other.close()
        world.server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        world.thread = Thread(target=world.server.serve_forever)
        world.thread.start()


def test_broken_file_is_not_decoded_again(world: World, tmp_path: Path) -> None:
    post = world.post("broken.mp4", "sign.png")
    first = world.features(post, world.settings())
    assert first.failures["video"].type == "MediaError"
    second = world.features(post, world.settings())
    assert not world.work
    same(first, second)
    world.features(post, world.settings(decode={"max_pixels": 99_999}))
    # What the broken file may say is open until then, and with it the text to embed.
    assert world.work == {"decode": 1, "text": 1}


def test_files_on_disk(world: World) -> None:
    """Local files are known by their content, wherever they lie and whatever they are called."""
    named = [Media(KINDS[Path(n).suffix], str(world.files / n)) for n in NAMES]  # type: ignore[arg-type]
    first = world.features(Post("p", "a cat", tuple(named)), world.settings())
    assert world.work["decode"] == 4
    second = world.features(Post("p", "a cat", tuple(named)), world.settings())
    assert not world.work
    same(first, second)
    third = world.features(world.post(*NAMES), world.settings())
    assert set(world.work) <= {"text"}
    same(first, third)


def test_damaged_cache_is_made_anew(world: World) -> None:
    """Every entry cut or overwritten: the features are right all the same, and kept again."""
    post = world.post("sign.png", "v.mp4")
    first = world.features(post, world.settings())
    entries = [path for path in world.cache.rglob("*") if path.is_file()]
    assert len(entries) > 6
    for i, path in enumerate(entries):
        path.write_bytes(path.read_bytes()[: i * 7] if i % 2 else b"garbage")
    same(first, world.features(post, world.settings()))
    third = world.features(post, world.settings())
    assert not world.work
    same(first, third)


def test_only_digests_lie_in_the_cache(world: World) -> None:
    """Neither URLs nor names of posts are written there."""
    world.features(world.post("sign.png"), world.settings())
    everything = b"".join(p.read_bytes() for p in world.cache.rglob("*") if p.is_file())
    assert b"sign.png" not in everything
    assert b"127.0.0.1" not in everything
    digest = hashlib.sha256((world.files / "sign.png").read_bytes()).hexdigest()
    assert digest.encode() in everything
    assert open_store(world.settings().cache).stats().entries == 6
