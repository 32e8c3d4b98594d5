"""The bundle: what is deployed. A folder of three files, read without any training code.

``model.safetensors`` the weights, ``labels.json`` the tags, ``bundle.yaml`` everything else: the
architecture, the manifest of the features it was trained on, thresholds, metrics, name, version
and the digests of the other two.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import torch
import yaml
from pydantic import Field, ValidationError, model_validator

from config.errors import BundleError, ConfigError
from config.labels import LabelMap
from config.load import one_line
from config.settings import Section
from config.train import ModalityName, ModelSettings
from extractors.post import Modality
from fusion.calibration import Calibration
from fusion.files import replace_folder, sync_file
from fusion.models import FusionModel, build_model
from fusion.schema import FeatureManifest, InputSchema

WEIGHTS, LABELS, ABOUT = "model.safetensors", "labels.json", "bundle.yaml"
FORMAT: Literal[1] = 1


class ModalityEntry(Section):
    """One modality of the feature manifest."""

    dim: int = Field(ge=1)
    fingerprint: str = Field(min_length=1)


class About(Section):
    """The content of ``bundle.yaml``."""

    format: Literal[1]
    name: str = Field(min_length=1)
    version: str = Field(pattern=r"^\d{8}T\d{6}Z-[0-9a-f]{8}$")
    image_as_frames: bool
    ocr_mode: Literal["append", "separate"]
    features: dict[ModalityName, ModalityEntry] = Field(min_length=1)
    model: ModelSettings
    thresholds: tuple[float, ...]
    calibration: Calibration | None = None
    metrics: dict[str, float]
    weights_sha256: str
    labels_sha256: str

    @model_validator(mode="after")
    def _thresholds(self) -> About:
        if not all(0 <= t <= 1 for t in self.thresholds):
            raise ValueError("thresholds must lie in [0, 1]")
        return self

    def manifest(self) -> FeatureManifest:
        """The features that the model was trained on."""
        return FeatureManifest(
            dims={m: entry.dim for m, entry in self.features.items()},
            fingerprints={m: entry.fingerprint for m, entry in self.features.items()},
            image_as_frames=self.image_as_frames,
            ocr_mode=self.ocr_mode,
        )


@dataclass(frozen=True)
class Bundle:
    """A bundle in memory.

    Attributes:
        model: With its weights, in evaluation mode, on the CPU.
        thresholds: float32 ``(classes,)``, on calibrated scores.
        calibration: What makes the model's scores probabilities; None leaves them.
    """

    name: str
    version: str
    labels: LabelMap
    manifest: FeatureManifest
    schema: InputSchema
    model: FusionModel
    thresholds: npt.NDArray[np.float32]
    metrics: Mapping[str, float]
    calibration: Calibration | None = None


def save_bundle(
    folder: Path,
    *,
    name: str,
    model: FusionModel,
    settings: ModelSettings,
    manifest: FeatureManifest,
    labels: LabelMap,
    thresholds: npt.NDArray[np.float32],
    metrics: Mapping[str, float],
    calibration: Calibration | None = None,
) -> str:
    """Write a bundle; one that is there is replaced in one step.

    Returns:
        The version: time in UTC and the beginning of the weights' sha256; later is greater.

    Raises:
        BundleError: The folder cannot be written.
    """
    from safetensors.torch import save_file

    target = folder.resolve()
    part: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        part.chmod(0o755)
        state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
        save_file(state, part / WEIGHTS)
        text = json.dumps(labels.as_json(), ensure_ascii=False, indent=1)
        (part / LABELS).write_text(text + "\n", encoding="utf-8")
        digest = _sha256(part / WEIGHTS)
        version = f"{datetime.now(timezone.utc):%Y%m%dT%H%M%SZ}-{digest[:8]}"
        about = About(
            format=FORMAT,
            name=name,
            version=version,
            image_as_frames=manifest.image_as_frames,
            ocr_mode=manifest.ocr_mode,
            features={
                m: ModalityEntry(dim=dim, fingerprint=manifest.fingerprints[m])
                for m, dim in manifest.dims.items()
            },
            model=settings,
            thresholds=tuple(round(float(t), 6) for t in thresholds),
            calibration=calibration,
            metrics={key: float(value) for key, value in metrics.items()},
            weights_sha256=digest,
            labels_sha256=_sha256(part / LABELS),
        )
        lines = yaml.safe_dump(about.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        (part / ABOUT).write_text(lines, encoding="utf-8")
        for file in (WEIGHTS, LABELS, ABOUT):
            sync_file(part / file)
        replace_folder(part, target)
    except OSError as error:
        if part is not None:
            shutil.rmtree(part, ignore_errors=True)
        raise BundleError(f"{folder}: the bundle cannot be written: {error}") from error
    return version


def load_bundle(folder: Path) -> Bundle:
    """Read a bundle and check that its parts belong together.

    Raises:
        BundleError: A file is missing, broken, or does not fit the others.
    """
    about = _read_about(folder)
    for file, wanted in ((WEIGHTS, about.weights_sha256), (LABELS, about.labels_sha256)):
        if _sha256(folder / file) != wanted:
            raise BundleError(f"{folder / file}: is truncated, or not this bundle's (sha256)")
    try:
        labels = LabelMap.load(folder / LABELS)
        schema = InputSchema.of(about.manifest(), about.model.tokens, len(labels))
        model = build_model(schema, about.model)
    except ConfigError as error:
        raise BundleError(f"{folder}: {error}") from error
    if len(about.thresholds) != len(labels):
        raise BundleError(f"{folder}: {len(about.thresholds)} thresholds for {len(labels)} labels")
    _fill(model, folder / WEIGHTS)
    return Bundle(
        name=about.name,
        version=about.version,
        labels=labels,
        manifest=about.manifest(),
        schema=schema,
        model=model.eval().requires_grad_(False),
        thresholds=np.array(about.thresholds, dtype=np.float32),
        metrics=about.metrics,
        calibration=about.calibration,
    )


def newest_version(folder: Path) -> str | None:
    """The version that lies in the folder now, None while there is none; reads one small file."""
    try:
        text = (folder / ABOUT).read_text(encoding="utf-8")
        # The thresholds of many tags take long to parse, and the version stands before them.
        version = _parse(text.partition("\nfeatures:")[0]).get("version")
    except (OSError, ValueError, TypeError, yaml.YAMLError):
        return None
    return version if isinstance(version, str) else None


def check_fingerprints(
    manifest: FeatureManifest, given: Mapping[Modality, str], *, bundle: str
) -> None:
    """See that the extractors make the features that a bundle was trained on.

    Args:
        manifest: The bundle's.
        given: The extractors' fingerprints by modality; more than the bundle needs is fine.
        bundle: Its name or folder, for the error.

    Raises:
        BundleError: A modality is made otherwise or not at all; names it and both fingerprints.
    """
    for modality, wanted in manifest.fingerprints.items():
        found = given.get(modality)
        if found != wanted:
            raise BundleError(
                f"bundle {bundle} wants {modality} features {wanted}, "
                f"the extractors give {found or 'none'}: train it anew or set features.{modality} "
                "as it was in training"
            )


def _read_about(folder: Path) -> About:
    path = folder / ABOUT
    try:
        content = _parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        reason = f"holds no bundle ({ABOUT} is missing): train one, or name another"
        raise BundleError(f"{folder}: {reason}") from error
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise BundleError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error
    try:
        return About.model_validate(content)
    except ValidationError as error:
        raise BundleError(f"{path}: {one_line(error, About)}") from error


def _parse(text: str) -> dict[str, Any]:
    content = yaml.safe_load(text)
    if not isinstance(content, dict):
        raise TypeError("must hold keys and values")
    return cast("dict[str, Any]", content)


def _fill(model: FusionModel, path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state: dict[str, torch.Tensor] = load_file(path)
        model.load_state_dict(state, strict=True)
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise BundleError(f"{path}: does not fit the architecture: {reason}") from error


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except FileNotFoundError as error:
        raise BundleError(f"{path}: is missing") from error
    except OSError as error:
        raise BundleError(f"{path}: cannot be read: {error}") from error
    return digest.hexdigest()
