"""One run: posts in, URLs downloaded host by host, results kept, the report written.

The report (manifest, posts with local paths, rejects, summary) is written from the posts file and
the state alone: however often a run was killed before, the bytes are the same.
"""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any

from common.cli import say
from common.errors import FetchRefused, MediaError, TaggingError
from common.post import Media
from common.progress import Bar, progress_bar
from common.retry import backoff_s
from corpus.download.hosts import Hosts
from corpus.download.state import State
from corpus.download.transfer import Transfers, incoming_folder, left_over, move_in_place, present
from corpus.download.values import Answer, Ask, Options, UrlResult, ask_for
from corpus.records import AtomicLines, Summary, bad_line, post_line
from corpus.runs import Stopper, only_one
from fusion.data.data_file import BadLine, CorpusPost, check_holds_post, count_lines, read_posts

_AMOUNT = re.compile(r": \d+ of \d+ bytes$")
_NOUNS = {"image": "picture", "video": "video", "audio": "sound"}


def write_report(
    options: Options, state: State, tick: Callable[[int], None], asked: Callable[[], object]
) -> Summary:
    summary, out, posts, bad_lines = Summary("Media"), options.out, 0, 0
    with (
        AtomicLines(out / "manifest.jsonl") as manifest,
        AtomicLines(out / "posts.jsonl") as local_posts,
        AtomicLines(out / "rejected.jsonl") as rejected,
    ):
        for entry in read_posts(options.posts):
            tick(1)
            if asked():
                raise InterruptedError
            if isinstance(entry, BadLine):
                bad_lines += 1
                rejected.write(bad_line(entry))
                continue
            posts += 1
            local: list[Media] = []
            for i, media in enumerate(entry.post.media):
                result = _result_of_use(media, i, options, state)
                manifest.write(_manifest_line(entry.post.post_id, media, result))
                _count(summary, result)
                if result.status == "ok":
                    local.append(Media(media.kind, result.path))
            post = replace(entry.post, media=tuple(local))
            # Its features lie relative to another folder.
            local_posts.write(post_line(replace(entry, post=post, features=None)))
    files, size_bytes = state.totals()
    counts = {"posts": posts, "lines left out": bad_lines, "files": files, "bytes": size_bytes}
    summary.figures |= counts
    summary.write(out / "summary.json")
    return summary


def _result_of_use(media: Media, position: int, options: Options, state: State) -> UrlResult:
    limit = options.fetch.max_media
    refused = FetchRefused.__name__
    if position >= limit:
        return UrlResult("refused", reason=(refused, f"beyond fetch.max_media ({limit})"))
    result = state.get(ask_for(media.source, options).key)
    if result is None:  # the posts file has changed since it was read
        return UrlResult("refused", reason=(refused, "not asked for: run again"))
    if result.status == "ok" and media.kind not in result.kinds:
        wrong = f"is not a {_NOUNS[media.kind]}: {result.what}"
        return UrlResult("refused", reason=(MediaError.__name__, wrong))
    return result


def _manifest_line(post_id: str, media: Media, result: UrlResult) -> str:
    content = {"post_id": post_id, "kind": media.kind, "source": media.source, "status": "failed"}
    outcome: dict[str, Any] = dict.fromkeys(("sha256", "path", "bytes", "reason"))
    if result.status == "ok":
        content["status"] = "ok"
        outcome |= {"sha256": result.sha256, "path": result.path, "bytes": result.size_bytes}
    else:
        kind, message = result.reason
        outcome["reason"] = {"stage": "fetch", "type": kind, "message": message}
    return json.dumps(content | outcome, ensure_ascii=False)


def _count(summary: Summary, result: UrlResult) -> None:
    if result.status == "ok":
        summary.done()
        return
    kind, message = result.reason
    message = _AMOUNT.sub("", message)  # reasons are counted: they must not all differ
    again = " (tried again by the next run)" if result.status == "retryable" else ""
    summary.failed(f"{kind}: {message}{again}")


