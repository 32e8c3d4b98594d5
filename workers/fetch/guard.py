"""Connections to allowed addresses only, for a limited time.

The address is checked where the connection is made, on the very address that is connected to: a
check of the host name before would be undone by a second answer of the name server. Nothing here
follows redirects or knows proxies.
"""

from __future__ import annotations

import ipaddress
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.cookiejar import DefaultCookiePolicy
from typing import Any, TypeAlias

import requests
import urllib3
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection

Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address

_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
# Named here because Python's releases differ in what they call global.
_NEVER_V4 = tuple(
    ipaddress.IPv4Network(text)
    for text in (
        "192.0.0.0/24",  # protocol assignments, and metadata of one cloud
        "192.88.99.0/24",  # 6to4 relays, deprecated
        "168.63.129.16/32",  # public by number, yet a cloud's own service inside it
    )
)
_NEVER_V6 = tuple(
    ipaddress.IPv6Network(text)
    for text in (
        "64:ff9b:1::/48",  # NAT64 of the local network
        "::/96",  # IPv4-compatible, deprecated
        "2001::/23",  # protocol assignments; Teredo, which embeds two IPv4 addresses
        "3fff::/20",  # documentation
        "fec0::/10",  # site-local, deprecated
    )
)


class ForbiddenAddress(Exception):
    """The host is at no address that may be connected to."""


class Expired(Exception):
    """The whole time of the download is over."""


class Unreachable(Exception):
    """The host does not answer, or its name is not known; may pass."""


def is_public(address: Address) -> bool:
    """Tell whether an address is one of the public internet, also inside the IPv6 forms of IPv4."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if inner is None and address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(inner)
        if any(address in network for network in _NEVER_V6):
            return False
    elif any(address in network for network in _NEVER_V4):
        return False
    return address.is_global and not (address.is_multicast or address.is_reserved)


class Guard:
    """Rules and clock of one downloading thread.

    Attributes:
        allow_private: Let every address pass.
    """

    def __init__(self, *, allow_private: bool) -> None:
        self.allow_private = allow_private
        self._lock = threading.Lock()
        self._end: float | None = None
        self._socket: socket.socket | None = None
        self._expired = False

    @property
    def expired(self) -> bool:
        """Tell whether the clock has cut the current download."""
        return self._expired

    @property
    def left_s(self) -> float:
        """Return the seconds left of the current download."""
        return float("inf") if self._end is None else self._end - time.monotonic()

    @contextmanager
    def clock(self, seconds: float) -> Iterator[None]:
        """Cut the connection when the time is over, whatever it waits for.

        A time-out of each read is not enough: a server that sends a byte now and then, also
        in its headers, would hold the thread for as long as it likes.
        """
        with self._lock:
            self._end, self._expired = time.monotonic() + seconds, False
        timer = threading.Timer(seconds, self._cut)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            with self._lock:
                self._end = None
                self._forget()

    def pause(self, seconds: float) -> None:
        """Wait, but not beyond the end of the time."""
        time.sleep(max(0.0, min(seconds, self.left_s)))

    def watch(self, sock: socket.socket) -> None:
        """Have the clock cut this socket too."""
        # A duplicate: cutting must work beneath TLS, and while the original is being read.
        duplicate = socket.socket(fileno=socket.dup(sock.fileno()))
        with self._lock:
            self._forget()
            self._socket = duplicate
            if self._expired:
                self._shut()

    def connect(self, host: str, port: int, timeout_s: float, options: Any) -> socket.socket:
        """Connect to the first allowed address that answers.

        Raises:
            ForbiddenAddress: Every address of the host is forbidden.
            Expired: The time is over.
            Unreachable: Nothing answers, or the name is not known.
        """
        error: Exception = Unreachable("the host name has no address")
        for family, kind, protocol, target in _addresses(host, port):
            address = ipaddress.ip_address(target[0])
            if not self.allow_private and not is_public(address):
                error = ForbiddenAddress(
                    f"address {address} is private: set fetch.allow_private_hosts to allow it"
                )
                continue
            if self._expired or self.left_s <= 0:
                raise Expired
            sock = socket.socket(family, kind, protocol)
            try:
                for option in options or ():
                    sock.setsockopt(*option)
                sock.settimeout(min(timeout_s, max(0.01, self.left_s)))
                sock.connect(target)
                return sock
            except TimeoutError:
                sock.close()
                error = Unreachable(f"timed out after {timeout_s:g} s (connecting)")
            except OSError as failed:
                sock.close()
                error = Unreachable(failed.strerror or str(failed))
        raise error

    def _cut(self) -> None:
        with self._lock:
            if self._end is not None and time.monotonic() >= self._end - 0.05:
                self._expired = True
                self._shut()

    def _shut(self) -> None:
        if self._socket is not None:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def _forget(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def _addresses(host: str, port: int) -> list[tuple[int, int, int, tuple[Any, ...]]]:
    try:
        found = socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        raise Unreachable("the host name cannot be resolved") from error
    return [(family, kind, protocol, target) for family, kind, protocol, _, target in found]


def guarded_session(guard: Guard, *, user_agent: str) -> requests.Session:
    """Return a requests session whose every connection is made by the guard; for one thread."""
    session = requests.Session()
    session.trust_env = False  # no proxies, no .netrc: what is connected to is what was checked
    session.cookies.set_policy(_NoCookies())
    session.headers.clear()
    session.headers.update(
        {"User-Agent": user_agent, "Accept": "*/*", "Accept-Encoding": "identity"}
    )
    for prefix in list(session.adapters):
        del session.adapters[prefix]
    adapter = _GuardedAdapter(guard)
    session.mount("http://", adapter)
    session.mount("https://", adapter)
    return session


class _NoCookies(DefaultCookiePolicy):
    """A jar that keeps no cookie: posts have nothing to do with each other."""

    def set_ok(self, cookie: object, request: object) -> bool:
        return False

    def return_ok(self, cookie: object, request: object) -> bool:
        return False


class _GuardedAdapter(HTTPAdapter):
    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        super().__init__(pool_connections=4, pool_maxsize=1, max_retries=0)

    def init_poolmanager(self, *arguments: Any, **options: Any) -> None:
        super().init_poolmanager(*arguments, **options)
        self.poolmanager.pool_classes_by_scheme = _pool_classes(self._guard)


def _pool_classes(guard: Guard) -> dict[str, type[urllib3.HTTPConnectionPool]]:
    """Return urllib3's pools with connections that ask the guard."""

    class Guarded(HTTPConnection):
        def _new_conn(self) -> socket.socket:
            timeout_s = self.timeout if isinstance(self.timeout, (int, float)) else 60.0
            sock = guard.connect(self._dns_host, self.port, timeout_s, self.socket_options)
            sock.settimeout(timeout_s)
            guard.watch(sock)
            return sock

        def request(self, *arguments: Any, **options: Any) -> None:
            sock = getattr(self, "sock", None)
            if sock is not None:  # kept alive from an earlier download
                guard.watch(sock)
            super().request(*arguments, **options)

    class GuardedTls(Guarded, HTTPSConnection):
        pass

    class Pool(urllib3.HTTPConnectionPool):
        ConnectionCls = Guarded

    class TlsPool(urllib3.HTTPSConnectionPool):
        ConnectionCls = GuardedTls

    return {"http": Pool, "https": TlsPool}
