"""The metrics of the HTTP server for Prometheus, at `/metrics` of its own address.

The server is one process (`web.server.gunicorn_options`), so one registry in memory holds all of
them; gunicorn's arbiter has none. After a restart counters begin at 0, which Prometheus expects.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict

from prometheus_client import Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from king.metrics import SECONDS, Children, PostMetrics, bundle_info, new_registry, worker_metrics
from workers.runner import PostRunner


class HttpMetrics:
    """Every metric of one server."""

    def __init__(self, runner: PostRunner) -> None:
        self._registry = new_registry()
        self.posts = PostMetrics(self._registry)
        self._requests = Children(
            Counter(
                "insighttag_http_requests",
                "Requests that were answered; error is the type in the answer",
                ["endpoint", "status", "error"],
                registry=self._registry,
            )
        )
        self._seconds = Children(
            Histogram(
                "insighttag_http_request_seconds",
                "Time from the headers of a request to its answer",
                ["endpoint"],
                buckets=SECONDS,
                registry=self._registry,
            )
        )
        self._registry.register(_Runner(runner))

    def answered(self, endpoint: str | None, status: int, error: str, seconds: float) -> None:
        """Count a request; the endpoint is None where there is none of its path and method."""
        name = endpoint or "none"
        self._requests(name, str(status), error).inc()
        self._seconds(name).observe(seconds)

    def page(self, accept: str) -> tuple[bytes, str]:
        """Return all metrics in the format that the client asks for, and its content type."""
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type


class _Runner(Collector):
    """The state of the workers at the time of a scrape."""

    def __init__(self, runner: PostRunner) -> None:
        self._runner = runner

    def collect(self) -> Iterable[Metric]:
        runner = self._runner
        text = "1 while posts can be tagged"
        yield GaugeMetricFamily("insighttag_http_ready", text, value=float(runner.ready))
        text = "Posts in flight of this process"
        yield GaugeMetricFamily("insighttag_in_flight_posts", text, value=runner.in_flight)
        yield bundle_info(runner.bundle)
        yield from worker_metrics([asdict(view) for view in runner.workers])
