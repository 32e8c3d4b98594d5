"""Download one media file into a folder, under limits, from hosts that may be reached.

A post's URLs come from anybody: the other side chooses the target, the size, the encoding and the
speed, so each of these is bounded here. No proxies, no cookies, and redirects are followed by hand.

Downloads lie in the spool until they are decoded. Each King has a folder of its own there, with a
lock that the kernel frees when the King ends, however it ends; at start the folders of dead Kings
are removed. A lock, and not a process ID: Kings in containers share a host's disk and not its IDs.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import http.client
import ipaddress
import math
import os
import re
import secrets
import select
import shutil
import socket
import ssl
import string
import time
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias, cast
from urllib.parse import quote, unquote, urljoin, urlsplit

import certifi
import structlog
from urllib3.util import make_headers, parse_url
from urllib3.util.ssl_ import create_urllib3_context

from common.errors import FetchRefused, FetchRetryable, TaggingError, path_error
from common.files import lock_file, locked
from common.post import Media
from config.settings import FetchSettings
from extractors.media.sniff import HEAD_BYTES, sniff
from workers.protocol import Fetched

_log = structlog.get_logger()

FETCH_TRIES = 2
"""Tries close together: the second is for a kept-alive connection that the server has just closed.
More belong to the King, which waits longer between them."""
_PAUSE_S = 0.2
"""Pause before the second try: long enough for a server that restarts a worker, short against the
time that a download takes."""
STEP_BYTES = 1 << 16
"""Most bytes of one step, also of a bomb's. Smaller ones cost time in Python, larger ones memory on
each of the connections."""
_PLAIN = frozenset({"", "identity", "none", "utf-8", "aws-chunked"})
_DEFLATED = frozenset({"gzip", "x-gzip", "deflate"})
_GZIP = b"\x1f\x8b\x08"

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
# Besides 5xx. 202: a picture that is still being made; 409 and 423: a file that is being written or
# brought back from an archive; 421: another connection may reach the right server.
_RETRYABLE = frozenset({202, 408, 409, 421, 423, 425, 429})
_CONTROLS = re.compile(r"[\x00-\x1f\x7f]")
_MAX_URL = 8192
"""Longer URLs are refused; browsers and servers stop at about as many characters."""

_MOST_KEPT = 4
"""Connections that one thread keeps alive: as many hosts as the media of a post come from. At half,
posts of two hosts in turn connect anew; at double, idle ones cost servers memory."""
_PORTS = {"http": 80, "https": 443}
_OPTIONS = ((socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),)

_BROKE = "the connection broke"
_NO_HTTP = "the answer is no proper HTTP"
_NO_URL = "not a URL that can be requested"
_NO_MEDIA = frozenset({"application/json", "application/xhtml+xml", "application/xml"})

_Host: TypeAlias = tuple[str, str, int]  # scheme, name or address, port
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

    The address is checked where the connection is made, on the very address that is connected to:
    a check of the host name before would be undone by a second answer of the name server.
    """

    def __init__(self, *, allow_private: bool) -> None:
        self._allow_private = allow_private
        self._end = self._total_s = math.inf

    @property
    def left_s(self) -> float:
        return self._end - time.monotonic()

    @contextmanager
    def clock(self, seconds: float) -> Iterator[None]:
        """Bound the whole of a download: every connection and every read ends with the time."""
        self._end, self._total_s = time.monotonic() + seconds, seconds
        try:
            yield
        finally:
            self._end = math.inf

    def check(self) -> None:
        """Raise FetchRetryable once the time is over."""
        if self.left_s <= 0:
            raise FetchRetryable(f"timed out after {self._total_s:g} s")

    def connect(self, host: str, port: int, timeout_s: float, options: Any) -> socket.socket:
        """Connect to the first allowed address that answers.

        Raises:
            FetchRefused: Every address of the host is forbidden.
            FetchRetryable: Nothing answers, the name is not known, or the time is over.
        """
        try:
            addresses = socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM)
        except socket.gaierror as failed:
            self.check()
            raise _unreachable("the host name cannot be resolved") from failed
        error: TaggingError = _unreachable("the host name has no address")
        for family, kind, protocol, _, target in addresses:
            address = ipaddress.ip_address(target[0])
            if not self._allow_private and not is_public(address):
                error = FetchRefused(
                    f"address {address} is private: set fetch.allow_private_hosts to allow it"
                )
                continue
            self.check()
            sock: socket.socket | None = None
            try:
                sock = socket.socket(family, kind, protocol)
                for option in options or ():
                    sock.setsockopt(*option)
                sock.settimeout(min(timeout_s, max(0.01, self.left_s)))
                sock.connect(target)
                return sock
            except OSError as failed:
                if sock is not None:
                    sock.close()
                self.check()
                late = isinstance(failed, TimeoutError)
                reason = (
                    f"timed out after {timeout_s:g} s (connecting)" if late else failed.strerror
                )
                error = _unreachable(reason or str(failed))
        raise error


