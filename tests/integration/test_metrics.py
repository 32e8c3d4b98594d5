"""The metrics of a running King and of the HTTP server; and what refers to them."""

import json
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from tests.support.fakes.broker import MemoryBroker
from tests.support.fakes.pool import FakePool
from tests.support.fakes.store import FakeStore
from tests.support.king.king_rig import Running, king_settings, posts, queue_of
from tests.support.ports import free_port
from tests.support.processes import python
from tests.support.web.fixtures import Desk
from workers.protocol import WorkerView

ROOT = Path(__file__).resolve().parents[2]
RULES = ROOT / "deploy" / "prometheus" / "alerts.yml"
DASHBOARD = ROOT / "deploy" / "grafana" / "insighttag.json"
CASES = ROOT / "tests" / "integration" / "alerts_cases.yml"
DOCS = ROOT / "docs" / "metrics.md"
RUNBOOKS = [ROOT / "docs" / name for name in ("alerts.md", "alerts.zh-CN.md")]
_OWN = re.compile(r"\b(?:insighttag|process)_[a-z_]+")


class PoolOfThisProcess(FakePool):
    """Fake workers that are a real process: this one."""

    @property
    def workers(self) -> list[WorkerView]:
        return [replace(view, pid=os.getpid()) for view in super().workers]


class CountingBroker(MemoryBroker):
    """A queue that tells what is held, as Redis does."""

    def unacknowledged(self) -> int:
        return 3


def scrape(address: str) -> list[Metric]:
    answer = requests.get(f"http://{address}/metrics", timeout=30)
    answer.raise_for_status()
    return list(text_string_to_metric_families(answer.text))


def values(families: Iterable[Metric]) -> dict[tuple[str, ...], float]:
    """Return the samples by name and label values, in the order of the labels' names."""
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


@pytest.fixture
def king(tmp_path: Path) -> Iterator[tuple[Running, str]]:
    """A King that has tagged two posts and set two messages aside, and its address."""
    bodies = (b"p1", b"p2", b"{", b"nobody")
    store, broker = FakeStore(posts("p1", "p2")), CountingBroker(queue_of(*bodies))
    address = f"127.0.0.1:{free_port()}"
    (tmp_path / "spool").mkdir()
    pool = PoolOfThisProcess(tmp_path / "spool")
    settings = king_settings(tmp_path, metrics=address)
    with Running(settings, pool, store=store, broker=broker) as it:
        it.until(lambda: len(broker.acked) == 4)
        # Asked once a second: the first answer is of the full queue.
        it.until(lambda: (it.king.status.queue_depth or (1, 0))[0] == 0)
        it.until(lambda: it.king.status.workers)
        pool.swap_bundle("fake", "1", refused="broken", shadow=("trial", "2"))
        it.until(lambda: it.king.status.shadow)
        yield it, address


def test_a_king_counts_what_ended(king: tuple[Running, str]) -> None:
    seen = values(scrape(king[1]))
    assert seen[("insighttag_posts_total", "tagged")] == 2
    assert seen[("insighttag_posts_total", "failed")] == 1
    assert seen[("insighttag_dead_letters_total", "load", "PostNotFound")] == 1
    assert seen[("insighttag_dead_letters_total", "message", "MessageError")] == 1
    assert seen[("insighttag_post_seconds_count", "tagged")] == 2
    assert seen[("insighttag_stage_seconds_count", "fuse")] == 2
    assert seen[("insighttag_tags_total", "sport")] == 2
    assert seen[("insighttag_post_tags_sum",)] == 2
    assert seen[("insighttag_post_best_score_sum",)] == pytest.approx(1.8)
    assert seen[("insighttag_modalities_total", "text", "ok")] == 2
    assert seen[("insighttag_modalities_total", "video", "missing")] == 2
    assert seen[("insighttag_queue_messages", "ready")] == 0
    assert seen[("insighttag_queue_messages", "unacknowledged")] == 3
    assert seen[("insighttag_king_phase", "serving")] == 1
    assert seen[("insighttag_bundle_info", "fake", "1")] == 1
    assert seen[("insighttag_bundle_refused", "served")] == 1
    assert seen[("insighttag_bundle_refused", "shadow")] == 0
    assert seen[("insighttag_shadow_info", "trial", "2")] == 1
    assert seen[("insighttag_worker_state", "cpu", "extract", "ready", "fake-0")] == 1
    assert seen[("insighttag_worker_resident_memory_bytes", "extract", "fake-0")] > 2**20
    assert seen[("insighttag_worker_cpu_seconds_total", "extract", "fake-0")] > 0
    assert seen[("process_resident_memory_bytes",)] > 2**20


