"""What the King believes of a worker: decoders may be taken over by what they decode.

A message that does not fit what the worker was asked is no error of a task: its sender is killed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from extractors.parts import PARTS
from workers.pool.pipe import PipeBroken
from workers.pool.schedule import Entry
from workers.protocol import (
    MODALITIES,
    STREAMS,
    ArrayRef,
    Began,
    BundleLoaded,
    CacheHits,
    Decoded,
    Done,
    Extracted,
    Failed,
    Failure,
    Fetched,
    Part,
    Ready,
    Refused,
    Result,
    Tags,
)

_BY_LANE: dict[str, type] = {"recall": CacheHits, "fetch": Fetched, "decode": Decoded, "fuse": Tags}
_MAX_PARTS = 4096


def check_result(entry: Entry, result: Result, spool: Path) -> None:
    """Believe a result, or not; ``spool`` is the folder that downloads must lie in.

    Raises:
        PipeBroken: It cannot be the answer to this task.
    """
    if type(result) is not _BY_LANE.get(entry.lane, Extracted):
        raise PipeBroken(f"{type(result).__name__} is no answer to {entry.lane}")
    if isinstance(result, Fetched) and Path(result.path).parent != spool:
        raise PipeBroken("a download outside the spool")
    if isinstance(result, Decoded):
        _check_decoded(entry, result)
    if isinstance(result, Extracted) and not (
        type(result.also) is dict and all(stream in STREAMS for stream in result.also)
    ):
        raise PipeBroken("features of no stream")


def check_message(message: object) -> None:
    """Believe the outside of a message, or not.

    Raises:
        PipeBroken: Its fields are not of their types.
    """
    good = True
    if isinstance(message, Began):
        good = type(message.task_ids) is tuple and all(type(i) is int for i in message.task_ids)
    elif isinstance(message, Done):
        good = type(message.task_id) is int and type(message.seconds) is float
    elif isinstance(message, Failed):
        good = type(message.task_id) is int
        check_failure(message.failure)
    elif isinstance(message, Ready):
        texts = [*message.info, *message.info.values()] if type(message.info) is dict else [0]
        good = all(type(text) is str for text in texts)
    elif isinstance(message, Refused):
        good = type(message.message) is str
    elif isinstance(message, BundleLoaded):
        good = type(message.name) is str and type(message.version) is str
    else:
        good = False
    if not good:
        raise PipeBroken(f"{type(message).__name__} is no message of a worker")


def check_failure(failure: Failure) -> None:
    """Believe a failure, or not.

    Raises:
        PipeBroken: It is no failure.
    """
    texts = (failure.stage, failure.type, failure.message) if type(failure) is Failure else (0,)
    if not all(type(text) is str for text in texts):
        raise PipeBroken("a failure that is none")


def _check_decoded(entry: Entry, decoded: Decoded) -> None:
    if not isinstance(decoded.failures, Mapping) or len(decoded.parts) > _MAX_PARTS:
        raise PipeBroken("decoded to what cannot be")
    for modality, failure in decoded.failures.items():
        if modality not in MODALITIES:
            raise PipeBroken("a failure of no modality")
        check_failure(failure)
    for part in decoded.parts:
        if type(part) is not Part or part.kind not in PARTS or type(part.ref) is not ArrayRef:
            raise PipeBroken("a part that is none")
        ref = part.ref
        numbers = (ref.slot, ref.offset, *ref.shape)
        if ref.slot != entry.slot or not all(type(n) is int and n >= 0 for n in numbers):
            raise PipeBroken("a part outside its slot")
