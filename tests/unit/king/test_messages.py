"""The queue message: what any client may publish, and what is refused by name."""

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import MessageError
from king.messages import PostMessage, parse_message
from tests.support.mistakes import one_line


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"p1", PostMessage("p1")),
        ("p1", PostMessage("p1")),
        (b" p1\n", PostMessage("p1")),
        ("帖子-7".encode(), PostMessage("帖子-7")),
        (b"\xef\xbb\xbfp1", PostMessage("p1")),
        (b'"p1"', PostMessage("p1")),
        (b"42", PostMessage("42")),
        (b"007", PostMessage("007")),
        (b"12345678901234567890123", PostMessage("12345678901234567890123")),
        (b"1.50", PostMessage("1.50")),
        (b'{"post_id": "p1"}', PostMessage("p1")),
        (b'{"post_id": 42}', PostMessage("42")),
        (b'{"post_id": "p1", "priority": 3, "force": true}', PostMessage("p1", 3, True)),
        (b'{"post_id": "p1", "priority": 99}', PostMessage("p1", 9)),
        (b'{"post_id": "p1", "priority": -4, "force": null}', PostMessage("p1")),
        (b'{"post_id": "p1", "trace": "x"}', PostMessage("p1")),
        (b"64f0c2a1e4b0a1b2c3d4e5f6", PostMessage("64f0c2a1e4b0a1b2c3d4e5f6")),
        (b"nullable", PostMessage("nullable")),
    ],
)
def test_reads_every_accepted_form(body: bytes | str, expected: PostMessage) -> None:
    assert parse_message(body) == expected


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "empty"),
        (b"  \n", "empty"),
        (b"\xff\xfe", "not UTF-8"),
        (b'{"post_id": "p1"', "not JSON"),
        (b"{'post_id': 'p1'}", "not JSON"),
        (b"[" * 5000, "not JSON"),
        (b"{}", "no .post_id"),
        (b'{"id": "p1"}', "no .post_id"),
        (b'{"post_id": null}', "null"),
        (b'{"post_id": true}', "true or false"),
        (b'{"post_id": NaN}', "not JSON"),
        (b'{"post_id": ["p1"]}', "a list"),
        (b'{"post_id": {}}', "an object"),
        (b'{"post_id": "  "}', "empty"),
        (b'["p1"]', "a list"),
        (b"null", "null"),
        (b"true", "true or false"),
        (b"p\x001", "U[+]0000"),
        (b"p1\np2", "U[+]000A"),
        (b'{"post_id": "a\\u0007"}', "U[+]0007"),
        (b'{"post_id": "\\ud800"}', "surrogate"),
        ("\ud800", "not UTF-8"),
        (b"x" * 513, "513 bytes"),
        (b"x" * 70_000, "70000 bytes"),
        (b'{"post_id": "p1", "priority": "high"}', "priority"),
        (b'{"post_id": "p1", "priority": 1.5}', "priority"),
        (b'{"post_id": "p1", "force": "yes"}', "force"),
    ],
)
def test_refuses_with_a_one_line_reason(body: bytes | str, reason: str) -> None:
    with one_line(MessageError, match=reason):
        parse_message(body)


@given(
    st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=100)
    .map(str.strip)
    .filter(bool),
    st.integers(0, 9),
    st.booleans(),
)
def test_encode_and_parse_are_inverse(post_id: str, priority: int, force: bool) -> None:
    """Any usable ID survives the queue, and the body is plain JSON for other clients."""
    message = PostMessage(post_id, priority, force)
    assert parse_message(message.encode()) == message
    assert json.loads(message.encode())["post_id"] == post_id


@given(st.binary(max_size=200))
def test_never_raises_anything_else(body: bytes) -> None:
    with contextlib.suppress(MessageError):
        assert parse_message(body).post_id
