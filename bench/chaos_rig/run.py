"""One run of faults against one broker, and what is left at its end."""

from __future__ import annotations

import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chaos_rig.faults import FAULTS, Wound, recovery
from chaos_rig.leftovers import Watch, spool_files
from chaos_rig.posts import Feeder, documents, make_media, media_server, shipments
from chaos_rig.site import BrokerName, Site
from tests.support.tiny_models import tiny_bundle, tiny_features

TIMES: dict[str, dict[str, Any]] = {
    "broker": {
        "heartbeat_s": 4,
        "socket_timeout_s": 2,
        "visibility_timeout_s": 6,
        "prefetch": 32,
    },
    "store": {
        "database": "chaos",
        "collection": "chaos_posts",
        "jobs_collection": "chaos_jobs",
        "timeout_s": 3,
    },
    "fetch": {"allow_private_hosts": True, "total_timeout_s": 10, "read_timeout_s": 5},
    "decode": {"deadline_s": 8},
    "workers": {"slots": 8, "extractors": [{"threads": 1}], "task_timeout_s": 10},
    "king": {
        "attempts": 8,  # so that no post runs out of them while the spool is full
        "backoff_s": 0.2,
        "backoff_max_s": 2,
        "post_deadline_s": 60,
        "drain_timeout_s": 20,
        "lease_s": 6,
    },
    "watchdog": {"stall_s": 12, "interval_s": 2},
}
"""The shipped times suit a production network; on loopback shorter ones prove the same sooner."""

_START_S = 600.0
_LOADED = 0.25
"""Share of a burst that has ended when the fault begins: the rest is the load."""


@dataclass(frozen=True)
class Stock:
    """Things that the runs share.

    Attributes:
        media: Folder of the media files.
        entries: The posts that they belong to.
        bundle: A fusion model for `tests.support.tiny_models.tiny_features`.
    """

    media: Path
    entries: list[dict[str, Any]]
    bundle: Path

    @classmethod
    def at(cls, folder: Path, posts: int) -> Stock:
        """Read the folder; make the media of that many posts, and the model, when it is new."""
        media, bundle = folder / "media", folder / "bundle"
        if not bundle.exists():
            make_media(media, posts, seed=7)
            tiny_bundle(bundle, tiny_features())
        return cls(media, json.loads((media / "posts.json").read_text(encoding="utf-8")), bundle)


@dataclass(frozen=True)
class Plan:
    """The faults and limits of a run.

    Attributes:
        kinds: The faults, in order.
        limit_s: Seconds after the last fault by which every post must have come to an end.
        decoders: Processes that decode.
    """

    broker: BrokerName
    posts: int
    kinds: Sequence[str]
    seed: int
    limit_s: float
    decoders: int


@dataclass
class Report:
    """The outcome of a run."""

    figures: dict[str, Any]
    wounds: list[Wound]
    broken: list[str] = field(default_factory=list)
    seconds: float = 0.0
    settled: int = 0


Progress = Callable[[int, str], None]
"""Called with the number of posts that have ended and what is going on."""


