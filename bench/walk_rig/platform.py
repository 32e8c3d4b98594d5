"""A platform to pull from: posts with real media on a server, and documents in a database."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pymongo import MongoClient

from config.load import load_settings
from config.settings import Settings
from demo.__main__ import CONFIG
from demo.posts.make import make_posts
from demo.posts.plan import plan_posts
from deploy import embedded
from walk_rig import broken
from walk_rig.broken import Plant
from walk_rig.site import Site, site_of


@dataclass(frozen=True)
class Platform:
    """The platform at the beginning of the walk.

    Attributes:
        folder: Of the walk; settings.yaml lies there.
        plants: Which posts are broken, and how.
        posts: Documents in the database.
    """

    folder: Path
    site: Site
    plants: Sequence[Plant]
    posts: int

    @property
    def settings(self) -> Path:
        """Return the settings file that the commands name."""
        return self.folder / "settings.yaml"


@contextlib.contextmanager
def platform(
    folder: Path, posts: int, spoilt: int, seed: int, processes: int = 2
) -> Iterator[Platform]:
    """Make posts, break some, serve their media, put the documents into a database.

    Args:
        folder: An empty one.
        posts: How many.
        spoilt: Posts to break.
        seed: Another seed, other posts.
        processes: That make media.
    """
    origin = folder / "platform"
    plans = plan_posts(posts, seed, "train", noise=0.3, missing=0.05)
    entries = list(make_posts(origin, plans, processes))
    settings = write_settings(folder)
    online = embedded.ensure(settings, ("mongo",))
    try:
        with site_of(origin) as site, closed_port() as dead:
            where = broken.Site(origin, site.url, f"http://127.0.0.1:{dead}")
            documents, plants = broken.plant(entries, where, spoilt, seed)
            note = [{"post_id": p.post_id, "way": p.way, "source": p.source} for p in plants]
            (folder / "planted.json").write_text(json.dumps(note, indent=1), encoding="utf-8")
            store = settings.store
            client: MongoClient[dict[str, Any]] = MongoClient(online["mongo"].url)
            with client:
                collection = client[store.database][store.collection]
                for start in range(0, len(documents), 1000):
                    collection.insert_many(documents[start : start + 1000])
            yield Platform(folder, site, plants, len(documents))
    finally:
        embedded.stop(settings)


def write_settings(folder: Path) -> Settings:
    """Write the demo's settings with a database of their own, in ``folder/settings.yaml``."""
    content: dict[str, Any] = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    content["store"] = {
        "url": "embedded://",
        "database": "platform",
        "fields": {"author": "author", "created": "created"},
    }
    content["embedded"] = {"folder": str(folder / "embedded")}
    content["fetch"] = {"allow_private_hosts": True, "spool": str(folder / "spool")}
    file = folder / "settings.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return load_settings(file, [])


@contextlib.contextmanager
def closed_port() -> Iterator[int]:
    """Yield a port that nobody listens on, and that nobody else gets."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield int(holder.getsockname()[1])


def fresh(folder: Path) -> Path:
    """Return an empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