_WINDOW = 5_000  # URLs in memory: enough hosts to keep every connection busy, about 2 MB
_FEED = 500  # of them read in one go, so that the first downloads begin at once
_IDLE_S = 0.2  # a signal, and the end of a host's wait, are noticed this late
_LONGEST_WAIT_S = 300.0  # a host that wants to be left alone for longer is left to the next run
_LONGEST_BACKOFF_S = 60.0
_TOO_MANY = "HTTP 429"
_PATIENCE_S = 3.0  # after a signal: most downloads under way end, and nobody waits for the rest
_AGAIN = "run the same command again to continue where it stopped"


def download(options: Options, figures: dict[str, Any]) -> None:
    """Download everything, write the report, and add its files and counts to ``figures``.

    Raises:
        TaggingError: It was interrupted, or all media failed.
    """
    check_holds_post(options.posts)
    total = count_lines(options.posts)
    folder = options.out / ".state"
    with only_one(folder / "lock", str(options.out)), Stopper() as stopper:
        try:
            with closing(State(folder / "download.sqlite")) as state:
                _download(options, state, stopper, total, figures)
        except OSError as error:
            text = error.strerror or str(error)
            raise TaggingError(f"stopped: {text}; make room, then {_AGAIN}") from error


def _download(
    options: Options, state: State, stopper: Stopper, total: int, figures: dict[str, Any]
) -> None:
    if options.retry_failed:
        state.forget_refused()
    with progress_bar("posts", total) as bar:
        run = Download(options, state, bar)
        run.run(lambda: stopper.asked)
    if not run.complete:
        raise _interrupted(stopper, f"{run.files:,} files downloaded in this run")
    try:
        with progress_bar("manifest", total) as bar:
            summary = write_report(options, state, bar.advance, lambda: stopper.asked)
    except InterruptedError:
        what = "all files are downloaded, the manifest is not written"
        raise _interrupted(stopper, what) from None
    summary.show()
    for name in ("manifest", "posts", "rejected"):
        figures[name] = options.out / f"{name}.jsonl"
    figures |= summary.as_dict()
    say(f"{options.out}/manifest.jsonl, posts.jsonl, summary.json\n")
    if summary.total and summary.failures == summary.total:
        raise TaggingError(f"all {summary.total:,} media failed, see the reasons above")


def _interrupted(stopper: Stopper, what: str) -> TaggingError:
    return TaggingError(f"{stopper.asked}: {what}; {_AGAIN}")


