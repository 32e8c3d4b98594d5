"""From the options of `infer_net.py` to its report: puts input, taggers and output together."""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.errors import ConfigError
from common.urls import redact
from config.infer import InferSettings, RunSettings, is_database
from config.settings import Settings
from fusion.bundle.legacy import resolve_model
from fusion.data.dataset import FeatureFiles
from fusion.infer.infer_features import FeatureMaker
from fusion.infer.inference import Facts, InferReport, Job, infer, shown
from fusion.infer.input import Input, read_record
from fusion.infer.journal import Journal
from fusion.infer.options import InferOptions, bundle_of, run_settings, with_bundle
from fusion.infer.outputs import CsvTable, JsonLines, Sink, TextSink
from scripts.commands.post_file import post_of


def run(settings: InferSettings | Settings, options: InferOptions) -> None:
    """Infer, and say what came out.

    Raises:
        TaggingError: One line that names what is wrong.
    """
    plan = run_settings(settings)
    with _best_model(settings, options.best_model) as chosen, _scratch(plan) as scratch:
        job = _job(chosen, options.input, scratch)
        report = infer(job, restart=options.restart)
        _say(report, plan)


def _job(settings: InferSettings | Settings, posts: Path, scratch: Path | None) -> Job[Any]:
    plan = run_settings(settings)
    form, output = _target(plan)
    if isinstance(settings, InferSettings):
        facts = Facts.of(settings.bundle)
        read: Callable[[Any, Path, str], Any] = read_record
        maker: Any = FeatureMaker(settings, FeatureFiles(settings.features))
        about: dict[str, Any] = {}
        made_of: dict[str, Any] | None = {"features_root": str(settings.features.resolve())}
    else:
        from common.logs import configure_logs
        from scripts.inference.raw_media import RawMaker

        if posts.suffix == ".txt":
            raise ConfigError(f"{posts}: names no media: raw media take .json or .jsonl")
        configure_logs(settings.log.format, settings.log.level)
        facts, read, maker = Facts.of(settings.fusion.bundle), post_of, RawMaker(settings)
        about = {"features": _digest(settings.features.model_dump_json())}
        made_of = None  # media may have failed, and be had now
        # Of posts whose media are decoded a batch is dear: each is written when it is done.
        plan = plan.model_copy(update={"batch_size": 1})
    base = output or scratch
    if base is None:
        noted = _digest(f"{redact(plan.output or '')} {posts.resolve()}")
        base = plan.progress_dir / noted
    return Job(
        source=Input(posts, read, facts.labels, plan.skip_bad),
        maker=maker,
        facts=facts,
        settings=plan,
        base=base,
        output=output,
        sink=_sink(form, plan, facts),
        about={"format": form, **about},
        made_of=made_of,
    )


def _target(plan: RunSettings) -> tuple[str, Path | None]:
    """The format, and the file where the output is one."""
    output = plan.output
    database = output is not None and is_database(output)
    if plan.format == "mongodb" and not database:
        raise ConfigError("format: mongodb takes --output mongodb://HOST/DATABASE.COLLECTION")
    if database and plan.format not in ("auto", "mongodb"):
        raise ConfigError(f"format: {plan.format} goes into a file, the output is a database")
    if output is None or database:
        form = "mongodb" if database else plan.format
        return ("jsonl" if form == "auto" else form), None
    file = Path(output)
    if file.is_dir():
        raise ConfigError(f"{file}: cannot be written: is a folder")
    if plan.format != "auto":
        return plan.format, file
    return ("csv" if file.suffix == ".csv" else "jsonl"), file


def _sink(form: str, plan: RunSettings, facts: Facts) -> Callable[[Journal], Sink]:
    if form == "mongodb":
        from scripts.inference.collection import CollectionSink, store_of

        store = store_of(str(plan.output), plan.collection)

        def into_collection(_: Journal) -> Sink:
            sink = CollectionSink(store, insert=plan.collection.insert)
            try:
                sink.connect()
            except BaseException:
                sink.close()
                raise
            return sink

        return into_collection
    shape = CsvTable(facts.labels.names, plan.scores) if form == "csv" else JsonLines(plan.scores)

    def as_text(journal: Journal) -> Sink:
        if plan.output is None:
            return TextSink(shape, sys.stdout.write, begun=False)
        begun = bool(journal.path("part").stat().st_size)
        return TextSink(shape, lambda t: journal.write("part", t.encode("utf-8")), begun=begun)

    return as_text


@contextmanager
def _best_model(
    settings: InferSettings | Settings, model: Path | None
) -> Iterator[InferSettings | Settings]:
    """The settings with the bundle that ``--best_model`` means."""
    if model is None:
        yield settings
        return
    allowed = run_settings(settings).allow_pickle
    key = "allow_pickle" if isinstance(settings, InferSettings) else "infer.allow_pickle"
    with tempfile.TemporaryDirectory(prefix="insighttag-") as folder:
        bundle = resolve_model(
            model, bundle_of(settings), Path(folder) / "bundle", allow_pickle=allowed, setting=key
        )
        yield with_bundle(settings, bundle)


@contextmanager
def _scratch(plan: RunSettings) -> Iterator[Path | None]:
    """Where a run to standard output keeps its notes: it cannot be gone on with."""
    if plan.output is not None:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="insighttag-") as folder:
        yield Path(folder) / "stdout"


def _say(report: InferReport, plan: RunSettings) -> None:
    # Beside the tags on standard output, what is for people goes to standard error.
    people = sys.stderr if plan.output is None else sys.stdout
    left_out = f"  skipped {report.skipped}" if report.skipped else ""
    gone_on = f"  (went on after {report.resumed})" if report.resumed else ""
    people.write(
        f"posts {report.posts}  labelled {report.labelled}{left_out}  {shown(report.metrics)}"
        f"{gone_on}\n"
    )
    if report.complete:
        people.write(f"complete already: {plan.output}; --restart computes it anew\n")
    if report.posts_per_s:  # of one batch alone there is no rate
        people.write(f"{report.posts_per_s:,.1f} posts/s\n")
    if report.skipped_at is None:
        return
    if plan.output is not None:
        people.write(f"left out, and why: {report.skipped_at}\n")
        return
    with report.skipped_at.open(encoding="utf-8") as file:
        for line in file:
            bad = json.loads(line)
            people.write(f"skipped {bad['post_id']}: {bad['reason']}\n")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]
