"""The HTTP server and its process tree.

    flask_server.py            gunicorn's arbiter: listens, passes signals on, restarts the server
     |- server (one process)   threads that serve requests, and the runner's thread
         |- workers            as in the daemon; they die with the runner's thread

The workers refuse a wrong configuration only after the server has been forked: the reason comes
back through a pipe, and `serve` raises it in the process that was called. Where they cannot work
for a reason that may pass (killed for their memory, a full disk), the arbiter starts a new server.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partialmethod
from typing import Any

import structlog
from flask import Flask

from common.errors import ConfigError, TaggingError, one_line
from config.settings import Settings
from web.app import create_app
from web.backend import Services
from web.reading import Uploads
from workers.runner import PostRunner

# How often the runner is asked for trouble; a restart by the supervisor waits this long.
_LOOK_S = 0.2
_REFUSED_STATUS = 4  # gunicorn ends, and starts no other worker, when its worker exits with it
_PASSING_STATUS = 1  # gunicorn starts another
# Pause before that: at half, a full disk has models loaded twice as often for nothing; at double,
# the server is away longer than what has passed.
_AGAIN_S = 5.0
_MAX_REASON_BYTES = 4096  # an atomic write to a pipe on Linux

log = structlog.get_logger()


@dataclass
class Served:
    """The application, runner and uploads of one serving process."""

    app: Flask
    runner: PostRunner
    uploads: Uploads
    closing: bool = False

    def close(self) -> None:
        """End the workers and remove the uploads."""
        self.closing = True
        self.runner.close()
        self.uploads.close()


def build(settings: Settings, services: Services) -> Served:
    """Build the application and start its workers; return before they have loaded."""
    http = settings.http
    uploads = Uploads(settings.fetch.spool, max_files=http.max_files)
    runner = PostRunner(settings, local_root=uploads.folder, limit=http.posts)
    served = Served(create_app(settings, runner, uploads, services), runner, uploads)
    runner.start(wait=False)
    threading.Thread(target=_tell_ready, args=(served,), name="ready", daemon=True).start()
    return served


def serve(settings: Settings, services: Services) -> int:
    """Serve with gunicorn until stopped; return the exit code.

    Raises ConfigError when the address is taken, or the workers refuse the configuration.
    """
    check_address(settings.http.host, settings.http.port)
    caller = os.getpid()
    reading, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        application(settings, services, lambda reason: os.write(writing, reason)).run()
    except SystemExit as end:
        if os.getpid() != caller:
            raise  # the forked server ends through here too
        refused = _read(reading)
        if refused:
            raise ConfigError(refused) from None
        return end.code if isinstance(end.code, int) else 1
    return 0


def serve_for_debugging(settings: Settings, services: Services) -> int:
    """Serve with Werkzeug's server in this process; for one person at a desk."""
    from werkzeug.serving import make_server

    http = settings.http
    check_address(http.host, http.port)
    served = build(settings, services)
    try:
        server = make_server(http.host, http.port, served.app, threaded=True)
        server.daemon_threads = True  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        while (error := served.runner.ended_by) is None:
            time.sleep(_LOOK_S)
        raise error
    except KeyboardInterrupt:
        return 0
    finally:
        served.close()


def check_address(host: str, port: int) -> None:
    """Raise ConfigError when an address cannot be listened on."""
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = infos[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"http.host, http.port: {host}:{port}: {reason}") from error


def application(settings: Settings, services: Services, refuse: Callable[[bytes], object]) -> Any:
    """Return a gunicorn application; gunicorn is imported here, so that ``--help`` is quick."""
    from gunicorn.app.base import BaseApplication
    from gunicorn.glogging import Logger

    from web.arrivals import worker_class

    class GunicornLog(Logger):  # type: ignore[misc]
        """Write gunicorn's messages to our log; requests are logged by `web.guard`."""

        def setup(self, cfg: Any) -> None:
            self.cfg = cfg

        def _say(self, level: str, msg: Any, *args: Any, **_: Any) -> None:
            getattr(log, level)("http.server", text=_text(msg, args))

        critical = error = partialmethod(_say, "error")
        warning = partialmethod(_say, "warning")
        info = partialmethod(_say, "info")
        debug = partialmethod(_say, "debug")
        exception = partialmethod(_say, "exception")

        def log(self, _level: Any, msg: Any, *args: Any, **_: Any) -> None:
            self._say("info", msg, *args)

        def access(self, resp: Any, req: Any, environ: Any, request_time: Any) -> None:
            pass

        def reopen_files(self) -> None:
            pass

        def close_on_exec(self) -> None:
            pass

    served: list[Served] = []

    def close(_arbiter: object, _worker: object) -> None:
        for each in served:
            each.close()

    class Application(BaseApplication):  # type: ignore[misc]
        def load_config(self) -> None:
            options = {**gunicorn_options(settings), "logger_class": GunicornLog}
            options["worker_exit"] = close
            options["worker_class"] = worker_class(settings.http)
            for name, value in options.items():
                if name in self.cfg.settings:  # releases differ in what they know
                    self.cfg.set(name, value)

        def load(self) -> Flask:
            # After the fork: the workers belong to this process, and die with it.
            try:
                made = build(settings, services)
            except TaggingError as error:
                _give_up(error, refuse)
            served.append(made)
            threading.Thread(target=_watch, args=(made, refuse), name="watch", daemon=True).start()
            return made.app

    return Application()


def gunicorn_options(settings: Settings) -> dict[str, Any]:
    """Return gunicorn's settings; one process, since models are large and batches form in it."""
    http = settings.http
    host = f"[{http.host}]" if ":" in http.host else http.host
    return {
        "bind": f"{host}:{http.port}",
        "workers": 1,
        "threads": http.threads,
        "worker_connections": max(1000, http.threads * 2),
        "graceful_timeout": round(http.shutdown_timeout_s + settings.workers.shutdown_timeout_s),
        "timeout": 120,
        "keepalive": 5,
        "proc_name": "insighttag: http",
        "control_socket_disable": True,
    }


def _watch(served: Served, refuse: Callable[[bytes], object]) -> None:
    """End the server when its workers cannot work, so that the arbiter knows."""
    while not served.closing:
        error = served.runner.ended_by
        if error is not None and not served.closing:
            served.close()
            _give_up(error, refuse)
        time.sleep(_LOOK_S)


def _give_up(error: TaggingError, refuse: Callable[[bytes], object]) -> None:
    # Not sys.exit: it would end this thread only, or run the caller's code in the fork.
    if isinstance(error, ConfigError):
        refuse(one_line(error).encode()[:_MAX_REASON_BYTES])
        os._exit(_REFUSED_STATUS)
    log.error("http.workers_failed", reason=one_line(error), again_s=_AGAIN_S)
    time.sleep(_AGAIN_S)
    os._exit(_PASSING_STATUS)


def _tell_ready(served: Served) -> None:
    while not served.runner.ready:
        if served.closing or served.runner.trouble is not None:
            return
        time.sleep(_LOOK_S)
    name, version = served.runner.bundle or ("", "")
    log.info("http.ready", model=name, version=version)


def _read(descriptor: int) -> str:
    try:
        return os.read(descriptor, _MAX_REASON_BYTES).decode("utf-8", "replace")
    except BlockingIOError:
        return ""


def _text(message: Any, args: tuple[Any, ...]) -> str:
    try:
        return " ".join((str(message) % args if args else str(message)).split())[:500]
    except (TypeError, ValueError):
        return str(message)[:500]
