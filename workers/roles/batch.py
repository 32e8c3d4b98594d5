"""Run a batch so that one bad member costs only itself; used by workers and by `workers.local`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TypeAlias, TypeVar

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
from workers.protocol import Failure, Result

Item = TypeVar("Item")
Outcome: TypeAlias = Result | Failure

_log = structlog.get_logger()
_FOREIGN: dict[str, type[PermanentError]] = {"fetch": FetchRefused, "decode": MediaError}
_LOST_DEVICE = ("device-side assert", "cuda error", "cublas_status", "cudnn_status_execution")


class DeviceLost(Exception):
    """The device's state cannot be recovered in this process: it must end and be replaced."""


def failure_of(stage: str, error: Exception) -> Failure:
    """A failure from an exception.

    What is not ours is logged with its traceback, and becomes the error of its stage, whose
    message begins with the exception's own name.
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
    """Results of all items, in order: halves when out of memory, alone when one is bad.

    ``run`` gives one result per item, or raises.

    Raises:
        DeviceLost: A CUDA error that no later call in this process would survive.
    """
    try:
        results = list(run(items))
        if len(results) != len(items):
            raise RuntimeError(f"{stage}: {len(results)} results for {len(items)} items")
        return list(results)
    except Exception as error:  # the worker's loop: whatever an item does, the worker goes on
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
    # The exception's frames keep the tensors alive that have just not fitted.
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
