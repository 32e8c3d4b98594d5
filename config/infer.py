"""Typed settings of offline inference: `infer_net.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

from common.urls import redact
from config.base import PositiveInt, Seconds, Section

Count = Annotated[int, Field(ge=0)]


class CollectionSettings(Section):
    """Options for tags written to a MongoDB collection."""

    id: str = "_id"
    """Dotted path of a post's ID in its document."""
    result_path: str = "insight"
    """The sub-document that tags are written to."""
    insert: bool = True
    """Make a document for a post that the collection does not have; false skips such a post."""
    timeout_s: Seconds = 10


class RunSettings(Section):
    """Options of an inference, from feature files or from raw media."""

    n_gpus: Count | None = None
    """0 runs on the CPU; null takes one GPU where there is one. Each has a process of its own."""
    processes: PositiveInt = 1
    """Processes on the CPU."""
    batch_size: PositiveInt = 64
    """Posts that are written, and on feature files inferred, together."""
    output: str | None = None
    """A file, or ``mongodb://.../database.collection``; null writes to standard output."""
    format: Literal["auto", "jsonl", "csv", "mongodb"] = "auto"
    """``auto`` goes by the output's name."""
    scores: bool = True
    """Write the score of every class next to the tags."""
    skip_bad: bool = False
    """Leave out posts that cannot be tagged, count and list them; otherwise the first one ends
    the run."""
    collection: CollectionSettings = CollectionSettings()
    progress_dir: Path = Path("workshop/infer")
    """Folder for the list of posts that a run into MongoDB left out; others list them next to the
    output."""
    allow_pickle: bool = False
    """Load a ``.pth`` that is a whole pickled model, which runs code that is in the file."""
    progress: bool = True

    @field_validator("output")
    @classmethod
    def _named(cls, value: str | None) -> str | None:
        if value is not None and is_database(value) and not collection_of(value):
            raise ValueError(f"{redact(value)!r} must end in /database.collection")
        return value


class InferSettings(RunSettings):
    """All settings of `infer_net.py` on feature files."""

    bundle: Path = Path("workshop/weights/insight")
    features: Path = Path("workshop/features")
    """Root of the feature files, for inputs that name only post IDs."""
    threads: PositiveInt | None = None


def is_database(output: str) -> bool:
    """Tell whether an output is a MongoDB URL."""
    return output.startswith(("mongodb://", "mongodb+srv://"))


def collection_of(url: str) -> tuple[str, str] | None:
    """Database and collection that a URL ends in, before its options."""
    base = url.partition("?")[0]
    rest = base.partition("://")[2].rpartition("@")[2]
    database, _, collection = rest.partition("/")[2].partition(".")
    return (database, collection) if database and collection else None
