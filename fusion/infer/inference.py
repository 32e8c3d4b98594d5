"""Offline inference: posts in, tags out, with metrics where labels are.

What an earlier run of the same command has written is not computed again: the output is asked
for the posts that it holds. Chunks of posts go through one tagger in this process, or through
several in processes of their own; results come back in the order of the input either way.
"""

from __future__ import annotations

import json
import multiprocessing
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from multiprocessing.queues import SimpleQueue
from multiprocessing.util import Finalize
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from common.errors import ConfigError, FeatureError, WorkerDied, one_line, told
from common.files import read_text, write_whole
from common.post import Post
from common.processes import process_pool
from common.progress import progress_bar
from config.labels import LabelMap
from config.settings import RunSettings
from fusion.bundle.bundle import Bundle
from fusion.data.data_file import Record, entries, record_of, relative_to_file
from fusion.infer.outputs import Bad, Earlier, Outcome, Sink
from fusion.metrics import ranking as metrics

# Chunks in flight for each process: with 1 it waits for this process between chunks; more than 2
# only hold more posts in memory.
_AHEAD = 2


class Tagger(Protocol):
    """A loaded model, from posts to their tags; one bad post costs only itself."""

    def run(self, posts: Sequence[Any]) -> list[Outcome]:
        """Return an outcome for each post, in order."""
        ...

    def close(self) -> None:
        """Free its models."""


Labelled: TypeAlias = Record | Post
"""A post to tag: features on disk, whose file may be all that knows its ID, or raw media."""
Maker: TypeAlias = Callable[[str], Tagger]
"""Makes a loaded tagger on a device; pickles."""


@dataclass(frozen=True)
class InferReport:
    """The outcome of an inference.

    Attributes:
        posts: All that are tagged, by this run and by earlier ones.
        labelled: Posts whose true labels and scores of all classes are known.
        metrics: Over those of these that no part was trained on, where there are any.
        seen: Labelled posts that a part was trained on; they are in the metrics only where they
            are all, and these then say nothing of new posts.
        skipped_at: The list of posts that were left out; None where nothing was.
        resumed: Entries of the input that an earlier run had done.
        unscored: Labelled posts that are not in the metrics, because the output does not hold their
            scores.
        posts_per_s: Of this run, models loaded.
    """

    posts: int
    labelled: int
    metrics: dict[str, float]
    seen: int
    skipped: int
    skipped_at: Path | None
    resumed: int
    unscored: int
    posts_per_s: float


@dataclass(frozen=True)
class Input:
    """The posts of a file: read once to check them, and again one by one, so that memory is flat.

    Attributes:
        read: Makes a post of an entry, the file, and the entry's place in it; or `ConfigError`.
        labels: Names that labels must have.
        skip_bad: Give what is wrong as `Bad`; otherwise it is raised.
    """

    path: Path
    read: Callable[[Any, Path, str], Labelled]
    labels: LabelMap
    skip_bad: bool = False

    def count(self) -> int:
        """Read everything once; return the number of entries, bad ones included."""
        posts = sum(1 for _ in self)
        if not posts:
            raise ConfigError(f"{self.path}: holds no posts")
        return posts

    def __iter__(self) -> Iterator[Labelled | Bad]:
        """Yield every post, or `Bad` for an entry that is none; raises as `count`."""
        for where, content in _raw_entries(self.path):
            try:
                post = self.read(content, self.path, where)
                self.labels.encode(post.labels, where=f"{self.path}: post {post.post_id}")
            except ConfigError as error:
                if not self.skip_bad:
                    raise
                name = content.get("post_id") if isinstance(content, dict) else None
                yield Bad(name if isinstance(name, str) and name else where, one_line(error))
            else:
                yield post


def read_record(content: Any, path: Path, where: str) -> Record:
    """Return a post with features: an entry of a data file, or a line of a list."""
    if path.suffix != ".txt":
        return record_of(content, where, path)
    if not content.endswith(".safetensors"):
        return Record(content)
    return Record("", features=relative_to_file(content, path))


