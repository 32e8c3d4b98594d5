"""Feature files: the features of one post as safetensors, with the fingerprints in the header.

``<root>/<first two hex of sha256(id)>/<id>.safetensors``: one float16 array per stream. Equal
features give equal bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from common.errors import FeatureError, one_line
from common.files import write_whole
from common.fingerprint import differing, digest, known_parts, with_parts
from common.post import STREAMS, Failure, Features, Modality, Status, Stream, modality_of
from config.features import FeatureSettings

_FORMAT = "insighttag.features/2"
_FORMAT_1 = "insighttag.features/1"  # the same with a key for each of these parts
_PARTS = ("fingerprints", "statuses", "failures", "ocr_text")
_KEY = "insighttag"
_LONGEST_NAME = 180  # bytes; file systems take 255, and temporary names and suffixes are added
# Streams of one extractor each; text and OCR share one. ASR's holds the fingerprint of the text's.
_OWN: tuple[Stream, ...] = ("video", "video_lstm", "image", "audio", "asr")


@dataclass(frozen=True, slots=True)
class Header:
    """The header of a feature file.

    Attributes:
        inputs: Modality -> digest of what it was made from; only the offline scripts know it.
        learned_from: Streams whose weights were trained on this very post: a score from them
            says nothing about new posts.
    """

    post_id: str
    fingerprints: Mapping[Stream, str]
    statuses: Mapping[Modality, Status]
    failures: Mapping[Modality, Failure]
    ocr_text: str | None
    inputs: Mapping[Modality, str]
    learned_from: tuple[Stream, ...] = ()


def stream_fingerprints(
    features: FeatureSettings, by_extractor: Mapping[Stream, str]
) -> dict[Stream, str]:
    """Return the fingerprint of each stream, made of those of the extractors.

    ``ocr`` is embedded by the text extractor, so its fingerprint joins both; with ``ocr_mode:
    append`` what was read is part of ``text``, and there is no ``ocr``. With OCR disabled, text
    that a post brings along as already read is still embedded. A stream whose extractors are not
    all among those given (``video_lstm`` is one of them) is left out.
    """
    result: dict[Stream, str] = {s: by_extractor[s] for s in _OWN if s in by_extractor}
    text = by_extractor.get("text")
    engine = by_extractor.get("ocr") if features.ocr.enabled else "disabled"
    if text is not None and features.ocr_mode == "separate":
        result["text"] = text
    if text is not None and engine is not None:
        stream: Stream = "text" if features.ocr_mode == "append" else "ocr"
        result[stream] = digest({"text": text, "ocr": engine, "mode": features.ocr_mode})
    return result


def feature_path(root: Path, post_id: str) -> Path:
    """Return the path of the features of a post.

    The ID is percent-encoded; one too long for a file name is cut and ends in its hash.
    """
    raw = post_id.encode("utf-8", "surrogatepass")
    hashed = hashlib.sha256(raw).hexdigest()
    name = quote(raw, safe="")
    if len(name) > _LONGEST_NAME:
        name = f"{name[:_LONGEST_NAME]}~{hashed[:32]}"
    return root / hashed[:2] / f"{name}.safetensors"


def write_features(
    root: Path,
    features: Features,
    fingerprints: Mapping[Stream, str],
    learned_from: Sequence[Stream] = (),
) -> Path:
    """Write the features of one post whole or not at all, as `features_bytes`; return the path."""
    path = feature_path(root, features.post_id)
    content = features_bytes(features, fingerprints, learned_from=learned_from)
    write_whole(path, content, sync=False, shared=True)
    return path


def features_bytes(
    features: Features,
    fingerprints: Mapping[Stream, str],
    inputs: Mapping[Modality, str] | None = None,
    learned_from: Sequence[Stream] = (),
) -> bytes:
    """Return the content of a feature file; equal features give equal bytes.

    Args:
        features: What the extractors gave; FeatureError for an array not float16 ``(n, dim)``.
        fingerprints: Of every stream that the extractors serve, missing ones included.
        inputs: Modality -> digest of what it was made from, where that is known.
        learned_from: As in `Header`.
    """
    from safetensors.numpy import save

    for stream, array in features.arrays.items():
        if array.dtype != np.float16 or array.ndim != 2:
            raise FeatureError(
                f"{features.post_id}: {stream} must be float16 (n, dim), "
                f"not {array.dtype} {array.shape}"
            )
        if stream not in fingerprints:
            raise FeatureError(f"{features.post_id}: {stream} has no fingerprint")
    made_of = known_parts(fingerprints)
    header = {
        "format": _FORMAT,
        "post_id": features.post_id,
        "fingerprints": dict(fingerprints),
        "statuses": dict(features.statuses),
        "failures": {m: asdict(failure) for m, failure in features.failures.items()},
        "ocr_text": features.ocr_text,
        **({"inputs": dict(inputs)} if inputs else {}),
        **({"made_of": made_of} if made_of else {}),
        **({"learned_from": sorted(learned_from)} if learned_from else {}),
    }
    # One key: safetensors writes several in random order.
    metadata = {_KEY: json.dumps(header, sort_keys=True)}
    arrays = {
        str(s): np.ascontiguousarray(features.arrays[s]) for s in STREAMS if s in features.arrays
    }
    return save(arrays, metadata=metadata)


def read_features(
    root: Path, post_id: str, fingerprints: Mapping[Stream, str] | None = None
) -> Features:
    """Read the features of one post.

    `fingerprints` are what the reader needs: only these streams are read. None reads all of them,
    whatever they were made with. FeatureError names a file that is missing, broken or another
    post's, or the stream that was made by another extractor.
    """
    path = feature_path(root, post_id)
    metadata, arrays = _open(path, arrays=True)
    header = _header(path, metadata, post_id)
    if any(array.dtype != np.float16 or array.ndim != 2 for array in arrays.values()):
        raise FeatureError(f"{path}: its arrays must be float16 (n, dim)")
    for stream, needed in (fingerprints or {}).items():
        stored = header.fingerprints.get(stream)
        if stored != needed:
            raise FeatureError(
                f"{path}: {stream} was made with {stored or 'no extractor'}, but {needed} is "
                f"needed{differing(needed, stored)}: extract it again (scripts/{script_of(stream)})"
            )
    streams = [s for s in STREAMS if fingerprints is None or s in fingerprints]
    asked = dict.fromkeys(modality_of(stream) for stream in streams)
    modalities = [m for m in asked if m != "asr" or m in header.statuses]  # else it was off
    return Features(
        post_id=post_id,
        arrays={s: arrays[s] for s in streams if s in arrays},
        statuses={m: header.statuses.get(m, "missing") for m in modalities},
        failures={m: header.failures[m] for m in modalities if m in header.failures},
        ocr_text=header.ocr_text,
    )


def script_of(stream: Stream) -> str:
    """Return the script that makes a stream: of words in pictures the text's, in sound its own."""
    modality = modality_of(stream)
    name = {"ocr": "text", "asr": "audio"}.get(modality, modality)
    return f"extract_{name}_features.py"


