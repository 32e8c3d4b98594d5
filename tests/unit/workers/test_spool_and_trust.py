"""The spool of downloads, and what the King believes of what a worker says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from common.post import Failure
from config.settings import Settings
from tests.support.workers.driving import decode_task, fetch_task, text_task
from workers.fetch.spool import Spool, file_name
from workers.pool.checks import check_failure, check_message, check_result
from workers.pool.pipe import PipeBroken
from workers.pool.schedule import Scheduler
from workers.protocol import (
    ArrayRef,
    Began,
    BundleLoaded,
    Decoded,
    Done,
    Extracted,
    Failed,
    Fetched,
    Part,
    Ready,
    Refused,
    Stop,
)

# Spool ---------------------------------------------------------------------------------------


def test_spool_is_private_and_ends_with_its_king(tmp_path: Path) -> None:
    """A folder of its own with mode 0700; other living Kings' folders stay, dead ones go."""
    root = tmp_path / "spool"
    first = Spool(root)
    assert first.folder.stat().st_mode & 0o777 == 0o700
    (first.folder / "file").write_text("x")
    second = Spool(root)
    assert (first.folder / "file").exists(), "a living King lost its files"
    first._lock.release()  # as the kernel does when its process ends
    (root / "king-not-a-folder").write_text("x")
    third = Spool(root)
    assert not first.folder.exists()
    assert second.folder.exists()
    for spool in (second, third):
        spool.close()
        assert not spool.folder.exists()


def test_spool_removes_what_a_dead_downloader_left(tmp_path: Path) -> None:
    """Files of given tasks go, others stay; only files of the spool can be removed."""
    spool = Spool(tmp_path)
    kept = spool.folder / file_name(12)
    left = spool.folder / file_name(1)
    outside = tmp_path / "outside"
    for path in (kept, left, outside):
        path.write_text("x")
    spool.remove_of([1, 2])
    assert (kept.exists(), left.exists()) == (True, False)
    spool.remove(str(outside))
    assert outside.exists()
    spool.remove(str(kept))
    assert not kept.exists()
    assert file_name(1) != file_name(1)
    spool.close()


# Trust ---------------------------------------------------------------------------------------


def entry_of(task: Any, slot: int | None = None) -> Any:
    scheduler = Scheduler(Settings())
    entry = scheduler._entries[scheduler.submit(task, 9.0)]
    entry.slot = slot
    return entry


def test_what_is_believed(tmp_path: Path) -> None:
    """Results of the right kind, in the right place, pass."""
    check_result(entry_of(fetch_task("u")), Fetched(str(tmp_path / "f"), 1), tmp_path)
    part = Part("image", ArrayRef(3, 0, (1, 2, 2, 3), "uint8"))
    check_result(entry_of(decode_task(), 3), Decoded((part,)), tmp_path)
    check_result(entry_of(text_task("t")), Extracted(text="x"), tmp_path)
    check_failure(Failure("decode", "MediaError", "broken"))


@pytest.mark.parametrize(
    ("task", "result"),
    [
        (fetch_task("u"), Fetched("/etc/passwd", 1)),
        (fetch_task("u"), Extracted()),
        (text_task("t"), Fetched("/spool/f", 1)),
        (decode_task(), Decoded((Part("image", ArrayRef(4, 0, (1,), "uint8")),))),
        (decode_task(), Decoded((Part("image", ArrayRef(3, -1, (1,), "uint8")),))),
        (decode_task(), Decoded((Part("image", ArrayRef(3, 0, (-1,), "uint8")),))),
        (decode_task(), Decoded((Part("other", ArrayRef(3, 0, (1,), "uint8")),))),  # type: ignore[arg-type]
        (decode_task(), Decoded(("part",))),  # type: ignore[arg-type]
        (decode_task(), Decoded((), {"smell": Failure("a", "b", "c")})),  # type: ignore[dict-item]
        (decode_task(), Decoded((), {"audio": "no"})),  # type: ignore[dict-item]
        (decode_task(), Decoded((), 5)),  # type: ignore[arg-type]
    ],
)
def test_what_is_not_believed(task: Any, result: Any) -> None:
    """An answer that cannot be true marks its worker as broken."""
    with pytest.raises(PipeBroken):
        check_result(entry_of(task, 3), result, Path("/spool"))


@pytest.mark.parametrize(
    "message",
    [
        Began((1, [])),  # type: ignore[arg-type]
        Began(5),  # type: ignore[arg-type]
        Done([], Extracted(), 0.1),  # type: ignore[arg-type]
        Done(1, Extracted(), "long"),  # type: ignore[arg-type]
        Failed(1, "no"),  # type: ignore[arg-type]
        Failed("1", Failure("a", "b", "c")),  # type: ignore[arg-type]
        Ready({"a": 1}),  # type: ignore[dict-item]
        Ready([]),  # type: ignore[arg-type]
        Refused(b"no"),  # type: ignore[arg-type]
        BundleLoaded("name", 2),  # type: ignore[arg-type]
        Stop(),
        ArrayRef(0, 0, (), "uint8"),
    ],
)
def test_messages_of_wrong_types_are_not_believed(message: Any) -> None:
    """A field of another type would break the King where it is read."""
    with pytest.raises(PipeBroken):
        check_message(message)


def test_messages_of_right_types_are_believed() -> None:
    """What honest workers say passes."""
    failure = Failure("a", "b", "c")
    done = Done(1, Extracted(text="x"), 0.5)
    for message in (Ready(), Ready({"a": "b"}), Began((1, 2)), done, Failed(1, failure)):
        check_message(message)
    for last in (Refused("no"), BundleLoaded("name", "1")):
        check_message(last)


def test_a_failure_must_be_one() -> None:
    """A failure with something else in it would break the King where it is read."""
    for failure in ("no", Failure("a", "b", 5)):  # type: ignore[arg-type]
        with pytest.raises(PipeBroken):
            check_failure(failure)  # type: ignore[arg-type]
