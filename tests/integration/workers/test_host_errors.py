"""Errors of this host, not of a post: they are retryable, and reported as such."""

import shutil
import socket
import threading
from contextlib import closing
from pathlib import Path

import pytest

from common.errors import FetchRetryable, RetryableError
from common.post import MEDIA_KINDS, Media, MediaKind
from config.features import FeatureSettings
from config.settings import DecodeSettings
from tests.support.processes import limited_to, no_descriptors
from tests.support.workers.fetching import fetch, retryable, settings_of
from tests.support.workers.web import BODY, Web
from workers.fetch import Fetcher, Spool
from workers.pool.channel import Arena
from workers.protocol import DecodeTask
from workers.roles.batched import run_decode
from workers.roles.loop import failure_of


def test_descriptors_that_are_used_up(web: Web, tmp_path: Path) -> None:
    """For the connection, or for the file in the spool."""
    media = Media("image", web.url("/ok"))
    with closing(Fetcher(settings_of())) as fetcher:
        with no_descriptors(), pytest.raises(FetchRetryable, match="Too many open files"):
            fetcher.fetch(media, tmp_path / "a")
        assert fetcher.fetch(media, tmp_path / "b").size_bytes == len(BODY)
        with no_descriptors(), pytest.raises(FetchRetryable, match="spool: Too many open files"):
            fetcher.fetch(media, tmp_path / "c")  # over the same connection
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_disk_that_is_full(web: Web, tmp_path: Path) -> None:
    """The limit on the size of files stands for it: a write fails half-way."""
    with limited_to(100):
        assert retryable(web.url("/ok"), tmp_path) == "spool: File too large"


def test_handshake_that_breaks_off(tmp_path: Path) -> None:
    """An overloaded server closes before TLS is agreed on; a certificate is another matter."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def hang_up() -> None:
            for _ in range(2):
                connection, _ = server.accept()
                connection.recv(4096)
                connection.close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        url = f"https://127.0.0.1:{server.getsockname()[1]}/"
        assert retryable(url, tmp_path) == "the connection broke"
        thread.join(60)


@pytest.mark.parametrize("error", [OSError(24, "Too many open files"), MemoryError()])
def test_errors_that_nobody_foresaw_in_a_download(error: Exception) -> None:
    assert failure_of("fetch", error).retryable
    assert not failure_of("fetch", KeyError("x")).retryable


@pytest.mark.parametrize("kind", MEDIA_KINDS)
def test_a_download_that_goes_before_it_was_decoded(tmp_path: Path, kind: MediaKind) -> None:
    """Or cannot be opened for want of descriptors; a broken file stays the post's fault."""
    arena = Arena.private(1, 1 << 24)
    task = DecodeTask(kind, str(tmp_path / "file"), 0)
    decode = (task, FeatureSettings(), DecodeSettings(), arena)
    with pytest.raises(RetryableError, match="cannot be opened: No such file"):
        run_decode(*decode)
    (tmp_path / "file").write_bytes(b"\0" * 100)
    with no_descriptors(), pytest.raises(RetryableError, match="Too many open files"):
        run_decode(*decode)
    arena.close()


def test_spool_that_was_removed_is_made_again(web: Web, tmp_path: Path) -> None:
    """With its lock, so that a King that starts meanwhile takes it for a living one's."""
    spool = Spool(tmp_path / "spool")
    spool.restore()
    shutil.rmtree(tmp_path / "spool")
    with pytest.raises(FetchRetryable, match="spool: No such file"):
        fetch(Media("image", web.url("/ok")), settings_of(), spool.folder, "file")
    spool.restore()
    assert spool.folder.stat().st_mode & 0o777 == 0o700
    fetch(Media("image", web.url("/ok")), settings_of(), spool.folder, "file")
    other = Spool(tmp_path / "spool")
    assert (spool.folder / "file").exists()
    for each in (spool, other):
        each.close()
