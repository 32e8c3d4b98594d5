"""The spans of an attempt: what they say, and when they lie."""

from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timezone
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from common.post import Failure, Post, Tag, TagResult
from config.settings import TraceSettings
from king import traces
from king.jobs import Dead, Retry, Settled, Started, Superseded, Tagged, Unreadable
from king.status import End
from king.traces import Traces

NOW_S = 1_700_000_100.0
STARTED = Started(Post("p1", text="hello"), "p1", attempt=2)
TIMINGS_MS = {"fuse": 200, "fetch": 1000, "decode": 500, "total": 1700}
FAILURE = Failure("fetch", "FetchRefused", "HTTP 404")
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"

SpansOf = Callable[..., dict[str, ReadableSpan]]


def tagged() -> Tagged:
    """Tags that were there a tenth of a second before their write was confirmed."""
    result = TagResult(
        post_id="p1",
        model="demo",
        version="v1",
        tags=(Tag(3, "sport", 0.9),),
        modalities={"text": "ok", "video": "failed"},
    )
    at = datetime.fromtimestamp(NOW_S - 0.1, timezone.utc)
    return Tagged(STARTED, replace(result, tagged_at=at, timings_ms=TIMINGS_MS))


@pytest.fixture
def spans_of(monkeypatch: pytest.MonkeyPatch) -> SpansOf:
    """The spans by name of an end that is written at `NOW_S`, whose message came 3 s before."""

    class Clock:
        time_ns = staticmethod(lambda: int(NOW_S * 1e9))
        monotonic = staticmethod(lambda: 0.0)

    monkeypatch.setattr(traces, "time", Clock)

    def spans(end: End, total_s: float | None = 3.0, ratio: float = 1.0) -> dict[str, ReadableSpan]:
        exporter = InMemorySpanExporter()
        made = Traces(TraceSettings(ratio=ratio), "host:1", exporter)
        with made.sent():
            made.ended(end, total_s)
        return {span.name: span for span in exporter.get_finished_spans()}

    return spans


def times_s(spans: dict[str, ReadableSpan]) -> dict[str, tuple[float, float]]:
    """Return start and end of each span in seconds before the write."""
    return {
        name: (
            round(NOW_S - (span.start_time or 0) / 1e9, 3),
            round(NOW_S - (span.end_time or 0) / 1e9, 3),
        )
        for name, span in spans.items()
    }


def ids(span: ReadableSpan) -> tuple[int, int]:
    context: Any = span.get_span_context()
    return context.trace_id, context.span_id


def test_an_attempt_is_a_span_of_stages(spans_of: SpansOf) -> None:
    spans = spans_of(tagged())
    assert times_s(spans) == {
        "post": (3.0, 0.0),
        "wait": (3.0, 1.8),
        "fetch": (1.8, 0.8),
        "decode": (0.8, 0.3),
        "fuse": (0.3, 0.1),
        "write": (0.1, 0.0),
    }
    post = spans.pop("post")
    assert post.parent is None
    assert {span.parent.span_id for span in spans.values() if span.parent} == {ids(post)[1]}
    assert dict(post.attributes or {}) == {
        "insighttag.post_id": "p1",
        "insighttag.attempt": 2,
        "insighttag.outcome": "tagged",
        "insighttag.bundle": "demo",
        "insighttag.bundle_version": "v1",
        "insighttag.tags": 1,
        "insighttag.modality.text": "ok",
        "insighttag.modality.video": "failed",
    }
    assert post.resource.attributes["service.name"] == "insighttag"
    assert post.resource.attributes["service.instance.id"] == "host:1"


@pytest.mark.parametrize(
    ("end", "outcome", "error"),
    [
        (Retry(STARTED, FAILURE, 2.0, TIMINGS_MS, NOW_S), "retried", "FetchRefused"),
        (Dead(STARTED, FAILURE, TIMINGS_MS, NOW_S), "failed", "FetchRefused"),
        (Superseded(STARTED, "v2", TIMINGS_MS), "superseded", None),
        (Superseded(STARTED, None), "superseded", None),
    ],
)
def test_every_end_of_an_attempt_has_its_outcome(
    spans_of: SpansOf, end: End, outcome: str, error: str | None
) -> None:
    post = spans_of(end)["post"]
    attributes = post.attributes or {}
    assert attributes["insighttag.outcome"] == outcome
    assert attributes.get("error.type") == error
    assert post.status.description == ("fetch: HTTP 404" if error else None)


def test_a_trace_of_the_publisher_goes_on(spans_of: SpansOf) -> None:
    end = replace(tagged(), started=replace(STARTED, traceparent=TRACEPARENT))
    post: Any = spans_of(end, ratio=0)["post"]  # the publisher's own decision holds
    assert f"{ids(post)[0]:032x}" == TRACEPARENT.split("-")[1]
    assert f"{post.parent.span_id:016x}" == TRACEPARENT.split("-")[2]


@pytest.mark.parametrize("text", ["", "junk", "00-0-0-0", "\ud800", "9" * 100_000])
def test_a_traceparent_that_cannot_be_read_begins_a_trace(spans_of: SpansOf, text: str) -> None:
    end = replace(tagged(), started=replace(STARTED, traceparent=text))
    assert spans_of(end)["post"].parent is None


@pytest.mark.parametrize(
    ("end", "total_s", "ratio"),
    [
        (Settled("p1", "tagged"), None, 1.0),
        (Unreadable("{", FAILURE), None, 1.0),
        (tagged(), 3.0, 0.0),
        (replace(tagged(), started=replace(STARTED, traceparent=TRACEPARENT[:-1] + "0")), 3.0, 1.0),
    ],
    ids=["settled", "unreadable", "not chosen", "not chosen by the publisher"],
)
def test_what_is_not_traced_has_no_span(
    spans_of: SpansOf, end: End, total_s: float | None, ratio: float
) -> None:
    assert spans_of(end, total_s, ratio) == {}
