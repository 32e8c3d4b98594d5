"""Roles for tests of the pool: real processes that load nothing and do what the task's text says.

A task's text is ``verb:argument``; for a fetch task it is the URL, for decode the path, for
extract the text, for fuse the post's ID.
"""

import atexit
import json
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from common.errors import ConfigError
from common.post import Failure, Tags
from workers import protocol
from workers.pool.channel import Channel
from workers.roles.loop import Context, DeviceLost, Handler, Outcome, run_batch, serve

TOY = "tests.support.workers.toys:run"
WORKING_TOY = "tests.support.workers.toys:run_working"
TASK_CPU_S = 0.02
"""Twice the kernel's step of a process's CPU time."""
ROLES: dict[protocol.WorkerRole, str] = {"fetch": TOY, "decode": TOY, "extract": TOY, "fuse": TOY}


def text_of(task: protocol.Task) -> str:
    if isinstance(task, protocol.FetchTask):
        return task.media.source
    if isinstance(task, protocol.DecodeTask):
        return task.path
    if isinstance(task, protocol.ExtractTask):
        return task.text
    assert isinstance(task, protocol.FuseTask)
    return task.features.post_id


class Toy(Handler):
    """Does as it is told."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.swap: tuple[str, str] | None = None

    def load(self) -> Mapping[str, str]:
        spoken = self.context.settings.features.text.arch  # a free text in the settings
        role = self.context.launch.role
        verb, _, rest = spoken.partition(":")
        if verb == f"{role}-refuses":
            raise ConfigError(rest)
        if verb == "all-fail-while" and Path(rest).exists():
            # The file says how: by a refusal, or by a death.
            if reason := Path(rest).read_text():
                raise ConfigError(reason)
            os.kill(os.getpid(), signal.SIGKILL)
        if verb == f"{role}-dies":
            os._exit(7)
        if verb == f"{role}-hangs":
            time.sleep(60)
        if role == "fuse":
            fingerprints = json.loads(rest) if verb == "bundle-wants" else {}
            return {"name": "toy", "version": "1", "fingerprints": json.dumps(fingerprints)}
        if role == "extract":
            return {
                "fingerprints": json.dumps({n: f"fp-{n}" for n in self.context.launch.extractors})
            }
        return {}

    def between_batches(self, channel: Channel[protocol.Command]) -> float | None:
        if self.swap is not None:
            channel.send_wait(protocol.BundleLoaded(*self.swap))
            self.swap = None
        return 1.0

    def run(self, tasks: Sequence[protocol.Task]) -> list[Outcome]:
        self.batch = len(tasks)
        for task in tasks:
            verb, _, rest = text_of(task).partition(":")
            if verb == "hold":
                self.hold(Path(rest))
            if verb == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if verb == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            if verb == "device-lost":
                raise DeviceLost("toy")
        return run_batch("toy", lambda some: [self.one(task) for task in some], tasks)

    def hold(self, folder: Path) -> None:
        """Say that the task has begun, and stay in it until the test lets go."""
        (folder / "held").touch()
        while not (folder / "go").exists():
            time.sleep(0.01)

    def one(self, task: protocol.Task) -> protocol.Result:
        verb, _, rest = text_of(task).partition(":")
        if verb == "sleep":
            time.sleep(float(rest))
        if verb == "bad":
            raise ConfigError(rest)
        if verb == "swap":
            self.swap = ("toy", rest)
        if isinstance(task, protocol.FetchTask):
            return self.fetched(verb, rest)
        if isinstance(task, protocol.DecodeTask):
            return self.decoded(task, verb)
        if isinstance(task, protocol.ExtractTask):
            return self.extracted(task, verb, rest)
        assert isinstance(task, protocol.FuseTask)
        return Tags(rest, "toy", "1", (), np.zeros(1))

    def fetched(self, verb: str, rest: str) -> protocol.Result:
        if verb == "elsewhere":
            return protocol.Fetched("/etc/passwd", 1)
        if verb == "above":
            return protocol.Fetched(f"{self.context.launch.spool}/..", 1)
        path = Path(self.context.launch.spool) / f"{rest}-file"
        path.write_text("x")
        return protocol.Fetched(str(path), 1)

    def decoded(self, task: protocol.DecodeTask, verb: str) -> protocol.Result:
        if verb == "no-parts":
            return protocol.Decoded(5)  # type: ignore[arg-type]  # as a decoder that was taken over
        if verb == "empty":
            return protocol.Decoded((), {"audio": Failure("decode", "MediaError", "broken")})
        assert self.context.arena is not None
        writer = self.context.arena.writer(task.slot)
        array = writer((2, 4, 4, 3), np.dtype(np.uint8))
        array[...] = task.slot + 1
        part = protocol.Part("frames", writer.ref(array))
        if verb == "slot-of-another":
            part = protocol.Part(
                "frames", type(part.ref)((task.slot + 1) % 4, 0, (2, 4, 4, 3), "uint8")
            )
        return protocol.Decoded((part,))

    def extracted(self, task: protocol.ExtractTask, verb: str, rest: str) -> protocol.Result:
        if verb == "no-rows":
            return protocol.Extracted(np.zeros((), np.float16))
        if task.refs:
            assert self.context.arena is not None
            view = self.context.arena.view(task.refs[0])
            return protocol.Extracted(np.full((1, 2), view.mean(), np.float16))
        say = {
            "env": lambda: os.environ.get(rest, "-"),
            "pid": lambda: str(os.getpid()),
            "batch": lambda: str(self.batch),
            "modules": lambda: str(sorted(set(sys.modules) & set(rest.split(",")))),
            "big": lambda: "x" * int(rest),
        }
        return protocol.Extracted(text=say.get(verb, lambda: task.text)())


class Working(Toy):
    """Takes `TASK_CPU_S` of CPU for each task."""

    def one(self, task: protocol.Task) -> protocol.Result:
        end = time.process_time() + TASK_CPU_S
        while time.process_time() < end:
            pass
        return super().one(task)


def run(context: Context) -> None:
    serve(context, Toy(context))


def run_working(context: Context) -> None:
    serve(context, Working(context))


def run_lingering(context: Context) -> None:
    """Like `run`, and leaves behind what takes the interpreter long to take apart."""
    atexit.register(time.sleep, 20)
    run(context)
