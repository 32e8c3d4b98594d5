"""One entry as bytes, what its key depends on, and what a bad cache does to a post: nothing."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from structlog.testing import capture_logs

from common.errors import CacheUnavailable
from config.settings import CacheSettings, Settings
from tests.support.tiny_models import tiny_features
from workers.cache.entries import CorruptEntry, Entry, GuardedStore, decode, encode
from workers.cache.features import Keys
from workers.cache.store import CacheStore, StoredEntry

KEY = "ab" * 32
SHA = "cd" * 32


def arrays() -> dict[str, np.ndarray]:
    random = np.random.default_rng(1)
    return {
        "video": random.normal(size=(4, 64)).astype(np.float16),
        "video_lstm": random.normal(size=(1, 7)).astype(np.float16),
        "empty": np.empty((0, 9), np.float16),
    }


def test_entry_comes_back() -> None:
    entry = Entry(arrays(), "猫 \ud83d\nx", {"parts": ["frames"], "at": 1.5})
    decoded = decode(KEY, encode(KEY, entry))
    assert (decoded.text, decoded.facts) == (entry.text, entry.facts)
    assert list(decoded.arrays) == list(entry.arrays)
    for name, array in entry.arrays.items():
        assert decoded.arrays[name].dtype == np.float16
        assert decoded.arrays[name].shape == array.shape
        assert decoded.arrays[name].tobytes() == array.tobytes()


def test_changed_bytes_are_no_entry() -> None:
    content = encode(KEY, Entry({"image": np.ones((2, 3), np.float16)}, "text"))
    for i in range(len(content)):
        with pytest.raises(CorruptEntry):
            decode(KEY, content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :])
        with pytest.raises(CorruptEntry):
            decode(KEY, content[:i])
    with pytest.raises(CorruptEntry):
        decode(KEY, content + b"\0")
    with pytest.raises(CorruptEntry):
        decode("ac" * 32, content)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_no_features(value: float) -> None:
    content = encode(KEY, Entry({"image": np.full((1, 2), value, np.float16)}))
    with pytest.raises(CorruptEntry, match="not finite"):
        decode(KEY, content)


BASE: dict[str, Any] = {"features": tiny_features(ocr=True).model_dump()}


def keys_of(**changes: Any) -> dict[str, str]:
    """Every kind of key under settings with some changes, given as dotted paths with ``__``."""
    settings = Settings.model_validate(BASE).model_dump()
    for path, value in changes.items():
        *way, last = path.split("__")
        section = settings
        for name in way:
            section = section[name]
        section[last] = value
    keys = Keys(Settings.model_validate(settings))
    return {
        "source": keys.source("http://a/b.png"),
        "image": keys.stream(SHA, "image", "image", "f"),
        "image ocr": keys.stream(SHA, "image", "ocr", "f"),
        "video": keys.stream(SHA, "video", "video", "f"),
        "video ocr": keys.stream(SHA, "video", "ocr", "f"),
        "sound": keys.stream(SHA, "audio", "audio", "f"),
        "video sound": keys.stream(SHA, "video", "audio", "f"),
        "text": keys.text("t", "f"),
        "media image": keys.media(SHA, "image"),
        "media video": keys.media(SHA, "video"),
        "media audio": keys.media(SHA, "audio"),
        "limits": keys.limits,
    }


@pytest.mark.parametrize(
    ("change", "changed"),
    [
        ({"decode__max_audio_s": 7}, "sound, video sound, media audio, media video, limits"),
        (
            {"decode__max_duration_s": 7},
            "sound, video sound, video, video ocr, media audio, media video",
        ),
        ({"decode__max_pixels": 9}, "limits"),
        ({"decode__memory_mb": 9}, "limits"),
        ({"features__image__max_frames": 3}, "image ocr, media image"),
        ({"features__image__padded": True}, "media image"),
        ({"features__video__frames": 300}, "video ocr, media video, limits"),
        ({"features__video__decode": "keyframes"}, "video ocr, media video"),
        ({"features__ocr__enabled": False}, "media image, media video, limits"),
        ({"features__ocr__frames": 0}, "media video, limits"),
        ({"features__image__precision": "auto"}, "image"),
        ({"features__video__precision": "auto"}, "video"),
        ({"features__audio__precision": "auto"}, "sound, video sound"),
        ({"features__text__precision": "auto"}, "text"),
        ({"fetch__allow_private_hosts": True}, "source"),
        ({"features__ocr_mode": "append"}, ""),
        ({"decode__processes": 7}, ""),
        ({"features__image__batch_size": 7}, ""),
        ({"store__database": "x"}, ""),
        ({"cache__max_mb": 7}, ""),
    ],
)
def test_what_changes_a_result_changes_its_key(change: dict[str, Any], changed: str) -> None:
    before, after = keys_of(), keys_of(**change)
    different = {name for name in before if before[name] != after[name]}
    assert different == {name for name in changed.split(", ") if name}


def test_keys_are_all_different() -> None:
    keys = Keys(Settings.model_validate(BASE))
    all_keys = list(keys_of().values())
    all_keys += [keys.stream(SHA, "image", "image", "g"), keys.stream(KEY, "image", "image", "f")]
    all_keys += [keys.text("t", "g"), keys.text("u", "f"), keys.text("\ud800", "f")]
    assert len(set(all_keys)) == len(all_keys)
    assert all(len(key) == 64 and set(key) <= set("0123456789abcdef") for key in all_keys)


class Flaky(CacheStore):
    """A store in memory that can be switched off."""

    def __init__(self) -> None:
        super().__init__(0)
        self.values: dict[str, bytes] = {}
        self.away = False
        self.calls = 0

    def _check(self) -> None:
        self.calls += 1
        if self.away:
            raise CacheUnavailable("it is away")

    def get_many(self, keys: Sequence[str]) -> Mapping[str, bytes]:
        self._check()
        return {key: self.values[key] for key in keys if key in self.values}

    def put(self, key: str, value: bytes) -> None:
        self._check()
        self.values[key] = value

    def delete(self, keys: Iterable[str]) -> None:
        self._check()
        for key in keys:
            self.values.pop(key, None)

    def _name(self, key: str) -> str:
        return key

    def _entries(self) -> list[StoredEntry]:
        return []

    def _remove(self, names: Sequence[str]) -> None:
        pass

    def close(self) -> None:
        self._check()


def test_cache_that_is_away_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """One warning, no further call until the time is over; then it is used again, and says so."""
    now = [100.0]
    monkeypatch.setattr("workers.cache.entries.time.monotonic", lambda: now[0])
    store = Flaky()
    guarded = GuardedStore(store, retry_s=30, where="redis://***")
    entry = Entry(text="read")
    guarded.put(KEY, entry)
    store.away = True
    with capture_logs() as logs:
        for _ in range(5):
            assert guarded.get_many([KEY]) == {}
            guarded.put(KEY, entry)
    assert [line["event"] for line in logs] == ["cache.unavailable"]
    assert store.calls == 2
    store.away = False
    with capture_logs() as logs:
        now[0] += 30
        assert guarded.get_many([KEY])[KEY].text == "read"
        guarded.get_many([KEY])
    assert [line["event"] for line in logs] == ["cache.available_again"]


def test_corrupt_entry_is_a_miss_and_goes() -> None:
    store = Flaky()
    guarded = GuardedStore(store, retry_s=1)
    other = "ef" * 32
    guarded.put(KEY, Entry(text="a"))
    guarded.put(other, Entry(text="b"))
    store.values[KEY] = store.values[KEY][:-1]
    assert list(guarded.get_many([KEY, other])) == [other]
    assert list(store.values) == [other]


def test_closing_a_dead_cache_is_quiet() -> None:
    store = Flaky()
    store.away = True
    GuardedStore(store, retry_s=1).close()


def test_url_of_a_cache_is_shown_without_password() -> None:
    guarded = GuardedStore.open(CacheSettings(url="redis://user:hush@127.0.0.1:1/0", timeout_s=0.3))
    with capture_logs() as logs:
        guarded.get_many([KEY])
    assert "hush" not in str(logs)
    assert "redis://user:***@127.0.0.1:1/0" in str(logs)