def test_an_end_counts_the_same_in_health_and_metrics(king: tuple[Running, str]) -> None:
    counters = king[0].king.status.snapshot(in_flight=0, oldest_in_flight_s=0)["counters"]
    seen = values(scrape(king[1]))
    dead = sum(value for key, value in seen.items() if key[0] == "insighttag_dead_letters_total")
    assert counters["dead"] == dead == 2
    assert counters["tagged"] == seen[("insighttag_posts_total", "tagged")]


def test_the_address_is_free_again_when_the_king_has_ended(king: tuple[Running, str]) -> None:
    running, address = king
    running.stop()
    with pytest.raises(requests.ConnectionError):
        scrape(address)


def test_a_client_that_sends_nothing_stops_no_scrape_and_no_end(king: tuple[Running, str]) -> None:
    running, address = king
    with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))):
        assert values(scrape(address))[("insighttag_king_phase", "serving")] == 1
        running.stop()
    assert running.exit_code == 0


def test_an_address_that_is_taken_ends_the_daemon_with_2(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        overrides = [
            f"king.metrics={address}",
            f"king.health_file={tmp_path / 'king.json'}",
            f"fetch.spool={tmp_path / 'spool'}",
            "broker.url=redis://127.0.0.1:1/0",
            "store.url=mongodb://127.0.0.1:1/",
        ]
        arguments = [part for each in overrides for part in ("--set", each)]
        done = python("online_process.py", *arguments)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"online_process.py: king.metrics: {address}: Address already in use; "
        "name another address, or null for no metrics"
    ]


def test_the_server_counts_requests_and_tags(desk: Desk) -> None:
    assert desk.client.post("/v1/tag", json={"text": "x"}).status_code == 200
    assert desk.client.post("/v1/tag", json={}).status_code == 422
    assert desk.client.open("/v1/tag", method="STRANGE").status_code == 405
    answer = desk.client.get("/metrics")
    assert answer.content_type.startswith("text/plain")
    seen = values(text_string_to_metric_families(answer.text))
    assert seen[("insighttag_http_requests_total", "tag", "", "200")] == 1
    assert seen[("insighttag_http_requests_total", "tag", "NothingUsable", "422")] == 1
    assert seen[("insighttag_http_requests_total", "none", "MethodNotAllowed", "405")] == 1
    assert seen[("insighttag_http_request_seconds_count", "tag")] == 2
    assert seen[("insighttag_stage_seconds_count", "fuse")] == 1
    assert seen[("insighttag_tags_total", "sport")] == 1
    assert seen[("insighttag_http_ready",)] == 1
    assert seen[("insighttag_bundle_info", "fake", "1")] == 1


def shown(family: Metric) -> str:
    return f"{family.name}_total" if family.type == "counter" else family.name


def rows(king: list[Metric], http: list[Metric]) -> list[str]:
    sources = {"King": {shown(f) for f in king}, "HTTP": {shown(f) for f in http}}
    families: dict[str, Metric] = {}
    for family in [*http, *king]:  # the King's, which have samples, replace those of the server
        families[shown(family)] = family
    lines = []
    for name, family in sorted(families.items()):
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        named = ", ".join(f"`{label}`" for label in sorted(labels))
        by = [source for source, names in sources.items() if name in names]
        text = family.documentation.rstrip(".")
        lines.append(f"| `{name}` | {family.type} | {named} | {', '.join(by)} | {text} |")
    return lines


def families_of(desk: Desk) -> list[Metric]:
    assert desk.client.post("/v1/tag", json={"text": "x"}).status_code == 200
    return list(text_string_to_metric_families(desk.client.get("/metrics").text))


