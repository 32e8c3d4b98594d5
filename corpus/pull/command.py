"""Posts of the database to a posts file: the options, and the pull from start to end."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import bson
from bson import json_util
from bson.errors import BSONError

from common.errors import ConfigError, TaggingError, one_line
from common.progress import progress_bar
from common.times import since_time
from common.urls import redact
from config.settings import StoreSettings
from corpus.pull.pages import Page, Pages, Position
from corpus.pull.posts import (
    Choice,
    NoPost,
    convert,
    created_at,
    projection,
    rare_tags,
    sample,
    shown_id,
)
from corpus.pull.progress import Files
from corpus.records import post_line
from corpus.runs import Stopper, only_one
from fusion.data.data_file import CorpusPost


@dataclass(frozen=True, slots=True)
class Options:
    """Options of a pull.

    Attributes:
        store: With the URL as it stands in the settings, ``embedded://`` included.
        query: A MongoDB filter, as it was written: extended JSON.
        since: Oldest time, as it was written; `until` the same, not included itself.
        sample: Posts to pick out of all; None takes all.
        min_posts_per_tag: Tags with fewer posts are left out; 0 leaves out none.
        seed: Another seed, another sample.
        limit: Posts written at most.
        untagged: Only posts without a result.
        page: Documents read at a time.
        restart: Forget an unfinished pull.
    """

    store: StoreSettings
    out: Path
    query: str = "{}"
    since: str | None = None
    until: str | None = None
    sample: int | None = None
    min_posts_per_tag: int = 0
    seed: int = 0
    limit: int | None = None
    untagged: bool = False
    page: int = 1000
    restart: bool = False


_AGAIN = "run the same command again to go on where it stopped"
_SHOWN_CHARS = 200


class Interrupted(Exception):
    """A signal came."""


def pull(options: Options, resolved: StoreSettings) -> int:
    """Pull everything; return the exit code.

    Args:
        options: What to pull.
        resolved: The store as it can be reached: no ``embedded://``.

    Raises:
        ConfigError: The query or a time is wrong, or another pull is under way there.
        TaggingError: The database stayed away, or the disk is full.
    """
    query = query_of(options)
    lock = options.out.with_name(f".{options.out.name}.lock")
    with only_one(lock, str(options.out)), Stopper() as stopper:
        pages = Pages(resolved, query, projection(options.store), options.page)
        run = _Pull(options, pages, lambda: stopper.asked)
        try:
            run.run()
        except Interrupted:
            sys.stderr.write(
                f"pull_posts: {stopper.asked}: {run.files.written:,} posts written; {_AGAIN}\n"
            )
            return 1
        except OSError as error:
            reason = f"{options.out}: {error.strerror or error}"
            raise TaggingError(f"stopped: {reason}; make room, then {_AGAIN}") from error
        finally:
            run.files.close()
            pages.close()
    if not run.files.summary.total:
        sys.stderr.write(f"pull_posts: {_nothing(options)}\n")
    run.files.summary.show()
    sys.stdout.write(f"{run.files.written:,} posts: {options.out}\n")
    return 0


def _nothing(options: Options) -> str:
    """Say in one line that nothing matched."""
    store = options.store
    where = f"collection {store.database}.{store.collection}"
    if not query_of(options):
        return f"{where} holds no document"
    query = f"--query {' '.join(options.query.split())}"[:_SHOWN_CHARS]
    asked = [query] if read_query(options.query) else []
    asked += ["--untagged"] if options.untagged else []
    return f"no document of {where} matches {' '.join(asked)}"


def query_of(options: Options) -> dict[str, Any]:
    """Return the filter.

    Raises:
        ConfigError: See `read_query`.
    """
    query = read_query(options.query)
    if not options.untagged:
        return query
    untagged = {f"{options.store.result_path}.status": None}
    return {"$and": [query, untagged]} if query else untagged


def read_query(text: str) -> dict[str, Any]:
    """Read a condition in MongoDB's extended JSON.

    Raises:
        ConfigError: It is no JSON object, or holds what a database has no type for.
    """
    try:
        query = json_util.loads(text)
    except (
        ValueError,
        TypeError,
        LookupError,
        ArithmeticError,
        RecursionError,
        BSONError,
    ) as error:
        reason = one_line(error)
        raise ConfigError(f"--query: not JSON: {reason}") from error
    if not isinstance(query, dict):
        raise ConfigError('--query: must be an object, as {"lang": "en"}')
    try:
        bson.encode(query)
    except (ValueError, OverflowError, RecursionError, BSONError) as error:
        reason = one_line(error)
        raise ConfigError(f"--query: cannot be asked for: {reason}") from error
    return query


class _Pull:
    """One pull, begun or going on."""

    def __init__(self, options: Options, pages: Pages, asked: Callable[[], object]) -> None:
        self._options, self._pages, self._asked = options, pages, asked
        self._fields = options.store.fields
        self._since: float | None = None
        self._until: float | None = None
        self.files = Files(options.out, _asked(options))

    def run(self) -> None:
        """Read, choose, write.

        Raises:
            Interrupted: A signal came; the record is up to date.
        """
        files = self.files
        if self._options.restart:
            files.forget()
        fresh = not files.begun
        files.open()
        if not files.complete:
            self._set_times()
            total = self._pages.count()
            choice = self._choose(total, None if fresh else files.read_choice())
            self._write(choice, total)
        files.finish()

    def _set_times(self) -> None:
        """Count ``7d`` from the beginning of the pull, also when it goes on later."""
        times = self.files.times
        for name, text in (("since", self._options.since), ("until", self._options.until)):
            if name not in times:
                times[name] = _moment(name, text)
        self._since, self._until = times["since"], times["until"]

    def _choose(self, total: int, saved: Choice | None) -> Choice:
        minimum, count = self._options.min_posts_per_tag, self._options.sample
        if not minimum and count is None:
            return Choice()
        if saved is not None:
            return saved
        choice = Choice(seed=self._options.seed, need_tag=minimum > 0)
        if minimum:
            choice = replace(choice, rare=rare_tags(self._eligible(Choice(), total), minimum))
        if count is not None:
            choice = sample(self._eligible(choice, total), choice, count, minimum)
        self.files.keep_choice(choice)
        self.files.save(Position())
        return choice

    def _eligible(self, choice: Choice, total: int) -> Iterator[CorpusPost]:
        with _bar("counting", total) as advance:
            for page in self._pages.pages(Position()):
                self._heed()
                for document in page.documents:
                    try:
                        entry = self._in_time(document)
                    except (NoPost, _LeftOut):
                        continue
                    post = choice.without_rare(entry)
                    if isinstance(post, CorpusPost):
                        yield post
                advance(len(page.documents), "")

    def _write(self, choice: Choice, total: int) -> None:
        files = self.files
        begun = files.summary.total
        if choice.need_tag:
            files.summary.figures["tags of too few posts"] = len(choice.rare)
        position = files.position
        with _bar("posts", total) as advance:
            advance(begun, "")
            for page in self._pages.pages(files.position):
                full = self._write_page(page, choice)
                position = page.position
                files.save(position, complete=full)
                advance(len(page.documents), f"{files.written:,} written")
                if full:
                    return
                self._heed()
        files.save(position, complete=True)

    def _write_page(self, page: Page, choice: Choice) -> bool:
        """Write the chosen posts of a page; return True when the limit is reached."""
        files, limit = self.files, self._options.limit
        for document in page.documents:
            if limit is not None and files.written >= limit:
                return True
            try:
                entry = self._in_time(document)
            except NoPost as error:
                files.summary.failed(str(error))
                files.reject(_rejected(document, str(error)))
                continue
            except _LeftOut as error:
                files.summary.skipped(str(error))
                continue
            post = choice.without_rare(entry)
            if isinstance(post, str):
                files.summary.skipped(post)
            elif not choice.sampled(post.post.post_id):
                files.summary.skipped("not in the sample")
            else:
                files.write(post_line(post))
                files.summary.done()
        return limit is not None and files.written >= limit

    def _in_time(self, document: Mapping[str, Any]) -> CorpusPost:
        entry = convert(document, self._fields)
        if self._since is None and self._until is None:
            return entry
        made_at = created_at(document, self._fields)
        if made_at is None:
            raise _LeftOut("no time is known")
        if self._since is not None and made_at < self._since:
            raise _LeftOut("before --since")
        if self._until is not None and made_at >= self._until:
            raise _LeftOut("not before --until")
        return entry

    def _heed(self) -> None:
        if self._asked():
            raise Interrupted


class _LeftOut(Exception):
    """A post that was not asked for; says why."""


def _asked(options: Options) -> dict[str, Any]:
    """Return the options that must be the same for a pull to go on; nothing secret."""
    store = options.store
    return {
        "database": f"{redact(store.url)} {store.database}.{store.collection}",
        "fields": store.fields.model_dump(),
        "query": options.query,
        "untagged": options.untagged and store.result_path,
        "since": options.since,
        "until": options.until,
        "sample": options.sample,
        "min_posts_per_tag": options.min_posts_per_tag,
        "seed": options.seed,
        "limit": options.limit,
    }


def _moment(name: str, text: str | None) -> float | None:
    try:
        return since_time(text, time.time())
    except ConfigError as error:
        raise ConfigError(str(error).replace("--since", f"--{name}", 1)) from error


def _rejected(document: Mapping[str, Any], reason: str) -> str:
    return json.dumps({"_id": shown_id(document), "reason": reason}, ensure_ascii=False)


@contextmanager
def _bar(description: str, total: int) -> Iterator[Callable[[int, str], None]]:
    """Show a progress bar; yield a function that adds to it."""
    done = 0
    with progress_bar(description, total) as bar:

        def advance(count: int, note: str) -> None:
            nonlocal done
            done += count
            bar.update(done, note)

        yield advance
