"""The demo's final table and its machine-readable report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.files import write_whole
from common.post import MODALITIES, Post
from demo.evaluate import Evaluation
from scripts.commands.common import console


def show_posts(posts: Sequence[Post], results: Mapping[str, Mapping[str, Any]]) -> None:
    """Return the table of posts, true labels, predicted tags and modalities used."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("post", "true", "predicted", "used"):
        table.add_column(column, overflow="fold")
    for post in posts:
        result = results.get(post.post_id, {})
        predicted = Text()
        for tag in result.get("tags", ()):
            right = tag["name"] in post.labels
            predicted.append(f"{tag['name']} {tag['score']:.2f}  ", "green" if right else "red")
        missed = [name for name in post.labels if name not in _names(result)]
        true = Text()
        for name in post.labels:
            true.append(f"{name}  ", "bold red" if name in missed else "")
        statuses = result.get("modalities", {})
        used = " ".join(m for m in MODALITIES if statuses.get(m) == "ok")
        table.add_row(Text(post.post_id), true, predicted, Text(used))
    console().print(table)


def _names(result: Mapping[str, Any]) -> set[str]:
    return {str(tag["name"]) for tag in result.get("tags", ())}


def show_summary(
    evaluation: Evaluation, content: Mapping[str, Any], places: Mapping[str, Path]
) -> None:
    """GAP, what each modality is worth, speed, and where everything lies."""
    posts, tagged = content["posts"], content["tagged"]
    print(f"tagged           {tagged} of {posts} posts, {content['posts_per_s']:.1f} posts/s")
    print(f"GAP@20           {content['gap']:.4f}  of the tags in the database")
    print(
        f"                 {evaluation.gap_all_scores:.4f}  of the scores of every class, offline"
    )
    for modality, gap in content["gap_without"].items():
        print(f"  without {modality:<8}{gap:.4f}")
    print(f"offline = online {evaluation.same} of {posts} posts have the same tags and scores")
    print(f"seconds          {content['seconds']:.0f}")
    for name, path in places.items():
        print(f"{name:<17}{path}")


def write_report(path: Path, content: Mapping[str, Any]) -> None:
    """Write the report, whole or not at all."""
    write_whole(path, json.dumps(content, indent=2))
