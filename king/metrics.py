"""The metrics of the King for Prometheus, served on an address of their own (``king.metrics``).

What a post shows is observed once, by the store thread, where it ends (`KingMetrics.ended`); all
else is read from the health file's content when Prometheus asks. The HTTP server serves the same
metrics of posts and workers (`web.metrics`). docs/metrics.md lists all.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeAlias, TypeVar, get_args
from wsgiref.simple_server import WSGIRequestHandler, make_server

import psutil
import structlog
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    make_wsgi_app,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import ThreadingWSGIServer
from prometheus_client.registry import Collector

from common.errors import ConfigError
from common.post import TagResult, clean
from common.urls import split_address
from king.jobs import Dead, Rejected, Retry, Superseded, Tagged, Unreadable
from king.status import OUTCOMES, End, Phase
from workers.protocol import WorkerState

# From a text out of the cache to a long video behind a queue. A bucket is a series per stage: twice
# as many double what Prometheus stores, half as many make a quantile wrong by a factor of five.
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_SCORES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1)
_TAGS = (0, 1, 2, 3, 5, 8, 13, 20)

# Label values of one metric. Names of tags and of errors come from bundles and from workers, which
# files of strangers may take over; each value is a series for ever. At half, taxonomies of common
# size do not fit; at double, one King costs Prometheus as much as an ordinary host.
_MOST_CHILDREN = 1000

# A client that sends nothing, or does not read, loses its thread after this. At half, a scrape over
# a slow line breaks off; at double, such threads are there for twice as long.
_CLIENT_TIMEOUT_S = 10.0

MetricT = TypeVar("MetricT", Counter, Histogram)
Samples: TypeAlias = Iterable[tuple[Sequence[str], float]]
"""Values of the labels, and the number."""

_PHASES = get_args(Phase)
_WORKER_STATES = get_args(WorkerState)
_COUNTERS = (
    ("retried", "retries", "Failed attempts that are retried"),
    ("settled", "messages_settled", "Messages that needed no work"),
    ("cache_lookups", "cache_lookups", "Media files that were looked up in the cache"),
    ("cache_hits", "cache_hits", "Media files whose features were all in the cache"),
    ("gpu_decoded", "gpu_decoded_videos", "Videos that a GPU decoded"),
    ("gpu_refused", "gpu_refused_videos", "Videos that the CPU decoded in place of a GPU"),
)
_GAUGES = (
    ("in_flight", "in_flight_posts", "Posts in flight of this process"),
    ("oldest_in_flight_s", "oldest_in_flight_seconds", "Age of the oldest post in flight"),
    ("open_jobs", "open_jobs", "Jobs of all Kings, without dead letters"),
)

log = structlog.get_logger()


def new_registry() -> CollectorRegistry:
    """Return a registry with the memory, CPU and descriptors of this process."""
    # They are a third of all series, and Prometheus sees a restart without them.
    disable_created_metrics()  # type: ignore[no-untyped-call]
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    return registry


class Children(Generic[MetricT]):
    """The children of a metric by their label values; past `_MOST_CHILDREN` they are ``other``."""

    def __init__(self, metric: MetricT) -> None:
        self._metric: MetricT = metric
        self._children: dict[tuple[str, ...], MetricT] = {}

    def __call__(self, *values: str) -> MetricT:
        """Return the child of some label values."""
        child = self._children.get(values)
        if child is None:
            if len(self._children) >= _MOST_CHILDREN:
                values = ("other",) * len(values)
            child = self._metric.labels(*map(clean, values))
            self._children[values] = child
        return child


class PostMetrics:
    """Metrics of tagged posts, read off their results: a few microseconds a post."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._stages = Children(
            Histogram(
                "insighttag_stage_seconds",
                "Time of an attempt in a stage, waiting or being worked on",
                ["stage"],
                buckets=SECONDS,
                registry=registry,
            )
        )
        self._modalities = Children(
            Counter(
                "insighttag_modalities",
                "Modalities of tagged posts: ok, missing or failed",
                ["modality", "status"],
                registry=registry,
            )
        )
        self._tags = Children(
            Counter("insighttag_tags", "Tags given to posts", ["tag"], registry=registry)
        )
        self._tags_of_post = Histogram(
            "insighttag_post_tags", "Tags of a tagged post", buckets=_TAGS, registry=registry
        )
        self._best_score = Histogram(
            "insighttag_post_best_score",
            "Highest score of a post's tags, if it has any",
            buckets=_SCORES,
            registry=registry,
        )

    def timed(self, timings_ms: Mapping[str, int]) -> None:
        """Observe the stages of an attempt that has ended."""
        for stage, duration_ms in timings_ms.items():
            if stage != "total":  # without the time in the queue and the database
                self._stages(stage).observe(duration_ms / 1000)

    def tagged(self, result: TagResult) -> None:
        """Observe the tags and modalities of a post."""
        for modality, status in result.modalities.items():
            self._modalities(modality, status).inc()
        for tag in result.tags:
            self._tags(tag.name).inc()
        self._tags_of_post.observe(len(result.tags))
        if result.tags:
            self._best_score.observe(result.tags[0].score)


