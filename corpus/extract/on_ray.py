"""The Ray engine: actors of Ray Data, each with the extractors loaded, on one machine or many.

Every node must see the code, the settings' files, the media and the feature root under the same
paths (a shared file system): work goes out in files, the actors write the feature files themselves,
and only a line for each post comes back. Each actor runs the local engine, whose decoders and
extractors are processes of their own, so that a file that kills one costs its post. A post that
kills the actor itself is found by the tries that the actors note.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import shutil
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import ConfigError, TaggingError, one_line
from common.files import lock_file, locked
from common.logs import configure_logs
from common.post import Failure, Modality
from config.settings import Settings
from corpus.extract.local import LocalEngine
from corpus.extract.options import Options
from corpus.extract.work import MODALITIES_OF, Entry, FailedPart, Result, Work
from corpus.runs import Interrupt

_PREFIX, _MAKING = ".extract-", ".making-"
_LOCK = "lock"
_MADE_WITHIN_S = 3600.0
"""A folder without a lock may be one that is made just now; one so old was left by a kill."""
_FIRST, _LARGEST, _GROW_EVERY = 16, 512, 64


class PartFolder:
    """Files of a few posts each, in a hidden folder of the feature root.

    Its lock is freed by the kernel when this run ends, however it ends; the next run removes what
    has no living owner. The actors note their tries here: see `tries`.

    Attributes:
        folder: The folder; every node sees it under this path.
    """

    def __init__(self, root: Path) -> None:
        root.mkdir(parents=True, exist_ok=True)
        _remove_dead(root)
        name = secrets.token_hex(6)
        # Locked before it has its name, so that nobody takes it for the folder of a dead run.
        made = root / f"{_MAKING}{name}"
        made.mkdir()
        self._lock = lock_file(made / _LOCK)
        self.folder = root / f"{_PREFIX}{name}"
        made.rename(self.folder)

    def write(self, works: Iterable[Work]) -> list[str]:
        """Write the work and return the files; they grow, so that few posts spread too."""
        paths: list[str] = []
        lines: list[str] = []
        for work in works:
            lines.append(work.as_json())
            if len(lines) >= min(_LARGEST, _FIRST * (1 + len(paths) // _GROW_EVERY)):
                paths.append(self._part(len(paths), lines))
                lines = []
        if lines:
            paths.append(self._part(len(paths), lines))
        return paths

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.release()

    def _part(self, number: int, lines: list[str]) -> str:
        path = self.folder / f"part-{number:06}.txt"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return str(path)


def read_part(path: str) -> list[Work]:
    with Path(path).open(encoding="utf-8") as file:
        return [Work.of_json(line) for line in file]


def tries(folder: Path, name: str) -> int:
    """Note that something begins; return how often it has begun, this time included.

    A death cannot be told by who died of it: it is read off the tries that were left without end.
    """
    with (folder / f"tries-{name}").open("ab") as file:
        file.write(b".")
        return file.tell()


def ended(folder: Path, name: str) -> None:
    """Note that something has ended well: its tries are forgotten."""
    (folder / f"tries-{name}").unlink(missing_ok=True)


def _remove_dead(root: Path) -> None:
    made_after = time.time() - _MADE_WITHIN_S
    for folder in (*root.glob(f"{_PREFIX}*"), *root.glob(f"{_MAKING}*")):
        with contextlib.suppress(OSError):
            if folder.is_symlink() or not folder.is_dir():
                continue
            if folder.name.startswith(_MAKING) and folder.stat().st_mtime > made_after:
                continue
            with locked(folder / _LOCK):
                shutil.rmtree(folder, ignore_errors=True)


IN, OUT = "item", "result"
"""Columns of the batches: a file of work; a `Result`, or why the run cannot go on, as JSON."""


@dataclass(frozen=True)
class Order:
    """Constructor arguments of an actor; picklable.

    Attributes:
        settings: As JSON.
        root: Of the feature files; every node sees it under this path.
        folder: Of the run's `PartFolder`.
        where: Working folder, which relative paths in the settings start from.
    """

    settings: str
    root: str
    modalities: frozenset[Modality]
    folder: str
    where: str
    force: bool
    retry_failed: bool


class ExtractActor:
    """An actor: a callable for `ray.data.Dataset.map_batches`."""

    def __init__(self, order: Order, node: str | None = None) -> None:
        """Load the models; the first batch reports an error, as Ray would try again for ever.

        Args:
            order: What to do.
            node: Name of the machine; None asks Ray.
        """
        self._folder = Path(order.folder)
        self._node = node if node is not None else _node()
        self._engine: LocalEngine | None = None
        self._trouble: tuple[str, str] | None = None
        with contextlib.suppress(OSError):
            os.chdir(order.where)
        settings = Settings.model_validate_json(order.settings)
        configure_logs(settings.log.format, settings.log.level)
        engine = LocalEngine(
            settings,
            Path(order.root),
            order.modalities,
            force=order.force,
            retry_failed=order.retry_failed,
            node=self._node,
        )
        try:
            engine.open()
            self._engine = engine
        except TaggingError as error:
            self._trouble = _why(error)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return the results of files of work, in any order."""
        if self._trouble is None:
            try:
                results = [result for path in batch[IN].tolist() for result in self._run(path)]
                return _column([result.as_json() for result in results])
            except (TaggingError, OSError) as error:
                self._trouble = _why(error)
        return _column([json.dumps({"trouble": self._trouble})])

    def _run(self, path: str) -> list[Result]:
        if self._engine is None:
            raise RuntimeError("no engine")
        works = read_part(path)
        if tries(self._folder, Path(path).name) == 1:
            return list(self._engine.run(works))
        # An actor has died of this file, or beside it: one at a time shows of which post.
        results: list[Result] = []
        for work in works:
            if tries(self._folder, f"post-{work.index}") == 1:
                results += self._engine.run([work])
                ended(self._folder, f"post-{work.index}")
            else:
                results.append(self._given_up(work))
        return results

    def _given_up(self, work: Work) -> Result:
        failure = Failure("extract", "WorkerDied", "its actor died of it twice", retryable=True)
        part = FailedPart(work.post.post_id, None, failure)
        return Result(work.index, work.post.post_id, "failed", {}, (part,), self._node)


