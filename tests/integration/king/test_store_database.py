"""The real store: settings, documents, commands, and a database that is away."""

import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import dns.message
import dns.rcode
import dns.resolver
import pytest
from bson import Int64, decode, encode
from bson.datetime_ms import DatetimeMS

from common.errors import ConfigError, StoreUnavailable
from common.post import Failure
from config.settings import FieldMap, StoreSettings
from king.jobs import Dead, Settled, Unreadable, message_key
from king.store.client import StoreClient
from king.store.documents import id_text
from king.store.store import Store
from tests.support.king.store_rig import NOW, begin_one, context, mongo_store, started, tagged
from tests.support.mistakes import one_line
from tests.support.services import MongoServer


def test_embedded_databases_get_ids_that_they_can_update(mongo_url: str, unique_name: str) -> None:
    """It finds some by a query that takes another way, and their results would be lost."""
    store = mongo_store(mongo_url, unique_name)
    if not store.client.is_embedded:
        pytest.skip("MongoDB finds and updates IDs of every type")
    [values] = store.client.named([id_text(True), id_text(1e22), id_text(43.0)]).values()
    store.close()
    assert [type(value) for value in values["$in"]] == [str, str, str, Int64, float]


def test_platform_paths_and_result_path_are_settings(mongo_url: str, unique_name: str) -> None:
    """Posts in a shape of their own are read, and written to the place that is asked for."""
    fields = FieldMap(id="pid", text="body.text", images="media.pics", videos="files.url")
    store = mongo_store(mongo_url, unique_name, fields=fields, result_path="meta.insight")
    store.client.posts.insert_one(
        {
            "pid": 7,
            "body": {"text": "hello"},
            "media": {"pics": ["http://a/1"]},
            "files": [{"url": "http://v/1"}],
        }
    )
    begun = started(store, "7")
    assert begun.post.text == "hello"
    assert [m.source for m in begun.post.media] == ["http://a/1", "http://v/1"]
    store.finish([tagged(begun)], context())
    assert begin_one(store, "7") == Settled("7", "tagged")
    stored: Any = store.queries.post("7")
    assert stored.result["status"] == "tagged"
    assert list(store.queries.untagged_ids()) == []
    store.close()


def test_commands_see_posts_letters_and_counts(mongo: Store) -> None:
    mongo.client.posts.insert_many([{"_id": f"p{i}", "text": "t"} for i in range(4)] + [{"_id": 5}])
    mongo.finish([tagged(started(mongo, "p0"))], context())
    failure = Failure("decode", "MediaError", "no picture")
    mongo.finish([Dead(started(mongo, "p1"), failure)], context(NOW + 1))
    begin_one(mongo, "nobody")
    mongo.finish([Unreadable("{", Failure("message", "MessageError", "no JSON"))], context(NOW + 2))
    started(mongo, "p2")

    assert sorted(mongo.queries.untagged_ids()) == ["5", "p3"]
    assert len(list(mongo.queries.untagged_ids(limit=1))) == 1
    assert sorted(mongo.queries.untagged_ids(bundle=("demo", "9"))) == ["5", "p0", "p3"]
    assert mongo.queries.counts() == {
        "posts": 5,
        "tagged": 1,
        "partial": 0,
        "failed": 1,
        "untagged": 3,
        "jobs": {"running": 1, "waiting": 0, "queued": 0, "dead": 3},
    }
    stored: Any = mongo.queries.post("p1")
    assert stored.result["error"] == failure.as_dict()
    assert mongo.queries.post("nobody") is None
    letters = [job.post_id for job in mongo.queries.dead_letters()]
    assert letters == [message_key("{"), "p1", "nobody"]
    assert [j.post_id for j in mongo.queries.dead_letters(stage="decode")] == ["p1"]
    assert [j.post_id for j in mongo.queries.dead_letters(type="PostNotFound")] == ["nobody"]
    assert len(mongo.queries.dead_letters(since_s=NOW + 0.5)) == 2
    assert len(mongo.queries.dead_letters(since_s=NOW + 1.5)) == 1
    assert len(mongo.queries.dead_letters(limit=2)) == 2

    messages = mongo.queries.replay([message_key("{"), "p1", "p2", "absent"])
    assert [m.post_id for m in messages] == ["p1"]
    assert started(mongo, "p1", redelivered=True).attempt == 1
    assert mongo.queries.drop([message_key("{"), "nobody", "p2"]) == 2
    assert mongo.queries.dead_letters() == []


