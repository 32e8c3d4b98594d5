"""``insighttag tag``: posts from a file, raw media to tags, in this process and without a queue."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from common.cli import complain, say
from common.errors import TaggingError
from common.post import MEDIA_KINDS, Failure, Post, TagResult
from common.tables import print_table
from fusion.data.data_file import read_whole_posts
from scripts.commands.common import AsJson, Config, Overrides, print_json, settings_of

if TYPE_CHECKING:
    from workers.runner import PostRunner


def tag(
    file: Annotated[Path, typer.Argument(metavar="POST.json", help="One post, or a list of them.")],
    as_json: AsJson = False,
    config: Config = None,
    overrides: Overrides = None,
) -> None:
    """Tag the posts of a file, without a queue.

    Media are local paths or URLs; all models run in this process.
    """
    settings = settings_of(config, overrides)
    posts = read_whole_posts(file)  # before the models, which take long to load
    from workers.local import local_runner

    with local_runner(settings) as runner:
        ran = [result_of(post, runner) for post in posts]
    results = [result.answer() for result in ran]
    if as_json:
        print_json(results)
    else:
        for result in results:
            _print(result)
    media = sum(len(post.media) for post in posts)
    all_lost = media and not any(
        result.modalities.get(kind) == "ok" for result in ran for kind in MEDIA_KINDS
    )
    if all_lost:
        complain("tag", f"all {media} media failed", 1)
    if all_lost or any(result.status == "failed" for result in ran):
        raise typer.Exit(1)


def result_of(post: Post, runner: PostRunner) -> TagResult:
    """Return one post's result."""
    try:
        return runner.run(post).result
    except TaggingError as error:
        failure = Failure.of(error.stage or "load", error)
        return TagResult.failed(post.post_id, runner.bundle or ("", ""), failure)


def _print(result: dict[str, Any]) -> None:
    say(f"post      {result['post_id']}\n")
    if result["error"]:
        say(f"failed    {result['error']['type']}: {result['error']['message']}\n")
        return
    used = ", ".join(f"{name} {state}" for name, state in result["modalities"].items())
    say(f"used      {used}{'; partial' if result.get('partial') else ''}\n")
    for name, failure in result["failures"].items():
        say(f"          {name}: {failure['type']}: {failure['message']}\n")
    rows = [(tag["name"], f"{tag['score']:.3f}", tag["id"]) for tag in result["tags"]]
    print_table("", ("tag", "score", "id"), rows or [("(none over its threshold)", "", "")])
