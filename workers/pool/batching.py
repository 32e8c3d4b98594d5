"""Task queues: which tasks can be one batch, and the share of a full batch that each takes.

The King's scheduler and the workers count alike, so that tasks that are sent together run together.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from config.settings import Settings
from workers.protocol import CacheLookup, DecodeTask, ExtractTask, FetchTask, Task

TaskQueue: TypeAlias = str
"""``recall``, ``fetch``, ``decode``, ``fuse``, or an extractor's name."""


def queue_of(task: Task) -> TaskQueue:
    """Return the queue of a task."""
    if isinstance(task, CacheLookup):
        return "recall"
    if isinstance(task, FetchTask):
        return "fetch"
    if isinstance(task, DecodeTask):
        return "decode"
    return task.extractor if isinstance(task, ExtractTask) else "fuse"


def stage_of(task_queue: TaskQueue) -> str:
    """Return ``recall``, ``fetch``, ``decode``, ``extract`` or ``fuse``."""
    return task_queue if task_queue in ("recall", "fetch", "decode", "fuse") else "extract"


def batch_rows(settings: Settings) -> Mapping[TaskQueue, int]:
    """Return the rows of a full batch: frames, images, patches, texts, pictures or posts.

    With one row, each task is a batch of its own; its extractor cuts it as its settings say.
    """
    features = settings.features
    if not settings.workers.share_batches:
        return dict.fromkeys(("video", "image", "audio", "text", "ocr"), 1) | {
            "fuse": settings.fusion.batch_size
        }
    hosts = [group.threads for group in settings.workers.extractors if "ocr" in group.extractors]
    return {
        "video": features.video.batch_size,
        "image": features.image.batch_size,
        "audio": features.audio.batch_size,
        "text": features.text.batch_size,
        "ocr": min(hosts, default=1),  # pictures are read one a thread: more would only wait
        "fuse": settings.fusion.batch_size,
    }


def weight_of(task: Task, rows: Mapping[TaskQueue, int]) -> float:
    """Return the share of a full batch that a task takes, at most 1."""
    task_queue = queue_of(task)
    count = 1
    if isinstance(task, ExtractTask) and task_queue in ("video", "image", "audio"):
        count = sum(ref.shape[0] for ref in task.refs if ref.shape)
    elif isinstance(task, ExtractTask) and task_queue == "ocr":
        count = len(task.refs)
    return min(1.0, count / rows.get(task_queue, 1))
