"""Schedulers with toy workers, and what they send."""

from config.settings import Settings
from workers.pool.scheduler import Scheduler, WorkerLoad
from workers.protocol import ArrayRef, Envelope, ExtractTask

SETTINGS = Settings.model_validate(
    {
        "workers": {"slots": 3},
        "decode": {"processes": 1},
        "features": {"text": {"batch_size": 4}, "video": {"batch_size": 8}},
    }
)


def picture(slot: int, rows: int = 2) -> ExtractTask:
    return ExtractTask("video", "video", (ArrayRef(slot, 0, (rows, 4, 4, 3), "uint8"),))


def scheduler(*loads: WorkerLoad) -> Scheduler:
    made = Scheduler(SETTINGS, grace_s=1.0)
    for load in loads:
        made.add(load)
    return made


def extractor(name: str = "e") -> WorkerLoad:
    return WorkerLoad(name, ("video", "text", "ocr"), None, 10.0)


def decoder(name: str = "d") -> WorkerLoad:
    return WorkerLoad(name, ("decode",), 1, 10.0)


def sent(made: Scheduler, now: float = 0.0) -> list[tuple[str, Envelope]]:
    return list(made.dispatch(now))


def ids(envelopes: list[tuple[str, Envelope]]) -> list[int]:
    return [envelope.task_id for _, envelope in envelopes]
