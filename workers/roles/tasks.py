"""The work of each task; a bad task of a batch fails alone. Also used by `workers.local`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np
import structlog

from common.errors import (
    FeatureError,
    FetchRefused,
    MediaError,
    PermanentError,
    RetryableError,
    TaggingError,
    one_line,
)
from common.post import Failure
from config.settings import DecodeSettings, FeatureSettings
from workers.pool.arena import Arena
from workers.protocol import Decoded, DecodeTask, Extracted, ExtractTask, FuseTask, Part, Result

if TYPE_CHECKING:
    from extractors.suite import ExtractorSuite
    from fusion.infer.inferer import Inferer

Item = TypeVar("Item")
Outcome: TypeAlias = Result | Failure

_log = structlog.get_logger()
_FOREIGN: dict[str, type[PermanentError]] = {"fetch": FetchRefused, "decode": MediaError}
_LOST_DEVICE = ("device-side assert", "cuda error", "cublas_status", "cudnn_status_execution")


class DeviceLost(Exception):
    """The device's state cannot be recovered in this process: it must end and be replaced."""


def failure_of(stage: str, error: Exception) -> Failure:
    """Return an exception as a failure.

    A foreign exception is logged with its traceback, and becomes the error of its stage with a
    message that begins with the exception's own name.
    """
    if not isinstance(error, TaggingError):
        _log.error("workers.task_error", stage=stage, exc_info=error)
        error = _typed(stage, error, str(error))
    return Failure.of(stage, error, retryable=isinstance(error, RetryableError))


def _typed(stage: str, error: Exception, text: str) -> TaggingError:
    name = type(error).__name__
    return _FOREIGN.get(stage, FeatureError)(f"{name}: {text}" if text else name)


def run_batch(
    stage: str, run: Callable[[Sequence[Item]], Sequence[Result]], items: Sequence[Item]
) -> list[Outcome]:
    """Return the results of all items in order; halve when out of memory, run each alone on errors.

    ``run`` returns one result per item, or raises.

    Raises:
        DeviceLost: A CUDA error that no later call in this process would survive.
    """
    try:
        results = list(run(items))
        if len(results) != len(items):
            raise RuntimeError(f"{stage}: {len(results)} results for {len(items)} items")
        return list(results)
    except Exception as error:  # the worker's loop: it goes on whatever an item does
        if _is_out_of_memory(error):
            return _smaller(stage, run, items, error)
        if _is_device_lost(error):
            raise DeviceLost(one_line(error, 300)) from error
        if len(items) == 1:
            return [failure_of(stage, error)]
    return [outcome for item in items for outcome in run_batch(stage, run, [item])]


def _smaller(
    stage: str,
    run: Callable[[Sequence[Item]], Sequence[Result]],
    items: Sequence[Item],
    error: Exception,
) -> list[Outcome]:
    text = one_line(error, 200)
    _log.warning("workers.out_of_memory", stage=stage, batch=len(items), error=text)
    # The exception's frames keep the tensors alive that did not fit.
    error.__traceback__ = None
    _empty_cache()
    if len(items) == 1:
        failed = _typed(stage, error, f"out of memory: {text}")
        return [Failure.of(stage, failed, retryable=True)]
    half = len(items) // 2
    return run_batch(stage, run, items[:half]) + run_batch(stage, run, items[half:])


def _is_out_of_memory(error: Exception) -> bool:
    # By name: torch is not imported here, and may not be in this process at all.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def _is_device_lost(error: Exception) -> bool:
    text = str(error).lower()
    kind = type(error).__name__ == "AcceleratorError" or isinstance(error, RuntimeError)
    return kind and any(sign in text for sign in _LOST_DEVICE)


def _empty_cache() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def run_decode(
    task: DecodeTask, features: FeatureSettings, limits: DecodeSettings, arena: Arena
) -> Decoded:
    """Decode a media file into its slot.

    Raises:
        MediaError: The file cannot be decoded, or gives more than a slot holds.
    """
    from extractors.media.decode import decode_media

    writer = arena.writer(task.slot)
    media = decode_media(task.kind, task.path, features, limits, writer)
    parts = tuple(Part(kind, writer.ref(array)) for kind, array in media.parts)
    return Decoded(parts, dict(media.failures))


def run_extract(suite: ExtractorSuite, tasks: Sequence[ExtractTask], arena: Arena) -> list[Outcome]:
    """Run one extractor on a batch of its tasks; a bad one fails alone.

    Raises:
        DeviceLost: The process must be replaced.
    """

    def run(batch: Sequence[ExtractTask]) -> list[Extracted]:
        results = suite.run(batch[0].extractor, [_item(task, arena) for task in batch])
        if batch[0].extractor == "ocr":
            return [Extracted(text=text) for text in results]
        return [_extracted(result) for result in results]

    return run_batch("extract", run, tasks)


def run_fuse(inferer: Inferer, tasks: Sequence[FuseTask]) -> list[Outcome]:
    """Predict the tags of a batch of posts; a bad one fails alone.

    Raises:
        DeviceLost: The process must be replaced.
    """
    return run_batch("fuse", lambda batch: inferer.predict([t.features for t in batch]), tasks)


def _extracted(result: Any) -> Extracted:
    """Wrap one array, or the streams of a video."""
    if not isinstance(result, Mapping):
        return Extracted(array=result)
    streams = dict(result)
    return Extracted(array=streams.pop("video"), also=streams)


def _item(task: ExtractTask, arena: Arena) -> Any:
    if task.extractor == "text":
        return task.text
    views = [arena.view(ref) for ref in task.refs]
    if task.extractor == "ocr":
        return tuple(views)
    if not views:
        raise FeatureError(f"{task.extractor}: nothing to extract from")
    return views[0] if len(views) == 1 else np.concatenate(views)  # (n_i, ...) -> (n, ...)
