"""The whole command: lock, state, run, report, and one line for whatever ends it early."""

from __future__ import annotations

import sys

from common.errors import TaggingError
from common.progress import progress_bar
from corpus.download.meter import Meter
from corpus.download.report import Interrupted, write_report
from corpus.download.run import BrokenDisk, Download
from corpus.download.state import BrokenState, State
from corpus.download.values import Options
from corpus.records import check_holds_post, count_lines
from corpus.runs import Stopper, only_one

_AGAIN = "run the same command again to go on where it stopped"


def download(options: Options) -> int:
    """Download everything and write the report; gives the exit code.

    Raises:
        ConfigError: The posts file or the output folder is not as it should be.
        TaggingError: It cannot go on now.
    """
    check_holds_post(options.posts)
    total = count_lines(options.posts)
    folder = options.out / ".state"
    with only_one(folder / "lock", str(options.out)), Stopper() as stopper:
        try:
            return _download(options, State(folder / "download.sqlite"), stopper, total)
        except (BrokenDisk, BrokenState, OSError) as error:
            text = getattr(error, "strerror", None) or str(error)
            raise TaggingError(f"stopped: {text}; make room, then {_AGAIN}") from error


def _download(options: Options, state: State, stopper: Stopper, total: int) -> int:
    try:
        if options.retry_failed:
            state.forget_refused()
        with progress_bar("posts", total) as bar:
            meter = Meter(bar)
            run = Download(options, state, meter)
            run.run(lambda: stopper.asked)
        if not run.complete:
            return _interrupted(stopper, f"{meter.files:,} files downloaded in this run")
        try:
            with progress_bar("manifest", total) as bar:
                summary = write_report(options, state, bar.advance, lambda: stopper.asked)
        except Interrupted:
            return _interrupted(stopper, "all files are downloaded, the manifest is not written")
        summary.show()
        sys.stdout.write(f"{options.out}/manifest.jsonl, posts.jsonl, summary.json\n")
        return 0
    finally:
        state.close()


def _interrupted(stopper: Stopper, what: str) -> int:
    sys.stderr.write(f"download_mp: {stopper.asked}: {what}; {_AGAIN}\n")
    return 1
