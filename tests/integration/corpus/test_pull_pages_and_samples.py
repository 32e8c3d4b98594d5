"""Pages, samples and the resume record of ``pull_posts``, each by itself."""

import random
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import pymongo
import pytest
from bson import ObjectId

from common.errors import ConfigError
from common.post import Post
from config.settings import StoreSettings
from corpus.pull.pages import Pages, Position
from corpus.pull.posts import Choice, LeftOut, hash_of, sample
from corpus.pull.progress import Files
from fusion.data.data_file import CorpusPost


@pytest.mark.parametrize(
    ("ids", "by_range"),
    [
        ([ObjectId(f"65a0000000000000000000{i:02x}") for i in range(30)], None),
        ([*range(15), *(f"s{i}" for i in range(15))], None),
        ([f"s{i:02}" for i in range(30)], True),
        ([{"a": i} for i in range(30)], None),
    ],
    ids=["ObjectId", "mixed", "text by range", "objects"],
)
def test_pages_hold_every_document_once(
    mongo_url: str, unique_name: str, ids: list[Any], by_range: bool | None
) -> None:
    """From any position on, with IDs of any type, in an order that stays the same."""
    client: pymongo.MongoClient[dict[str, Any]] = pymongo.MongoClient(mongo_url)
    posts = client["insighttag"][unique_name]
    posts.insert_many([{"_id": i, "k": n % 3} for n, i in enumerate(ids)])
    store = StoreSettings(url=mongo_url, collection=unique_name)
    reader = Pages(store, {"k": {"$lt": 2}}, {"k": 1}, 4, by_range=by_range)
    try:
        pages = list(reader.pages(Position()))
        read = [document["_id"] for page in pages for document in page.documents]
        assert Counter(map(str, read)) == Counter(str(i) for n, i in enumerate(ids) if n % 3 < 2)
        assert {len(page.documents) for page in pages[:-1]} <= {1, 2, 3, 4}
        for n, page in enumerate(pages):
            rest = [d["_id"] for later in reader.pages(page.position) for d in later.documents]
            assert rest == [d["_id"] for later in pages[n + 1 :] for d in later.documents]
    finally:
        reader.close()
        posts.drop()
        client.close()


def tagged(count: int) -> list[CorpusPost]:
    """Posts with tags of very different frequency."""
    chance = random.Random(3)
    posts = []
    for i in range(count):
        labels = ["often"] + [f"t{j}" for j in range(8) if chance.random() < 0.4 / (j + 1)]
        posts.append(CorpusPost(Post(f"p{i}", labels=tuple(labels))))
    return posts


@pytest.mark.parametrize(("count", "minimum"), [(50, 0), (200, 10), (20, 10), (5000, 3)])
def test_sample_is_that_of_the_definition(count: int, minimum: int, tmp_path: Path) -> None:
    """The smallest hashes of each tag, then the smallest of all, until there are enough."""
    posts = tagged(1000)
    choice = sample(iter(posts), Choice(seed=5), count, minimum)
    taken = set()
    for post in posts:
        with suppress(LeftOut):
            choice.check_sampled(post.post.post_id)
            taken.add(post.post.post_id)

    order = sorted(posts, key=lambda p: hash_of(p.post.post_id, 5))
    expected: set[str] = set()
    for name in {name for p in posts for name in p.post.labels}:
        of_tag = [p.post.post_id for p in order if name in p.post.labels]
        expected |= set(of_tag[:minimum])
    for post in order:
        if len(expected) < count:
            expected.add(post.post.post_id)
    assert taken == expected
    Files(tmp_path / "p.jsonl", {}).keep_choice(choice)
    assert Files(tmp_path / "p.jsonl", {}).read_choice() == choice


def test_lines_after_the_record_are_cut_off(tmp_path: Path) -> None:
    out = tmp_path / "p.jsonl"
    files = Files(out, {"query": "{}"})
    files.open()
    files.write("one")
    files.reject("bad")
    files.summary.done()
    files.save(Position(2, ObjectId("65a000000000000000000001")))
    files.write("lost")
    files.close()
    again = Files(out, {"query": "{}"})
    again.open()
    assert again.position == Position(2, ObjectId("65a000000000000000000001"))
    assert again.written == again.summary.total == 1
    again.write("two")
    again.save(Position(2, 5), complete=True)
    again.finish()
    assert out.read_text() == "one\ntwo\n"
    assert (tmp_path / "p.rejected.jsonl").read_text() == "bad\n"
    assert not again.begun


def test_spoilt_record_is_named(tmp_path: Path) -> None:
    """A record that cannot be read, or a part that is too short, asks for --restart."""
    out = tmp_path / "p.jsonl"
    files = Files(out, {})
    files.open()
    files.write("one")
    files.save(Position())
    files.close()
    (tmp_path / ".p.jsonl.part").write_text("")
    with pytest.raises(ConfigError, match="shorter than it was; add --restart"):
        Files(out, {}).open()
    (tmp_path / ".p.jsonl.pull").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read; add --restart"):
        Files(out, {}).open()
