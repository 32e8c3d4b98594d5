"""The spool of downloads."""

from pathlib import Path

from workers.fetch import Spool, file_name


def test_spool_is_private_and_ends_with_its_king(tmp_path: Path) -> None:
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
    spool = Spool(tmp_path)
    of_another = spool.folder / file_name(12)
    of_task = spool.folder / file_name(1)
    outside = tmp_path / "outside"
    for path in (of_another, of_task, outside):
        path.write_text("x")
    spool.remove_of([1, 2])
    assert (of_another.exists(), of_task.exists()) == (True, False)
    spool.remove(str(outside))
    assert outside.exists()
    spool.remove(str(of_another))
    assert not of_another.exists()
    assert file_name(1) != file_name(1)
    spool.close()
