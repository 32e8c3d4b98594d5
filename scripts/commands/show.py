"""``insighttag show``: one post, its tags, and why."""

from __future__ import annotations

import time
from typing import Any

from common.cli import say
from common.errors import ConfigError
from common.tables import print_table
from scripts.commands.common import (
    AsJson,
    Config,
    Overrides,
    PostId,
    ago,
    moment,
    online_settings,
    print_json,
)

_OF_THE_STATUS = {"status", "model", "version", "tagged_at", "attempts", "partial", "error"}
_OF_THE_TABLES = {"tags", "modalities", "failures", "timings_ms"}


def show(
    post_id: PostId,
    as_json: AsJson = False,
    config: Config = None,
    overrides: Overrides = None,
) -> None:
    """Show one post's tags, and why.

    Which modalities the tags rest on, what went wrong with the others, and the post's job.
    """
    from king.store.queries import open_queries

    settings = online_settings(config, overrides, store=True)
    with open_queries(settings.store) as queries:
        stored = queries.post(post_id)
        job = queries.job(post_id)
    if stored is None and job is None:
        raise ConfigError(f"show: post {post_id!r} is not in the database")
    result = dict(stored.result) if stored is not None and stored.result else None
    content: dict[str, Any] = {
        "post_id": post_id,
        "labels": list(stored.post.labels) if stored is not None else [],
        "media": [m.kind for m in stored.post.media] if stored is not None else [],
        "result": result,
        "job": None,
    }
    if job is not None:
        error = dict(job.last_error) if job.last_error else None
        content["job"] = {"state": job.state, "attempts": job.attempts, "last_error": error}
        content["job"]["due_at"] = moment(job.due_at)
    if as_json:
        print_json(content)
    else:
        _print(content, found=stored is not None)


def _print(content: dict[str, Any], *, found: bool) -> None:
    result, job = content["result"], content["job"]
    say(f"post      {content['post_id']}{'' if found else '  (not in the database)'}\n")
    if content["labels"]:
        say(f"labels    {', '.join(content['labels'])}\n")
    if result is None:
        say("status    no result yet\n")
    else:
        tagged_at = result.get("tagged_at")
        when = ago(tagged_at.timestamp(), time.time()) if hasattr(tagged_at, "timestamp") else "?"
        model = f"{result.get('model')} {result.get('version')}"
        attempts = result.get("attempts")
        partial = ", partial" if result.get("partial") else ""
        say(f"status    {result.get('status')} by {model}, {when}, attempt {attempts}{partial}\n")
        if result.get("error"):
            say(f"error     {_error(result['error'])}\n")
        for name, value in result.items():
            if name not in _OF_THE_STATUS | _OF_THE_TABLES:  # keys that came later
                say(f"{name:<9} {value}\n")
    if job is not None:
        due = f", due {job['due_at']}" if job["due_at"] and job["state"] != "dead" else ""
        say(f"job       {job['state']}, {job['attempts']} attempts{due}\n")
        if job["last_error"]:
            say(f"last      {_error(job['last_error'])}\n")
    if result and result.get("tags"):
        tags = [(tag["name"], f"{tag['score']:.3f}", tag["id"]) for tag in result["tags"]]
        print_table("", ("tag", "score", "id"), tags)
    if result and result.get("modalities"):
        failures = result.get("failures") or {}
        rows = [
            (name, state, _error(failures[name]) if name in failures else "")
            for name, state in result["modalities"].items()
        ]
        print_table("", ("modality", "state", "why"), rows)


def _error(error: dict[str, Any]) -> str:
    return f"{error.get('stage')}: {error.get('type')}: {error.get('message')}"
