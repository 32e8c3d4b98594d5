"""A loopback server that speaks as much of the Hugging Face hub as its client needs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.processes import Answers, Site, serving

_COMMIT = "0" * 40


def _about(root: Path, path: str) -> bytes | None:
    """The hub's description of a repository, when that is what the path asks for."""
    name = path.removeprefix("/api/models/").removesuffix("/revision/main")
    folder = root / name
    if name == path or "?" in name or not folder.is_dir():
        return None
    files = [{"rfilename": file.name} for file in sorted(folder.iterdir())]
    return json.dumps({"id": name, "sha": _COMMIT, "tags": [], "siblings": files}).encode()


@contextmanager
def hub_server(root: Path) -> Iterator[str]:
    """Serve ``root/<owner>/<repository>/<file>`` as a hub; gives its URL for ``HF_ENDPOINT``."""

    class Handler(Answers):
        protocol_version = "HTTP/1.0"

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, *, body: bool) -> None:
            repository, separator, name = (
                self.path.lstrip("/").replace(_COMMIT, "main").partition("/resolve/main/")
            )
            if self.path == "/":
                self._send(200, b"hub", {}, body)
                return
            about = _about(root, self.path)
            if about is not None:
                self._send(200, about, {"Content-Type": "application/json"}, body)
                return
            file = root / repository / name
            if not separator or not file.is_file():
                missing = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": _COMMIT}
                self._send(404, b"", missing, body)
                return
            content = file.read_bytes()
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            self._send(200, content, {"ETag": etag, "X-Repo-Commit": _COMMIT}, body)

        def _send(self, status: int, content: bytes, headers: dict[str, str], body: bool) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if body:
                self.wfile.write(content)

    with serving(Site(Handler)) as server:
        yield server.url("")