def test_unreachable_database_is_named_without_its_password() -> None:
    url = "mongodb://reader:secret@127.0.0.1:9/"
    store = Store(StoreClient(StoreSettings(url=url, timeout_s=0.3)))
    for call in (store.connect, store.open_jobs, lambda: begin_one(store, "p1")):
        with one_line(StoreUnavailable, "reader:***@127.0.0.1:9") as caught:
            call()
        assert "secret" not in str(caught.value)
    store.close()


def test_malformed_url_is_a_configuration_error() -> None:
    store = StoreClient(StoreSettings(url="mongodb://u:secret@h:notaport/"))
    with pytest.raises(ConfigError, match=r"store\.url") as caught:
        store.connect()
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (None, StoreUnavailable),
        (dns.rcode.SERVFAIL, StoreUnavailable),
        (dns.rcode.REFUSED, StoreUnavailable),
        (dns.rcode.NOERROR, ConfigError),  # no such record
        (dns.rcode.NXDOMAIN, ConfigError),
    ],
)
def test_a_silent_name_server_passes_and_a_wrong_name_does_not(
    monkeypatch: pytest.MonkeyPatch, answer: dns.rcode.Rcode | None, kind: type[Exception]
) -> None:
    """Of ``mongodb+srv``; in one line, without the password."""
    with _name_server(answer) as port:
        resolver = dns.resolver.Resolver(configure=False)
        resolver.nameservers, resolver.port = ["127.0.0.1"], port
        monkeypatch.setattr(dns.resolver, "default_resolver", resolver)
        url = "mongodb+srv://u:secret@db.cluster.example/"
        client = StoreClient(StoreSettings(url=url, timeout_s=3))
        for _ in range(2):  # it is asked for again
            with one_line(kind, match=r"store\.url: mongodb\+srv://u:\*\*\*@"):
                client.connect()


@contextmanager
def _name_server(answer: dns.rcode.Rcode | None) -> Iterator[int]:
    """Answer every question with a code, or not at all; give the port."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))

        def serve() -> None:
            while True:
                query, asker = server.recvfrom(4096)
                if not query:
                    return
                if answer is not None:
                    reply = dns.message.make_response(dns.message.from_wire(query))
                    reply.set_rcode(answer)
                    server.sendto(reply.to_wire(), asker)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield server.getsockname()[1]
        finally:
            server.sendto(b"", server.getsockname())
            thread.join()


def test_documents_that_python_has_no_names_for_are_read() -> None:
    """Dates after the year 9999 and text that is no UTF-8 come from other drivers."""
    client = StoreClient(StoreSettings(url="mongodb://127.0.0.1:1"))
    encoded = encode({"seen": DatetimeMS(10**15), "text": "ab"}).replace(b"ab\0", b"\xff\xfe\0")
    with closing(client):
        document = decode(encoded, client.posts.codec_options)
    assert document == {"seen": DatetimeMS(10**15), "text": "\ufffd\ufffd"}


def test_restarted_database_is_used_again(mongo_server: MongoServer, unique_name: str) -> None:
    store = mongo_store(mongo_server.url, unique_name)
    store.client.posts.insert_one({"_id": "p1"})
    begun = started(store, "p1")
    mongo_server.kill()
    with pytest.raises(StoreUnavailable):
        store.finish([tagged(begun)], context())
    mongo_server.start()
    store.finish([tagged(begun)], context())
    assert store.queries.counts()["tagged"] == 1
    store.close()