def _unreachable(message: str) -> FetchRetryable:
    error = FetchRetryable(message)
    error.unreachable = True
    return error


class _TimedSocket(socket.socket):
    """A socket whose reads end with its guard's clock.

    A time-out of each read is not enough: a server that sends a byte now and then, also in its
    headers, would hold the thread for as long as it likes.
    """

    guard: Guard
    read_timeout_s: float

    def recv_into(self, *arguments: Any) -> int:
        left_s = self.guard.left_s
        if left_s <= 0:
            raise TimeoutError
        self.settimeout(min(self.read_timeout_s, left_s))
        return super().recv_into(*arguments)


class _TimedTls(_TimedSocket, ssl.SSLSocket):
    """The same with TLS."""


class _FinalResponse(http.client.HTTPResponse):
    """The answer behind the interim ones (102, 103), which http.client takes for answers."""

    def _read_status(self) -> tuple[str, int, str]:  # typeshed does not know it
        while True:
            status: tuple[str, int, str] = super()._read_status()  # type: ignore[misc]
            if not 101 < status[1] < 200:  # 100 is skipped by `begin`; 101 was not asked for
                return status
            http.client.parse_headers(self.fp)


class Fetcher:
    """Downloads for one thread; connections are kept alive between downloads."""

    def __init__(self, settings: FetchSettings) -> None:
        self._settings = settings
        self._guard = Guard(allow_private=settings.allow_private_hosts)
        agent = _CONTROLS.sub(" ", settings.user_agent).encode("latin-1", "replace")
        self._head = b"User-Agent: %s\r\nAccept: */*\r\nAccept-Encoding: identity\r\n" % agent
        self._idle: dict[_Host, _TimedSocket] = {}  # the one used last comes last

    @functools.cached_property  # reading the authorities takes longer than a small download
    def _tls(self) -> ssl.SSLContext:
        context = create_urllib3_context(cert_reqs=ssl.CERT_REQUIRED)
        context.sslsocket_class = _TimedTls
        context.set_alpn_protocols(["http/1.1"])
        context.load_verify_locations(certifi.where())
        return context

    def fetch(self, media: Media, target: Path, *, tries: int = FETCH_TRIES) -> Fetched:
        """Download to a file that must not exist yet.

        Args:
            media: What to download.
            target: Where to.
            tries: Attempts in all, close together; who waits longer between them asks for one.

        Raises:
            FetchRetryable: It may succeed later: time-out, broken connection, HTTP 408, 429, 5xx,
                a full disk.
            FetchRefused: It must not or cannot be had.
        """
        with self._guard.clock(self._settings.total_timeout_s):
            while True:
                tries -= 1
                try:
                    return self._try(media.source, target)
                except BaseException as error:
                    target.unlink(missing_ok=True)
                    passes = isinstance(error, FetchRetryable)
                    if not passes or tries <= 0 or self._guard.left_s <= _PAUSE_S:
                        raise
                time.sleep(_PAUSE_S)

    def close(self) -> None:
        while self._idle:
            self._idle.popitem()[1].close()

    def _try(self, url: str, target: Path) -> Fetched:
        try:
            for _ in range(self._settings.max_redirects + 1):
                url = f"https:{url}" if url.startswith("//") else url  # as a page on https means it
                fetched = self._get(url, target)
                if isinstance(fetched, Fetched):
                    return fetched
                url = urljoin(url, _unquoted(fetched))  # each target is checked like the first
        except (ValueError, UnicodeError) as error:  # of urllib3, and of idna for strange names
            raise FetchRefused(_NO_URL) from error
        raise FetchRefused(f"more than {self._settings.max_redirects} redirects")

    def _get(self, url: str, target: Path) -> Fetched | str:
        """Save what is there, or return where a redirect points to."""
        host, request = self._request(url, _check_url(url))
        sock = self._connected(host)
        response, is_whole = _FinalResponse(sock), False
        try:
            self._ask(sock, request, response)
            location: str | None = response.headers.get("Location")
            if response.status not in _REDIRECTS or not location:
                result: Fetched | str = self._save(response, target)
            else:
                result = location
                # Not read, for it may be endless; a short one is, to keep the connection alive.
                if response.length is not None and response.length < STEP_BYTES:
                    deque(self._body(response), maxlen=0)
            is_whole = response.isclosed() and not response.will_close
        finally:
            response.close()
            self._keep(host, sock) if is_whole else sock.close()
        return result

    def _request(self, url: str, login: str) -> tuple[_Host, bytes]:
        """Return where to ask, and what; ValueError for what is no URL."""
        # Not urllib3's connections, still less requests: they take most of the CPU of a small
        # download, for what it does without: proxies, cookies, retries and .netrc.
        parts = parse_url(url)
        name, scheme = parts.host or "", parts.scheme or ""
        target = parts.request_uri
        if scheme not in _PORTS or not name or " " in name + target:
            raise ValueError("no host, or a space")
        if _CONTROLS.search(name + target):
            raise ValueError("a control character")
        port = parts.port or _PORTS[scheme]
        shown = name.rstrip(".") + (f":{port}" if port != _PORTS[scheme] else "")
        request = f"GET {target} HTTP/1.1\r\nHost: {shown}\r\n{login}".encode("ascii")
        return (scheme, name.strip("[]"), port), request + self._head + b"\r\n"

    def _connected(self, host: _Host) -> _TimedSocket:
        """Return a connection to a host, a kept one if the server has not closed it."""
        idle = self._idle.pop(host, None)
        if idle is not None:
            poller = select.poll()
            poller.register(idle, select.POLLIN)
            if not poller.poll(0):  # it has nothing to say unasked
                return idle
            idle.close()
        scheme, name, port = host
        plain = self._guard.connect(name, port, self._settings.connect_timeout_s, _OPTIONS)
        sock = _TimedSocket(fileno=plain.detach())
        if scheme == "https":
            sock = self._with_tls(sock, name)
        sock.guard, sock.read_timeout_s = self._guard, self._settings.read_timeout_s
        return sock

    def _with_tls(self, sock: _TimedSocket, name: str) -> _TimedSocket:
        try:
            sock.settimeout(min(self._settings.read_timeout_s, max(0.01, self._guard.left_s)))
            own = name.rstrip(".").partition("%")[0]  # without the zone of an address
            return cast("_TimedTls", self._tls.wrap_socket(sock, server_hostname=own))
        except BaseException as error:
            sock.close()
            match error:
                case ssl.SSLError() | TimeoutError() | ConnectionError():
                    raise self._mapped(error) from error
                case OSError():  # of this system: the authorities cannot be read
                    reason = f"the TLS connection: {error.strerror or error}"
                    raise FetchRetryable(reason) from error
            raise

    def _keep(self, host: _Host, sock: _TimedSocket) -> None:
        self._idle[host] = sock
        if len(self._idle) > _MOST_KEPT:
            self._idle.pop(next(iter(self._idle))).close()

    def _ask(self, sock: _TimedSocket, request: bytes, response: http.client.HTTPResponse) -> None:
        """Send a request, and read the answer up to its body."""
        try:
            sock.settimeout(min(sock.read_timeout_s, max(0.01, self._guard.left_s)))
            sock.sendall(request)
            response.begin()
        except (OSError, http.client.HTTPException) as error:
            raise self._mapped(error) from error
        if len({*response.headers.get_all("Content-Length", ())}) > 1:
            raise FetchRetryable(_NO_HTTP)

    def _body(self, response: http.client.HTTPResponse) -> Iterator[bytes]:
        """Yield the body as it was sent."""
        try:
            while chunk := response.read(STEP_BYTES):
                yield chunk
        except (OSError, http.client.HTTPException) as error:
            raise self._mapped(error) from error
        except ValueError as error:  # a size of a chunk that is no number
            raise FetchRetryable(_NO_HTTP) from error
        if response.length:
            raise FetchRetryable(_BROKE)

    def _save(self, response: http.client.HTTPResponse, target: Path) -> Fetched:
        status = response.status
        if status != 200:
            if status not in _RETRYABLE and status < 500:
                raise FetchRefused(f"HTTP {status}")
            retryable = FetchRetryable(f"HTTP {status}")
            retryable.retry_after_s = seconds_of(response.headers.get("Retry-After", ""))
            raise retryable
        content_type = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        suspect = content_type.startswith("text/html") or content_type in _NO_MEDIA
        length = response.headers.get("Content-Length", "")
        if length.isdecimal() and int(length[:20]) > self._settings.max_bytes:
            raise self._too_large()
        size, digest = 0, hashlib.sha256()
        encodings = ",".join(response.headers.get_all("Content-Encoding", ()))
        try:
            descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                for chunk in unpacked(self._body(response), encodings):
                    self._guard.check()
                    if suspect and chunk and not size and not is_media(chunk):
                        raise FetchRefused(f"content type {content_type[:60]} is not media")
                    size += len(chunk)
                    if size > self._settings.max_bytes:
                        raise self._too_large()
                    digest.update(chunk)
                    file.write(chunk)
        except OSError as error:
            raise FetchRetryable(f"spool: {error.strerror or error}") from error
        if not size:
            raise FetchRefused("the answer is empty")
        return Fetched(str(target), size, digest.hexdigest())

    def _too_large(self) -> FetchRefused:
        return FetchRefused(f"larger than fetch.max_bytes ({self._settings.max_bytes})")

    def _mapped(self, error: Exception) -> FetchRetryable | FetchRefused:
        """Return our error; never the library's text, which may hold the URL."""
        self._guard.check()
        match error:
            case TimeoutError():
                return FetchRetryable(f"timed out after {self._settings.read_timeout_s:g} s")
            case ssl.SSLEOFError() | ssl.SSLZeroReturnError() | ssl.SSLSyscallError():
                return FetchRetryable(_BROKE)
            case ssl.SSLError():
                return FetchRefused("the TLS connection cannot be trusted or agreed on")
        return FetchRetryable(_BROKE)


