"""Downloads: where they may go."""

from __future__ import annotations

import ipaddress
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.workers.fetching import refused
from tests.support.workers.web import Web, web_server
from workers.fetch import Expired, ForbiddenAddress, Guard, Unreachable, is_public


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0", "2130706433", "127.1"])
def test_loopback_is_refused(web: Web, tmp_path: Path, host: str) -> None:
    """However loopback is written, it is not connected to; the way out is named."""
    before = web.connections
    url = web.url("/private").replace("127.0.0.1", host)
    reason = refused(url, tmp_path, allow_private_hosts=False)
    assert "is private: set fetch.allow_private_hosts to allow it" in reason
    assert reason.startswith("address ")
    assert web.connections == before


def test_redirect_to_a_private_address_is_refused(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check is made on every connection: a public host cannot send us home.

    The rule is narrowed to one port here, so that the first host counts as public.
    """
    with web_server() as inner:
        monkeypatch.setattr("workers.fetch.is_public", lambda address: True)
        original = Guard.connect

        def connect(self: Guard, host: str, port: int, timeout_s: float, options: Any) -> Any:
            if port == inner.server_port:
                monkeypatch.setattr("workers.fetch.is_public", lambda address: False)
            return original(self, host, port, timeout_s, options)

        monkeypatch.setattr(Guard, "connect", connect)
        reason = refused(web.url(f"/to/{inner.url('/ok')}"), tmp_path, allow_private_hosts=False)
        assert reason.startswith("address 127.0.0.1 is private")
        assert inner.paths == []


def test_address_is_checked_where_it_is_connected_to(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name server that answers something else the second time gains nothing."""
    asked: list[str] = []
    real = socket.getaddrinfo

    def getaddrinfo(host: str, port: int, *rest: Any) -> Any:
        asked.append(host)
        return real("127.0.0.1" if asked else "93.184.216.34", port, *rest)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    url = f"http://rebind.example:{web.server_port}/ok"
    reason = refused(url, tmp_path, allow_private_hosts=False)
    assert reason.startswith("address 127.0.0.1 is private")
    assert asked == ["rebind.example"], "a name must be resolved once, for the connection itself"


@pytest.mark.parametrize(
    "text",
    [
        "0.0.0.0",
        "10.1.2.3",
        "100.64.0.1",
        "127.0.0.1",
        "169.254.169.254",
        "172.16.0.1",
        "192.168.1.1",
        "192.0.2.1",
        "198.18.0.1",
        "224.0.0.1",
        "224.0.1.1",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "fe80::1",
        "fe80::1%eth0",
        "fc00::1",
        "fec0::1",
        "ff02::1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "::127.0.0.1",
        "2002:7f00:1::",
        "2002:a00:1::1",
        "64:ff9b::7f00:1",
        "64:ff9b::a9fe:a9fe",
        "64:ff9b:1::808:808",
        "2001:0:5ef5:79fd::1",
        "2001:db8::1",
        "100::1",
    ],
)
def test_addresses_that_are_not_public(text: str) -> None:
    """Private, local, reserved and multicast addresses, also inside the IPv6 forms of IPv4."""
    assert not is_public(ipaddress.ip_address(text))


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
    with pytest.raises(ForbiddenAddress, match=r"10\.0\.0\.1"):
        guard.connect("h", 80, 1.0, None)
    targets[:] = []
    with pytest.raises(Unreachable, match="no address"):
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
        with pytest.raises(Unreachable, match=r"timed out after 0\.3 s \(connecting\)"):
            guard.connect("127.0.0.1", full.getsockname()[1], 0.3, None)
        for filler in fillers:
            filler.close()
        with guard.clock(0.05):
            time.sleep(0.2)
            assert guard.left_s <= 0
            with pytest.raises(Expired):
                guard.connect("127.0.0.1", full.getsockname()[1], 1.0, None)
        assert guard.left_s == float("inf")
