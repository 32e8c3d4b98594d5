"""Feature files: the features of one post as safetensors, with the fingerprints in the header.

``<root>/<first two hex of sha256(id)>/<id>.safetensors``: one float16 array per modality.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

import numpy as np

from config.errors import FeatureError
from extractors.post import MODALITIES, Failure, FeatureArray, Features, Modality, Status

_FORMAT = "insighttag.features/1"
_LONGEST_NAME = 180
_SUFFIX = ".safetensors"


def feature_path(root: Path, post_id: str) -> Path:
    """Where the features of a post lie.

    The ID is percent-encoded; one too long for a file name is cut and ends in its hash.
    """
    raw = post_id.encode("utf-8", "surrogatepass")
    hashed = hashlib.sha256(raw).hexdigest()
    name = quote(raw, safe="")
    if len(name) > _LONGEST_NAME:
        name = f"{name[:_LONGEST_NAME]}~{hashed[:32]}"
    return root / hashed[:2] / f"{name}{_SUFFIX}"


def write_features(root: Path, features: Features, fingerprints: Mapping[Modality, str]) -> Path:
    """Write the features of one post; a reader sees the old file or the new one, never half.

    Args:
        root: Folder of all feature files.
        features: What the extractors gave.
        fingerprints: Of every modality that the extractors serve, missing ones included.

    Returns:
        The file's path.

    Raises:
        FeatureError: An array is not float16 ``(n, dim)``, or has no fingerprint.
    """
    from safetensors.numpy import save

    for modality, array in features.arrays.items():
        if array.dtype != np.float16 or array.ndim != 2:
            raise FeatureError(
                f"{features.post_id}: {modality} must be float16 (n, dim), "
                f"not {array.dtype} {array.shape}"
            )
        if modality not in fingerprints:
            raise FeatureError(f"{features.post_id}: {modality} has no fingerprint")
    header = {
        "format": _FORMAT,
        "post_id": features.post_id,
        "fingerprints": json.dumps(dict(fingerprints)),
        "statuses": json.dumps(dict(features.statuses)),
        "failures": json.dumps({m: asdict(failure) for m, failure in features.failures.items()}),
        "ocr_text": json.dumps(features.ocr_text),
    }
    arrays = {str(m): np.ascontiguousarray(a) for m, a in features.arrays.items()}
    path = feature_path(root, features.post_id)
    _write_atomically(path, save(arrays, metadata=header))
    return path


def read_features(
    root: Path, post_id: str, fingerprints: Mapping[Modality, str] | None = None
) -> Features:
    """Read the features of one post.

    Args:
        root: Folder of all feature files.
        post_id: The post's ID.
        fingerprints: What the reader needs; only these modalities are read. None reads all of
            them, whatever they were made with.

    Raises:
        FeatureError: The file is missing or broken, belongs to another post, or a modality was
            made by another extractor; the line names which.
    """
    path = feature_path(root, post_id)
    header, arrays = _read(path, post_id)
    made_with: dict[str, str] = header["fingerprints"]
    wanted = (
        MODALITIES if fingerprints is None else tuple(m for m in MODALITIES if m in fingerprints)
    )
    for modality in wanted if fingerprints is not None else ():
        found, needed = made_with.get(modality), (fingerprints or {})[modality]
        if found != needed:
            raise FeatureError(
                f"{path}: {modality} was made with {found or 'no extractor'}, "
                f"but {needed} is needed: extract it again"
            )
    return Features(
        post_id=post_id,
        arrays={m: arrays[m] for m in wanted if m in arrays},
        statuses={m: cast(Status, header["statuses"].get(m, "missing")) for m in wanted},
        failures={m: Failure(**header["failures"][m]) for m in wanted if m in header["failures"]},
        ocr_text=header["ocr_text"],
    )


def read_fingerprints(path: Path) -> dict[Modality, str]:
    """The fingerprints that a feature file was made with.

    Raises:
        FeatureError: The file is missing or broken.
    """
    header, _ = _read(path, None)
    return cast("dict[Modality, str]", header["fingerprints"])


def _read(path: Path, post_id: str | None) -> tuple[dict[str, Any], dict[Modality, FeatureArray]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  no mapping
    except FileNotFoundError as error:
        raise FeatureError(f"{path}: no such feature file") from error
    except (OSError, SafetensorError) as error:
        raise FeatureError(f"{path}: cannot be read as a feature file") from error
    if metadata.get("format") != _FORMAT:
        raise FeatureError(f"{path}: is no feature file of format {_FORMAT}")
    if post_id is not None and metadata.get("post_id") != post_id:
        raise FeatureError(f"{path}: belongs to post {metadata.get('post_id')!r}")
    try:
        header = {
            key: json.loads(metadata[key])
            for key in ("fingerprints", "statuses", "failures", "ocr_text")
        }
    except (KeyError, ValueError) as error:
        raise FeatureError(f"{path}: its header is broken") from error
    if any(array.dtype != np.float16 or array.ndim != 2 for array in arrays.values()):
        raise FeatureError(f"{path}: its arrays must be float16 (n, dim)")
    return header, cast("dict[Modality, FeatureArray]", arrays)


def _write_atomically(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
