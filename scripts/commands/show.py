"""``insighttag show``: one post, its tags, and why."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from common.cli import print_json, say
from common.errors import ConfigError
from common.tables import print_table
from config.labels import LabelMap
from config.settings import FusionSettings
from config.tag_rules import TagRules
from fusion.bundle.folder import thresholds_of
from scripts.commands.common import (
    AsJson,
    Config,
    Overrides,
    PostId,
    ago,
    moment,
    online_settings,
    say_row,
)

_OF_THE_STATUS = {"status", "model", "version", "tagged_at", "attempts", "partial", "error"}
_OF_THE_TABLES = {
    "tags": list,
    "near_misses": list,
    "modalities": dict,
    "failures": dict,
    "timings_ms": dict,
}
_MOST_TEXT = 300  # characters of a post's text that are printed; --json has all


def show(
    post_id: PostId,
    as_json: AsJson = False,
    config: Config = None,
    overrides: Overrides = None,
) -> None:
    """Show one post's tags, and why.

    Which modalities the tags rest on, what went wrong with the others, which tags were near, and
    the post's job. Thresholds are shown where fusion.bundle is the bundle that gave the tags.
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
        "text": stored.post.text if stored is not None else "",
        "labels": list(stored.post.labels) if stored is not None else [],
        "media": [m.kind for m in stored.post.media] if stored is not None else [],
        "result": result,
        "job": None,
    }
    if job is not None:
        error = dict(job.last_error) if job.last_error else None
        content["job"] = {"state": job.state, "attempts": job.attempts, "last_error": error}
        content["job"]["due_at"] = moment(job.due_at)
    if result is not None:
        content["thresholds"] = thresholds_by_name(settings.fusion, result)
    if as_json:
        print_json(content)
    else:
        _print(content, is_stored=stored is not None)


def thresholds_by_name(settings: FusionSettings, result: Mapping[str, Any]) -> dict[str, float]:
    """Return the thresholds of a result's tags; without those that are not known any more.

    Of a tag that stands for several, it is the lowest of theirs.
    """
    known = thresholds_of(settings.bundle, str(result.get("version")))
    if not known:
        return {}
    try:
        rules, labels = TagRules.read(settings), LabelMap.load(settings.bundle / "labels.json")
        served = rules.served(labels) if rules.digest == result.get("rules") else ()
    except ConfigError:  # of no use here, and no reason to show nothing
        return {}
    tags = result.get("tags")
    listed = tags if isinstance(tags, list) else ()
    names = {str(tag.get("name")) for tag in listed if isinstance(tag, dict)}
    return {tag.name: min(known[i] for i in tag.classes) for tag in served if tag.name in names}


def _print(content: dict[str, Any], *, is_stored: bool) -> None:
    result, job = content["result"], content["job"]
    say_row("post", f"{content['post_id']}{'' if is_stored else '  (not in the database)'}")
    if text := " ".join(content["text"].split()):
        say_row("text", f"{text[:_MOST_TEXT]}{' ...' if len(text) > _MOST_TEXT else ''}")
    if content["labels"]:
        say_row("labels", ", ".join(content["labels"]))
    if result is None:
        say_row("status", "no result yet")
    else:
        tagged_at = result.get("tagged_at")
        when = ago(tagged_at.timestamp(), time.time()) if hasattr(tagged_at, "timestamp") else "?"
        model = f"{result.get('model')} {result.get('version')}"
        attempts = result.get("attempts")
        partial = ", partial" if result.get("partial") else ""
        say_row("status", f"{result.get('status')} by {model}, {when}, attempt {attempts}{partial}")
        if result.get("error"):
            say_row("error", _error(result["error"]))
        for name, value in result.items():
            # Keys that came later, and values that the platform has put there.
            if name not in _OF_THE_STATUS and not isinstance(value, _OF_THE_TABLES.get(name, ())):
                say(f"{name:<9} {value}\n")
    if job is not None:
        due = f", due {job['due_at']}" if job["due_at"] and job["state"] != "dead" else ""
        say_row("job", f"{job['state']}, {job['attempts']} attempts{due}")
        if job["last_error"]:
            say_row("last", _error(job["last_error"]))
    tables = {
        name: result[name] if result and isinstance(result.get(name), kind) else kind()
        for name, kind in _OF_THE_TABLES.items()
    }
    if tables["tags"]:
        known = content["thresholds"]
        rows = [_tag(tag, known) for tag in tables["tags"]]
        print_table("", ("tag", "score", "threshold", "id"), rows)
    if near := tables["near_misses"]:
        rows = [_tag(tag, {}) for tag in near]
        print_table("", ("not given", "score", "threshold", "id"), rows)
    if tables["modalities"]:
        failures = tables["failures"]
        states = [
            (name, state, _error(failures[name]) if name in failures else "")
            for name, state in tables["modalities"].items()
        ]
        print_table("", ("modality", "state", "why"), states)


def _tag(tag: Any, thresholds: Mapping[str, float]) -> tuple[Any, Any, Any, Any]:
    if not isinstance(tag, dict):
        return tag, "", "", ""
    score, least = (
        f"{value:.3f}" if isinstance(value, (int, float)) else value
        for value in (tag.get("score"), tag.get("threshold", thresholds.get(str(tag.get("name")))))
    )
    return tag.get("name"), score, least, tag.get("id")


def _error(error: Any) -> str:
    if not isinstance(error, dict):
        return str(error)
    return f"{error.get('stage')}: {error.get('type')}: {error.get('message')}"
