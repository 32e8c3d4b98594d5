"""Check that the step that should find a broken post names it with its reason."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from walk_rig.broken import WAYS, Plant, Step

FILES: Mapping[Step, tuple[str, ...]] = {
    "pull": ("posts.rejected.jsonl",),
    "download": ("media/manifest.jsonl", "media/rejected.jsonl"),
    "extract image": ("features/failures_image.jsonl",),
    "extract video": ("features/failures_video.jsonl",),
    "build": ("data/left_out.jsonl",),
}
"""Step -> its files about posts that it left out, in the folder of the walk."""

_OTHERS = ("features/failures_text.jsonl", "features/failures_audio.jsonl")


@dataclass(frozen=True)
class Note:
    """A line of one of the files."""

    file: str
    post_id: str
    reason: str


@dataclass(frozen=True)
class Verdict:
    """The end of a planted post; `note` is None where it was not named."""

    plant: Plant
    note: Note | None


def judge(folder: Path, plants: Sequence[Plant], cut: Mapping[str, int]) -> list[Verdict]:
    """Look each planted post up.

    Args:
        folder: Of the walk.
        plants: What was broken.
        cut: post_id -> line that was cut, of `broken.cut_lines`.
    """
    by_line = {line: post_id for post_id, line in cut.items()}
    notes_by_post: dict[tuple[Step, str], list[Note]] = {}
    for step, files in FILES.items():
        for note in notes(folder, files, by_line):
            notes_by_post.setdefault((step, note.post_id), []).append(note)
    verdicts = []
    for plant in plants:
        way = WAYS[plant.way]
        fits = (
            n for n in notes_by_post.get((way.found_by, plant.post_id), []) if way.says in n.reason
        )
        verdicts.append(Verdict(plant, next(fits, None)))
    return verdicts


def false_alarms(folder: Path, plants: Sequence[Plant], cut: Mapping[str, int]) -> list[Note]:
    """Return posts that are named and were not broken."""
    planted = {plant.post_id for plant in plants}
    by_line = {line: post_id for post_id, line in cut.items()}
    files = [file for files in FILES.values() for file in files]
    return [n for n in notes(folder, [*files, *_OTHERS], by_line) if n.post_id not in planted]


def notes(folder: Path, files: Sequence[str], by_line: Mapping[int, str]) -> Iterator[Note]:
    """Read the notes of the files on posts that were left out, or that lack something."""
    for file in files:
        path = folder / file
        if not path.exists():
            continue
        for line in path.read_text(encoding="utf-8").splitlines():
            content: dict[str, Any] = json.loads(line)
            if content.get("status") == "ok":
                continue
            post_id = content.get("post_id") or content.get("_id")
            if post_id is None and "line" in content:
                post_id = by_line.get(int(content["line"]))
            yield Note(file, str(post_id), _reason(content))


def _reason(content: Mapping[str, Any]) -> str:
    reason = content.get("reason")
    if isinstance(reason, dict):
        return f"{reason['type']}: {reason['message']}"
    if reason is None:
        return f"{content.get('stage')} {content.get('type')}: {content.get('message')}"
    detail = content.get("detail")
    return f"{reason}: {detail}" if detail else str(reason)


def rows(verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    """Return one row a way: ``{way, posts, named, step, file, reason}``, with the first reason."""
    table = []
    for name, way in WAYS.items():
        mine = [v for v in verdicts if v.plant.way == name]
        if not mine:
            continue
        named = [v.note for v in mine if v.note is not None]
        table.append(
            {
                "way": name,
                "posts": len(mine),
                "named": len(named),
                "step": way.found_by,
                "file": named[0].file if named else "",
                "reason": named[0].reason[:160] if named else "",
            }
        )
    return table
