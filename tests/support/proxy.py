"""A TCP proxy for tests that can make connections go silent, as a dead link does."""

import contextlib
import socket
import ssl
import threading


class _Pair:
    """One proxied connection: two sockets and whether bytes still get through."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client, self.server = client, server
        self.silent: set[socket.socket] = set()
        """Those whose bytes are swallowed."""

    def close(self) -> None:
        for end in (self.client, self.server):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


class Proxy:
    """Forwards 127.0.0.1:`port` to `target`; with a context it speaks TLS to its clients."""

    def __init__(self, target: tuple[str, int], tls: ssl.SSLContext | None = None) -> None:
        self._tls = tls
        self._target = target
        self._pairs: list[_Pair] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._refusing = False
        threading.Thread(target=self._accept, name="proxy", daemon=True).start()

    def blackhole(self, *, replies_only: bool = False) -> int:
        """Existing connections stay open and swallow every byte; new ones work.

        Args:
            replies_only: What the client sends still arrives; it never learns that it did.

        Returns:
            How many went silent.
        """
        for pair in self._pairs:
            pair.silent = {pair.server} if replies_only else {pair.server, pair.client}
        return len(self._pairs)

    def cut(self) -> None:
        """Close the existing connections; new ones work."""
        pairs, self._pairs = self._pairs, []
        for pair in pairs:
            pair.close()

    def refuse(self, refusing: bool = True) -> None:
        """Close new connections at once, or accept them again."""
        self._refusing = refusing

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self._refusing:
                client.close()
                continue
            try:
                if self._tls is not None:
                    client = self._tls.wrap_socket(client, server_side=True)
                server = socket.create_connection(self._target, timeout=5)
            except OSError:
                client.close()
                continue
            server.settimeout(None)
            pair = _Pair(client, server)
            self._pairs.append(pair)
            for source, sink in ((client, server), (server, client)):
                threading.Thread(target=self._relay, args=(pair, source, sink), daemon=True).start()

    def _relay(self, pair: _Pair, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := self._receive(pair, source):
                if source not in pair.silent:
                    sink.sendall(data)
        except OSError:
            pass
        if not pair.silent:  # a silent connection does not even tell that it has ended
            with contextlib.suppress(OSError):
                sink.shutdown(socket.SHUT_WR)

    def _receive(self, pair: _Pair, source: socket.socket) -> bytes:
        """The next bytes of one side; empty at the end."""
        return source.recv(65536)


def proxy_to(
    target: tuple[str, int], tls: ssl.SSLContext | None = None
) -> contextlib.closing[Proxy]:
    """A proxy for the duration of a block."""
    return contextlib.closing(Proxy(target, tls))