def _unquoted(location: str) -> str:
    """Return the target of a redirect whose bytes, read as Latin-1, were sent as they are."""
    sent = location.encode("latin-1", "replace")
    try:
        return sent.decode()
    except UnicodeDecodeError:  # of another character set: a path of these bytes
        return quote(sent, safe=string.printable)


def _check_url(url: str) -> str:
    """Return the line of the user that a URL names, or nothing; FetchRefused for a bad one."""
    if len(url) > _MAX_URL or _CONTROLS.search(url):
        raise FetchRefused(_NO_URL)
    parts = urlsplit(url)
    if not parts.scheme:
        raise FetchRefused("is not http or https, and paths of this host are not read here")
    if parts.scheme not in ("http", "https"):
        raise FetchRefused(f"scheme {parts.scheme[:20]!r} is not http or https")
    if not parts.hostname or parts.hostname.startswith(("*", ".")):
        raise FetchRefused("the URL names no host")
    if parts.username is None:
        return ""
    login = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return f"Authorization: {make_headers(basic_auth=login)['authorization']}\r\n"


def seconds_of(retry_after: str) -> float | None:
    """Return the header Retry-After, seconds or a date, in seconds; None for anything else."""
    text = retry_after.strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        moment = parsedate_to_datetime(text)
        return max(0.0, moment.timestamp() - time.time())
    except (TypeError, ValueError, OverflowError, OSError):
        return None


