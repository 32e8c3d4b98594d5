"""A post's tags without the daemon: what an engineer would write around the same extractors.

Download with some threads, decode, run each extractor on what all posts of the batch have for it,
fuse, write. What fails costs its modality, as in the daemon. The loop, Celery and Ray share it.

A run has a folder (``PEERS_FOLDER``): ``settings.yaml``; the IDs in ``warm.json`` and
``posts.json``; a file for each process that is ready; and ``go``, which appears when the measured
posts may begin.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from uuid import uuid4

import cv2
import numpy as np
import requests
import torch
from pymongo import MongoClient, UpdateOne

from common.errors import TaggingError
from common.post import MODALITIES, Failure, Features, MediaKind, Post, TagResult, Tags
from config.load import load_settings
from config.settings import Settings
from extractors.media.decode import DecodedMedia, decode_media
from extractors.parts import PARTS
from extractors.suite import ExtractorSuite
from fusion.infer.inferer import Inferer
from king.store.documents import read_post

FOLDER = Path(os.environ.get("PEERS_FOLDER", "."))
_DOWNLOADS = 8
_OCR = "picture"


@dataclass
class _Draft:
    """Everything known of a post on its way."""

    arrays: dict[Any, list[Any]] = field(default_factory=lambda: defaultdict(list))
    failures: dict[Any, Failure] = field(default_factory=dict)
    read: list[str] = field(default_factory=list)

    def add(self, name: str, result: Any) -> None:
        """Take the result of an extractor: an array, the text in pictures, or its error."""
        if isinstance(result, Exception):
            self.failures.setdefault(name, Failure.of("extract", result))
        elif isinstance(result, str):
            self.read.append(result)
        elif len(result):
            self.arrays[name].append(result)

    def whole(self, post_id: str) -> Features:
        """Return the features."""
        arrays = {name: np.concatenate(each) for name, each in self.arrays.items()}
        absent = {m: "failed" if m in self.failures else "missing" for m in MODALITIES}
        statuses: Any = {m: "ok" if m in arrays else absent[m] for m in MODALITIES}
        return Features(post_id, arrays, statuses, self.failures)


class Tagger:
    """Models, a database and a media client in this process."""

    def __init__(self, settings: Settings, posts: Any = None) -> None:
        """Load everything, on one thread; `tag` needs the collection of posts."""
        torch.set_num_threads(1)
        cv2.setNumThreads(1)
        self._settings = settings
        self._suite = ExtractorSuite(settings.features, "cpu", threads=1)
        self._suite.load()
        self._inferer = Inferer.load(settings.fusion.bundle, device="cpu", threads=1)
        self._posts = posts
        self._session = requests.Session()
        self._session.mount("http://", requests.adapters.HTTPAdapter(pool_maxsize=_DOWNLOADS))
        self._threads = ThreadPoolExecutor(_DOWNLOADS)
        self._downloads = tempfile.TemporaryDirectory(prefix="peer-")

    def close(self) -> None:
        """Disconnect, and delete the folder of downloads."""
        self._threads.shutdown()
        self._session.close()
        self._downloads.cleanup()

    def tag(self, ids: Sequence[str]) -> int:
        """Read, tag and write posts; gives their number."""
        settings = self._settings.store
        stored = self._posts.find({"_id": {"$in": list(ids)}})
        posts = [read_post(str(each["_id"]), each, settings.fields) for each in stored]
        features = self.features(posts)
        tags = {each.post_id: each for each in self.fuse([f for f in features if f.arrays])}
        writes = []
        for each in features:
            if each.post_id in tags:
                result = TagResult.tagged(tags[each.post_id], each)
            else:
                error = next(iter(each.failures.values()))
                bundle = (self._inferer.name, self._inferer.version)
                result = TagResult.failed(each.post_id, bundle, error)
            document = {**result.document(), "tagged_at": datetime.now(timezone.utc)}
            change = {"$set": {settings.result_path: document}}
            writes.append(UpdateOne({"_id": each.post_id}, change))
        self._posts.bulk_write(writes, ordered=False)
        return len(writes)

    def features(self, posts: Sequence[Post]) -> list[Features]:
        """Return the features of posts, extracted together."""
        drafts = [_Draft() for _ in posts]
        inputs: dict[str, list[tuple[_Draft, Any]]] = {}
        files = [(d, each) for post, d in zip(posts, drafts, strict=True) for each in post.media]
        paths = list(self._threads.map(self._download, [each.source for _, each in files]))
        for (draft, each), path in zip(files, paths, strict=True):
            media = self._decoded(draft, each.kind, path)
            for kind, array in media.parts:
                if kind != _OCR:
                    inputs.setdefault(PARTS[kind].modality, []).append((draft, array))
            if media.pictures:
                inputs.setdefault("ocr", []).append((draft, media.pictures))
        for name, items in inputs.items():
            results = self._run(name, [item for _, item in items])
            for (draft, _), result in zip(items, results, strict=True):
                draft.add(name, result)
        texts = [
            (draft, name, text)
            for post, draft in zip(posts, drafts, strict=True)
            for name, text in (("text", post.text), ("ocr", "\n".join(filter(None, draft.read))))
            if text.strip()
        ]
        results = self._run("text", [text for _, _, text in texts])
        for (draft, name, _), result in zip(texts, results, strict=True):
            draft.add(name, result)
        return [draft.whole(post.post_id) for post, draft in zip(posts, drafts, strict=True)]

    def fuse(self, features: Sequence[Features]) -> list[Tags]:
        """Return the tags of posts."""
        return self._inferer.predict(features)

    def decode(self, kind: MediaKind, path: Path) -> DecodedMedia:
        """Decode a file."""
        return decode_media(kind, path, self._settings.features, self._settings.decode)

    def extract(self, name: Any, items: Sequence[Any]) -> list[Any]:
        """Run an extractor on a batch."""
        return self._suite.run(name, items)

    def _decoded(self, draft: _Draft, kind: MediaKind, path: Path | Exception) -> DecodedMedia:
        if isinstance(path, Exception):
            draft.failures.setdefault(kind, Failure.of("fetch", path))
            return DecodedMedia()
        try:
            media = self.decode(kind, path)
        except TaggingError as error:
            draft.failures.setdefault(kind, Failure.of("decode", error))
            return DecodedMedia()
        finally:
            path.unlink()
        draft.failures.update(media.failures)
        return media

    def _run(self, name: Any, items: list[Any]) -> list[Any]:
        """Run an extractor on a batch; when that fails, on its members one by one."""
        if not items:
            return []
        try:
            return self.extract(name, items)
        except TaggingError as error:
            if len(items) == 1:
                return [error]
            return [self._run(name, [item])[0] for item in items]

    def _download(self, url: str) -> Path | Exception:
        path = Path(self._downloads.name, uuid4().hex)
        try:
            with path.open("wb") as file, self._session.get(url, stream=True, timeout=15) as answer:
                answer.raise_for_status()
                for chunk in answer.iter_content(1 << 16):
                    file.write(chunk)
        except requests.RequestException as error:
            path.unlink()
            return error
        return path


def load_tagger() -> Tagger:
    """Return a tagger with the settings of the run, and tell the bench that it has loaded."""
    settings = load_settings(FOLDER / "settings.yaml")
    client: MongoClient[dict[str, Any]] = MongoClient(settings.store.url, tz_aware=True)
    tagger = Tagger(settings, client[settings.store.database][settings.store.collection])
    (FOLDER / f"ready-{os.getpid()}").touch()
    return tagger


def batches(processes: int, size: int) -> list[list[str]]:
    """Return the IDs of the run: those to warm up with, a batch a process; then the measured."""
    warm, ids = (json.loads((FOLDER / f"{name}.json").read_text()) for name in ("warm", "posts"))
    measured = [ids[i : i + size] for i in range(0, len(ids), size)]
    return [warm[i::processes] for i in range(processes)] + measured


def wait_for_go() -> None:
    """Wait until the measured posts may begin."""
    while not (FOLDER / "go").exists():
        time.sleep(0.02)
