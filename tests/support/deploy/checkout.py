"""A folder laid out like a checkout, under a real supervisord with the shipped configuration."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

import deploy
from common.errors import RetryableError
from deploy.supervisor import SupervisorClient
from king.status import read_health

ROOT = Path(deploy.__file__).resolve().parents[1]


def eventually(check: Callable[[], bool], timeout_s: float = 60.0) -> bool:
    """Tell if a condition becomes true in time; errors of a process being replaced count as no."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        try:
            if check():
                return True
        except (RetryableError, OSError, psutil.Error):
            pass
        time.sleep(0.05)
    return False


class Checkout:
    """The shipped configuration, with another King and other settings."""

    def __init__(self, folder: Path, king: str, settings: str, *, monitor: bool = False) -> None:
        self.folder = folder
        self.run = folder / "workshop" / "run"
        self.run.mkdir(parents=True)
        (folder / "deploy").mkdir()
        conf = (ROOT / "deploy" / "supervisord.conf").read_text()
        # Only the patience is shortened, for the tests' sake.
        conf = conf.replace("startsecs=2", "startsecs=1").replace("sleep 2;", "sleep 1;")
        if monitor:
            conf = conf.replace("scripts/mongo_supervisor", str(ROOT / "scripts/mongo_supervisor"))
            conf = conf.replace("--watch 60", "--watch 0.5")
        else:
            conf = conf[: conf.index("[program:mongo_supervisor]")]
        (folder / "deploy" / "supervisord.conf").write_text(conf)
        (folder / "online_process.py").write_text(king)
        (folder / "settings.yaml").write_text(settings)
        self.client = SupervisorClient(f"unix://{self.run}/supervisor.sock", "king", 5)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start supervisord, and wait until the King runs."""
        environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "PYTHONWARNINGS": "ignore",
            "KING_ARGS": "--config settings.yaml",
        }
        conf = self.folder / "deploy" / "supervisord.conf"
        # Started from elsewhere: nothing in the configuration may depend on the current folder.
        with (self.folder / "out").open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "supervisor.supervisord", "-n", "-c", str(conf)],
                cwd="/",
                env=environment,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        assert eventually(lambda: self.client.program().state == "RUNNING"), self.logs()

    def stop(self) -> None:
        """End supervisord, and what it left."""
        process, self.process = self.process, None
        if process is not None:
            children = psutil.Process(process.pid).children(recursive=True)
            process.terminate()
            process.wait(60)
            for child in psutil.wait_procs(children, 30)[1]:
                child.kill()

    def health(self) -> dict[str, Any]:
        """Return the King's last health file; empty without one."""
        return read_health(self.run / "king.json") or {}

    def serving(self, pid: int | None = None) -> bool:
        """Tell if a King serves, and is not the one of this pid."""
        health = self.health()
        fresh = time.time() - health.get("updated_at", 0) < 2
        return bool(fresh and health.get("phase") == "serving" and health["pid"] != pid)

    def logs(self) -> str:
        files = [*self.run.glob("*.log"), self.folder / "out"]
        return "\n".join(f"== {f.name}\n{f.read_text()}" for f in files if f.exists())

    def watchdog_log(self) -> str:
        return (self.run / "watchdog.log").read_text()
