"""Traces of a running King, as a collector gets them."""

import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from common.errors import ConfigError
from config.load import load_settings
from config.settings import TraceSettings
from tests.support.fakes.broker import MemoryBroker
from tests.support.fakes.store import FakeStore
from tests.support.king.king_rig import Running, fake_pool, king_settings, posts, queue_of
from tests.support.ports import free_port
from tests.support.processes import python, serving

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Collector(ThreadingHTTPServer):
    """Takes OTLP over HTTP."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Taker)
        self.spans: list[Span] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1/traces"


class Taker(BaseHTTPRequestHandler):
    """One request."""

    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            for scope in resource.scope_spans:
                self.server.spans += scope.spans
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def collector() -> Iterator[Collector]:
    with serving(Collector()) as server:
        yield server


def traced(folder: Path, url: str, broker: MemoryBroker, *ids: str) -> Running:
    """A King on fakes with traces."""
    settings = king_settings(folder).model_copy(update={"traces": TraceSettings(endpoint=url)})
    return Running(settings, fake_pool(folder), store=FakeStore(posts(*ids)), broker=broker)


def test_a_collector_has_each_post_of_an_ended_king(tmp_path: Path, collector: Collector) -> None:
    """Its trace goes on from the message's headers, and its stages lie within it."""
    queue = queue_of(b"p1", b"{")
    queue.put(b"p2", headers={"traceparent": TRACEPARENT})
    broker = MemoryBroker(queue)
    with traced(tmp_path, collector.url, broker, "p1", "p2") as it:
        it.until(lambda: len(broker.acked) == 3)
    spans = {
        span.attributes[0].value.string_value: span
        for span in collector.spans
        if span.name == "post"
    }
    assert set(spans) == {"p1", "p2"}
    assert spans["p2"].trace_id.hex() == TRACEPARENT.split("-")[1]
    assert spans["p1"].trace_id != spans["p2"].trace_id
    for post in spans.values():
        parts = [span for span in collector.spans if span.parent_span_id == post.span_id]
        assert {"wait", "fuse", "write"} <= {span.name for span in parts}
        assert min(span.start_time_unix_nano for span in parts) == post.start_time_unix_nano
        assert max(span.end_time_unix_nano for span in parts) == post.end_time_unix_nano


def test_a_lost_collector_stops_nobody(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    broker = MemoryBroker(queue_of(b"p1"))
    with traced(tmp_path, f"http://127.0.0.1:{free_port()}/v1/traces", broker, "p1") as it:
        it.until(lambda: len(broker.acked) == 1)
        began = time.monotonic()
    assert it.exit_code == 0
    assert time.monotonic() - began < 10
    assert "king.traces_refused" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "traces.endpoint=collector:4318",
            "traces.endpoint: 'collector:4318' is not the URL of a collector",
        ),
        (
            "traces.endpoint=grpc://a:4317",
            "traces.endpoint: 'grpc://a:4317' is not the URL of a collector",
        ),
        ("traces.endpoint=http://", "is not the URL of a collector; use http:// or https://"),
        ("traces.endpoint=", "is not the URL of a collector"),
        ("traces.ratio=2", "traces.ratio"),
        ("traces.url=http://a", "traces.url"),
    ],
)
def test_a_mistake_is_named(override: str, said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_settings(None, [override])
    assert said in str(refused.value)


def test_without_the_extra_the_daemon_says_what_to_install() -> None:
    """Exit code 2, before anything is loaded."""
    code = (
        "import sys; sys.modules['opentelemetry'] = None; import online_process; "
        "sys.exit(online_process.main(['--set', 'traces.endpoint=http://a/v1/traces', "
        "'--set', 'broker.url=redis://a', '--set', 'store.url=mongodb://a']))"
    )
    done = python("-c", code)
    assert done.returncode == 2
    assert "traces.endpoint: OpenTelemetry cannot be imported" in done.stderr
    assert "pip install '.[otel]'" in done.stderr


def test_without_an_endpoint_no_exporter_is_loaded() -> None:
    """redis-py loads parts of the SDK by itself, where it is installed."""
    code = (
        "import sys, king.king; print({'king.traces', 'opentelemetry.exporter'} & {*sys.modules})"
    )
    assert python("-c", code, check=True).stdout == "set()\n"
