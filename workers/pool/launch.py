"""The worker processes that the settings ask for, and the function of each role."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from config.settings import (
    BrokerSettings,
    CacheSettings,
    ExtractorName,
    Section,
    Settings,
    StoreSettings,
)
from workers.pool.batching import TaskQueue
from workers.protocol import WorkerRole

ROLES: Mapping[WorkerRole, str] = MappingProxyType(
    {
        "fetch": "workers.roles.fetch:run",
        "decode": "workers.roles.decode:run",
        "extract": "workers.roles.extract:run",
        "fuse": "workers.roles.fuse:run",
        "cache": "workers.roles.lookup:run",
    }
)
"""Role -> ``module:function``, by name so that the King never imports what the workers load."""

REFUSED_STATUS = 2
"""Exit status of a worker that said `Refused`: a restart would not help."""
BROKEN_STATUS = 3
"""Exit status of a worker whose device state is lost (a device-side assert): restart it."""


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """One worker process of the pool, as the settings describe it.

    Attributes:
        queues: The task queues that it serves.
        device: As configured: ``cpu`` or ``cuda:N`` of this host.
        at_most: Tasks that it may hold at once, begun or not; None leaves it to the batches.
        limit_s: Seconds that a task may run once begun.
    """

    role: WorkerRole
    name: str
    queues: tuple[TaskQueue, ...]
    device: str
    extractors: tuple[ExtractorName, ...]
    threads: int
    at_most: int | None
    limit_s: float


def without_credentials(settings: Settings, role: WorkerRole = "decode") -> Settings:
    """Return the settings without what a worker does not need: broker, database, cache.

    A decoder that is taken over by what it decodes finds no password in its memory; the feature
    cache is known only to those who use it.
    """
    hidden: dict[str, Section] = {"broker": BrokerSettings(), "store": StoreSettings()}
    if role not in ("cache", "extract"):
        hidden["cache"] = CacheSettings()
    return settings.model_copy(update=hidden)


_LOOKUP_MARGIN_S = 30
_FETCH_MARGIN_S = 30
"""Seconds beyond a role's own limit before its process is killed. Both keep their limits by
themselves, but for name resolution, which cannot be interrupted from inside the process and gives
up after some 20 s; with less, a slow name server would cost the downloads of all other posts."""


def worker_specs(
    settings: Settings,
    *,
    fuse: bool = True,
    extractors: Collection[ExtractorName] | None = None,
) -> list[WorkerSpec]:
    """Return every worker process that the settings ask for.

    Args:
        settings: Of the whole.
        fuse: Whether there is a fusion worker, which needs a bundle.
        extractors: Only these are hosted; None: all.
    """
    fetch, decode, workers = settings.fetch, settings.decode, settings.workers
    specs = [
        WorkerSpec(
            role="fetch",
            name="fetch-0",
            queues=("fetch",),
            device="cpu",
            extractors=(),
            threads=1,
            at_most=fetch.connections,
            limit_s=fetch.total_timeout_s + _FETCH_MARGIN_S,
        )
    ]
    if settings.cache.url is not None:
        specs.append(
            WorkerSpec(
                role="cache",
                name="cache-0",
                queues=("recall",),
                device="cpu",
                extractors=(),
                threads=1,
                at_most=4 * settings.cache.threads,  # it has the next ones while the King polls
                limit_s=2 * settings.cache.timeout_s + _LOOKUP_MARGIN_S,
            )
        )
    specs += [
        WorkerSpec("decode", f"decode-{i}", ("decode",), "cpu", (), 1, 1, decode.deadline_s)
        for i in range(decode.processes)
    ]
    hosted = [
        (group, _hosted(settings, group.extractors, extractors)) for group in workers.extractors
    ]
    placed = [(group, names) for group, names in hosted if names for _ in range(group.processes)]
    specs += [
        WorkerSpec(
            role="extract",
            name=f"extract-{i}",
            queues=names,
            device=group.device,
            extractors=names,
            threads=group.threads,
            at_most=None,
            limit_s=workers.task_timeout_s,
        )
        for i, (group, names) in enumerate(placed)
    ]
    return [*specs, _fusion_spec(settings)] if fuse else specs


def _fusion_spec(settings: Settings) -> WorkerSpec:
    return WorkerSpec(
        role="fuse",
        name="fuse-0",
        queues=("fuse",),
        device=settings.fusion.device,
        extractors=(),
        threads=settings.fusion.threads,
        at_most=None,
        limit_s=settings.workers.task_timeout_s,
    )


def _hosted(
    settings: Settings, names: tuple[ExtractorName, ...], only: Collection[ExtractorName] | None
) -> tuple[ExtractorName, ...]:
    chosen = [name for name in names if only is None or name in only]
    return tuple(name for name in chosen if name != "ocr" or settings.features.ocr.enabled)
