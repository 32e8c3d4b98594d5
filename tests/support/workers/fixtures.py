"""Fixtures of the workers: a web server, both ends of a channel, a pool of toys, or no workers."""

import socket
from collections.abc import Iterator
from typing import TypeAlias

import pytest

from tests.support.workers.driving import Driver, memory_files, toy_settings
from tests.support.workers.web import Web, web_server
from workers import runner
from workers.local import LocalPool
from workers.pool.channel import Channel, to_king, to_worker
from workers.protocol import Command, Reply

Ends: TypeAlias = tuple[Channel[Reply], Channel[Command]]


@pytest.fixture(scope="module")
def web() -> Iterator[Web]:
    """A web server of one file's tests."""
    with web_server() as server:
        yield server


@pytest.fixture
def ends() -> Iterator[Ends]:
    """The King's end and the worker's."""
    ours, theirs = socket.socketpair()
    king, worker = Channel(ours, to_king), Channel(theirs, to_worker)
    yield king, worker
    king.close()
    worker.close()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    """One pool for all tests of a file that leave it as they found it: deaths included."""
    driver = Driver(toy_settings(tmp_path_factory.mktemp("spool"))).start()
    try:
        yield driver
    finally:
        driver.stop()
        assert memory_files() == 0


@pytest.fixture
def driver(shared: Driver) -> Iterator[Driver]:
    """The shared pool, whole again; after the test it must hold nothing."""
    shared.ready()
    yield shared
    shared.holds_nothing()


@pytest.fixture(scope="module")
def models_in_this_process() -> Iterator[None]:
    """Run scripts without workers, whose models take long to load."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "ProcessPool", LocalPool)
        yield