_LOCK = "lock"
_PREFIX = "king-"


class Spool:
    """One King's folder.

    Attributes:
        folder: The folder, readable by this user only.
    """

    def __init__(self, root: Path) -> None:
        """Make the folder and remove those of dead Kings.

        Raises:
            ConfigError: The spool cannot be written.
            RetryableError: It cannot be written now: the disk is full.
        """
        self.folder = (root / f"{_PREFIX}{secrets.token_hex(8)}").resolve()
        try:
            self._make()
        except OSError as error:
            raise path_error(f"fetch.spool: {root} cannot be used", error) from error

    def restore(self) -> None:
        """Make the folder again if somebody removed it; while that fails, the downloads do."""
        if not self.folder.is_dir():
            _log.error("workers.spool_vanished", folder=str(self.folder))
            with contextlib.suppress(OSError):
                self._make()

    def _make(self) -> None:
        root = self.folder.parent
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        # One King at a time: a folder is not yet locked in the moment after it is made.
        with locked(root / ".lock", timeout_s=-1):
            _remove_dead(root)
            self.folder.mkdir(mode=0o700)
            self._lock = lock_file(self.folder / _LOCK)

    def remove_of(self, task_ids: Iterable[int]) -> None:
        with contextlib.suppress(OSError):  # no descriptors are left: the next King removes them
            for task_id in task_ids:
                for path in self.folder.glob(f"{task_id}-*"):
                    path.unlink(missing_ok=True)

    def remove(self, path: str) -> None:
        """Remove one file, if it is in this spool."""
        if Path(path).parent == self.folder:
            with contextlib.suppress(OSError):
                Path(path).unlink(missing_ok=True)

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.release()


