"""An internet on loopback for the tests of the guard: names, a public host, and a trap.

`NameServer` is a real name server over UDP, `Net` sends every connection that the guard makes to
one of two real servers: the public addresses to one that answers and redirects, every other
address to a trap that counts. What the guard lets through is thus seen as a connection.
"""

import ipaddress
import os
import socket
import struct
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import Any
from urllib.parse import unquote

import pytest

from tests.support.processes import Answers, Site, serving

PUBLIC_V4, PUBLIC_V6 = "93.184.216.34", "2606:2800:220:1::1"
BODY = b"\x89PNG\r\n\x1a\n" + bytes(range(256))
_A, _AAAA = 1, 28
_REAL_GETADDRINFO = socket.getaddrinfo

Addresses = Sequence[str]


class NameServer:
    """Answers A and AAAA queries over UDP; a name may answer differently the next time.

    Attributes:
        asked: Every name that was asked for, once per pair of queries.
    """

    def __init__(self, zone: Mapping[str, Sequence[Addresses]]) -> None:
        self._zone = zone
        self._turns: dict[str, int] = {}
        self.asked: list[str] = []
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def close(self) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as poker:
            poker.sendto(b"", self._socket.getsockname())
        self._thread.join()
        self._socket.close()

    def forget(self) -> None:
        """Forget the questions: every name begins with its first answer again."""
        self._turns.clear()
        self.asked.clear()

    def addresses(self, name: str) -> list[str]:
        """Ask over UDP, as a resolver does: A first, then AAAA.

        Raises:
            socket.gaierror: The name has no address.
        """
        addresses = [*self._ask(name, _A), *self._ask(name, _AAAA)]
        if not addresses:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return addresses

    def _ask(self, name: str, kind: int) -> list[str]:
        labels = name.rstrip(".").encode("ascii").split(b".")
        question = b"".join(bytes([len(label)]) + label for label in labels) + b"\0"
        number = os.urandom(2)
        query = number + struct.pack(">5H", 0x0100, 1, 0, 0, 0) + question
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
            asking.settimeout(5)
            asking.sendto(query + struct.pack(">2H", kind, 1), self._socket.getsockname())
            reply = asking.recv(4096)
        if reply[:2] != number:
            raise ValueError("an answer to another question")
        (count,) = struct.unpack_from(">H", reply, 6)
        position, addresses = 12 + len(question) + 4, []
        for _ in range(count):
            (size,) = struct.unpack_from(">H", reply, position + 10)
            addresses.append(str(ipaddress.ip_address(reply[position + 12 : position + 12 + size])))
            position += 12 + size
        return addresses

    def _serve(self) -> None:
        while True:
            query, sender = self._socket.recvfrom(4096)
            if not query:
                return
            self._socket.sendto(self._reply(query), sender)

    def _reply(self, query: bytes) -> bytes:
        labels, position = [], 12
        while query[position]:
            labels.append(query[position + 1 : position + 1 + query[position]].decode())
            position += 1 + query[position]
        name = ".".join(labels).lower()
        (kind,) = struct.unpack_from(">H", query, position + 1)
        turns = self._zone.get(name, [[]])
        turn = min(self._turns.get(name, 0), len(turns) - 1)
        if kind == _AAAA:  # the pair is complete
            self._turns[name] = turn + 1
            self.asked.append(name)
        version = 4 if kind == _A else 6
        records = b""
        count = 0
        for text in turns[turn]:
            packed = ipaddress.ip_address(text).packed
            if len(packed) == (4 if version == 4 else 16):
                records += b"\xc0\x0c" + struct.pack(">2HIH", kind, 1, 0, len(packed)) + packed
                count += 1
        header = query[:2] + struct.pack(">5H", 0x8180, 1, count, 0, 0)
        return header + query[12 : position + 5] + records


class _Handler(Answers):
    """``/302/URL`` redirects, ``/refresh/URL`` asks browsers to, all else is a picture."""

    server: "HttpServer"

    def do_GET(self) -> None:
        self.server.paths.append(self.path)
        self.server.credentials.append(self.headers.get("Authorization", ""))
        verb, _, rest = self.path.lstrip("/").partition("/")
        location = unquote(rest)
        headers = {"Content_Type": "image/png"}
        if verb.isdigit():
            headers["Location"] = location
        elif verb == "refresh":
            headers["Refresh"] = f"0; url={location}"
        self.answer(BODY, int(verb) if verb.isdigit() else 200, None, **headers)


class HttpServer(Site):
    """Counts connections, and remembers the credentials that came with them."""

    def __init__(self) -> None:
        super().__init__(_Handler)
        self.credentials: list[str] = []
        self.connections = 0

    def get_request(self) -> tuple[socket.socket, Any]:
        self.connections += 1
        return super().get_request()


class Net:
    """The network as the guard sees it.

    Attributes:
        names: The name server.
        public: The server at the public addresses.
        trap: The server at every other address: nothing may reach it.
        dialled: The addresses and ports that were connected to.
    """

    def __init__(self, names: NameServer, public: HttpServer, trap: HttpServer) -> None:
        self.names, self.public, self.trap = names, public, trap
        self.dialled: list[tuple[str, int]] = []

    def forget(self) -> None:
        self.dialled.clear()
        self.names.forget()
        for server in (self.public, self.trap):
            server.paths.clear()
            server.credentials.clear()
            server.connections = 0

    def getaddrinfo(self, host: Any, port: Any, *rest: Any) -> list[Any]:
        """The system's resolver for numbers and local names; all other names are asked for."""
        text = host.decode() if isinstance(host, bytes) else str(host)
        if text.lower() == "localhost" or _is_number(text):
            return list(_REAL_GETADDRINFO(host, port, *rest))
        infos: list[Any] = []
        for address in self.names.addresses(text):
            infos += _REAL_GETADDRINFO(address, port, *rest)
        return infos

    def connect(self, sock: socket.socket, target: tuple[Any, ...]) -> None:
        """Connect a socket to the server that stands at the address."""
        address = str(target[0]).partition("%")[0]
        self.dialled.append((address, target[1]))
        server = self.public if address in (PUBLIC_V4, PUBLIC_V6) else self.trap
        with socket.create_connection(("127.0.0.1", server.server_port), timeout=5) as made:
            os.dup2(made.fileno(), sock.fileno())


def _is_number(host: str) -> bool:
    try:
        _REAL_GETADDRINFO(host, 80, 0, socket.SOCK_STREAM, 0, socket.AI_NUMERICHOST)
    except (socket.gaierror, UnicodeError):
        return False
    return True


@contextmanager
def loopback_net(
    monkeypatch: pytest.MonkeyPatch, zone: Mapping[str, Sequence[Addresses]]
) -> Iterator[Net]:
    """Put the network behind `workers.fetch`, and only there."""
    names, public, trap = NameServer(zone), HttpServer(), HttpServer()
    net = Net(names, public, trap)

    class Socket(socket.socket):
        def connect(self, target: Any) -> None:
            net.connect(self, target)

    class Module:
        """The module `socket` as the guard sees it."""

        getaddrinfo = staticmethod(net.getaddrinfo)

        def __getattr__(self, name: str) -> Any:
            return Socket if name == "socket" else getattr(socket, name)

    monkeypatch.setattr("workers.fetch.socket", Module())
    with serving(public), serving(trap), closing(names):
        yield net
