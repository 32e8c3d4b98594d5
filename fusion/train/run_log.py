"""The log of a run: JSON lines for scripts, and TensorBoard for people."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from common.errors import ConfigError, told

_SCALARS = ("step", "epoch", "valid")
_PLACES = frozenset({"epoch", "step", "posts"})


class RunLog:
    """JSON lines, flushed line by line, and TensorBoard's events next to them.

    `write` alone makes JSON lines. After `begin` the numbers of the events ``step``, ``epoch`` and
    ``valid`` become TensorBoard's scalars too, all over the same axis: steps since the first one.
    It is disabled in the processes of a distributed run that do not speak.
    """

    def __init__(self, path: Path, *, enabled: bool, tensorboard: bool = False) -> None:
        self.path, self._enabled = path, enabled
        self._tensorboard = enabled and tensorboard
        self._writer: Any = None
        self._steps = 1

    def begin(self, steps: int, done: int = 0) -> None:
        """Start with ``steps`` an epoch, or go on after a resume with ``done`` over all epochs.

        Points of steps that will be repeated disappear.
        """
        self.close()
        self._steps = steps
        self.write("begin", steps=steps, done=done)
        if not self._tensorboard:
            return
        from torch.utils.tensorboard import SummaryWriter

        folder = self.path.parent / "tensorboard"
        with told(f"{folder}: cannot be written"):
            # Events of the same folder with this step or a later one are hidden by TensorBoard.
            self._writer = SummaryWriter(
                str(folder), purge_step=done + 1 if done else 0, flush_secs=10
            )

    def write(self, event: str, **values: Any) -> None:
        """Append one line; numbers of a step or an epoch go to TensorBoard as well."""
        if not self._enabled:
            return
        line = json.dumps({"event": event, "time": round(time.time(), 3), **values})
        with told(f"{self.path}: the log cannot be written"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(f"{line}\n")
        if self._writer is not None and event in _SCALARS and "epoch" in values:
            self._scalars(event, values)

    def curves(
        self, targets: npt.NDArray[Any], scores: npt.NDArray[Any], per_tag: Iterable[float], at: int
    ) -> None:
        """Give TensorBoard an epoch's precision-recall curve of all decisions and the tags' APs.

        Targets and scores are ``(posts, classes)``.
        """
        if self._writer is None:
            return
        step = at * self._steps
        self._writer.add_pr_curve("valid/all_tags", targets.ravel(), scores.ravel(), step)
        precisions = np.array(list(per_tag))
        if len(precisions):
            self._writer.add_histogram("valid/ap_of_tags", precisions, step)
        self._writer.flush()

    def close(self) -> None:
        """Push what TensorBoard holds to its file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _scalars(self, event: str, values: dict[str, Any]) -> None:
        epoch = int(values["epoch"])
        step = (epoch - 1) * self._steps + int(values.get("step", self._steps))
        for key, value in values.items():
            if key not in _PLACES and isinstance(value, (int, float)):
                self._writer.add_scalar(f"{event}/{key}", value, step)
        if event != "step":
            self._writer.flush()


def read_run(path: Path) -> list[dict[str, Any]]:
    """Return the events of the latest run in a log; steps repeated by a resumed run count once.

    A line that was cut off by a kill is left out; where there is no log, there are no events.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    events: list[dict[str, Any]] = []
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if event.get("event") == "begin":
            events = [e for e in events if _at(e, event) <= event["done"]] if event["done"] else []
        events.append(event)
    return events


def _at(event: dict[str, Any], begin: dict[str, Any]) -> int:
    """Return steps that were done when an event was written; 0 for those that belong to no step."""
    if event["event"] not in _SCALARS or "epoch" not in event:
        return 0
    steps = int(begin["steps"])
    return (int(event["epoch"]) - 1) * steps + int(event.get("step", steps))