class KingMetrics:
    """Every metric of one King."""

    def __init__(self, snapshot: Callable[[], Mapping[str, Any]]) -> None:
        """Take what returns the health file's content; it is called by the threads of scrapes."""
        self.registry = new_registry()
        self._posts = PostMetrics(self.registry)
        self._seconds = Children(
            Histogram(
                "insighttag_post_seconds",
                "Time of an attempt from the arrival of its message to its written outcome",
                ["outcome"],
                buckets=SECONDS,
                registry=self.registry,
            )
        )
        self._dead_letters = Children(
            Counter(
                "insighttag_dead_letters",
                "Posts and messages that became dead letters",
                ["stage", "type"],
                registry=self.registry,
            )
        )
        self.registry.register(_Snapshots(snapshot))

    def ended(self, end: End, total_s: float | None) -> None:
        """Observe the end of an attempt or of a message (store thread)."""
        match end:
            case Tagged(result=result):
                self._posts.tagged(result)
            case Dead(failure=failure) | Rejected(failure=failure) | Unreadable(failure=failure):
                self._dead_letters(failure.stage, failure.type).inc()
        if isinstance(end, (Tagged, Superseded, Retry, Dead)):
            self._posts.timed(end.timings_ms)
            if total_s is not None:
                self._seconds(OUTCOMES[type(end)]).observe(total_s)

    @contextlib.contextmanager
    def served(self, address: str) -> Iterator[None]:
        """Answer scrapes as long as the block runs; ConfigError when the address cannot be used."""
        host, port = split_address(address)
        try:
            kind = _ServerOfIPv6 if ":" in host else _Server
            server = make_server(host, port, make_wsgi_app(self.registry), kind, _Handler)
        except OSError as error:
            reason = error.strerror or str(error)
            hint = "name another address, or null for no metrics"
            raise ConfigError(f"king.metrics: {address}: {reason}; {hint}") from error
        thread = threading.Thread(target=server.serve_forever, name="king-metrics", daemon=True)
        thread.start()
        log.info("king.metrics_served", url=f"http://{address}/metrics")
        try:
            yield
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


class _Snapshots(Collector):
    """The content of the health file as metrics."""

    def __init__(self, snapshot: Callable[[], Mapping[str, Any]]) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterable[Metric]:
        health = self._snapshot()
        counters = health["counters"]
        phases = [([phase], float(phase == health["phase"])) for phase in _PHASES]
        yield _gauge("king_phase", "1 for the state of the King", ["phase"], phases)
        yield _gauge(
            "king_thread_tick_timestamp_seconds",
            "Unix time at which a thread last showed progress",
            ["thread"],
            [([thread], tick) for thread, tick in health["ticks"].items()],
        )
        ends = [([name], counters[name]) for name in ("tagged", "superseded", "failed")]
        yield _counter("posts", "Posts that were finished", ["outcome"], ends)
        for key, name, text in _COUNTERS:
            yield _counter(name, text, [], [([], counters[key])])
        depth = {"ready": health["queue_depth"], "unacknowledged": health["unacknowledged"]}
        yield _gauge(
            "queue_messages",
            "Waiting messages, and unacknowledged ones if the broker reports them",
            ["state"],
            [([state], number) for state, number in depth.items() if number is not None],
        )
        for key, name, text in _GAUGES:
            yield _gauge(name, text, [], [([], health[key])] if health[key] is not None else [])
        refused = float(health["publish_refused"] is not None)
        yield _gauge(
            "publish_refused", "1 while the broker accepts no messages", [], [([], refused)]
        )
        yield bundle_info(_bundle_of(health["bundle"]))
        yield bundle_info(_bundle_of(health["shadow"]), "shadow", "1 for the bundle on trial")
        text = "1 while the bundle in a folder is refused"
        reasons = {"served": health["bundle_refused"], "shadow": health["shadow_refused"]}
        refusals = [([which], float(reason is not None)) for which, reason in reasons.items()]
        yield _gauge("bundle_refused", text, ["bundle"], refusals)
        yield from worker_metrics(health["workers"])


