"""OpenTelemetry traces of the King: a span for each attempt at a post, with one for each stage.

The spans are made from the times that an attempt has anyway, once it has ended (`Traces.ended`),
and a thread of the SDK sends them; workers know nothing of them. ``traces.endpoint`` switches them
on; docs/metrics.md describes them.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator

import structlog

from common.errors import ConfigError, one_line
from common.post import clean
from common.urls import redact
from config.settings import TraceSettings
from king.jobs import Dead, Retry, Superseded, Tagged
from king.status import OUTCOMES, End
from workers.protocol import STAGES

try:
    from opentelemetry import trace
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
    from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ImportError as error:
    raise ConfigError(
        f"traces.endpoint: OpenTelemetry cannot be imported ({one_line(error)}); "
        "install the extra, pip install '.[otel]', or set it to null"
    ) from error

# One request to the collector may take this long. At half, a slow collector loses spans; at double,
# twice as many wait in memory while it hangs.
_TIMEOUT_S = 4.0
# Wait for the last spans when the King ends, on top of its drain. At half, those of a slow
# collector are lost; at double, a King whose collector is away takes that much longer to end.
_LAST_S = 4.0
# A collector that refuses or is away is named in the log once in this time. At half, an outage
# makes twice as many lines; at double, the next outage may pass unsaid.
_SAY_EVERY_S = 60.0

_NS_PER_MS = 1_000_000
_NS_PER_S = 1_000_000_000

log = structlog.get_logger()


class Traces:
    """The spans of one King."""

    def __init__(
        self, settings: TraceSettings, owner: str, exporter: SpanExporter | None = None
    ) -> None:
        """Describe the traces; nothing is sent before `sent`.

        ``owner`` names this King; the exporter defaults to that of ``traces.endpoint``.
        """
        self._url = redact(settings.endpoint or "")
        self._exporter = exporter or OTLPSpanExporter(settings.endpoint, timeout=_TIMEOUT_S)
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": "insighttag", "service.instance.id": owner}),
            sampler=ParentBasedTraceIdRatio(settings.ratio),
            shutdown_on_exit=False,
        )
        self._tracer = self._provider.get_tracer("insighttag.king")
        self._propagator = TraceContextTextMapPropagator()

    @contextlib.contextmanager
    def sent(self) -> Iterator[None]:
        """Send the spans of the block, the last ones at its end."""
        complaints = _Complaints(self._url)
        logger = logging.getLogger("opentelemetry")
        logger.addHandler(complaints)
        logger.propagate = False
        processor = BatchSpanProcessor(self._exporter)
        self._provider.add_span_processor(processor)
        log.info("king.traces_sent", url=self._url)
        try:
            yield
        finally:
            # In a thread, since the SDK would wait for half a minute.
            last = threading.Thread(target=processor.shutdown, name="king-traces", daemon=True)
            last.start()
            last.join(_LAST_S)
            if last.is_alive():
                log.warning("king.traces_lost", url=self._url, waited_s=_LAST_S)
                self._exporter.shutdown()
            logger.removeHandler(complaints)

    def ended(self, end: End, total_s: float | None) -> None:
        """Make the spans of an attempt whose message came ``total_s`` ago (store thread).

        Messages that began no attempt have no spans.
        """
        if not isinstance(end, (Tagged, Superseded, Retry, Dead)) or total_s is None:
            return
        started, now_ns = end.started, time.time_ns()
        arrived_ns = now_ns - round(total_s * _NS_PER_S)
        context = None
        if started.traceparent is not None:
            context = self._propagator.extract({"traceparent": started.traceparent})
        span = self._tracer.start_span(
            "post", context, trace.SpanKind.CONSUMER, start_time=arrived_ns
        )
        if span.is_recording():
            _describe(span, end)
            self._add_stages(span, end, arrived_ns, now_ns)
        span.end(now_ns)

    def _add_stages(
        self,
        post: trace.Span,
        end: Tagged | Superseded | Retry | Dead,
        arrived_ns: int,
        written_ns: int,
    ) -> None:
        """Add a span for each wait of the post: for its turn, the stages, and the database."""
        context = trace.set_span_in_context(post)
        worked_ns = min(_ended_ns(end) or written_ns, written_ns)
        began_ns = max(arrived_ns, worked_ns - end.timings_ms.get("total", 0) * _NS_PER_MS)
        spans = [("wait", began_ns - arrived_ns)]
        spans += [(it, end.timings_ms[it] * _NS_PER_MS) for it in STAGES if it in end.timings_ms]
        at_ns = arrived_ns
        for name, duration_ns in spans:
            span = self._tracer.start_span(name, context, start_time=at_ns)
            at_ns = min(at_ns + duration_ns, worked_ns)
            span.end(at_ns)
        self._tracer.start_span("write", context, start_time=worked_ns).end(written_ns)


def _ended_ns(end: Tagged | Superseded | Retry | Dead) -> int | None:
    """Return when the attempt ended, before its outcome was written; None if that is not known."""
    match end:
        case Tagged(result=result) if result.tagged_at is not None:
            return round(result.tagged_at.timestamp() * _NS_PER_S)
        case Retry(ended_at=ended_at) | Dead(ended_at=ended_at):
            return round(ended_at * _NS_PER_S)
    return None


def _describe(span: trace.Span, end: Tagged | Superseded | Retry | Dead) -> None:
    span.set_attribute("insighttag.post_id", clean(end.started.post_id))
    span.set_attribute("insighttag.attempt", end.started.attempt)
    span.set_attribute("insighttag.outcome", OUTCOMES[type(end)])
    match end:
        case Tagged(result=result):
            span.set_attribute("insighttag.bundle", clean(result.model))
            span.set_attribute("insighttag.bundle_version", clean(result.version))
            span.set_attribute("insighttag.tags", len(result.tags))
            for modality, status in result.modalities.items():
                span.set_attribute(f"insighttag.modality.{modality}", status)
        case Retry(failure=failure) | Dead(failure=failure):
            span.set_attribute("error.type", clean(failure.type))
            text = clean(f"{failure.stage}: {failure.message}")
            span.set_status(trace.Status(trace.StatusCode.ERROR, text))


class _Complaints(logging.Handler):
    """Writes warnings of the SDK to the King's log, now and then."""

    def __init__(self, url: str) -> None:
        super().__init__(logging.WARNING)
        self._url = url
        self._due = 0.0

    def emit(self, record: logging.LogRecord) -> None:
        now = time.monotonic()
        if now >= self._due:
            self._due = now + _SAY_EVERY_S
            log.warning("king.traces_refused", url=self._url, error=record.getMessage()[:300])