class Download:
    """One run up to the results of all URLs; `files` were downloaded in this run."""

    def __init__(self, options: Options, state: State, bar: Bar) -> None:
        self._options, self._state, self._bar = options, state, bar
        self._hosts = Hosts(options.per_host)
        self._transfers = Transfers(options)
        self._pending: set[str] = set()
        self._active: dict[str, Ask] = {}
        self._posts_read = self._urls_read = 0
        self._chance = random.Random()  # noqa: S311 - for waits
        self._began = time.monotonic()
        self._shown_at = 0.0
        self.complete = False
        self.files = self._size_bytes = self._failures = 0

    def run(self, asked: Callable[[], object]) -> None:
        """Download all that has no result yet; end early, in good order, when `asked` is true."""
        self._recover()
        asks = self._asks()
        try:
            fed = False
            while not asked():
                fed = fed or self._feed(asks)
                self._start_downloads()
                # While there is more to read, nothing is waited for.
                reading = not fed and self._hosts.size < _WINDOW
                self._settle(self._transfers.receive(0.0 if reading else _IDLE_S))
                self._show()
                if fed and not self._pending:
                    self.complete = True
                    return
        finally:
            self._settle(self._transfers.close(0.0 if self.complete else _PATIENCE_S))
            self._show(last=True)

    def _recover(self) -> None:
        incoming_folder(self._options.out).mkdir(parents=True, exist_ok=True)
        for key, name, result in left_over(self._options.out):
            self._state.put([(key, result)])
            if result.status == "ok":
                move_in_place(self._options.out, name, result)
            else:
                (incoming_folder(self._options.out) / name).unlink()

    def _feed(self, asks: Iterator[Ask | None]) -> bool:
        """Queue some more URLs; return True when there are no more."""
        for _ in range(_FEED):
            if self._hosts.size >= _WINDOW:
                return False
            try:
                ask = next(asks)
            except StopIteration:
                return True
            if ask is not None:
                self._queue(ask)
        return False

    def _asks(self) -> Iterator[Ask | None]:
        """Yield the sources without a result, each once; None for one that has its result."""
        options = self._options
        for entry in read_posts(options.posts):
            self._posts_read += 1
            if not isinstance(entry, CorpusPost):
                continue
            for media in entry.post.media[: options.fetch.max_media]:
                self._urls_read += 1
                ask = ask_for(media.source, options)
                skip = ask.key in self._pending or self._is_settled(ask.key)
                yield None if skip else ask

    def _is_settled(self, key: str) -> bool:
        settled = self._state.settled(key)
        if settled is None:
            return False
        result, of_this_run = settled
        if result.status != "ok" or of_this_run:
            return True
        if present(self._options.out, result, verify=self._options.verify):
            return True
        # The file first: a kill in between must not leave a broken one that counts as good.
        (self._options.out / result.path).unlink(missing_ok=True)
        self._state.forget(key)
        return False

    def _queue(self, ask: Ask) -> None:
        verdict = self._hosts.verdict(ask.host)
        self._pending.add(ask.key)
        if verdict is not None:
            self._keep([(ask.key, verdict, "")])
        else:
            self._hosts.add(ask, time.monotonic())

    def _start_downloads(self) -> None:
        now = time.monotonic()
        for _ in range(self._transfers.free):
            ask = self._hosts.take(now)
            if ask is None:
                return
            self._active[ask.key] = ask
            self._transfers.start(ask)

    def _settle(self, answers: Iterable[Answer]) -> None:
        results: list[tuple[str, UrlResult, str]] = []
        broken = ""
        for answer in answers:
            broken = broken or answer.broken
            ask = self._active.pop(answer.key)
            if answer.broken:
                continue
            if answer.result.status == "retryable":
                results += [(key, result, "") for key, result in self._retry(ask, answer)]
            else:
                self._hosts.reached(ask.host)
                self._hosts.done(ask.host)
                results.append((answer.key, answer.result, answer.incoming))
        self._keep(results)
        if broken:
            raise OSError(f"{self._options.out}: {broken}")

    def _retry(self, ask: Ask, answer: Answer) -> list[tuple[str, UrlResult]]:
        """Have a URL tried again later, or return what it and others get for good."""
        hosts, now, name = self._hosts, time.monotonic(), ask.host
        wait_s = backoff_s(ask.failed + 1, self._options.backoff, _LONGEST_BACKOFF_S)
        wait_s *= self._chance.uniform(0.5, 1.0)
        if answer.unreachable:
            hosts.unreached(name, answer.result)
        else:
            hosts.reached(name)
        if answer.retry_after_s is not None and answer.retry_after_s > _LONGEST_WAIT_S:
            hosts.give_up(name, answer.result)
        elif answer.retry_after_s is not None or answer.result.reason[1] == _TOO_MANY:
            wait_s = max(wait_s, answer.retry_after_s or 0.0)
            hosts.pause(name, now + wait_s)
        hosts.done(name)
        verdict = hosts.verdict(name)
        if verdict is not None:
            others = [(other.key, verdict) for other in hosts.drop(name)]
            return [(answer.key, answer.result), *others]
        if ask.failed >= self._options.retries:
            return [(answer.key, answer.result)]
        ask.failed += 1
        hosts.add(ask, now + wait_s)
        return []

    def _keep(self, results: list[tuple[str, UrlResult, str]]) -> None:
        """Record results, then move the files: a kill between the two is recovered."""
        self._state.put((key, result) for key, result, _ in results)
        for key, result, incoming in results:
            self._pending.discard(key)
            if result.status != "ok":
                self._failures += 1
                continue
            move_in_place(self._options.out, incoming, result)
            self.files += 1
            self._size_bytes += result.size_bytes

    def _show(self, *, last: bool = False) -> None:
        now = time.monotonic()
        if not last and now - self._shown_at < _IDLE_S:
            return
        self._shown_at = now
        # Posts read, less those whose media may still be under way.
        per_post = max(self._urls_read / max(self._posts_read, 1), 1e-9)
        done = max(0.0, self._posts_read - len(self._pending) / per_post)
        seconds = max(now - self._began, 1e-9)
        self._bar.update(
            int(done),
            f"{self.files:,} files, {self._failures:,} failed, "
            f"{self.files / seconds:,.1f} files/s, "
            f"{self._size_bytes / seconds / 1e6:,.1f} MB/s",
        )
