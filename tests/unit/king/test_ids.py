"""Every BSON type as an ID of a post: it has one text, and the text finds the document again."""

import uuid
from datetime import datetime, timezone
from typing import Any

import bson
import pytest
import structlog
from bson import Binary, Code, Decimal128, Int64, MaxKey, MinKey, ObjectId, Regex, Timestamp
from bson.binary import UuidRepresentation
from bson.codec_options import CodecOptions, DatetimeConversion
from bson.datetime_ms import DatetimeMS

from common.errors import MessageError
from config.settings import FieldMap
from corpus.pull.posts import NoPost, convert, shown_id
from king.jobs import Rejected, Settled, Started
from king.messages import PostMessage, parse_message
from king.store.documents import NoIdError, id_candidates, id_text, match_ids
from tests.support.fakes.store import FakeStore
from tests.support.king.store_rig import begin_one, context, started, tagged

OID = ObjectId("0123456789abcdef01234567")
UUID = uuid.UUID("00112233-4455-6677-8899-aabbccddeeff")
LEGACY = (
    UuidRepresentation.PYTHON_LEGACY,
    UuidRepresentation.JAVA_LEGACY,
    UuidRepresentation.CSHARP_LEGACY,
)

NAMED: list[tuple[Any, str]] = [
    ("p1", "p1"),
    ("42", "42"),
    ("007", "007"),
    ("\u0664\u0662", "\u0664\u0662"),
    ("two words", "two words"),
    (" x ", '" x "'),
    ("", '""'),
    ("a\nb\0", '"a\\nb\\u0000"'),
    (42, "42"),
    (-7, "-7"),
    (Int64(5), "5"),
    (Int64(1212092628029698048), "1212092628029698048"),
    (Int64(-(2**63)), str(-(2**63))),
    (43.0, "43"),
    (float(2**31 + 1), str(2**31 + 1)),
    (1e22, str(10**22)),
    (1.815568081429157e23, "181556808142915693969408"),
    (-0.0, "0"),
    (1.5, "1.5"),
    (0.1, "0.1"),
    (5e-324, "5e-324"),
    (float("nan"), '{"$numberDouble":"NaN"}'),
    (float("-inf"), '{"$numberDouble":"-Infinity"}'),
    (Decimal128("44"), "44"),
    (Decimal128("4.50"), "4.5"),
    (Decimal128("1E+3"), "1000"),
    (Decimal128("9" * 34), "9" * 34),
    (Decimal128("1E+6000"), '{"$numberDecimal":"1E+6000"}'),
    (OID, str(OID)),
    (Binary.from_uuid(UUID), str(UUID)),
    (Binary.from_uuid(UUID, LEGACY[0]), str(UUID)),
    (Binary.from_uuid(UUID, LEGACY[1]), "77665544-3322-1100-ffee-ddccbbaa9988"),
    (Binary.from_uuid(UUID, LEGACY[2]), "33221100-5544-7766-8899-aabbccddeeff"),
    (b"abc", '{"$binary":{"base64":"YWJj","subType":"00"}}'),
    (Binary(b"zz", 128), '{"$binary":{"base64":"eno=","subType":"80"}}'),
    (datetime(2026, 1, 1, tzinfo=timezone.utc), '{"$date":{"$numberLong":"1767225600000"}}'),
    (DatetimeMS(10**15), '{"$date":{"$numberLong":"1000000000000000"}}'),
    (True, "true"),
    ({"a": 1, "b": "x"}, '{"a":{"$numberInt":"1"},"b":"x"}'),
    ({"site": 1, "id": Int64(9)}, '{"site":{"$numberInt":"1"},"id":{"$numberLong":"9"}}'),
    (Timestamp(5, 1), '{"$timestamp":{"t":5,"i":1}}'),
    (MinKey(), '{"$minKey":1}'),
    (MaxKey(), '{"$maxKey":1}'),
    (Code("f"), '{"$code":"f"}'),
]
NAMELESS: list[tuple[Any, str]] = [
    (None, "it is null"),
    ([1], "it is a list"),
    ("x" * 600, "bytes"),
    (b"x" * 600, "bytes"),
    (Regex("a"), "it is a Regex"),
    ({"$gt": 1}, "it is a dict"),
]
_OPTIONS: CodecOptions[dict[str, Any]] = CodecOptions(
    tz_aware=True, datetime_conversion=DatetimeConversion.DATETIME_AUTO
)


