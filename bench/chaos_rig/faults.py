"""The faults: what is done, and by what the recovery from it is seen."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeAlias

import psutil
import redis
from fuzzing.messages import bad_messages

from chaos_rig.posts import FIRST
from chaos_rig.site import BrokerName, Site
from common.errors import PublishRefused
from tests.support.king.odd_properties import ODD_PROPERTIES, send
from tests.support.services import RabbitMQServer, RedisServer, Server

# A killed King loads torch again: seconds on a quiet machine, 87 s were seen on a crowded one.
RECOVERY_LIMIT_S = 240.0


@dataclass(frozen=True, slots=True)
class Hurt:
    """A fault that has just ended.

    Attributes:
        ended: Unix time.
        worker: The worker whose return is waited for; None where a post shows the recovery: one
            that was published after the fault's end must have been tagged.
        note: For the table.
    """

    ended: float
    worker: str | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Wound:
    """A fault and what came of it.

    Attributes:
        posts: How many posts had ended when it began.
        recovery_s: From the fault's end; None when it was not seen within the limit.
    """

    kind: str
    posts: int
    lasted_s: float
    recovery_s: float | None
    note: str


Inject: TypeAlias = Callable[[Site, random.Random], Hurt]


def _kill(role: str) -> Inject:
    def inject(site: Site, _rng: random.Random) -> Hurt:
        name, pid = site.worker(role)
        os.kill(pid, signal.SIGKILL)
        return Hurt(time.time(), worker=name)

    return inject


def _stop(role: str) -> Inject:
    """Send SIGSTOP, and never SIGCONT: the deadline of its task must find it."""

    def inject(site: Site, _rng: random.Random) -> Hurt:
        name, pid = site.worker(role)
        os.kill(pid, signal.SIGSTOP)
        return Hurt(time.time(), worker=name)

    return inject


def _kill_king(site: Site, _rng: random.Random) -> Hurt:
    site.kill_king()
    return Hurt(time.time())


def _kill_king_at_a_write(site: Site, _rng: random.Random) -> Hurt:
    """Kill the King once a result is in the database, before its message can be acknowledged."""
    before, end = site.audit.rows, time.monotonic() + 20
    while site.audit.rows == before and time.monotonic() < end:
        time.sleep(0.0005)
    site.kill_king()
    return Hurt(time.time(), note="" if time.monotonic() < end else "no write was seen")


def _stop_king(site: Site, _rng: random.Random) -> Hurt:
    """Send SIGSTOP, and never SIGCONT: the watchdog must find it."""
    pid = site.king_pid
    if pid is not None:
        os.kill(pid, signal.SIGSTOP)
    return Hurt(time.time())


def _terminate_king(site: Site, _rng: random.Random) -> Hurt:
    """Send SIGTERM under load; then start it again."""
    status, seconds = site.stop_king()
    folders = len(list(site.direct.fetch.spool.glob("king-*")))
    site.start_king()
    wrong = [f"exit {status}"] if status else []
    wrong += [f"{folders} spool folders"] if folders else []
    # The drain limit is for the posts; the flush of what was given back and the joins follow it.
    if seconds > site.direct.king.drain_timeout_s:
        wrong.append("past the drain limit")
    note = f"exit {status} after {seconds:.1f} s"
    return Hurt(time.time(), note=f"FAILED: {', '.join(wrong)}; {note}" if wrong else note)


def _broker(site: Site) -> Server:
    return site.broker


def _database(site: Site) -> Server:
    return site.database


def _restart(server: Callable[[Site], Server], *, kill: bool) -> Inject:
    def inject(site: Site, rng: random.Random) -> Hurt:
        target = server(site)
        if kill:
            target.kill()
        else:
            target.stop()
        time.sleep(rng.uniform(0.5, 3.0))
        target.start()
        return Hurt(time.time())

    return inject


def _kill_king_without_database(site: Site, rng: random.Random) -> Hurt:
    """Kill the King while the database is away; its successor finds neither."""
    site.database.kill()
    time.sleep(rng.uniform(0.5, 1.5))
    site.kill_king()
    time.sleep(rng.uniform(1.0, 3.0))
    site.database.start()
    return Hurt(time.time())


def _cut(site: Site, _rng: random.Random) -> Hurt:
    site.broker_proxy.cut()
    site.database_proxy.cut()
    return Hurt(time.time())


def _cut_often(site: Site, rng: random.Random) -> Hurt:
    for _ in range(5):
        proxy = rng.choice((site.broker_proxy, site.database_proxy))
        proxy.cut()
        time.sleep(rng.uniform(0.05, 0.4))
    return Hurt(time.time())


def _blackhole(which: str, *, replies_only: bool = False) -> Inject:
    def inject(site: Site, _rng: random.Random) -> Hurt:
        proxy = site.broker_proxy if which == "broker" else site.database_proxy
        proxy.blackhole(replies_only=replies_only)
        return Hurt(time.time())

    return inject


def _fill_spool(site: Site, _rng: random.Random) -> Hurt:
    """Let no download be written: a limit on the size of files stands for the full disk."""
    worker = psutil.Process(site.worker("fetch")[1])
    limits = worker.rlimit(psutil.RLIMIT_FSIZE)
    worker.rlimit(psutil.RLIMIT_FSIZE, (0, limits[1]))
    time.sleep(1.5)
    worker.rlimit(psutil.RLIMIT_FSIZE, limits)
    return Hurt(time.time())


def _remove_spool(site: Site, _rng: random.Random) -> Hurt:
    """Clean up a folder, as a careless cron job does, and do not restore it."""
    shutil.rmtree(site.direct.fetch.spool)
    return Hurt(time.time())


# Codes of a server in trouble, and one that nobody knows: throttled, over a quota, interrupted, a
# query plan killed, no right in a failover, unknown.
_CODES = (16500, 8000, 11601, 249, 175, 13, 8, 99999)


def _refuse_writes(site: Site, rng: random.Random) -> Hurt:
    """Refuse writes of results and of jobs for a while; none of it may cost a post."""
    settings = site.direct.store
    end = time.monotonic() + 10
    for code in rng.sample(_CODES, 4):
        collection = rng.choice((settings.collection, settings.jobs_collection))
        site.database_proxy.refuse_writes(collection, code, times=2)
        while site.database_proxy.refusals_left and time.monotonic() < end:
            time.sleep(0.01)
    unseen = site.database_proxy.refusals_left
    site.database_proxy.refuse_writes("", 0, times=0)
    return Hurt(time.time(), note=f"{unseen} writes were not seen" if unseen else "")


def _memory_alarm(site: Site) -> AbstractContextManager[None]:
    assert isinstance(site.broker, RabbitMQServer)
    return site.broker.memory_alarm()


def _full_queue(site: Site) -> AbstractContextManager[None]:
    assert isinstance(site.broker, RabbitMQServer)
    return site.broker.full_queue(site.direct.broker.queue)


def _out_of_memory(site: Site) -> AbstractContextManager[None]:
    assert isinstance(site.broker, RedisServer)
    return site.broker.out_of_memory()


def _full(make_full: Callable[[Site], AbstractContextManager[None]]) -> Inject:
    """Have the broker take no messages; what it holds must still be worked off."""

    def inject(site: Site, _rng: random.Random) -> Hurt:
        refused = False
        with make_full(site):
            end = time.monotonic() + 20  # not before: rabbitmqctl may take as long
            while not refused and time.monotonic() < end:
                try:
                    site.publish([FIRST] * 20)
                except PublishRefused:
                    refused = True
            time.sleep(1.5)
        return Hurt(time.time(), note="" if refused else "FAILED: no message was refused")

    return inject


def _poison(site: Site, _rng: random.Random) -> Hurt:
    """Send messages that no parser can read; each must become a dead letter, alone."""
    queue = site.direct.broker.queue
    if isinstance(site.broker, RabbitMQServer):
        send(site.broker, queue, ODD_PROPERTIES)
        site.poison |= set(ODD_PROPERTIES)
    else:
        with redis.Redis(port=site.broker.port) as client:
            for message in bad_messages(seed=1, count=60):
                client.lpush(queue, message.item)
                site.poison.add(message.key)
    return Hurt(time.time())


def _step_clock(site: Site, _rng: random.Random) -> Hurt:
    """Step the clock of the King, its workers and its watchdog ahead, then far back."""
    end = time.monotonic() + 30
    for seconds in (7200, -10_800):
        site.clock.step(seconds)
        while time.monotonic() < end:
            ahead_s = site.health.get("updated_at", 0) - time.time()
            if abs(ahead_s - site.clock.ahead_s) < 600:
                break
            time.sleep(0.1)
        time.sleep(1.5)
    return Hurt(time.time(), note="" if time.monotonic() < end else "FAILED: no King saw it")


FAULTS: Mapping[str, Inject] = MappingProxyType(
    {
        "kill fetch": _kill("fetch"),
        "kill decode": _kill("decode"),
        "kill extract": _kill("extract"),
        "kill fuse": _kill("fuse"),
        "stop decode": _stop("decode"),
        "stop extract": _stop("extract"),
        "stop fuse": _stop("fuse"),
        "stop king": _stop_king,
        "kill king": _kill_king,
        "kill king at a write": _kill_king_at_a_write,
        "kill king, database down": _kill_king_without_database,
        "SIGTERM king": _terminate_king,
        "broker killed": _restart(_broker, kill=True),
        "broker restarted": _restart(_broker, kill=False),
        "database killed": _restart(_database, kill=True),
        "database restarted": _restart(_database, kill=False),
        "database refuses writes": _refuse_writes,
        "cut both": _cut,
        "cut often": _cut_often,
        "blackhole broker": _blackhole("broker"),
        "blackhole database": _blackhole("database"),
        "replies of broker lost": _blackhole("broker", replies_only=True),
        "replies of database lost": _blackhole("database", replies_only=True),
        "spool full": _fill_spool,
        "spool removed": _remove_spool,
        "memory alarm": _full(_memory_alarm),
        "queue full": _full(_full_queue),
        "maxmemory": _full(_out_of_memory),
        "poison messages": _poison,
        "clock steps": _step_clock,
    }
)

_OF_ONE_BROKER: Mapping[str, BrokerName] = MappingProxyType(
    {"memory alarm": "rabbitmq", "queue full": "rabbitmq", "maxmemory": "redis"}
)
_AGAIN = ("kill decode", "kill extract", "kill fuse", "kill king at a write")

SHORT: Mapping[BrokerName, tuple[str, ...]] = MappingProxyType(
    {
        "rabbitmq": (
            "poison messages",
            "replies of database lost",
            "memory alarm",
            "queue full",
            "database refuses writes",
        ),
        "redis": (
            *("poison messages", "kill decode", "maxmemory", "spool full", "clock steps"),
            *("blackhole broker", "broker killed", "kill king at a write"),
        ),
    }
)
"""For a run of seconds: every kind of fault, but one death of a King, which loads torch again."""


def schedule(broker: BrokerName, seed: int) -> list[str]:
    """Return all faults of a broker once and the commonest again, in the order of the run."""
    order = [k for k in (*FAULTS, *_AGAIN) if _OF_ONE_BROKER.get(k, broker) == broker]
    random.Random(seed).shuffle(order)
    return order


def recovery(site: Site, hurt: Hurt, probes: Iterable[str]) -> float | None:
    """Wait for it; seconds from the fault's end, or None when it was not seen in time.

    Args:
        site: The installation.
        hurt: The fault.
        probes: Posts that were published after its end, and not before.
    """
    end = time.monotonic() + RECOVERY_LIMIT_S
    while time.monotonic() < end:
        if hurt.worker is None:
            at = site.journal.first_tagged(probes)
        else:
            at = site.journal.ready_since(hurt.worker, hurt.ended)
        if at is not None:
            return max(0.0, at - hurt.ended)  # the King may have found the post by itself
        time.sleep(0.05)
    return None
