"""Downloads: where they may go."""

import ipaddress
import socket
import time

import pytest

from common.errors import FetchRefused, FetchRetryable
from tests.support.workers.web import Web
from workers.fetch import Guard, is_public


@pytest.mark.parametrize(
    "text",
    [
        "8.8.8.8",
        "93.184.216.34",
        "2606:2800:220:1::1",
        "::ffff:8.8.8.8",
        "64:ff9b::808:808",
        "2002:808:808::1",
    ],
)
def test_addresses_that_are_public(text: str) -> None:
    assert is_public(ipaddress.ip_address(text))


def test_guard_takes_the_first_allowed_address(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a host's addresses the forbidden and the dead are passed over."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        dead = free.getsockname()[1]
    targets = [("10.0.0.1", 1), ("127.0.0.1", dead), ("127.0.0.1", web.server_port)]
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda *_: [(socket.AF_INET, socket.SOCK_STREAM, 6, "", t) for t in targets],
    )
    private = ipaddress.ip_address("10.0.0.1")
    monkeypatch.setattr("workers.fetch.is_public", lambda address: address != private)
    guard = Guard(allow_private=False)
    sock = guard.connect("h", 80, 1.0, [(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)])
    assert sock.getpeername()[1] == web.server_port
    sock.close()
    targets[:] = targets[:1]
    with pytest.raises(FetchRefused, match=r"10\.0\.0\.1"):
        guard.connect("h", 80, 1.0, None)
    targets[:] = []
    with pytest.raises(FetchRetryable, match="no address"):
        guard.connect("h", 80, 1.0, None)


def test_guard_counts_connecting_as_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connecting ends with the connect time-out, and not at all once the time is over."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        fillers = []
        for _ in range(4):  # a full accept queue drops new connections silently
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
            fillers.append(filler)
        guard = Guard(allow_private=True)
        with pytest.raises(FetchRetryable, match=r"timed out after 0\.3 s \(connecting\)"):
            guard.connect("127.0.0.1", full.getsockname()[1], 0.3, None)
        for filler in fillers:
            filler.close()
        with guard.clock(0.05):
            time.sleep(0.2)
            assert guard.left_s <= 0
            with pytest.raises(FetchRetryable, match=r"timed out after 0\.05 s"):
                guard.connect("127.0.0.1", full.getsockname()[1], 1.0, None)
        assert guard.left_s == float("inf")
