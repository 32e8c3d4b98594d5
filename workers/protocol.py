"""The messages between the King and its workers, and the pool of workers as its users see it.

Pixels and patches lie in shared-memory slots and are named by `ArrayRef`; everything else
crosses as one of these messages on one channel per worker (`workers.pool.channel`). Types and
limits in the annotations are checked while a message is decoded.

A task is answered by exactly one `Done` or `Failed`. Before a worker runs a batch it reports the
batch's tasks (`Began`), so that the King knows which tasks a death is charged to. The downloader
does not: it begins every task as it comes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Protocol, TypeAlias

import msgspec
import numpy as np

from common.post import Failure, FeatureArray, Features, Media, MediaKind, Modality, Stream, Tags
from config.features import ExtractorName
from extractors.parts import PartKind

WorkerRole: TypeAlias = Literal["fetch", "decode", "extract", "fuse", "cache"]
WorkerState: TypeAlias = Literal["waiting", "starting", "ready", "refused"]

STAGES = ("lookup", "fetch", "decode", "extract", "fuse")
"""The stages of a post, in order; ``lookup`` is the look-up in the feature cache."""

NO_SLOT = -1
"""Slot of a `DecodeTask` before its pool has assigned one."""

_Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0)]

MAX_PARTS = 4096
"""Arrays that one media file may give; a real file gives at most a few dozen (frames and sound in
one array each, and a picture for each frame that is read). It bounds what a decoder that was taken
over can make the King hold."""


class ProtocolError(Exception):
    """A message breaks the protocol: its sender cannot be trusted any more.

    What the sender had said before it is in ``before``.
    """

    before: tuple[Any, ...] = ()


class Message(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Base of everything that crosses: a msgpack array that begins with the name of its class."""


class Launch(Message, frozen=True):
    """King -> worker, the first message on the channel.

    Attributes:
        run: ``module:function`` that gets the `workers.roles.loop.Context`.
        name: Unique name, ``extract-0``; in logs and in the process title.
        settings: As JSON, `workers.pool.supervisor.without_credentials`.
        arena: Descriptor of the shared slots, or -1 for a role that does not use them.
        device: ``cpu``, or ``cuda:0`` of the one device that the process can see.
        spool: Folder of downloaded files.
        expected: Fingerprints that a bundle must match, as `Expect` has them, where known.
        shadow: Fusion tries the bundle on trial too.
    """

    run: str
    role: WorkerRole
    name: str
    settings: str
    device: str = "cpu"
    extractors: tuple[ExtractorName, ...] = ()
    threads: int = 1
    arena: int = -1
    slots: int = 0
    slot_bytes: int = 0
    spool: str = ""
    expected: str = ""
    shadow: bool = False


