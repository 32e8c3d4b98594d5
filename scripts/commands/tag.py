"""``insighttag tag``: posts from files, raw media to tags, in this process and without a queue."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import typer

from common.cli import argument, complain, flag, option, print_json, say
from common.errors import ConfigError, path_told, replaced
from common.post import MEDIA_KINDS, Post
from common.progress import notice, track
from common.tables import print_table
from common.times import plain
from config.load import settings_beside
from config.tag_rules import TagRules
from fusion.data.data_file import parse_post, read_whole_posts
from scripts.commands.common import AsJson, Config, Overrides, say_row, settings_of

if TYPE_CHECKING:
    from workers.runner import PostRunner

_POSTS_FILES = (".json", ".jsonl")


def tag(
    file: Annotated[
        Path,
        argument(
            "Posts as .json, .jsonl or .csv; a folder of media, or one file: each is a post.",
            "POSTS",
        ),
    ],
    *,
    as_json: AsJson = False,
    out: Annotated[
        Path | None, option("Write a line for each post; continues an earlier run.", "F.jsonl")
    ] = None,
    restart: Annotated[bool, flag("--restart", "Overwrite --out, whatever it holds.")] = False,
    bundle: Annotated[
        Path | None,
        option(
            "Instead of fusion.bundle; without --config, uses the settings.yaml next to it.",
            "FOLDER",
        ),
    ] = None,
    config: Config = None,
    overrides: Overrides = None,
) -> None:
    """Tag posts in files, without a queue.

    Media are local paths or URLs; all models run in this process.
    """
    sets = list(overrides or ())
    if bundle is not None:
        config = config or settings_beside(bundle)
        sets.append(f"fusion.bundle={json.dumps(str(bundle))}")
    settings = settings_of(config, sets)
    # Both before the models, which take long to load.
    posts, rules = _posts(file), TagRules.read(settings.fusion).digest
    if out is not None and out.is_dir():
        raise ConfigError(f"--out {out}: is a folder: name a file in it, as {out / 'tags.jsonl'}")
    if out is not None:
        _check_writable(out)
    from workers.local import local_runner
    from workers.runner import result_of

    with local_runner(settings) as runner:
        if out is not None:
            results = list(_written(posts, runner, rules, out, restart=restart))
        else:
            results = [result_of(runner, post).answer() for post in posts]
    if out is not None:
        failed = sum(result["status"] == "failed" for result in results)
        say(f"{len(results):,} posts, {failed:,} failed: {out}\n")
    elif as_json:
        print_json(results)
    else:
        for result in results:
            _print(result)
    media = sum(len(post.media) for post in posts)
    all_lost = media and not any(
        result["modalities"].get(kind) == "ok" for result in results for kind in MEDIA_KINDS
    )
    if all_lost:
        complain("tag", f"all {media} media failed", 1)
    if all_lost or any(result["status"] == "failed" for result in results):
        raise typer.Exit(1)


def _posts(source: Path) -> list[Post]:
    if str(source).lower().startswith("file:/"):
        raise ConfigError(f"{source}: give a plain path, without file://")
    if source.suffix.lower() in _POSTS_FILES and not source.is_dir():
        return read_whole_posts(source)
    from corpus.from_files.posts import raise_it, read_own_posts

    # Labels say nothing here: mistakes in those of a folder are passed over.
    refuse = _pass_over if source.is_dir() else raise_it
    entries = read_own_posts(source, refuse=refuse)
    posts = [parse_post(entry, str(source)).post for entry in entries]
    if not posts:
        raise ConfigError(f"{source}: holds no post")
    return posts


def _pass_over(_mistake: ConfigError) -> None: ...


def _check_writable(out: Path) -> None:
    with path_told(f"--out {out}"):
        out.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(out if out.exists() else out.parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def _written(
    posts: Sequence[Post], runner: PostRunner, rules: str | None, out: Path, *, restart: bool
) -> Iterator[dict[str, Any]]:
    """Yield results, and write each as a line; those that an earlier run has written stay."""
    from workers.runner import result_of

    with path_told(f"--out {out}"):
        file = out.open("a+b")
    with file:
        with replaced(
            ConfigError(f"--out {out}: is being written by another run"), BlockingIOError
        ):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if restart:
            file.truncate(0)
        earlier = _earlier(file, out, runner.bundle or ("", ""), rules)
        if earlier:
            notice(f"{out}: goes on after {len(earlier):,} posts")
        for post in track(posts, "tag", len(posts)):
            result = earlier.get(post.post_id)
            if result is None:
                result = result_of(runner, post).answer()
                line = json.dumps(result, ensure_ascii=False, default=plain).encode() + b"\n"
                with path_told(f"--out {out}"):
                    file.write(line)
                    file.flush()
            yield result


def _earlier(
    file: BinaryIO, out: Path, bundle: tuple[str, str], rules: str | None
) -> dict[str, dict[str, Any]]:
    """Return the results in a file by post, and cut off the half line of a killed run."""
    results: dict[str, dict[str, Any]] = {}
    file.seek(0)
    end, anew = 0, "name another, or --restart overwrites it"
    for number, line in enumerate(file, 1):
        if not line.endswith(b"\n"):
            break
        with replaced(
            ConfigError(f"--out {out}: line {number}: is not a result of insighttag tag: {anew}"),
            ValueError,
            KeyError,
            TypeError,
        ):
            result = json.loads(line)
            made_by = result["model"], result["version"]
            results[result["post_id"]] = result
        if made_by != bundle:
            raise ConfigError(
                f"--out {out}: line {number}: is by the bundle {' '.join(map(str, made_by))}, this "
                f"one is {' '.join(bundle)}: {anew}"
            )
        if result.get("rules") != rules:
            raise ConfigError(
                f"--out {out}: line {number}: is by other rules for tags (fusion.min_tags, "
                f"max_tags, tags): {anew}"
            )
        end += len(line)
    file.truncate(end)
    return results


def _print(result: dict[str, Any]) -> None:
    say_row("post", f"{result['post_id']}")
    if result["error"]:
        say_row("failed", f"{result['error']['type']}: {result['error']['message']}")
        return
    used = ", ".join(f"{name} {state}" for name, state in result["modalities"].items())
    say_row("used", f"{used}{'; partial' if result.get('partial') else ''}")
    for name, failure in result["failures"].items():
        say(f"          {name}: {failure['type']}: {failure['message']}\n")
    rows = [(tag["name"], f"{tag['score']:.3f}", tag["id"]) for tag in result["tags"]]
    print_table("", ("tag", "score", "id"), rows or [("(none over its threshold)", "", "")])
    near = [
        (tag["name"], f"{tag['score']:.3f}", f"{tag['threshold']:.3f}", tag["id"])
        for tag in result.get("near_misses", ())
    ]
    if near:
        print_table("", ("not given", "score", "threshold", "id"), near)
