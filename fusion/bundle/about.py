"""``bundle.yaml``, and the files that belong to it; read and checked without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, TypeAlias

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from common.errors import BundleError, ConfigError, RetryableError, path_error, told
from common.files import file_digest
from common.fingerprint import with_parts
from common.post import Stream
from config.fusion_models import ModelSettings
from config.labels import LabelMap
from config.load import validation_line
from config.section import Section
from fusion.bundle.folder import ABOUT, YamlLoader, made_at
from fusion.metrics.calibration import Calibration

WEIGHTS, LABELS = "model.safetensors", "labels.json"
Averaging: TypeAlias = Literal["probabilities", "logits"]


class ModalityEntry(Section):
    """One stream of the feature manifest."""

    dim: int = Field(ge=1)
    fingerprint: str = Field(min_length=1)
    made_of: dict[str, Any] = Field(default_factory=dict)
    """The values that the fingerprint is a digest of; empty where they are not known."""


class About(Section):
    """The content of ``bundle.yaml``."""

    format: Literal[1]
    name: str = Field(min_length=1)
    version: str = Field(pattern=r"^\d{8}T\d{6}Z-[0-9a-f]{8}$")
    image_as_frames: bool
    ocr_mode: Literal["append", "separate"]
    features: dict[Stream, ModalityEntry] = Field(min_length=1)
    model: ModelSettings
    thresholds: tuple[float, ...]
    calibration: Calibration | None = None
    metrics: dict[str, float]
    seen_posts: int = 0
    """Posts that the metrics are of, where parts had been trained on all of them: they then say
    nothing of new posts, and no threshold was fitted to them."""
    subsets: dict[str, float] = Field(default_factory=dict)
    """GAP where only these modalities are shown, by their names joined with ``+``."""
    averaging: Averaging = "probabilities"
    """Values that an ensemble takes the mean of."""
    weights_sha256: str
    members_sha256: tuple[str, ...] = ()
    """Of an ensemble's further members, in their order."""
    labels_sha256: str

    @field_validator("version")
    @classmethod
    def _version(cls, version: str) -> str:
        try:
            made_at(version)
        except ValueError as error:
            raise ValueError(f"begins with no time in UTC: {version}") from error
        return version

    @model_validator(mode="after")
    def _thresholds(self) -> About:
        if not all(0 <= t <= 1 for t in self.thresholds):
            raise ValueError("thresholds must be in [0, 1]")
        return self

    @property
    def fingerprints(self) -> dict[Stream, str]:
        """Return the fingerprints of the streams, with their parts where these are known."""
        return with_parts(
            {stream: entry.fingerprint for stream, entry in self.features.items()},
            {stream: entry.made_of for stream, entry in self.features.items()},
        )

    @property
    def weights(self) -> tuple[str, ...]:
        """Return the files of the weights, the first model's first."""
        return weight_files(1 + len(self.members_sha256))


def read_about(folder: Path) -> About:
    """Return the content of a bundle's ``bundle.yaml``; BundleError where it cannot be read."""
    path = folder / ABOUT
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=YamlLoader)  # noqa: S506 - safe
        if not isinstance(content, dict):
            raise TypeError("must hold keys and values")
    except FileNotFoundError as error:
        raise BundleError(
            f"{folder}: holds no bundle ({ABOUT} is missing): train one, or name another"
        ) from error
    except OSError as error:
        raise _unreadable(path, error) from error
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise BundleError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error
    try:
        return About.model_validate(content)
    except ValidationError as error:
        raise BundleError(f"{path}: {validation_line(error, About)}") from error


def check_files(folder: Path, about: About, *, whole: bool = True) -> LabelMap:
    """Check that all files are there, and with `whole` their digests; return its labels.

    Raises:
        BundleError: The first file that is not.
    """
    digests = (about.weights_sha256, *about.members_sha256, about.labels_sha256)
    for file, sha256 in zip((*about.weights, LABELS), digests, strict=True):
        if not whole and (folder / file).is_file():
            continue
        if sha256_of(folder / file) != sha256:
            raise BundleError(f"{folder / file}: is truncated, or not this bundle's (sha256)")
    with told(f"{folder}", ConfigError, as_=BundleError):
        labels = LabelMap.load(folder / LABELS)
    if len(about.thresholds) != len(labels):
        raise BundleError(f"{folder}: {len(about.thresholds)} thresholds for {len(labels)} labels")
    return labels


def weight_files(members: int) -> tuple[str, ...]:
    """Return the names of the weight files of a bundle with this many models."""
    return (WEIGHTS, *(f"members/{i}.safetensors" for i in range(1, members)))


def sha256_of(path: Path) -> str:
    """Return the digest of a bundle's file; BundleError where it is missing."""
    try:
        return file_digest(path)
    except FileNotFoundError as error:
        raise BundleError(f"{path}: is missing") from error
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> BundleError | RetryableError:
    told = path_error(f"{path}: cannot be read", error)
    return BundleError(str(told)) if isinstance(told, ConfigError) else told
