"""Posts of the database to a posts file: the options, and the pull from start to end."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import bson
import typer
from bson import json_util
from bson.errors import BSONError

from common.cli import ConfigFile, Overrides, flag, option, say
from common.errors import ConfigError, TaggingError, one_line, told
from common.progress import progress_bar
from common.times import since_time
from common.urls import redact
from config.load import load_settings
from config.settings import StoreSettings
from corpus.pull.pages import Interrupted, Page, Pages, Position
from corpus.pull.posts import (
    Choice,
    LeftOut,
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


def _lines_file(text: str) -> Path:
    if not text.endswith(".jsonl"):
        raise typer.BadParameter(f"{text}: must end in .jsonl")
    return Path(text)


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command line of a pull."""

    out: Annotated[Path, option("file to write", "POSTS.jsonl", parser=_lines_file)]
    query: Annotated[str, option("MongoDB filter, extended JSON", "JSON")] = "{}"
    since: Annotated[
        str | None, option("posts since then: 2026-01-31[T12:00], or 7d, 12h ago", "T")
    ] = None
    until: Annotated[str | None, option("posts before then", "T")] = None
    sample: Annotated[
        int | None, option("only this many, chosen by a hash of the ID", "N", min=1)
    ] = None
    seed: Annotated[int, option("another seed, another sample", "N", min=0, max=(1 << 63) - 1)] = 0
    min_posts_per_tag: Annotated[
        int,
        option(
            "leave out tags with fewer posts, and posts without any other tag; a sample keeps "
            "this many posts of each tag",
            "N",
            "--min_posts_per_tag",
            min=0,
        ),
    ] = 0
    limit: Annotated[int | None, option("stop after this many posts", "N", min=1)] = None
    untagged: Annotated[bool, flag("--untagged", "only posts without a result")] = False
    page: Annotated[int, option("documents read at a time", "N", min=1)] = 1000
    restart: Annotated[bool, flag("--restart", "forget an unfinished pull into the same file")] = (
        False
    )
    config: ConfigFile = None
    overrides: Overrides

    @cached_property
    def store(self) -> StoreSettings:
        """Return the database as the settings name it, ``embedded://`` included."""
        return load_settings(self.config, self.overrides).store


_AGAIN = "run the same command again to continue where it stopped"
_SHOWN_CHARS = 200


def pull(options: Options, resolved: StoreSettings) -> int:
    """Pull everything from the store as it can be reached; return the exit code."""
    query = query_of(options)
    lock = options.out.with_name(f".{options.out.name}.lock")
    with only_one(lock, str(options.out)), Stopper() as stopper:
        pages = Pages(
            resolved,
            query,
            projection(options.store),
            options.page,
            stopped=lambda: stopper.asked,
        )
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
    say(f"{run.files.written:,} posts: {options.out}\n")
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
    """Return the filter; raises as `read_query`."""
    query = read_query(options.query)
    if not options.untagged:
        return query
    untagged = {f"{options.store.result_path}.status": None}
    return {"$and": [query, untagged]} if query else untagged


def read_query(text: str) -> dict[str, Any]:
    """Read a condition in MongoDB's extended JSON."""
    try:
        query = json_util.loads(text)
    except Exception as error:  # bson raises whatever a value's type raises
        raise ConfigError(f"--query: not JSON: {one_line(error)}") from error
    if not isinstance(query, dict):
        raise ConfigError('--query: must be an object such as {"lang": "en"}')
    with told(
        "--query: not a query for MongoDB", ValueError, OverflowError, RecursionError, BSONError
    ):
        bson.encode(query)
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
                times[name] = since_time(text, time.time(), f"--{name}")
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
        with progress_bar("counting", total) as bar:
            for page in self._pages.pages(Position()):
                self._heed()
                for document in page.documents:
                    with suppress(NoPost, LeftOut):
                        yield choice.without_rare(self._in_time(document))
                bar.advance(len(page.documents))

    def _write(self, choice: Choice, total: int) -> None:
        files = self.files
        if choice.need_tag:
            files.summary.figures["tags of too few posts"] = len(choice.rare)
        position = files.position
        with progress_bar("posts", total) as bar:
            bar.advance(files.summary.total)
            for page in self._pages.pages(files.position):
                full = self._write_page(page, choice)
                position = page.position
                files.save(position, complete=full)
                bar.update(files.summary.total, f"{files.written:,} written")
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
                entry = choice.without_rare(self._in_time(document))
                choice.check_sampled(entry.post.post_id)
            except NoPost as error:
                files.summary.failed(str(error))
                files.reject(_rejected(document, str(error)))
            except LeftOut as error:
                files.summary.skipped(str(error))
            else:
                files.write(post_line(entry))
                files.summary.done()
        return limit is not None and files.written >= limit

    def _in_time(self, document: Mapping[str, Any]) -> CorpusPost:
        entry = convert(document, self._fields)
        if self._since is None and self._until is None:
            return entry
        made_at = created_at(document, self._fields)
        if made_at is None:
            raise LeftOut("no time is known")
        if self._since is not None and made_at < self._since:
            raise LeftOut("before --since")
        if self._until is not None and made_at >= self._until:
            raise LeftOut("not before --until")
        return entry

    def _heed(self) -> None:
        if self._asked():
            raise Interrupted


def _asked(options: Options) -> dict[str, Any]:
    """Return the options that must be the same for a pull to go on; nothing secret."""
    store = options.store
    same = ("query", "since", "until", "sample", "min_posts_per_tag", "seed", "limit")
    return {
        "database": f"{redact(store.url)} {store.database}.{store.collection}",
        "fields": store.fields.model_dump(),
        "untagged": options.untagged and store.result_path,
        **{name: getattr(options, name) for name in same},
    }


def _rejected(document: Mapping[str, Any], reason: str) -> str:
    return json.dumps({"_id": shown_id(document), "reason": reason}, ensure_ascii=False)