def _raw_entries(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the place of an entry and its content; a `ConfigError` for a line that is no JSON."""
    if path.suffix not in (".json", ".jsonl", ".txt"):
        raise ConfigError(
            f"{path}: must be a .json data file or a .txt list (or .jsonl, a post a line)"
        )
    if path.suffix != ".txt":
        yield from ((entry.where, entry.value) for entry in entries(path))
        return
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            yield f"{path}: line {number}", line.strip()


@dataclass(frozen=True)
class Job:
    """An inference, ready to run.

    Attributes:
        maker: Makes a tagger on a device.
        skipped: File for the list of posts that are left out; large temporary files are made in the
            same folder.
        seen: Tells whether the bundle or its extractors' weights were trained on a post.
    """

    source: Input
    maker: Maker
    bundle: Bundle
    settings: RunSettings
    sink: Sink
    skipped: Path
    seen: Callable[[Any], bool]


def infer(job: Job) -> InferReport:
    """Tag posts, in their order; after a `WorkerDied` the same command goes on."""
    settings, sink = job.settings, job.sink
    devices = devices_of(settings)
    entries = job.source.count()
    with told(f"{job.skipped.parent}: cannot be written"):
        job.skipped.parent.mkdir(parents=True, exist_ok=True)
        files = [TemporaryFile(dir=job.skipped.parent) for _ in range(2)]  # noqa: SIM115 - below
    with files[0], files[1], closing(sink):
        sink.open(lambda: Counter(post.post_id for post in job.source if not isinstance(post, Bad)))
        new, seen = (_LabelledRows(file, job.bundle.labels) for file in files)
        bad, into = list[Bad](), deque[_LabelledRows]()
        resumed = timed = 0
        started = 0.0
        with progress_bar("infer", entries, enabled=settings.progress) as bar:

            def to_tag() -> Iterator[Labelled | Bad]:
                nonlocal resumed
                for batch in chunked(job.source, settings.batch_size):
                    remaining = 0
                    for post, earlier in _written(batch, sink):
                        learned = not isinstance(post, Bad) and post.labels and job.seen(post)
                        rows = seen if learned else new
                        if earlier is not None and not isinstance(post, Bad):
                            rows.add(earlier.scores, post.labels)
                        else:
                            into.append(rows)
                            remaining += 1
                            yield post
                    resumed += len(batch) - remaining
                    bar.advance(len(batch) - remaining)

            chunks = chunked(to_tag(), settings.batch_size)
            for outcomes in run_chunks(job.maker, devices, chunks):
                places = [into.popleft() for _ in outcomes]
                bad += _record(outcomes, sink, places, skip_bad=settings.skip_bad)
                # The first chunk is not timed: the models are loaded before it comes.
                if started:
                    timed += len(outcomes)
                started = started or time.monotonic()
                bar.advance(len(outcomes))
        seconds = time.monotonic() - started
        measured = (new if new.count else seen).measure(job.bundle.thresholds)
        sink.finish()
        _list_skipped(bad, job.skipped)
    return InferReport(
        posts=entries - len(bad),
        labelled=new.count + seen.count,
        metrics=measured,
        seen=seen.count,
        skipped=len(bad),
        skipped_at=job.skipped if bad else None,
        resumed=resumed,
        unscored=new.unscored + seen.unscored,
        posts_per_s=timed / seconds if timed else 0.0,
    )


def devices_of(settings: RunSettings) -> list[str]:
    present, asked = torch.cuda.device_count(), settings.n_gpus
    if asked is None:
        asked = min(1, present) if settings.processes == 1 else 0
    if asked > present:
        raise ConfigError(f"n_gpus: {asked} GPUs requested, but this machine has {present}")
    if asked and settings.processes > 1:
        raise ConfigError(
            f"processes: {settings.processes} on the CPU and n_gpus: {asked}: give one of them; "
            "each GPU has a process of its own"
        )
    return [f"cuda:{i}" for i in range(asked)] or ["cpu"] * settings.processes


def shown(values: Mapping[str, float], *, seen: bool = False) -> str:
    """Return metrics in one line for a person; those of posts that were trained on say so."""
    text = "  ".join(f"{key} {value:.4f}" for key, value in values.items())
    return f"of training posts: {text}" if seen else text


def chunked(posts: Iterable[Labelled | Bad], size: int) -> Iterator[list[Labelled | Bad]]:
    iterator = iter(posts)
    while chunk := list(islice(iterator, size)):
        yield chunk


def run_chunks(
    maker: Maker, devices: Sequence[str], chunks: Iterable[list[Labelled | Bad]]
) -> Iterator[list[Outcome]]:
    """Return the outcomes of every chunk, in order.

    There is a process for each device; a single one is used in this process.
    """
    if len(devices) == 1:
        with closing(maker(devices[0])) as tagger:
            for chunk in chunks:
                yield _outcomes(tagger, chunk)
        return
    queue = multiprocessing.get_context("spawn").SimpleQueue()
    for device in devices:
        queue.put(device)
    pool = process_pool(len(devices), _prepare, maker, queue)
    flying: deque[Future[list[Outcome]]] = deque()
    try:
        for chunk in chunks:
            if len(flying) == _AHEAD * len(devices):
                yield flying.popleft().result()
            flying.append(pool.submit(_tag, chunk))
        while flying:
            yield flying.popleft().result()
    except BrokenProcessPool as error:
        raise WorkerDied(
            "a process that tags has died: it was killed, or ran out of memory"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


class _Worker:
    """The tagger of a process of the pool: made with its first chunk, so that errors get out."""

    maker: Maker
    device: str
    tagger: Tagger | None = None


def _prepare(maker: Maker, devices: SimpleQueue[str]) -> None:
    _Worker.maker, _Worker.device = staticmethod(maker), devices.get()


def _tag(chunk: Sequence[Any]) -> list[Outcome]:
    if _Worker.tagger is None:
        _Worker.tagger = _Worker.maker(_Worker.device)
        # Processes of a pool run no atexit functions, and temporary folders would stay.
        Finalize(None, _Worker.tagger.close, exitpriority=10)
    return _outcomes(_Worker.tagger, chunk)


def _outcomes(tagger: Tagger, chunk: Sequence[Labelled | Bad]) -> list[Outcome]:
    outcomes = iter(tagger.run([post for post in chunk if not isinstance(post, Bad)]))
    return [post if isinstance(post, Bad) else next(outcomes) for post in chunk]


def _written(
    batch: Sequence[Labelled | Bad], sink: Sink
) -> Iterator[tuple[Labelled | Bad, Earlier | None]]:
    written = iter(sink.written([post.post_id for post in batch if not isinstance(post, Bad)]))
    return ((post, None if isinstance(post, Bad) else next(written)) for post in batch)


class _LabelledRows:
    """Scores and targets of the labelled posts, in a file: metrics are of the whole set."""

    def __init__(self, file: IO[bytes], labels: LabelMap) -> None:
        shape = (len(labels),)
        self.count = self.unscored = 0
        self._file, self._labels = file, labels
        self._kind = np.dtype([("scores", "<f8", shape), ("targets", "?", shape)])

    def add(self, scores: npt.NDArray[np.float64] | None, labels: Sequence[str]) -> None:
        """Add a post, if it has labels."""
        if labels and scores is not None:
            row = np.zeros((), self._kind)
            row["scores"] = scores
            row["targets"][self._labels.encode(labels)] = True
            self._file.write(row.tobytes())
            self.count += 1
        elif labels:
            self.unscored += 1

    def measure(self, thresholds: npt.NDArray[np.float32]) -> dict[str, float]:
        """Return the metrics of all; empty where there are none."""
        if not self.count:
            return {}
        self._file.flush()
        rows = np.memmap(self._file, self._kind, mode="r")
        return metrics.summary(rows["scores"], rows["targets"], thresholds)


def _record(
    outcomes: Sequence[Outcome], sink: Sink, places: Sequence[_LabelledRows], *, skip_bad: bool
) -> list[Bad]:
    """Write a chunk's results, the scores of each into its place; return its bad posts."""
    pairs = list(zip(outcomes, places, strict=True))
    bad = [outcome for outcome in outcomes if isinstance(outcome, Bad)]
    results = [(outcome, rows) for outcome, rows in pairs if not isinstance(outcome, Bad)]
    if skip_bad or not bad:
        refused = list(sink.write([result for result, _ in results]))
        names = {each.post_id for each in refused}
        results = [(result, rows) for result, rows in results if result.post_id not in names]
        bad += refused
    if bad and not skip_bad:
        name = f"post {bad[0].post_id}"
        reason = bad[0].reason if name in bad[0].reason else f"{name}: {bad[0].reason}"
        raise FeatureError(f"{reason}; --skip_bad leaves such posts out")
    for result, rows in results:
        rows.add(result.scores, result.labels)
    return bad


def _list_skipped(bad: Sequence[Bad], path: Path) -> None:
    rows = ({"post_id": each.post_id, "reason": each.reason} for each in bad)
    with told(f"{path}: cannot be written"):
        if bad:
            write_whole(path, "\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
        else:
            path.unlink(missing_ok=True)
