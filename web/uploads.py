"""Uploaded files: streamed into our own spool folder, removed when their request ends."""

from __future__ import annotations

import errno
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http import HTTPStatus
from pathlib import Path
from typing import IO, Any

from web.errors import ApiError, too_large
from workers.fetch.spool import Spool


class Box:
    """The files of one request."""

    def __init__(self, folder: Path, max_files: int) -> None:
        self._folder = folder
        self._max_files = max_files
        self._files: list[IO[bytes]] = []
        self.paths: list[Path] = []

    def stream(
        self,
        total_content_length: int | None,
        content_type: str | None,
        filename: str | None,
        content_length: int | None = None,
    ) -> IO[bytes]:
        """Return a file to write into; a stream factory for Werkzeug's form parser.

        We choose its name: the client's file name is never a path here.

        Raises:
            ApiError: There are too many files.
        """
        del total_content_length, content_type, filename, content_length
        if len(self.paths) >= self._max_files:
            raise too_large(f"more than {self._max_files} files (http.max_files)")
        path = self._folder / f"upload-{secrets.token_hex(16)}"
        file = path.open("x+b")
        self.paths.append(path)
        self._files.append(file)
        return file

    def finish(self) -> None:
        """Flush and close the files after the last byte."""
        for file in self._files:
            file.close()

    def empty(self) -> None:
        """Remove the files."""
        for file in self._files:
            with suppress(OSError):  # a full disk: some bytes could not be flushed
                file.close()
        for path in self.paths:
            path.unlink(missing_ok=True)


class Uploads:
    """A spool folder for uploads; created by the constructor, removed by `close`."""

    def __init__(self, root: Path, *, max_files: int) -> None:
        """Create the folder, and remove those of dead processes.

        Raises:
            ConfigError: The folder cannot be written.
        """
        self._spool = Spool(root)
        self._max_files = max_files

    @property
    def folder(self) -> Path:
        return self._spool.folder

    @contextmanager
    def box(self) -> Iterator[Box]:
        """Yield a box for one request's files; they are removed at its end.

        Raises:
            ApiError: The disk is full.
        """
        box = Box(self.folder, self._max_files)
        try:
            yield box
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            status = HTTPStatus.INSUFFICIENT_STORAGE
            raise ApiError(status, "SpoolFull", "there is no room for the upload") from error
        finally:
            box.empty()

    def hide(self, text: str) -> str:
        """Return a message without our paths."""
        return text.replace(f"{self.folder}/", "")

    def close(self) -> None:
        """Remove the folder."""
        self._spool.close()


def is_empty(file: Any) -> bool:
    """Tell whether a form's file field was left empty."""
    return not file.filename