def read_back(value: Any) -> dict[str, Any]:
    """A post with this ID as a driver reads it."""
    return bson.decode(bson.encode({"_id": value, "text": "t"}), _OPTIONS)


@pytest.mark.parametrize(("value", "text"), NAMED)
def test_every_type_has_one_text_that_finds_it_again(value: Any, text: str) -> None:
    """In the queue's message, in a query, in the fake store that the King runs on."""
    document = read_back(value)
    assert id_text(document["_id"]) == text
    assert parse_message(PostMessage(text).encode()).post_id == text
    assert match_ids([document, {"_id": "other"}], [text], "_id") == {text: document}
    bson.encode({"_id": {"$in": id_candidates(text)}})
    assert (convert(document, FieldMap()).post.post_id, shown_id(document)) == (text, text)
    store = FakeStore([document])
    assert list(store.untagged_ids()) == [text]
    store.finish([tagged(started(store, text))], context())
    assert begin_one(store, text) == Settled(text, "tagged")


@pytest.mark.parametrize(("value", "reason"), NAMELESS)
def test_value_that_names_no_post_has_a_reason(value: Any, reason: str) -> None:
    document = {"_id": value, "text": "t"}
    with pytest.raises(NoIdError, match=reason):
        id_text(value)
    with pytest.raises(NoPost, match=reason):
        convert(document, FieldMap())
    assert shown_id(document)


@pytest.mark.parametrize("stored", [42, Int64(42), 42.0, Decimal128("42"), Decimal128("42.0")])
def test_numbers_are_found_by_value_whatever_their_type(stored: Any) -> None:
    assert set(match_ids([{"_id": stored}], ["42", "43", "42.5"], "_id")) == {"42"}


@pytest.mark.parametrize("order", LEGACY)
def test_uuid_is_found_in_the_byte_order_of_any_driver(order: int) -> None:
    stored = {"_id": Binary.from_uuid(UUID, order)}
    assert match_ids([stored], [str(UUID)], "_id") == {str(UUID): stored}


@pytest.mark.parametrize(
    "text",
    [
        '{"$regularExpression":{"pattern":".*","options":""}}',
        '{"$gt":""}',
        '{"$where":"1"}',
        '[{"a":1}]',
        '{"$oid":"short"}',
        "{",
        "1e999999999999",
        "1e99999999999999999999",
        "-1e-99999999999999999999",
        "9" * 500,
    ],
)
def test_text_asks_for_values_and_never_for_operators(text: str) -> None:
    """A hostile ID matches no other post and breaks no batch."""
    for value in id_candidates(text):
        assert isinstance(value, (str, float))


def test_text_wins_over_a_number_of_the_same_name() -> None:
    """The other document is named in the log: it is never tagged."""
    both: list[dict[str, Any]] = [{"_id": 42, "n": "number"}, {"_id": "42", "n": "text"}]
    with structlog.testing.capture_logs() as logs:
        assert match_ids(both, ["42"], "_id")["42"]["n"] == "text"
    assert [(line["post_id"], line["ignored"]) for line in logs] == [("42", ["int"])]


def test_unknown_id_of_any_type_is_a_dead_letter_with_a_reason() -> None:
    store = FakeStore()
    for _, text in NAMED:
        verdict = begin_one(store, text)
        assert not isinstance(verdict, Started)
        assert isinstance(verdict, (Rejected, Settled))
    with pytest.raises(MessageError):
        parse_message(b'{"post_id": null}')
