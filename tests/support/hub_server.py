"""A loopback server that speaks as much of the Hugging Face hub as its client needs."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.processes import Answers, Site, serving

_COMMIT = "0" * 40


GATED = ".gated"
"""A repository with a file of this name is given only to those who accept its licence."""


def _about(root: Path, path: str) -> bytes | None:
    """The hub's description of a repository, or its list of files, when the path asks for one."""
    name, _, rest = path.removeprefix("/api/models/").partition("?")[0].rpartition("/")
    name, _, verb = name.rpartition("/")
    folder = root / name
    if not path.startswith("/api/models/") or verb not in ("revision", "tree") or not name:
        return None
    if not folder.is_dir() or rest not in ("main", _COMMIT):
        return None
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    names = [str(file.relative_to(folder)) for file in files]
    if verb == "tree":
        entries = [
            {"type": "file", "path": name, "size": file.stat().st_size, "oid": _sha256(file)[:40]}
            for name, file in zip(names, files, strict=True)
        ]
        return json.dumps(entries).encode()
    siblings = [{"rfilename": name} for name in names]
    return json.dumps({"id": name, "sha": _COMMIT, "tags": [], "siblings": siblings}).encode()


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


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
            if (root / repository / GATED).is_file():
                self._send(403, b"", {"X-Error-Code": "GatedRepo"}, body)
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
            etag = f'"{_sha256(file)}"'
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
