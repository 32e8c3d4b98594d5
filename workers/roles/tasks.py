"""What each task does: the same functions in the workers and in `workers.local`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from common.errors import FeatureError
from config.settings import DecodeSettings, FeatureSettings
from workers.pool.arena import Arena
from workers.protocol import Decoded, DecodeTask, Extracted, ExtractTask, FuseTask, Part
from workers.roles.batch import Outcome, run_batch

if TYPE_CHECKING:
    from extractors.suite import ExtractorSuite
    from fusion.infer.inferer import Inferer


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
    """Run one extractor on a batch of its tasks; a bad member fails alone.

    Raises:
        DeviceLost: The process must be replaced.
    """

    def run(some: Sequence[ExtractTask]) -> list[Extracted]:
        results = suite.run(some[0].extractor, [_item(task, arena) for task in some])
        if some[0].extractor == "ocr":
            return [Extracted(text=text) for text in results]
        return [_extracted(result) for result in results]

    return run_batch("extract", run, tasks)


def run_fuse(inferer: Inferer, tasks: Sequence[FuseTask]) -> list[Outcome]:
    """Predict the tags of a batch of posts; a bad member fails alone.

    Raises:
        DeviceLost: The process must be replaced.
    """
    return run_batch("fuse", lambda some: inferer.predict([t.features for t in some]), tasks)


def _extracted(result: Any) -> Extracted:
    """One array, or the streams of the video, of which its own comes first."""
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