class ArrayRef(Message, frozen=True):
    """An array in a shared-memory slot.

    Attributes:
        slot: Index of the slot.
        offset: Bytes from the start of the slot, a multiple of 64.
    """

    slot: _Count
    offset: _Count
    shape: tuple[_Count, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


class Part(Message, frozen=True):
    """One array that was decoded from a media file; `extractors.parts` has its dtype and shape."""

    kind: PartKind
    ref: ArrayRef


class CacheQuery(Message, frozen=True):
    """One media file that is looked up in the feature cache.

    Attributes:
        index: Of the file in its plan.
        wants: What of it would be extracted.
        sha256: Of its content, hex, where that is known; else it is looked up by its source.
        local: The source is a path, and the file may be read to learn its content.
    """

    index: int
    media: Media
    wants: tuple[PartKind, ...]
    sha256: str = ""
    local: bool = False


class CacheLookup(Message, frozen=True):
    """Look up what is known of a post, or of one file that has just been downloaded.

    Attributes:
        texts: Which of ``text`` and ``ocr`` are wanted.
        text: The post's own text.
        ocr: Text already read from the pictures, or None.
        mode: How the two are embedded.
        path: The downloaded file, which is kept meanwhile; "" where there is none.
    """

    stage: ClassVar[str] = "lookup"
    media: tuple[CacheQuery, ...]
    texts: frozenset[Modality] = frozenset()
    text: str = ""
    ocr: str | None = None
    mode: Literal["append", "separate"] = "separate"
    path: str = ""


class FetchTask(Message, frozen=True):
    """Download one media file into the spool folder."""

    stage: ClassVar[str] = "fetch"
    media: Media


class DecodeTask(Message, frozen=True):
    """Decode one local media file into a slot.

    Attributes:
        sha256: Of its content, hex, where what it gives is to be remembered.
    """

    stage: ClassVar[str] = "decode"
    kind: MediaKind
    path: str
    slot: int
    sha256: str = ""


class ExtractTask(Message, frozen=True):
    """Run one extractor on what one media file gave, or on a text.

    Attributes:
        extractor: ``ocr`` reads ``refs`` (pictures) into text; ``text`` embeds ``text``; the
            others turn ``refs`` into a feature array, ``asr`` by the words that it hears.
        modality: Which modality the result belongs to (``text`` serves ``text`` and ``ocr``).
        sha256: Of the media file's content, hex, where the result is to be remembered.
        kind: Of the media file.
    """

    stage: ClassVar[str] = "extract"
    extractor: ExtractorName
    modality: Modality
    refs: tuple[ArrayRef, ...] = ()
    text: str = ""
    sha256: str = ""
    kind: MediaKind | None = None


class FuseTask(Message, frozen=True):
    """Predict the tags of one post from its features."""

    stage: ClassVar[str] = "fuse"
    features: Features


Task: TypeAlias = CacheLookup | FetchTask | DecodeTask | ExtractTask | FuseTask


class CacheHit(Message, frozen=True):
    """Known features of one media file.

    Attributes:
        whole: Nothing of the file needs to be decoded.
        ready: What was asked for and need not be extracted: it is here, or the file has none.
        arrays: Stream -> float16 ``(n, dim)``.
        text: What OCR read; None where that is not known.
        failure: Why the file cannot be decoded at all.
        failures: Modality -> why that side of it cannot be.
    """

    index: int
    sha256: str
    whole: bool
    ready: frozenset[PartKind] = frozenset()
    arrays: Mapping[Stream, FeatureArray] = msgspec.field(default_factory=dict)
    text: str | None = None
    failure: Failure | None = None
    failures: Mapping[Modality, Failure] = msgspec.field(default_factory=dict)


class CacheHits(Message, frozen=True):
    """Known features of a post or a file; unknown files are left out.

    Attributes:
        texts: Text -> its features, float16 ``(t, dim)``.
    """

    media: tuple[CacheHit, ...] = ()
    texts: Mapping[str, FeatureArray] = msgspec.field(default_factory=dict)


class Fetched(Message, frozen=True):
    """A media file in the spool folder; the receiver deletes it.

    Attributes:
        sha256: Of its content, hex, hashed as it came; empty where it was not.
    """

    path: str
    size_bytes: int
    sha256: str = ""


class Decoded(Message, frozen=True):
    """The arrays that a media file was decoded to.

    Attributes:
        parts: In order of time.
        failures: Modality -> why that side of the file is broken, while the rest is usable.
        on_gpu: As in `extractors.media.decode.DecodedMedia`.
    """

    parts: Annotated[tuple[Part, ...], msgspec.Meta(max_length=MAX_PARTS)]
    failures: Mapping[Modality, Failure] = msgspec.field(default_factory=dict)
    on_gpu: bool | None = None


class Extracted(Message, frozen=True):
    """An extractor's result: float16 ``(n, dim)``, or the text that OCR read.

    Attributes:
        array: Of the modality's own stream.
        also: Further streams of the modality, where ``array`` has rows.
    """

    array: FeatureArray | None = None
    text: str | None = None
    also: Mapping[Stream, FeatureArray] = msgspec.field(default_factory=dict)


Result: TypeAlias = CacheHits | Fetched | Decoded | Extracted | Tags


class Envelope(Message, frozen=True):
    """King -> worker: one task.

    Attributes:
        deadline: `time.monotonic()` of this host, past which the result is of no use.
        solo: Run alone, never in a batch: the task is suspected of killing a worker.
    """

    task_id: int
    task: Task
    deadline: float
    solo: bool = False


class Expect(Message, frozen=True):
    """King -> fusion or cache worker: the fingerprints of the features from now on.

    Attributes:
        fingerprints: `common.fingerprint.packed`. Fusion gets those of the streams, which every
            later bundle must match; the cache those of the extractors.
    """

    fingerprints: str


class CacheUpdate(Message, frozen=True):
    """King -> cache worker: a URL led to this content, or this is what decoding it gave.

    Attributes:
        source: The URL; "" where the rest is about the content.
        parts: What it gave.
        failure: Why it gave nothing.
        failures: Modality -> why that side of it is broken.
    """

    sha256: str
    source: str = ""
    kind: MediaKind = "image"
    parts: tuple[PartKind, ...] = ()
    failure: Failure | None = None
    failures: Mapping[Modality, Failure] = msgspec.field(default_factory=dict)

    @classmethod
    def of(cls, task: Task, outcome: Result | Failure) -> CacheUpdate | None:
        """Return what the cache may learn of a media file from a task's outcome, if anything."""
        match task, outcome:
            case FetchTask(), Fetched(sha256=sha256) if sha256:
                return cls(sha256, source=task.media.source)
            case DecodeTask(sha256=sha256), Decoded() if sha256:
                parts = tuple(dict.fromkeys(part.kind for part in outcome.parts))
                return cls(sha256, kind=task.kind, parts=parts, failures=outcome.failures)
            case DecodeTask(sha256=sha256), Failure(retryable=False) if sha256:
                return cls(sha256, kind=task.kind, failure=outcome)
        return None


class Stop(Message, frozen=True):
    """King -> worker: finish what has begun and exit 0."""


class Ready(Message, frozen=True):
    """Worker -> King: models are loaded."""

    info: Mapping[str, str] = msgspec.field(default_factory=dict)


class Began(Message, frozen=True):
    """Worker -> King: these tasks now run, as one batch."""

    task_ids: tuple[int, ...]


class Done(Message, frozen=True):
    """Worker -> King: a task's result.

    A `Fetched` file is the receiver's to delete; the slot of a `Decoded` that has parts is the
    receiver's to release, exactly once, even when it no longer wants the post.
    """

    task_id: int
    result: Result


class Failed(Message, frozen=True):
    """Worker -> King: a task failed."""

    task_id: int
    failure: Failure


class BundleLoaded(Message, frozen=True):
    """Fusion worker -> King: the bundle now served; sent after `Ready` whenever any of it changes.

    Attributes:
        refused: The reason why what is in ``fusion.bundle`` now is not served, in one line.
        shadow: Name and version of the bundle on trial.
        shadow_refused: The reason why what is in its folder now is not tried.
    """

    name: str
    version: str
    refused: str = ""
    shadow: tuple[str, str] | None = None
    shadow_refused: str = ""


class Refused(Message, frozen=True):
    """Worker -> King: it cannot start, and a restart would not help (a `ConfigError`)."""

    message: str


Command: TypeAlias = Launch | Envelope | Expect | CacheUpdate | Stop
"""King -> worker."""
Reply: TypeAlias = Ready | Began | Done | Failed | BundleLoaded | Refused
"""Worker -> King."""

_RESULTS: Mapping[type, type] = {
    CacheLookup: CacheHits,
    FetchTask: Fetched,
    DecodeTask: Decoded,
    ExtractTask: Extracted,
    FuseTask: Tags,
}


def validate_reply(reply: Done, task: Task, slot: int | None, spool: Path) -> None:
    """Reject a result that does not match its task; decoders may be taken over by what they decode.

    Args:
        reply: Already of the right types: see `workers.pool.channel`.
        task: The task that it answers.
        slot: The slot that the task may write to.
        spool: The folder that downloads must lie in.

    Raises:
        ProtocolError: It names a file or memory that is not the task's, or is of another kind.
    """
    result = reply.result
    if type(result) is not _RESULTS[type(task)]:
        kinds = f"{type(result).__name__}, not {_RESULTS[type(task)].__name__}"
        raise ProtocolError(f"task {reply.task_id}: `result` is {kinds}")
    wrong = None
    match result:
        case Fetched(path=path):
            folder, name = os.path.split(path)  # for each file: a Path costs as much as the rest
            if folder != str(spool) or name in ("", ".", "..") or "\0" in path:
                wrong = f"`path` {path!r} is not in {spool}"
        case Decoded(parts=parts):
            slots = [part.ref.slot for part in parts]
            at = next((i for i, used in enumerate(slots) if used != slot), None)
            if at is not None:
                wrong = f"`parts[{at}].ref.slot` is {slots[at]}, not {slot}"
        case Extracted(array=array, also=also):
            wrong = _not_rows({"array": array, **also})
        case CacheHits(media=hits, texts=texts) if isinstance(task, CacheLookup):
            queried = {query.index for query in task.media}
            wrong = _not_rows({**texts, **{key: a for h in hits for key, a in h.arrays.items()}})
            if not {hit.index for hit in hits} <= queried:
                wrong = "`media` holds an index that was not asked for"
    if wrong is not None:
        raise ProtocolError(f"task {reply.task_id}: {wrong}")


def _not_rows(arrays: Mapping[Any, FeatureArray | None]) -> str | None:
    """Return the first array that is not ``(n, dim)``."""
    for name, array in arrays.items():
        if array is not None and array.ndim != 2:
            return f"`{name}` has the shape {array.shape}, not (n, dim)"
    return None


@dataclass(frozen=True, slots=True)
class PoolReady:
    """Every worker has loaded, and the bundle fits the extractors; sent once."""


@dataclass(frozen=True, slots=True)
class PoolRefused:
    """The pool cannot work; sent once, and never for a worker that was replaced.

    ``mistake``: the configuration is wrong. Else a fresh start may help.
    """

    message: str
    mistake: bool = True


PoolEvent: TypeAlias = Done | Failed | PoolReady | PoolRefused | BundleLoaded


@dataclass(frozen=True, slots=True)
class WorkerView:
    """One worker, for health and logs.

    Attributes:
        pid: None while there is no process.
        held: Tasks that it has, begun or not.
        done: Tasks that it has answered since it started.
        batches: Batches that it has begun since it started; none are counted of look-ups.
        deaths: Number of times it died.
    """

    name: str
    role: WorkerRole
    device: str
    extractors: tuple[ExtractorName, ...]
    state: WorkerState
    pid: int | None
    held: int
    done: int
    batches: int
    deaths: int


class TaskPool(Protocol):
    """The workers as the King sees them; all but `wake` are for one thread."""

    @property
    def ready(self) -> bool:
        """Return True when every worker has been ready once, and none has refused."""

    @property
    def refused(self) -> str | None:
        """Return why the pool cannot work."""

    @property
    def bundle(self) -> tuple[str, str] | None:
        """Name and version of the bundle that is served."""

    @property
    def fingerprints(self) -> Mapping[Stream, str]:
        """Return stream -> fingerprint of the features that the extractors give, once ready."""

    @property
    def workers(self) -> list[WorkerView]: ...

    def start(self) -> None:
        """Start every worker; returns at once."""

    def submit(self, task: Task, *, deadline: float, priority: int = 0, turn: int = 0) -> int:
        """Queue a task and return its ID; ``deadline`` is `time.monotonic()`.

        Tasks of the highest priority come first, of those the ones of the lowest turn.
        """

    def cancel(self, task_id: int) -> None:
        """Forget a task: it has no event, and what it holds is freed."""

    def release(self, slot: int) -> None:
        """Say that no more tasks will refer to a decoded slot."""

    def poll(self, timeout_s: float) -> list[PoolEvent]:
        """Drive the pool; returns with the first events, when woken, or after ``timeout_s``."""

    def wake(self) -> None:
        """Interrupt `poll`; from any thread."""

    def stop(self, timeout_s: float) -> None:
        """Let workers finish what they have started, then kill the rest."""
