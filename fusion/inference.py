"""Offline inference: a list of posts in, JSON lines of tags out. What `infer_net.py` runs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch

from config.errors import ConfigError
from config.infer import InferSettings
from extractors.post import Tags
from fusion import metrics
from fusion.dataset import FeatureReader, Record, encode_targets, read_data_file
from fusion.inferer import Inferer
from fusion.progress import progress_bar


@dataclass(frozen=True)
class InferReport:
    """What came out of an inference.

    Attributes:
        posts: All that were tagged.
        labelled: Those whose true labels are known.
        metrics: Over these; empty where there are none.
    """

    posts: int
    labelled: int
    metrics: dict[str, float]


def read_input(path: Path) -> tuple[Record, ...]:
    """Read a data file, or a list of post IDs or feature files.

    Raises:
        ConfigError: It is missing, empty, or neither ``.json`` nor ``.txt``.
    """
    if path.suffix == ".json":
        return read_data_file(path)
    if path.suffix != ".txt":
        raise ConfigError(f"{path}: must be a .json data file or a .txt list")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    records = tuple(_listed(line.strip(), path) for line in lines if line.strip())
    if not records:
        raise ConfigError(f"{path}: holds no posts")
    return records


def _listed(line: str, file: Path) -> Record:
    if not line.endswith(".safetensors"):
        return Record(line)
    beside = file.parent / line
    return Record("", features=beside if beside.exists() else Path(line))


def infer(
    settings: InferSettings, posts: Path, output: Path | None, reader: FeatureReader
) -> InferReport:
    """Tag posts and write a JSON line for each, in their order.

    Args:
        settings: All of them.
        posts: Data file or list.
        output: JSON lines; None writes to standard output. A file appears when it is whole.
        reader: Where features come from.

    Raises:
        ConfigError: The input or the device is wrong, or a label is not in the bundle's map.
        BundleError: The bundle is missing or broken.
        FeatureError: Features are missing, broken, or made for another bundle.
    """
    records = read_input(posts)
    inferer = Inferer.load(
        settings.bundle,
        device=_device(settings.n_gpus),
        threads=settings.threads,
        batch_size=settings.batch_size,
    )
    targets = encode_targets(records, inferer.labels, str(posts))
    scores: list[np.ndarray[Any, np.dtype[np.float32]]] = []
    with (
        _writer(output) as out,
        progress_bar("infer", len(records), enabled=settings.progress) as bar,
    ):
        for start in range(0, len(records), settings.batch_size):
            chunk = records[start : start + settings.batch_size]
            features = [reader.features(r.post_id, r.features, inferer.fingerprints) for r in chunk]
            found = inferer.predict(features)
            for record, tags in zip(chunk, found, strict=True):
                out.write(_line(record, tags, with_scores=settings.scores))
            scores += [tags.scores for r, tags in zip(chunk, found, strict=True) if r.labels]
            bar.advance(len(chunk))
    labelled = [i for i, record in enumerate(records) if record.labels]
    measured = metrics.summary(np.stack(scores), targets[labelled]) if labelled else {}
    inferer.close()
    return InferReport(len(records), len(labelled), measured)


def _device(n_gpus: int | None) -> str:
    if n_gpus is not None and n_gpus > 1:
        raise ConfigError(f"n_gpus: {n_gpus}; inference from feature files takes 0 or 1")
    if n_gpus is None:
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    return "cuda:0" if n_gpus else "cpu"


def _line(record: Record, tags: Tags, *, with_scores: bool) -> str:
    content: dict[str, Any] = {
        "post_id": tags.post_id,
        "tags": [{"id": t.id, "name": t.name, "score": t.score} for t in tags.tags],
        "model": tags.model,
        "version": tags.version,
    }
    if record.labels:
        content["labels"] = list(record.labels)
    if with_scores:
        content["scores"] = [float(score) for score in tags.scores]
    return json.dumps(content, ensure_ascii=False) + "\n"


@contextmanager
def _writer(output: Path | None) -> Iterator[TextIO]:
    if output is None:
        yield sys.stdout
        return
    part = output.with_name(f".{output.name}.part")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with part.open("w", encoding="utf-8") as file:
            yield file
        part.replace(output)
    except OSError as error:
        raise ConfigError(f"{output}: cannot be written: {error}") from error
    finally:
        part.unlink(missing_ok=True)


def shown(found: Mapping[str, float]) -> str:
    """Metrics in one line for a person."""
    return "  ".join(f"{key} {value:.4f}" for key, value in found.items())