def test_the_docs_list_every_metric(king: tuple[Running, str], desk: Desk) -> None:
    listed = [line for line in DOCS.read_text("utf-8").splitlines() if _OWN.match(line[3:])]
    assert listed == rows(scrape(king[1]), families_of(desk))


def expressions(content: Any) -> Iterator[str]:
    """Return every query of a dashboard or of rules."""
    if isinstance(content, dict):
        for key, value in content.items():
            if key in ("expr", "definition") and isinstance(value, str):
                yield value
            else:
                yield from expressions(value)
    elif isinstance(content, list):
        for each in content:
            yield from expressions(each)


@pytest.mark.parametrize("file", [DASHBOARD, RULES], ids=["dashboard", "alerts"])
def test_every_metric_asked_for_exists(file: Path, king: tuple[Running, str], desk: Desk) -> None:
    """Names of series, and for each its labels: a misspelled one would silently show nothing."""
    labels: dict[str, set[str]] = {}
    for family in [*scrape(king[1]), *families_of(desk)]:
        names = {shown(family), *(sample.name for sample in family.samples)}
        for name in names:
            known = labels.setdefault(name, {"job", "instance"})
            known.update(label for sample in family.samples for label in sample.labels)
    queries = list(expressions(yaml.safe_load(file.read_text("utf-8"))))
    assert queries
    for query in queries:
        used = _OWN.findall(query)
        assert used or re.search(r"\bup\b", query), query
        for name in used:
            assert name in labels, query
        for name, matchers in re.findall(r"((?:insighttag|process)_[a-z_]+)\{([^}]*)\}", query):
            assert set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers)) <= labels[name], query


def rules() -> list[dict[str, Any]]:
    content = yaml.safe_load(RULES.read_text("utf-8"))
    assert content.keys() == {"groups"}
    return [rule for group in content["groups"] for rule in group["rules"]]


def test_every_alert_says_what_to_do() -> None:
    """It has a severity, a summary, and a section of its own name in both languages."""
    names = [rule["alert"] for rule in rules()]
    assert len(set(names)) == len(names)
    for rule in rules():
        assert rule.keys() == {"alert", "expr", "for", "labels", "annotations"}, rule["alert"]
        assert re.fullmatch(r"\d+[smh]", rule["for"])
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"].keys() == {"summary", "runbook"}
        assert rule["annotations"]["runbook"] == f"docs/alerts.md#{rule['alert'].lower()}"
    for page in RUNBOOKS:
        sections = re.findall(r"^## (\w+)$", page.read_text("utf-8"), re.MULTILINE)
        assert sections == names, page


def test_promtool_accepts_the_alerts() -> None:
    """The rules are valid, and fire on the series of `CASES` where they must, and else not."""
    promtool = os.environ.get("INSIGHTTAG_TEST_PROMTOOL") or shutil.which("promtool")
    if promtool is None:
        pytest.skip(
            "no promtool found; Debian has it in prometheus, or set INSIGHTTAG_TEST_PROMTOOL"
        )
    for arguments in (["check", "rules", str(RULES)], ["test", "rules", str(CASES)]):
        done = subprocess.run([promtool, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_dashboard_is_one_that_grafana_reads() -> None:
    """Panels have IDs of their own, places on a grid of 24 columns, and a data source to choose."""
    content = json.loads(DASHBOARD.read_text("utf-8"))
    assert content["uid"] == "insighttag"
    variables = {each["name"]: each["type"] for each in content["templating"]["list"]}
    assert variables["datasource"] == "datasource"
    ids = [panel["id"] for panel in content["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in content["panels"]:
        place = panel["gridPos"]
        cells = {
            (place["x"] + column, place["y"] + row)
            for column in range(place["w"])
            for row in range(place["h"])
        }
        assert max(x for x, _ in cells) < 24, panel["title"]
        assert not cells & taken, panel["title"]
        taken |= cells
        if panel["type"] != "row":
            assert panel["datasource"]["uid"] == "${datasource}"
            assert panel["description"]
            assert panel["targets"]
