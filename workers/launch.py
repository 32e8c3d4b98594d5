"""What a worker process is told when it is born, and which function each role runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from config.settings import BrokerSettings, ExtractorName, Settings, StoreSettings
from workers.lanes import Lane
from workers.protocol import WorkerRole

ROLES: Mapping[WorkerRole, str] = MappingProxyType(
    {
        "fetch": "workers.fetcher:run",
        "decode": "workers.decoder:run",
        "extract": "workers.extractor:run",
        "fuse": "workers.fuser:run",
    }
)
"""Role ─► ``module:function``, by name so that the King never imports what the workers load."""

REFUSED_STATUS = 2
"""Exit status of a worker that said `Refused`: a restart would not help."""
BROKEN_STATUS = 3
"""Exit status of a worker whose device state is lost (a device-side assert): restart it."""


@dataclass(frozen=True, slots=True)
class Launch:
    """King ─► worker, the first message on the pipe.

    Attributes:
        run: ``module:function`` that gets the `workers.child.Context`.
        name: Unique name, ``extract-0``; in logs and in the process title.
        settings: As JSON, `without_credentials`.
        arena: Descriptor of the shared slots, or -1 for a role that has no business there.
        device: ``cpu``, or ``cuda:0`` of the one device that the process can see.
        spool: Folder of downloaded files.
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


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """One worker process of the pool, as the settings describe it.

    Attributes:
        lanes: The lanes that it serves.
        device: As configured: ``cpu`` or ``cuda:N`` of this host.
        at_most: Tasks that it may hold at once, begun or not; None leaves it to the batches.
        limit_s: Seconds that a task may run once begun.
    """

    role: WorkerRole
    name: str
    lanes: tuple[Lane, ...]
    device: str
    extractors: tuple[ExtractorName, ...]
    threads: int
    at_most: int | None
    limit_s: float


def without_credentials(settings: Settings) -> Settings:
    """What a worker may know: it has no business with the broker and the database.

    A decoder that is taken over by what it decodes finds no password in its memory.
    """
    return settings.model_copy(update={"broker": BrokerSettings(), "store": StoreSettings()})


FETCH_TRIES = 2
_FETCH_MARGIN_S = 30  # name resolution cannot be interrupted from inside the process


def worker_specs(settings: Settings) -> list[WorkerSpec]:
    """Every worker process that the settings ask for."""
    fetch, decode, workers = settings.fetch, settings.decode, settings.workers
    specs = [
        WorkerSpec(
            role="fetch",
            name="fetch-0",
            lanes=("fetch",),
            device="cpu",
            extractors=(),
            threads=1,
            at_most=fetch.connections,
            limit_s=fetch.total_timeout_s + _FETCH_MARGIN_S,
        )
    ]
    specs += [
        WorkerSpec("decode", f"decode-{i}", ("decode",), "cpu", (), 1, 1, decode.deadline_s)
        for i in range(decode.processes)
    ]
    placed = [group for group in workers.extractors for _ in range(group.processes)]
    specs += [
        WorkerSpec(
            role="extract",
            name=f"extract-{i}",
            lanes=_hosted(settings, group.extractors),
            device=group.device,
            extractors=_hosted(settings, group.extractors),
            threads=group.threads,
            at_most=None,
            limit_s=workers.task_timeout_s,
        )
        for i, group in enumerate(placed)
    ]
    fusion = settings.fusion
    specs.append(
        WorkerSpec(
            role="fuse",
            name="fuse-0",
            lanes=("fuse",),
            device=fusion.device,
            extractors=(),
            threads=fusion.threads,
            at_most=None,
            limit_s=workers.task_timeout_s,
        )
    )
    return specs


def _hosted(settings: Settings, names: tuple[ExtractorName, ...]) -> tuple[ExtractorName, ...]:
    return tuple(name for name in names if name != "ocr" or settings.features.ocr.enabled)
