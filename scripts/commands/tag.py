"""``insighttag tag``: posts from a file, raw media to tags, in this process and without a queue."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Protocol

import typer

from common.errors import BundleError, ConfigError, TaggingError
from common.post import Failure, Features, Post, Tags
from common.result import TagResult
from scripts.commands.common import AsJson, Config, Overrides, print_json, print_table, settings_of
from scripts.commands.post_file import read_posts


class Tagger(Protocol):
    """What is asked of `workers.local.LocalTagger`."""

    @property
    def bundle(self) -> tuple[str, str]:
        """Name and version of what tags."""
        ...

    def features(self, post: Post) -> Features:
        """The post's features."""
        ...

    def fuse(self, features: Features) -> Tags:
        """The tags that follow from them."""
        ...


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
    posts = read_posts(file)  # before the models, which take long to load
    from workers.local import LocalTagger

    with LocalTagger(settings) as tagger:
        try:
            tagger.load()
        except BundleError as error:
            raise ConfigError(f"fusion.bundle: {error}") from error
        results = [result_of(post, tagger).answer() for post in posts]
    if as_json:
        print_json(results)
    else:
        for result in results:
            _print(result)
    if any(result["status"] == "failed" for result in results):
        raise typer.Exit(1)


def result_of(post: Post, tagger: Tagger) -> TagResult:
    """Return one post's result."""
    try:
        features = tagger.features(post)
        tags = tagger.fuse(features)
    except TaggingError as error:
        return TagResult.failed(post.post_id, tagger.bundle, Failure.of("extract", error))
    return TagResult.tagged(tags, features.statuses, features.failures)


def _print(result: dict[str, Any]) -> None:
    write = sys.stdout.write
    write(f"post      {result['post_id']}\n")
    if result["error"]:
        write(f"failed    {result['error']['type']}: {result['error']['message']}\n")
        return
    used = ", ".join(f"{name} {state}" for name, state in result["modalities"].items())
    write(f"used      {used}\n")
    for name, failure in result["failures"].items():
        write(f"          {name}: {failure['type']}: {failure['message']}\n")
    rows = [(tag["name"], f"{tag['score']:.3f}", tag["id"]) for tag in result["tags"]]
    print_table("", ("tag", "score", "id"), rows or [("(none over its threshold)", "", "")])
