"""Write the JSON Schemas of settings and data files to docs/schemas: ``make schemas``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.files import write_whole
from config.schema import VERSION, schema_of
from config.settings import InferSettings, Settings
from config.tags import TagTexts
from config.train import BackboneTrainSettings, TrainSettings

FOLDER = Path("docs/schemas")
_TEXTS = {"type": ["array", "null"], "items": {"type": "string"}}
_POST = {
    "$schema": VERSION,
    "title": "A post of a data file: a line of .jsonl, an entry of the list in .json",
    "type": "object",
    "required": ["post_id"],
    "properties": {
        "post_id": {"type": "string", "minLength": 1, "description": "Its ID."},
        "text": {"type": ["string", "null"], "description": "Its text."},
        "ocr": {
            "type": ["string", "null"],
            "description": "Text in its pictures; if absent or blank, it is read from them.",
        },
        "images": {**_TEXTS, "description": "Pictures: paths or URLs."},
        "videos": {**_TEXTS, "description": "Videos: paths or URLs."},
        "audios": {**_TEXTS, "description": "Sounds: paths or URLs."},
        "labels": {**_TEXTS, "description": "Names of its true tags."},
        "features": {
            "type": ["string", "null"],
            "description": "Its feature file; by default found by the ID.",
        },
        "author": {
            "type": ["string", "null"],
            "description": "Its author, who stays on one side of a split.",
        },
        "created": {"type": ["string", "null"], "description": "When it was made, ISO 8601."},
    },
}
_LABELS = {
    "$schema": VERSION,
    "title": "A label map: index from 0 on -> name of the tag",
    "type": "object",
    "minProperties": 1,
    "propertyNames": {"pattern": "^[0-9]+$"},
    "additionalProperties": {"type": "string", "minLength": 1},
}


def schemas() -> dict[str, dict[str, Any]]:
    """Return each schema by the name of its file."""
    one = {"$ref": "post.schema.json"}
    tags = schema_of(TagTexts, "tags.yaml: texts of tags")
    entries = tags["properties"]["tags"]
    entries["items"] = {"anyOf": [{"type": "string"}, entries["items"]]}  # a name alone
    return {
        "settings": schema_of(Settings, "Settings of the daemon, the commands and HTTP"),
        "infer": schema_of(InferSettings, "Settings of infer_net.py on feature files"),
        "train": schema_of(TrainSettings, "Settings of train_net.py: a fusion model"),
        "backbone": schema_of(BackboneTrainSettings, "Settings of train_net.py: an encoder"),
        "tags": tags,
        "post": _POST,
        "posts": {
            "$schema": VERSION,
            "title": "A data file .json: a list of posts, or one post alone",
            "anyOf": [{"type": "array", "items": one}, one],
        },
        "labels": _LABELS,
    }


def text_of(schema: Mapping[str, Any]) -> str:
    """Return what the file of a schema holds."""
    return f"{json.dumps(schema, ensure_ascii=False, indent=2)}\n"


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, schema in schemas().items():
        write_whole(FOLDER / f"{name}.schema.json", text_of(schema))