class Run:
    """Posts in, faults, posts out."""

    def __init__(self, folder: Path, stock: Stock, plan: Plan, progress: Progress) -> None:
        self._folder = folder
        self._stock = stock
        self._plan = plan
        self._tell = progress
        self._rng = random.Random(plan.seed)
        self._ids = [f"post-{i:05d}" for i in range(plan.posts)]
        self._wounds: list[Wound] = []
        self._shipped: set[str] = set()
        self._watch = Watch()

    def run(self) -> Report:
        """Run everything; nothing of it outlives this call."""
        began = time.monotonic()
        features = tiny_features().model_dump(mode="json")
        fusion = {"bundle": str(self._stock.bundle)}
        decode = {**TIMES["decode"], "processes": self._plan.decoders}
        settings = {**TIMES, "decode": decode, "features": features, "fusion": fusion}
        site = Site(self._folder, self._plan.broker, settings)
        feeder = Feeder(site.publish, every_s=0.25)
        try:
            with self._watch.looking(), media_server(self._stock.media) as base_url:
                posts = documents(self._stock.entries, len(self._ids), base_url, self._plan.seed)
                site.open(posts)
                site.start_daemon()
                feeder.start()
                self._tell(0, "starting")
                site.wait_for_phase("serving", _START_S)
                self._hurt_it(site, feeder)
                self._finish(site, feeder)
                status, _ = site.stop_king()
                report = self._judge(site, feeder)
                if status != 0:
                    report.broken.append(f"the King's last exit status was {status}")
        finally:
            feeder.stop()
            site.close()
        self._judge_leftovers(site, report)
        report.seconds = time.monotonic() - began
        return report

    def _hurt_it(self, site: Site, feeder: Feeder) -> None:
        dealt = shipments(self._ids, len(self._plan.kinds) + 1, self._rng)
        shipped = 0
        for kind, shipment in zip(self._plan.kinds, dealt, strict=False):
            self._tell(site.journal.ended, kind)
            feeder.ship(shipment.burst)
            fresh = len(self._new(shipment.burst))
            _wait_for(site, shipped + max(1, int(fresh * _LOADED)), 30)
            posts, began = site.journal.ended, time.time()
            hurt = FAULTS[kind](site, self._rng)
            feeder.trickle(shipment.trickle)
            took_s = recovery(site, hurt, shipment.probes)
            self._wounds.append(Wound(kind, posts, hurt.ended - began, took_s, hurt.note))
            feeder.hurry()
            shipped += fresh + len(self._new(shipment.trickle))
        feeder.ship([*dealt[-1].burst, *dealt[-1].trickle])

    def _new(self, ids: list[str]) -> set[str]:
        """Return those that were not published before."""
        fresh = set(ids) - self._shipped
        self._shipped |= fresh
        return fresh

    def _finish(self, site: Site, feeder: Feeder) -> None:
        """Wait until all posts have come to an end and nothing is under way, twice in a row."""
        end = time.monotonic() + self._plan.limit_s
        ids = set(self._ids)
        quiet = 0
        while time.monotonic() < end and quiet < 2:
            time.sleep(1.0)
            self._tell(site.journal.ended, "finishing")
            idle = feeder.empty and site.health.get("in_flight") == 0
            done = idle and ids <= set(site.ends())
            done = done and site.open_jobs() == 0 and site.messages_left == 0
            quiet = quiet + 1 if done else 0

    def _judge(self, site: Site, feeder: Feeder) -> Report:
        ends = site.ends()
        letters = {job.post_id: job for job in site.store.queries.dead_letters(limit=100_000)}
        lost = sorted(set(self._ids) - set(ends))
        poison_lost = sorted(site.poison - set(letters))
        twice = sorted(site.audit.tagged_twice() | site.journal.tagged_twice)
        recovered = [w.recovery_s for w in self._wounds if w.recovery_s is not None]
        median = round(statistics.median(recovered), 2) if recovered else None
        worst = round(max(recovered), 2) if recovered else None
        open_jobs, messages = site.open_jobs(), site.messages_left
        counts = site.store.queries.counts()
        reasons = Counter(
            f"{(job.last_error or {}).get('stage')}: {(job.last_error or {}).get('type')}"
            for job in letters.values()
        )
        figures = {
            "broker": self._plan.broker,
            "posts": len(self._ids),
            "published": feeder.published,
            "lost": len(lost),
            "tagged_twice": len(twice),
            "tagged_in_part": counts["partial"],
            "dead_lettered": len(letters.keys() & set(self._ids)),
            "king_exit_2": site.king_exit_2,
            "poison_messages": len(site.poison),
            "poison_lost": len(poison_lost),
            "jobs_left": open_jobs,
            "orphan_processes": -1,
            "shared_segments": -1,
            "spool_files": -1,
            "faults": len(self._wounds),
            "recovery_s": {"median": median, "worst": worst},
            "seed": self._plan.seed,
            "messages_left": messages,
            "messages_given_up_by_broker": site.messages_given_up,
            "dead_letter_reasons": dict(reasons),
        }
        broken = []
        broken += [f"{len(lost)} posts lost: {', '.join(lost[:5])}"] if lost else []
        broken += [f"{len(twice)} tagged twice: {', '.join(twice[:5])}"] if twice else []
        broken += [f"{len(poison_lost)} poison lost: {', '.join(poison_lost)}"[:300]] * bool(
            poison_lost
        )
        broken += [f"{site.king_exit_2} Kings ended with exit code 2"] if site.king_exit_2 else []
        in_part = counts["partial"]
        broken += [f"{in_part} posts tagged without media that may be had"] if in_part else []
        broken += [f"{open_jobs} jobs left"] if open_jobs else []
        broken += [f"{messages} messages left"] if messages else []
        unknown = [p for p, job in letters.items() if not (job.last_error or {}).get("message")]
        broken += [f"{len(unknown)} dead letters without a reason"] if unknown else []
        broken += self._broken_faults()
        crashes = site.journal.tracebacks
        broken += [f"{crashes} tracebacks in the log"] if crashes else []
        settled = site.journal.counts["king.message_settled"]
        return Report(figures, self._wounds, broken, settled=settled)

    def _broken_faults(self) -> list[str]:
        broken = [f"no recovery from {w.kind}" for w in self._wounds if w.recovery_s is None]
        broken += [f"{w.kind}: {w.note}" for w in self._wounds if w.note.startswith("FAILED")]
        missing = len(self._plan.kinds) - len(self._wounds)
        return broken + ([f"{missing} faults did not happen"] if missing else [])

    def _judge_leftovers(self, site: Site, report: Report) -> None:
        orphans = self._watch.orphans(set())
        segments = self._watch.segments()
        files = spool_files(site.direct.fetch.spool)
        if not self._watch.arenas:
            report.broken.append("the watch has seen no shared memory: it is blind")
        for key, leftovers in (
            ("orphan_processes", orphans),
            ("shared_segments", segments),
            ("spool_files", files),
        ):
            report.figures[key] = len(leftovers)
            if leftovers:
                report.broken.append(f"{len(leftovers)} {key}: {', '.join(leftovers[:3])}")


def _wait_for(site: Site, ended: int, timeout_s: float) -> None:
    """Wait until that many posts have ended, or the time is over."""
    end = time.monotonic() + timeout_s
    while site.journal.ended < ended and time.monotonic() < end:
        time.sleep(0.01)
