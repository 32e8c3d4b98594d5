"""The Ray engine: actors of Ray that run the local engine, on one machine or many.

Every node must see the code, the settings' files, the media and the feature root under the same
paths (a shared file system): the actors write the feature files themselves, and only results come
back. An actor has one chunk of posts at a time; when it dies, its posts are sent again one by one,
so that a post that kills its actor is found.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from common.errors import ConfigError, TaggingError
from common.logs import configure_logs
from common.post import Failure
from common.processes import python_path
from corpus.extract.local import LocalEngine
from corpus.extract.options import Options
from corpus.extract.work import Entry, FailedPart, Result, Work
from corpus.runs import Interrupt

# Posts of a chunk: the first are small, so that few posts spread over all actors; later ones grow,
# so that the batches of an extractor seldom run empty at the end of a chunk.
_FIRST, _LARGEST, _GROW_EVERY = 16, 512, 64
_POLL_S = 0.5  # how late a signal is noticed
_STORE_BYTES = 200 * 1024 * 1024  # only posts and results pass through Ray's object store
_REACH_S = 5.0


class ExtractActor:
    """The local engine in a process of Ray; its methods run in that process."""

    def __init__(self, options: Options, where: str) -> None:
        """Take the options, and the working folder that relative paths in them start from."""
        import ray

        with contextlib.suppress(OSError):
            os.chdir(where)
        configure_logs(options.settings.log.format, options.settings.log.level)
        node = str(ray.get_runtime_context().get_node_id())[:8]
        self._engine = LocalEngine(options, Interrupt(), node)

    def run(self, works: list[Work]) -> list[Result]:
        """Return the results of some posts, in any order; the first call loads the models."""
        self._engine.open()
        return list(self._engine.run(works))


class RayEngine:
    """The engine with actors of Ray; `open` it, `run` entries through it, `close` it."""

    def __init__(self, options: Options, interrupt: Interrupt, actor: type = ExtractActor) -> None:
        self._options, self._interrupt, self._actor = options, interrupt, actor
        self._actors: list[Any] = []

    def open(self) -> None:
        """Join the cluster, or start one on this machine."""
        ray = _import_ray()
        self._join(ray)
        self._start_actors(ray)

    def close(self) -> None:
        """Leave the cluster with all actors, or end it where it is ours."""
        if self._actors:
            import ray

            ray.shutdown()

    def run(self, entries: Iterable[Entry]) -> Iterator[Result]:
        """Yield results in the order in which they come."""
        import ray

        settled: deque[Result] = deque()
        chunks = _chunks(entries, settled)
        again: deque[list[Work]] = deque()  # of one post each: their actor has died
        suspects: set[int] = set()
        # The first chunk is empty: who answers it has loaded the models. An actor for which the
        # cluster has no room yet never answers, and gets no posts.
        waiting: dict[Any, tuple[Any, list[Work]]] = {
            actor.run.remote([]): (actor, []) for actor in self._actors
        }
        idle: list[Any] = []
        while not self._interrupt.asked:
            while idle and (chunk := again.popleft() if again else next(chunks, None)):
                actor = idle.pop()
                waiting[actor.run.remote(chunk)] = (actor, chunk)
            while settled:
                yield settled.popleft()
            if idle and not any(chunk for _, chunk in waiting.values()):
                return  # there is no more to send, and no answer to wait for
            for ref in ray.wait(list(waiting), timeout=_POLL_S)[0]:
                actor, chunk = waiting.pop(ref)
                try:
                    yield from ray.get(ref)
                    idle.append(actor)
                except ray.exceptions.RayTaskError as error:
                    raise error.cause from error
                except ray.exceptions.RayActorError:
                    if len(chunk) == 1 and chunk[0].index in suspects:
                        yield _given_up(chunk[0])
                    else:
                        suspects.update(work.index for work in chunk)
                        again.extend([work] for work in chunk)
                    waiting[actor.run.remote([])] = (actor, [])  # Ray starts it again
                except ray.exceptions.RayError as error:
                    last = str(error).strip().splitlines()
                    raise TaggingError(f"Ray: {last[-1] if last else error!r}") from error

    def _join(self, ray: Any) -> None:
        address = self._options.line.address
        options: dict[str, Any] = {"address": address}
        if address is None:
            options = {
                "include_dashboard": False,
                "object_store_memory": _STORE_BYTES,
                "_node_ip_address": "127.0.0.1",
            }
        environment = {"PYTHONPATH": python_path(os.environ), "RAY_USAGE_STATS_ENABLED": "0"}
        try:
            if address is not None:
                _check_reachable(address)
            ray.init(
                **options,
                runtime_env={"env_vars": environment},
                logging_level=logging.ERROR,
                log_to_driver=False,
            )
        except (OSError, ValueError, RuntimeError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ConfigError(f"--address {address or 'local'}: {reason}") from error

    def _start_actors(self, ray: Any) -> None:
        """Start the actors, each with its share of a node."""
        options = self._options
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        on_gpus = any(device != "cpu" for device in options.devices)
        gpus = int(sum(node.get("GPU", 0) for node in nodes))
        if on_gpus and not gpus:
            raise ConfigError("--devices: the cluster has no GPU; use --devices cpu")
        cpus = [node.get("CPU", 0) for node in nodes]
        actor = ray.remote(self._actor).options(
            num_cpus=max(1.0, min(options.settings.decode.processes, max(cpus, default=0))),
            num_gpus=1.0 if on_gpus else 0.0,
            max_restarts=-1,
        )
        count = options.workers or (gpus if on_gpus else max(1, int(sum(cpus) // 2)))
        self._actors = [actor.remote(options, str(Path.cwd())) for _ in range(count)]


def _chunks(entries: Iterable[Entry], settled: deque[Result]) -> Iterator[list[Work]]:
    """Yield the work in chunks; put aside what needs none."""
    chunk: list[Work] = []
    count = 0
    for entry in entries:
        if isinstance(entry, Result):
            settled.append(entry)
            continue
        chunk.append(entry)
        if len(chunk) >= min(_LARGEST, _FIRST * (1 + count // _GROW_EVERY)):
            yield chunk
            chunk, count = [], count + 1
    if chunk:
        yield chunk


def _given_up(work: Work) -> Result:
    failure = Failure("extract", "WorkerDied", "its actor died of it twice", retryable=True)
    part = FailedPart(work.post.post_id, None, failure)
    return Result(work.index, work.post.post_id, "failed", failures=(part,))


def _check_reachable(address: str) -> None:
    """Fail at once where nothing listens; Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=_REACH_S).close()


def _import_ray() -> Any:
    # Read as ray is imported: nothing of a run is told to anybody.
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            f"--engine ray needs Ray ({error.name or error} is missing): pip install '.[ray]'"
        ) from error
    return ray