def file_name(task_id: int) -> str:
    """Return a name that cannot be guessed and starts with its task, to find leftovers."""
    return f"{task_id}-{secrets.token_hex(16)}"


def _remove_dead(root: Path) -> None:
    for folder in root.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            if folder.is_symlink() or not folder.is_dir():
                continue
            with locked(folder / _LOCK):
                shutil.rmtree(folder, ignore_errors=True)


def local_file(source: str, *, root: Path | None = None) -> Fetched:
    """Return a file that is read in place.

    Args:
        source: Its path.
        root: The only folder whose files may be read, links followed; None: any.

    Raises:
        FetchRefused: There is no such file, or it lies elsewhere.
    """
    path = Path(source)
    try:
        if root is not None and path.resolve().parent != root.resolve():
            raise FetchRefused("a local path is not allowed as a source of media here")
        if not path.is_file():
            raise FetchRefused(f"{path}: no such file")
        return Fetched(str(path), path.stat().st_size)
    except (OSError, ValueError, RuntimeError) as error:  # too long, a null byte, a loop of links
        raise FetchRefused(f"{path}: {getattr(error, 'strerror', None) or error}") from error


def is_media(head: bytes) -> bool:
    """Return True for the first bytes of a media file."""
    file_type = sniff(head)
    return file_type is not None and bool(file_type.kinds)


def unpacked(chunks: Iterator[bytes], label: str) -> Iterator[bytes]:
    """Yield a body in steps of bounded size, without the encoding that its label names.

    Downloads ask for ``identity``, but servers pack files unasked, store the label of an upload
    (``aws-chunked``), and write there what is no packing at all (``utf-8``, ``none``). So the label
    is looked at only where the body does not begin as media.

    A step may be empty, so that the reader can check its deadline after each.

    Args:
        chunks: The body as it was sent.
        label: The header Content-Encoding.

    Raises:
        FetchRefused: It is packed in a way that cannot be undone, or damaged.
        FetchRetryable: It ends too early.
    """
    head = bytearray()
    while len(head) < HEAD_BYTES and (chunk := next(chunks, b"")):
        head += chunk
    body = chain([bytes(head)], chunks)
    names = [name for each in label.lower().split(",") if (name := each.strip()) not in _PLAIN]
    if not names or not head or is_media(bytes(head)):
        yield from body
    elif len(names) == 1 and names[0] in _DEFLATED:
        yield from _inflated(body, names[0])
    else:
        raise FetchRefused(f"content encoding {', '.join(names)[:40]!r} cannot be unpacked here")


def _inflated(body: Iterator[bytes], name: str) -> Iterator[bytes]:
    """Yield the content of all gzip members, or of one deflated stream; the first chunk is long."""
    broken = FetchRefused(f"content encoding {name}: the body is broken")
    rest = next(body)
    unpacker = zlib.decompressobj(_window_bits(rest, name))
    try:
        while True:
            size = len(rest)
            step = unpacker.decompress(rest, STEP_BYTES)
            rest = unpacker.unused_data if unpacker.eof else unpacker.unconsumed_tail
            yield step
            if unpacker.eof:
                while len(rest) < len(_GZIP) and (chunk := next(body, b"")):
                    rest += chunk
                if not rest.startswith(_GZIP):
                    return  # what follows the content is no part of it
                unpacker = zlib.decompressobj(zlib.MAX_WBITS | 16)
            elif not rest:
                rest = next(body, b"")
                if not rest and not step and not size:  # the end, and nothing is pending either
                    raise FetchRetryable(f"content encoding {name}: the body is cut short")
            elif not step and len(rest) == size:
                raise broken
    except zlib.error as error:
        raise broken from error


def _window_bits(head: bytes, name: str) -> int:
    """Return zlib's ``wbits`` for gzip, zlib, or a raw stream, which has no header."""
    if head.startswith(_GZIP[:2]):
        return zlib.MAX_WBITS | 16
    has_header = len(head) < 2 or (head[0] & 15 == 8 and int.from_bytes(head[:2], "big") % 31 == 0)
    return -zlib.MAX_WBITS if name == "deflate" and not has_header else zlib.MAX_WBITS
