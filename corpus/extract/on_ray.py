"""The Ray engine: actors of Ray Data, each with the extractors loaded, on one machine or many.

Every node must see the code, the settings' files, the media and the feature root under the same
paths (a shared file system): the actors write the feature files themselves, and only a line for
each post comes back.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from common.errors import ConfigError, TaggingError
from corpus.extract.actor import OUT, ExtractActor, Order, trouble_of
from corpus.extract.options import Options
from corpus.extract.parts import PartFolder
from corpus.extract.values import WANTED, Entry, Result, Work
from corpus.runs import Interrupt

_STORE_BYTES = 200 * 1024 * 1024  # only lines of text pass through Ray's object store
_REACH_S = 5.0
_FILES_IN_FLIGHT = 2  # one runs, one waits: more would starve actors that come late
_CODE = Path(__file__).resolve().parents[2]


class RayEngine:
    """Extracts with actors of Ray; `open` it, `run` entries through it, `close` it."""

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
        """Results in the order in which they come.

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
        """How many actors, and what each of them takes of its node."""
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
            wanted=WANTED[options.kind],
            folder=str(self._parts.folder),
            where=str(Path.cwd()),
            force=options.force,
            retry_failed=options.retry_failed,
        )


def _check_reachable(address: str) -> None:
    """Ray itself would try for minutes.

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