def trouble_of(line: str) -> TaggingError | None:
    """Return the error of a row that ends the run; None for a result."""
    content = json.loads(line)
    if "trouble" not in content:
        return None
    kind, text = content["trouble"]
    return ConfigError(text) if kind == ConfigError.__name__ else TaggingError(text)


def _column(lines: Sequence[str]) -> dict[str, Any]:
    return {OUT: np.array(list(lines), dtype=object)}


def _why(error: TaggingError | OSError) -> tuple[str, str]:
    return type(error).__name__, one_line(error)


def _node() -> str:
    import ray

    return str(ray.get_runtime_context().get_node_id())[:8]


_STORE_BYTES = 200 * 1024 * 1024  # only lines of text pass through Ray's object store
_REACH_S = 5.0
_FILES_IN_FLIGHT = 2  # one runs, one waits: more would starve actors that come late
_CODE = Path(__file__).resolve().parents[2]


class RayEngine:
    """The engine with actors of Ray; `open` it, `run` entries through it, `close` it."""

    def __init__(self, options: Options, interrupt: Interrupt) -> None:
        self._options, self._interrupt = options, interrupt
        self._ours = False
        self._parts: PartFolder | None = None
        self._actors = 0
        self._cpus = self._gpus = 0.0

    def open(self) -> None:
        """Join the cluster, or start one on this machine.

        Raises:
            ConfigError: Ray is not installed, there is no such cluster, or it has no such devices.
        """
        ray = _import_ray()
        if not ray.is_initialized():
            self._ours = True
            self._join(ray)
        self._fit(ray)
        self._parts = PartFolder(self._options.features)

    def close(self) -> None:
        """Leave the cluster, or end it where it is ours; remove the work files."""
        if self._ours:
            import ray

            ray.shutdown()
            self._ours = False
        if self._parts is not None:
            self._parts.close()
            self._parts = None

    def run(self, entries: Iterable[Entry]) -> Iterator[Result]:
        """Yield results in the order in which they come.

        Raises:
            ConfigError: The extractors cannot be loaded.
            TaggingError: Ray gives up, or features cannot be written.
        """
        if self._parts is None:
            raise RuntimeError("open() comes first")
        settled: list[Result] = []
        paths = self._parts.write(_work_of(entries, settled))
        yield from settled
        if paths and not self._interrupt.asked:
            yield from self._results(paths)

    def _join(self, ray: Any) -> None:
        environment = {"PYTHONPATH": _python_path(), "RAY_USAGE_STATS_ENABLED": "0"}
        common: dict[str, Any] = {
            "runtime_env": {"env_vars": environment},
            "logging_level": logging.ERROR,
            "log_to_driver": False,
        }
        address = self._options.address
        try:
            if address is not None:
                _check_reachable(address)
                ray.init(address=address, **common)
                return
            ray.init(
                include_dashboard=False,
                object_store_memory=_STORE_BYTES,
                _node_ip_address="127.0.0.1",
                **common,
            )
        except (OSError, ValueError, RuntimeError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ConfigError(f"--address {address or 'local'}: {reason}") from error

    def _fit(self, ray: Any) -> None:
        """Choose the number of actors, and the share of its node that each takes."""
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        on_gpus = any(device != "cpu" for device in self._options.devices)
        gpus = int(sum(node.get("GPU", 0) for node in nodes))
        if on_gpus and not gpus:
            raise ConfigError("--devices: the cluster has no GPU; use --devices cpu")
        most = max((node.get("CPU", 0) for node in nodes), default=0)
        self._cpus = max(1.0, min(self._options.settings.decode.processes, most))
        self._gpus = 1.0 if on_gpus else 0.0
        cpus = sum(node.get("CPU", 0) for node in nodes)
        self._actors = self._options.workers or (gpus if on_gpus else max(1, int(cpus // 2)))

    def _results(self, paths: list[str]) -> Iterator[Result]:
        import ray
        from ray.data import ActorPoolStrategy

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        files: Any = ray.data.from_items(paths, override_num_blocks=len(paths))
        results = files.map_batches(
            ExtractActor,
            fn_constructor_args=(self._order(),),
            batch_size=1,
            batch_format="numpy",
            compute=ActorPoolStrategy(
                size=self._actors, max_tasks_in_flight_per_actor=_FILES_IN_FLIGHT
            ),
            num_cpus=self._cpus,
            num_gpus=self._gpus,
        )
        try:
            for row in results.iter_rows():
                trouble = trouble_of(row[OUT])
                if trouble is not None:
                    raise trouble
                yield Result.of_json(row[OUT])
                if self._interrupt.asked:
                    return
        except ray.exceptions.RayError as error:
            last = str(error).strip().splitlines()
            raise TaggingError(f"Ray: {last[-1] if last else type(error).__name__}") from error

    def _order(self) -> Order:
        options = self._options
        if self._parts is None:
            raise RuntimeError("open() comes first")
        return Order(
            settings=options.settings.model_dump_json(),
            root=str(options.features),
            modalities=MODALITIES_OF[options.kind],
            folder=str(self._parts.folder),
            where=str(Path.cwd()),
            force=options.force,
            retry_failed=options.retry_failed,
        )


def _check_reachable(address: str) -> None:
    """Fail at once where nothing listens; Ray itself would try for minutes.

    Raises:
        OSError: Nothing listens there.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=_REACH_S).close()


def _work_of(entries: Iterable[Entry], settled: list[Result]) -> Iterator[Work]:
    for entry in entries:
        if isinstance(entry, Work):
            yield entry
        else:
            settled.append(entry)


def _import_ray() -> Any:
    # Read as ray is imported: nothing of a run is told to anybody.
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ConfigError(
            f"--engine ray needs Ray ({error.name or error} is missing): "
            "pip install 'insighttag[ray]'"
        ) from error
    return ray


def _python_path() -> str:
    others = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    return os.pathsep.join(dict.fromkeys([str(_CODE), *others]))