def bundle_info(
    bundle: tuple[str, str] | None,
    name: str = "bundle",
    text: str = "1 for the bundle that is served",
) -> Metric:
    """Return the name and version of a bundle as a metric."""
    samples: Samples = [(list(map(clean, bundle)), 1.0)] if bundle else []
    return _gauge(f"{name}_info", text, ["name", "version"], samples)


def _bundle_of(health: Mapping[str, str] | None) -> tuple[str, str] | None:
    return (health["name"], health["version"]) if health is not None else None


def worker_metrics(workers: Sequence[Mapping[str, Any]]) -> Iterable[Metric]:
    """Return the metrics of workers, each as `WorkerView` has it; asks the system for the rest."""
    labels = ["worker", "role"]
    states = [
        ([worker["name"], worker["role"], worker["device"], state], float(worker["state"] == state))
        for worker in workers
        for state in _WORKER_STATES
    ]
    yield _gauge(
        "worker_state", "1 for the state of a worker", [*labels, "device", "state"], states
    )

    def of(key: str) -> Samples:
        return [([worker["name"], worker["role"]], worker[key]) for worker in workers]

    yield _gauge(
        "worker_tasks_held", "Tasks that a worker holds, started or not", labels, of("held")
    )
    yield _counter("worker_tasks", "Tasks finished since a worker started", labels, of("done"))
    text = "Batches that a worker started, except look-ups"
    yield _counter("worker_batches", text, labels, of("batches"))
    yield _counter("worker_deaths", "Times that a worker died", labels, of("deaths"))
    began, memory, cpu = [], [], []
    for worker in workers:
        name = [worker["name"], worker["role"]]
        with contextlib.suppress(psutil.Error, OSError):  # it has ended, or no descriptors are left
            if worker["pid"] is not None:
                process = psutil.Process(worker["pid"])
                with process.oneshot():
                    began.append((name, process.create_time()))
                    memory.append((name, float(process.memory_info().rss)))
                    cpu.append((name, float(sum(process.cpu_times()[:2]))))
    text = "Unix time of a worker's start"
    yield _gauge("worker_start_time_seconds", text, labels, began)
    yield _gauge("worker_resident_memory_bytes", "Resident memory of a worker", labels, memory)
    yield _counter("worker_cpu_seconds", "CPU time of a worker since it started", labels, cpu)


def _gauge(name: str, text: str, labels: Sequence[str], samples: Samples) -> Metric:
    return _filled(GaugeMetricFamily(f"insighttag_{name}", text, labels=labels), samples)


def _counter(name: str, text: str, labels: Sequence[str], samples: Samples) -> Metric:
    return _filled(CounterMetricFamily(f"insighttag_{name}", text, labels=labels), samples)


def _filled(family: GaugeMetricFamily | CounterMetricFamily, samples: Samples) -> Metric:
    for labels, value in samples:
        family.add_metric(labels, value)
    return family


class _Server(ThreadingWSGIServer):
    """A thread for each scrape."""

    def handle_error(self, request: object, client_address: object) -> None:
        """Note a client that has gone or sends nothing; the default writes a traceback."""
        log.debug("king.scrape_failed", client=str(client_address), exc_info=True)


class _ServerOfIPv6(_Server):
    address_family = socket.AF_INET6


class _Handler(WSGIRequestHandler):
    timeout = _CLIENT_TIMEOUT_S

    def log_message(self, *_: object) -> None:
        """Log nothing: scrapes come four times a minute."""