def read_header(path: Path, post_id: str | None = None) -> Header:
    """Read the header of a feature file, without its arrays, as `read_features`.

    `post_id` is the post that it must belong to; None allows any.
    """
    return _header(path, _open(path, arrays=False)[0], post_id)


def _open(path: Path, *, arrays: bool) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            names = file.keys() if arrays else ()
            return file.metadata() or {}, {name: file.get_tensor(name) for name in names}
    except FileNotFoundError as error:
        raise FeatureError(f"{path}: no such feature file") from error
    except (OSError, SafetensorError) as error:
        raise FeatureError(
            f"{path}: cannot be read as a feature file: {one_line(error, 200)}"
        ) from error


def _header(path: Path, metadata: Mapping[str, str], post_id: str | None) -> Header:
    try:
        if metadata.get("format") == _FORMAT_1:
            content: Any = {key: json.loads(metadata[key]) for key in _PARTS}
            content |= {"format": _FORMAT, "post_id": metadata["post_id"]}
        else:
            content = json.loads(metadata.get(_KEY, '{"format": null}'))
        if content["format"] != _FORMAT:
            raise FeatureError(
                f"{path}: is not a feature file of format {_FORMAT}: its header names "
                f"{content['format']}"
            )
        header = Header(
            post_id=content["post_id"],
            fingerprints=with_parts(dict(content["fingerprints"]), content.get("made_of")),
            statuses=content["statuses"],
            failures={m: Failure(**failure) for m, failure in content["failures"].items()},
            ocr_text=content["ocr_text"],
            inputs=content.get("inputs", {}),
            learned_from=tuple(content.get("learned_from", ())),
        )
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise FeatureError(f"{path}: its header is broken: {one_line(error)}") from error
    if post_id is not None and header.post_id != post_id:
        raise FeatureError(f"{path}: belongs to post {header.post_id!r}")
    return header
