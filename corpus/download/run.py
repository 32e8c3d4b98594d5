"""One run: posts in, URLs handed out by host, results kept. Memory does not grow with the posts."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from common.retry import backoff_s
from corpus.download.content import incoming_folder, left_over, place, present
from corpus.download.crew import Crew
from corpus.download.hosts import Hosts, Try, host_of
from corpus.download.meter import Meter
from corpus.download.state import State
from corpus.download.values import Answer, Ask, Found, Options, key_of
from corpus.records import CorpusPost, is_url, local_path, read_posts

_WINDOW = 5_000  # URLs held at a time
_FEED = 500  # of them read in one go, so that the first downloads begin at once
_IDLE_S = 0.2
_LONGEST_WAIT_S = 300.0
_TOO_MANY = "HTTP 429"
_PATIENCE_S = 3.0


class BrokenDisk(Exception):
    """Nothing can be written: the disk is full, or the folder is gone."""


class Download:
    """Everything of one run up to the results of all URLs.

    Attributes:
        complete: Whether every URL has its result.
    """

    def __init__(self, options: Options, state: State, meter: Meter) -> None:
        self._options, self._state, self._meter = options, state, meter
        self._hosts = Hosts(options.per_host)
        self._pending: set[str] = set()
        self._flying: dict[str, Try] = {}
        self._posts_read = self._urls_read = 0
        self._chance = random.Random()  # noqa: S311 - for waits
        self.complete = False

    def run(self, asked: Callable[[], object]) -> None:
        """Download all that has no result yet; ends early, in good order, when `asked` is true.

        Raises:
            BrokenDisk: Nothing can be written.
            BrokenState: The state cannot be written.
            ConfigError: The posts file cannot be read.
            RetryableError: The processes die again and again.
        """
        self._recover()
        feed = self._asks()
        crew: Crew | None = None
        try:
            fed = False
            while not asked():
                fed = fed or self._feed(feed)
                if self._hosts.size and crew is None:
                    crew = Crew(self._options)  # not before there is something to do
                if crew is not None:
                    self._hand_out(crew)
                    self._settle(crew.receive(self._wait_s(waiting=fed)))
                self._meter.show(self._posts_done())
                if fed and not self._pending:
                    self.complete = True
                    return
        finally:
            if crew is not None:
                self._settle(crew.close(0.0 if self.complete else _PATIENCE_S))
            self._meter.show(self._posts_done(), last=True)

    def _recover(self) -> None:
        incoming_folder(self._options.out).mkdir(parents=True, exist_ok=True)
        for key, name, found in left_over(self._options.out):
            self._state.put([(key, found)])
            if found.status == "ok":
                place(self._options.out, name, found)
            else:
                (incoming_folder(self._options.out) / name).unlink()

    # What is to be downloaded ----------------------------------------------------------------

    def _feed(self, asks: Iterator[Ask | None]) -> bool:
        """Queue some more URLs; true when there are no more."""
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
        """The sources without a result, each once at a time; None for one that has its result."""
        options = self._options
        for entry in read_posts(options.posts):
            self._posts_read += 1
            if not isinstance(entry, CorpusPost):
                continue
            for media in entry.post.media[: options.fetch.max_media]:
                self._urls_read += 1
                ask = ask_for(media.source, options)
                known = ask.key in self._pending or self._is_settled(ask.key)
                yield None if known else ask

    def _is_settled(self, key: str) -> bool:
        known = self._state.settled(key)
        if known is None:
            return False
        found, fresh = known
        if found.status != "ok" or fresh:
            return True
        if present(self._options.out, found, verify=self._options.verify):
            return True
        (self._options.out / found.path).unlink(missing_ok=True)  # first: else it would count
        self._state.forget(key)
        return False

    def _queue(self, ask: Ask) -> None:
        host = "" if ask.local else host_of(ask.source)
        verdict = self._hosts.verdict(host)
        self._pending.add(ask.key)
        if verdict is not None:
            self._keep([(ask.key, verdict, "")])
        else:
            self._hosts.add(Try(ask, host))

    # What comes back -------------------------------------------------------------------------

    def _hand_out(self, crew: Crew) -> None:
        now = time.monotonic()
        for _ in range(crew.free):
            item = self._hosts.take(now)
            if item is None:
                return
            self._flying[item.ask.key] = item
            crew.send(item.ask)

    def _settle(self, answers: Iterable[Answer]) -> None:
        kept: list[tuple[str, Found, str]] = []
        broken = ""
        for answer in answers:
            broken = broken or answer.broken
            item = self._flying.pop(answer.key, None)
            if item is None or answer.broken:
                continue
            if answer.found.status == "retryable":
                kept += [(key, found, "") for key, found in self._failed(item, answer)]
            else:
                self._hosts.reached(item.host)
                self._hosts.done(item.host)
                kept.append((answer.key, answer.found, answer.incoming))
        self._keep(kept)
        if broken:
            raise BrokenDisk(f"{self._options.out}: {broken}")

    def _failed(self, item: Try, answer: Answer) -> list[tuple[str, Found]]:
        """Have a URL tried again later, or give what it and others get for good."""
        hosts, now, name = self._hosts, time.monotonic(), item.host
        wait_s = backoff_s(item.failed + 1, self._options.backoff_s, self._options.backoff_max_s)
        wait_s *= self._chance.uniform(0.5, 1.0)
        if answer.unreachable:
            hosts.unreached(name, answer.found)
        else:
            hosts.reached(name)
        if answer.retry_after_s is not None and answer.retry_after_s > _LONGEST_WAIT_S:
            hosts.give_up(name, answer.found)
        elif answer.retry_after_s is not None or answer.found.reason[1] == _TOO_MANY:
            wait_s = max(wait_s, answer.retry_after_s or 0.0)
            hosts.pause(name, now + wait_s)
        hosts.done(name)
        verdict = hosts.verdict(name)
        if verdict is not None:
            others = [(other.ask.key, verdict) for other in hosts.drop(name)]
            return [(answer.key, answer.found), *others]
        if item.failed >= self._options.retries:
            return [(answer.key, answer.found)]
        item.failed += 1
        hosts.again(item, now + wait_s)
        return []

    def _keep(self, results: list[tuple[str, Found, str]]) -> None:
        """Record results, then put files in their place: a kill between the two is recovered."""
        self._state.put((key, found) for key, found, _ in results)
        for key, found, incoming in results:
            self._pending.discard(key)
            if found.status != "ok":
                self._meter.failed += 1
                continue
            try:
                place(self._options.out, incoming, found)
            except OSError as error:
                raise BrokenDisk(f"{self._options.out}: {error.strerror or error}") from error
            self._meter.files += 1
            self._meter.size_bytes += found.size_bytes

    def _wait_s(self, *, waiting: bool) -> float:
        if not waiting and self._hosts.size < _WINDOW:
            return 0.0  # there is more to read
        next_at = self._hosts.next_at()
        return _IDLE_S if next_at is None else min(_IDLE_S, next_at - time.monotonic())

    def _posts_done(self) -> float:
        """Posts read, less those whose media may still be under way."""
        per_post = max(self._urls_read / max(self._posts_read, 1), 1e-9)
        return max(0.0, self._posts_read - len(self._pending) / per_post)


def ask_for(source: str, options: Options) -> Ask:
    """How a source of the posts file is asked for and known by."""
    path = None if is_url(source) or not options.local else local_path(source, options.posts)
    if path is None:
        return Ask(key_of(source), source)
    absolute = str(Path(path).absolute())
    return Ask(key_of(f"local:{absolute}"), absolute, local=True)
