"""Offline inference: posts in, tags out, with metrics where labels are."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from common.errors import ConfigError, FeatureError
from common.progress import progress_bar
from config.infer import RunSettings
from config.labels import LabelMap
from fusion.bundle.bundle import load_bundle
from fusion.infer.infer_complete import Made, completed, note_complete
from fusion.infer.input import Bad, Input, Labelled
from fusion.infer.journal import Journal
from fusion.infer.outputs import Result, Sink
from fusion.infer.processes import Maker, Outcome, chunked, run_chunks
from fusion.metrics import ranking as metrics

P = TypeVar("P", bound=Labelled)


@dataclass(frozen=True)
class InferReport:
    """What came out of an inference.

    Attributes:
        posts: All that were tagged, by this run and the one that it went on from.
        labelled: Those whose true labels are known.
        metrics: Over these; empty where there are none.
        skipped: Posts that were left out.
        skipped_at: The list of them; None where nothing was left out.
        resumed: Entries of the input that an earlier run had done.
        posts_per_s: Of this run, models loaded.
        complete: The output was there already, whole: nothing was computed.
    """

    posts: int
    labelled: int
    metrics: dict[str, float]
    skipped: int = 0
    skipped_at: Path | None = None
    resumed: int = 0
    posts_per_s: float = 0.0
    complete: bool = False


@dataclass(frozen=True)
class Facts:
    """What is to be known of a bundle before it is used.

    Attributes:
        thresholds: float32 ``(classes,)``.
    """

    name: str
    version: str
    labels: LabelMap
    thresholds: npt.NDArray[np.float32]

    @classmethod
    def of(cls, folder: Path) -> Facts:
        """Read a bundle.

        Raises:
            BundleError: It is missing or broken.
        """
        bundle = load_bundle(folder)
        return cls(bundle.name, bundle.version, bundle.labels, bundle.thresholds)


@dataclass(frozen=True)
class Job(Generic[P]):
    """An inference, ready to run.

    Attributes:
        source: The posts.
        maker: Makes a tagger on a device.
        facts: Of the bundle.
        settings: How to run.
        base: What the journal's names begin with.
        output: The file that is made; None where results go elsewhere.
        sink: Takes the results; the file's journal is its argument.
        about: What else a killed run must have been begun with.
        made_of: What else an output that is whole must have been made of; None where that is not
            known, and it is computed each time.
    """

    source: Input[P]
    maker: Maker
    facts: Facts
    settings: RunSettings
    base: Path
    output: Path | None
    sink: Callable[[Journal], Sink]
    about: Mapping[str, Any] = field(default_factory=dict)
    made_of: Mapping[str, Any] | None = None


def infer(job: Job[P], *, restart: bool = False) -> InferReport:
    """Tag posts, in their order.

    Args:
        job: What to do.
        restart: Do not go on with what a killed run has left, and compute what is whole anew.

    Raises:
        ConfigError: The input or the device is wrong, or a label is not in the bundle's map.
        FeatureError: A post is bad, without ``skip_bad``.
        WorkerDied: A process has died; the same command goes on.
    """
    settings, labels = job.settings, job.facts.labels
    devices = devices_of(settings)
    survey = job.source.survey()
    signature = {
        "input": survey.sha256,
        "bundle": job.facts.version,
        "device": devices[0].partition(":")[0],
        **{key: getattr(settings, key) for key in ("batch_size", "scores", "skip_bad")},
        **job.about,
    }
    beside = job.base.with_name(f"{job.base.name}.skipped.jsonl")
    with Journal(job.base, signature, restart=restart) as journal:
        if (found := _whole(job, signature, journal)) is not None:
            return found
        resumed, rows = journal.done, _Rows(labels)
        left = islice(job.source, resumed, None)
        chunks = chunked(left, settings.batch_size)
        sink = job.sink(journal)
        started = 0.0
        try:
            with progress_bar("infer", survey.entries, enabled=settings.progress) as bar:
                bar.advance(resumed)
                for outcomes in run_chunks(job.maker, devices, chunks):
                    started = started or time.monotonic()
                    posts = _record(outcomes, sink, journal, rows, skip_bad=settings.skip_bad)
                    journal.commit(len(outcomes), posts)
                    bar.advance(len(outcomes))
        finally:
            sink.close()
        seconds = time.monotonic() - started
        first = min(settings.batch_size, survey.entries - resumed)  # before the clock was started
        timed = survey.entries - resumed - first
        measured, labelled = rows.measure(journal, job.facts.thresholds)
        posts, skipped = journal.posts, survey.entries - journal.posts
        journal.finish(job.output, beside)
        if job.output is not None and job.made_of is not None:
            made = Made(posts=posts, labelled=labelled, metrics=measured, skipped=skipped)
            note_complete(job.output, _made_of(job, signature), made)
    return InferReport(
        posts,
        labelled,
        measured,
        skipped,
        beside if skipped else None,
        resumed,
        timed / seconds if timed else 0.0,
    )


def devices_of(settings: RunSettings) -> list[str]:
    """The device of each process.

    Raises:
        ConfigError: There are not as many GPUs.
    """
    there, wanted = torch.cuda.device_count(), settings.n_gpus
    if wanted is None:
        wanted = min(1, there) if settings.processes == 1 else 0
    if wanted > there:
        raise ConfigError(f"n_gpus: {wanted} GPUs wanted, this machine has {there}")
    if wanted and settings.processes > 1:
        raise ConfigError(
            f"processes: {settings.processes} on the CPU and n_gpus: {wanted}: give one of them; "
            "each GPU has a process of its own"
        )
    return [f"cuda:{i}" for i in range(wanted)] or ["cpu"] * settings.processes


def shown(found: Mapping[str, float]) -> str:
    """Metrics in one line for a person."""
    return "  ".join(f"{key} {value:.4f}" for key, value in found.items())


def _made_of(job: Job[Any], signature: Mapping[str, Any]) -> dict[str, Any]:
    """What an output is made of; whether bad posts are left out matters only where there are."""
    rest = {key: value for key, value in signature.items() if key != "skip_bad"}
    return {**rest, **(job.made_of or {})}


def _whole(job: Job[Any], signature: Mapping[str, Any], journal: Journal) -> InferReport | None:
    """The report of an output that is whole already; None where there is something to do."""
    if job.output is None or job.made_of is None or journal.restart or journal.done:
        return None
    made = completed(job.output, _made_of(job, signature))
    if made is None or made.skipped:  # what was left out may be good by now
        return None
    return InferReport(made.posts, made.labelled, dict(made.metrics), complete=True)


class _Rows:
    """Scores and targets of the labelled posts, in a file: metrics are of the whole set."""

    def __init__(self, labels: LabelMap) -> None:
        shape = (len(labels),)
        self._labels = labels
        self._kind = np.dtype([("scores", "<f4", shape), ("targets", "?", shape)])

    def of(self, results: Sequence[Result]) -> bytes:
        chosen = [result for result in results if result.labels]
        rows = np.zeros(len(chosen), self._kind)
        for row, result in zip(rows, chosen, strict=True):
            row["scores"] = result.tags.scores
            row["targets"][self._labels.encode(result.labels)] = True
        return rows.tobytes()

    def measure(
        self, journal: Journal, thresholds: npt.NDArray[np.float32]
    ) -> tuple[dict[str, float], int]:
        path = journal.path("scores")
        count = path.stat().st_size // self._kind.itemsize
        if not count:
            return {}, 0
        rows = np.memmap(path, self._kind, mode="r")
        return metrics.summary(rows["scores"], rows["targets"], thresholds), count


def _record(
    outcomes: Sequence[Outcome],
    sink: Sink,
    journal: Journal,
    rows: _Rows,
    *,
    skip_bad: bool,
) -> int:
    """Write a chunk's results and list its bad posts; gives how many were tagged."""
    bad = [outcome for outcome in outcomes if isinstance(outcome, Bad)]
    results = [outcome for outcome in outcomes if not isinstance(outcome, Bad)]
    if skip_bad or not bad:
        refused = list(sink.write(results))
        names = {each.post_id for each in refused}
        results = [result for result in results if result.post_id not in names]
        bad += refused
    if bad and not skip_bad:
        raise FeatureError(f"{named(bad[0])}; --skip_bad leaves such posts out")
    journal.write("scores", rows.of(results))
    journal.write("skipped", "".join(map(_listed, bad)).encode("utf-8"))
    return len(results)


def named(bad: Bad) -> str:
    """A bad post and why, in one line."""
    name = f"post {bad.post_id}"
    return bad.reason if name in bad.reason else f"{name}: {bad.reason}"


def _listed(bad: Bad) -> str:
    line = {"post_id": bad.post_id, "reason": bad.reason}
    return json.dumps(line, ensure_ascii=False) + "\n"
