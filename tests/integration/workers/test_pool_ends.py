"""Start, refusal and stop of the pool, with toy workers (`tests.support.workers.toys`)."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from common.errors import ConfigError
from tests.support.services import wait_until
from tests.support.workers.driving import Driver, alive, memory_files, text_task, toy_settings
from tests.support.workers.toys import ROLES
from workers.pool.pool import ProcessPool
from workers.protocol import Extracted, PoolRefused, TaskPool

ROOT = Path(__file__).resolve().parents[3]


def test_refused_start(tmp_path: Path) -> None:
    """A worker that says why it cannot start is believed at once: no restart, one line."""
    settings = toy_settings(tmp_path, features={"text": {"arch": "extract-refuses:no weights"}})
    driver = Driver(settings)
    driver.pool.start()
    driver.until(lambda: driver.told)
    assert driver.told == [PoolRefused("no weights")]
    assert driver.pool.refused == "no weights"
    assert not driver.pool.ready
    driver.stop()


def test_start_that_fails_again_and_again(tmp_path: Path) -> None:
    driver = Driver(toy_settings(tmp_path, features={"text": {"arch": "decode-dies"}}))
    driver.pool.start()
    driver.until(lambda: driver.told)
    [event] = driver.told
    assert isinstance(event, PoolRefused)
    assert event.message == "worker decode-0 failed to start 3 times (status 7); its log says why"
    assert not event.mistake  # perhaps memory: a supervisor should try again
    driver.stop()


@pytest.mark.parametrize("reason", ["", "half a bundle"])
def test_a_pool_that_has_worked_goes_on_trying(tmp_path: Path, reason: str) -> None:
    """Workers killed while loading, or that find half a file, are tried until they come up."""
    marker, names = tmp_path / "marker", ("decode-0", "extract-0", "fuse-0")
    arch = f"all-fail-while:{marker}"
    driver = Driver(toy_settings(tmp_path, features={"text": {"arch": arch}})).start()
    marker.write_text(reason)
    for name in names:
        os.kill(driver.pid(name), signal.SIGKILL)
    # The first, and four while loading.
    driver.until(lambda: all(driver.view(name).deaths >= 5 for name in names))
    assert driver.pool.refused is None
    marker.unlink()
    driver.ready()
    assert not any(isinstance(event, PoolRefused) for event in driver.told)
    driver.stop()


def test_start_that_hangs(tmp_path: Path) -> None:
    settings = toy_settings(
        tmp_path, features={"text": {"arch": "decode-hangs"}}, workers={"start_timeout_s": 4}
    )
    driver = Driver(settings)
    driver.pool.start()
    driver.until(lambda: any(w.deaths for w in driver.pool.workers))
    driver.stop()


def test_wrong_bundle_is_refused(tmp_path: Path) -> None:
    settings = toy_settings(
        tmp_path, features={"text": {"arch": 'bundle-wants:{"video": "fp-of-others"}'}}
    )
    driver = Driver(settings)
    driver.pool.start()
    driver.until(lambda: driver.told)
    [event] = driver.told
    assert isinstance(event, PoolRefused)
    assert "modality video: the bundle needs fp-of-others, the extractors give fp-video" in (
        event.message
    )
    driver.stop()


def test_stop_waits_for_no_interpreter(tmp_path: Path) -> None:
    """A worker that is done is gone: taking torch apart would cost a drain seconds."""
    roles = dict.fromkeys(ROLES, "tests.support.workers.toys:run_lingering")
    driver = Driver(toy_settings(tmp_path), roles).start()
    started = time.monotonic()
    driver.pool.stop(30)
    assert time.monotonic() - started < 18


def test_stop_lets_the_begun_finish_and_kills_the_rest(tmp_path: Path) -> None:
    """`stop` is bounded: what has begun may end, a stopped worker is killed at the limit."""
    driver = Driver(toy_settings(tmp_path)).start()
    pids = [w.pid for w in driver.pool.workers if w.pid]
    os.kill(driver.pid("decode-0"), signal.SIGSTOP)
    driver.submit(text_task("sleep:0.5"))
    driver.told += driver.pool.poll(0.2)
    started = time.monotonic()
    driver.pool.stop(3)
    assert time.monotonic() - started < 30
    assert not alive(pids)
    assert driver.pool.poll(1) == []
    driver.pool.stop(1)
    driver.pool.wake()
    assert list(tmp_path.glob("king-*")) == []


def test_constructing_starts_nothing(tmp_path: Path) -> None:
    before = memory_files()
    pool: TaskPool = ProcessPool(toy_settings(tmp_path / "spool"))
    assert not (tmp_path / "spool").exists()
    assert memory_files() == before
    assert {w.state for w in pool.workers} == {"waiting"}
    pool.stop(1)


def test_unusable_spool_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    pool = ProcessPool(toy_settings(tmp_path / "file" / "spool"))
    with pytest.raises(ConfigError, match=r"^fetch\.spool: .* cannot be used"):
        pool.start()
    pool.stop(1)


KING = """
import json, sys, time
from pathlib import Path
from common.logs import configure_logs
from tests.support.workers.driving import Driver, decode_task, text_task, toy_settings
configure_logs("json", "error")
driver = Driver(toy_settings(Path(sys.argv[1]))).start()
driver.submit(decode_task("sleep:60"))
driver.submit(text_task("stop"))
driver.told += driver.pool.poll(0.5)
modules = sorted({"torch", "cv2", "av", "transformers", "timm", "fusion"} & set(sys.modules))
pids = [w.pid for w in driver.pool.workers]
rss = int(Path("/proc/self/statm").read_text().split()[1]) * 4096
print(json.dumps({"pids": pids, "modules": modules, "rss": rss}), flush=True)
time.sleep(60)
"""


def test_killed_king_leaves_nothing(tmp_path: Path) -> None:
    """After kill -9 of the King every worker dies with it, a busy and a stopped one too.

    The next King removes its spool. And the King's side is small and loads no model library.
    """
    king: Any = subprocess.Popen(
        [sys.executable, "-c", KING, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE
    )
    told = json.loads(king.stdout.readline())
    assert told["modules"] == []
    assert told["rss"] < 100 * 1024 * 1024
    assert len(alive(told["pids"])) == 4
    assert len(list(tmp_path.glob("king-*"))) == 1
    king.kill()
    king.wait()
    king.stdout.close()
    wait_until(lambda: not alive(told["pids"]), 60, "the workers' end")
    pool = ProcessPool(toy_settings(tmp_path))
    pool.start()
    assert len(list(tmp_path.glob("king-*"))) == 1, "the dead King's folder is still there"
    pool.stop(0)


def test_a_recycled_worker_loses_no_task(tmp_path: Path) -> None:
    """Tasks that wait in a retiring process run in the next one, and nobody is charged."""
    driver = Driver(toy_settings(tmp_path, workers={"recycle_tasks": 5})).start()
    try:
        first = driver.pid("extract-0")
        tasks = [driver.submit(text_task(f"t{i}")) for i in range(40)]
        results = [driver.done(task).result for task in tasks]
        assert [r.text for r in results if isinstance(r, Extracted)] == [f"t{i}" for i in range(40)]
        assert driver.view("extract-0").pid != first  # None while the next one is started
    finally:
        driver.stop()
