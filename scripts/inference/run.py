"""From the options of `infer_net.py` to its report: puts input, taggers and output together."""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from common.cli import say
from common.errors import ConfigError, TaggingError, one_line
from common.logs import visible
from common.post import Post
from common.post_set import PostSet
from common.urls import is_database, redact
from config.settings import InferSettings, RunSettings, Settings
from config.tag_rules import TagRules
from fusion.bundle.bundle import Bundle, load_bundle
from fusion.bundle.legacy import resolve_model
from fusion.data.data_file import post_to_tag
from fusion.data.dataset import FeatureFiles
from fusion.infer.inference import InferReport, Input, Job, infer, read_record, shown
from fusion.infer.inferer import FeatureTagger, has_seen
from fusion.infer.options import InferOptions, bundle_of, run_settings, with_bundle
from fusion.infer.outputs import (
    Bad,
    CsvTable,
    FileSink,
    JsonLines,
    Outcome,
    Result,
    Sink,
    StreamSink,
)


def run(settings: InferSettings | Settings, options: InferOptions) -> InferReport:
    """Infer, say what came out, and return it."""
    plan = run_settings(settings)
    with (
        _best_model(settings, options.best_model) as chosen,
        tempfile.TemporaryDirectory(prefix="insighttag-") as scratch,
    ):
        report = infer(_job(chosen, options, Path(scratch)))
        _say(report, plan)
        return report


def _job(settings: InferSettings | Settings, options: InferOptions, scratch: Path) -> Job:
    plan, posts = run_settings(settings), options.input
    form, output = _target(plan)
    choice = settings if isinstance(settings, InferSettings) else settings.fusion
    rules = TagRules.read(choice).digest
    if isinstance(settings, InferSettings):
        bundle = load_bundle(settings.bundle)
        read: Callable[[Any, Path, str], Any] = read_record
        files = FeatureFiles(settings.features)
        maker: Any = partial(FeatureTagger, settings, files)
        seen: Callable[[Any], bool] = partial(has_seen, bundle, files)
    else:
        from common.logs import configure_logs
        from extractors.learned import learned_from

        if posts.suffix == ".txt":
            raise ConfigError(f"{posts}: names no media: raw media take .json or .jsonl")
        configure_logs(settings.log.format, settings.log.level)
        bundle = load_bundle(settings.fusion.bundle)
        read, maker = post_to_tag, partial(RawTagger, settings)
        learned = bundle.learned_from
        for stream, posts_of_stream in learned_from(settings.features).items():
            learned |= posts_of_stream if stream in bundle.manifest.dims else PostSet()
        seen = partial(_seen, learned)
        # A batch of posts whose media are decoded is expensive: each is written when it is done.
        plan = plan.model_copy(update={"batch_size": 1})
    if output is not None:
        skipped = output.with_name(f"{output.name}.skipped.jsonl")
    elif plan.output is None:
        skipped = scratch / "skipped.jsonl"
    else:
        name = hashlib.sha256(f"{redact(plan.output)} {posts.resolve()}".encode()).hexdigest()
        skipped = plan.progress_dir / f"{name[:16]}.skipped.jsonl"
    return Job(
        source=Input(posts, read, bundle.labels, plan.skip_bad),
        maker=maker,
        bundle=bundle,
        settings=plan,
        sink=_sink(form, plan, bundle, rules, options, reuse=isinstance(settings, InferSettings)),
        skipped=skipped,
        seen=seen,
    )


class RawTagger:
    """A `fusion.infer.inference.Tagger` of posts with raw media.

    It runs on the device of the settings where they name no GPUs for the inference.
    """

    def __init__(self, settings: Settings, device: str) -> None:
        chosen = device if settings.infer.n_gpus is not None else None
        from workers.local import local_runner

        self._runner = local_runner(settings, device=chosen)
        self._runner.start()

    def run(self, posts: Sequence[Post]) -> list[Outcome]:
        """Return the posts' tags; a post with nothing usable is bad."""
        return [self._tag(post) for post in posts]

    def close(self) -> None:
        self._runner.close()

    def _tag(self, post: Post) -> Outcome:
        try:
            tagged = self._runner.run(post)
        except TaggingError as error:
            return Bad(post.post_id, f"{type(error).__name__}: {one_line(error)}")
        return Result(tagged.result, tagged.tags.scores, post.labels)


def _seen(learned: PostSet, post: Post) -> bool:
    return post.post_id in learned


def _target(plan: RunSettings) -> tuple[str, Path | None]:
    """Return the format, and the file where the output is one."""
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


def _sink(
    form: str,
    plan: RunSettings,
    bundle: Bundle,
    rules: str | None,
    options: InferOptions,
    *,
    reuse: bool,
) -> Sink:
    """Return the output; `reuse` takes over posts of an output that is whole.

    Of raw media everything is computed again: media that failed may be readable now.
    """
    if form == "mongodb":
        from scripts.inference.collection import CollectionSink, store_of

        store = store_of(str(plan.output), plan.collection)
        skip = None if options.restart or not reuse else (bundle.name, bundle.version)
        return CollectionSink(store, insert=plan.collection.insert, skip_bundle=skip, rules=rules)
    shape: CsvTable | JsonLines = JsonLines(plan.scores)
    if form == "csv":
        shape = CsvTable(bundle.labels.names, plan.scores, rules is not None)
    if plan.output is None:
        if form == "csv" and not sys.stdout.isatty():
            return StreamSink(shape, sys.stdout.write)
        # In JSON an escape means the character itself.
        return StreamSink(shape, lambda text: say(text.replace("\r\n", "\n")))
    return FileSink(Path(plan.output), shape, bundle, rules, restart=options.restart, reuse=reuse)


@contextmanager
def _best_model(
    settings: InferSettings | Settings, model: Path | None
) -> Iterator[InferSettings | Settings]:
    """Yield the settings with the bundle that ``--best_model`` names."""
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


def _say(report: InferReport, plan: RunSettings) -> None:
    # Tags may go to standard output: the report then goes to standard error.
    people = sys.stderr if plan.output is None else sys.stdout

    def tell(text: str) -> None:
        people.write(visible(text))

    left_out = f"  skipped {report.skipped}" if report.skipped else ""
    new = report.labelled - report.seen
    gone_on = f"  (went on after {report.resumed})" if report.resumed else ""
    tell(
        f"posts {report.posts}  labelled {report.labelled}{left_out}  "
        f"{shown(report.metrics, seen=report.seen > 0 and not new)}{gone_on}\n"
    )
    if new and report.seen:
        tell(
            f"figures are on {new} posts: the bundle or the weights of its features were trained "
            f"from the other {report.seen}\n"
        )
    if report.unscored:
        tell(
            f"without {report.unscored} labelled posts of an earlier run: the output does not hold "
            "their scores\n"
        )
    if report.posts == report.resumed and not report.skipped:
        tell(f"complete already: {redact(plan.output or '')}; --restart computes it again\n")
    if report.posts_per_s:  # of one batch alone there is no rate
        tell(f"{report.posts_per_s:,.1f} posts/s\n")
    if report.skipped_at is None:
        return
    if plan.output is not None:
        tell(f"left out, and why: {report.skipped_at}\n")
        return
    with report.skipped_at.open(encoding="utf-8") as file:
        for line in file:
            bad = json.loads(line)
            tell(f"skipped {bad['post_id']}: {bad['reason']}\n")
