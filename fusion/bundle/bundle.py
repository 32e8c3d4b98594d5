"""The bundle that is deployed: a folder that is read without any training code.

``model.safetensors`` has the weights (an ensemble's further members: ``members/1.safetensors`` and
so on), ``labels.json`` the tags, ``bundle.yaml`` everything else and the digests of the others.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
import yaml
from torch import nn
from torch.nn import functional

from common.errors import BundleError, ConfigError, one_line, told
from common.files import new_folder
from common.fingerprint import parts_of
from common.post_set import PostSet
from config.fusion_models import ModelSettings
from config.labels import LabelMap
from extractors.learned import KEY, posts_of_weights
from fusion.bundle.about import (
    LABELS,
    WEIGHTS,
    About,
    Averaging,
    ModalityEntry,
    check_files,
    read_about,
    sha256_of,
    weight_files,
)
from fusion.bundle.folder import ABOUT
from fusion.metrics.calibration import Calibration
from fusion.models import FusionModel, build_model
from fusion.models.base import Batch, FeatureManifest, InputSchema


class Ensemble(nn.Module):
    """The mean of its members; takes a batch and gives logits, as each of them does."""

    def __init__(
        self, members: Sequence[FusionModel], averaging: Averaging = "probabilities"
    ) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.averaging: Averaging = averaging

    def forward(self, batch: Batch) -> torch.Tensor:
        """Return logits float32 ``(posts, classes)``, whose sigmoid is the ensemble's score."""
        logits = torch.stack([member(batch) for member in self.members])  # (members, posts, cls)
        return averaged(logits, self.averaging)


def averaged(logits: torch.Tensor, averaging: Averaging) -> torch.Tensor:
    """Return the ensemble's logits ``(...)`` of its members' ``(members, ...)``."""
    if averaging == "logits":
        return logits.mean(dim=0)
    # In logarithms: where all members are sure, a mean of float32 probabilities would be exactly 0
    # or 1, and posts that differ would tie.
    yes = functional.logsigmoid(logits).logsumexp(dim=0)
    no = functional.logsigmoid(-logits).logsumexp(dim=0)
    return yes - no


@dataclass(frozen=True)
class Bundle:
    """A bundle in memory.

    Attributes:
        settings: Of the model; an ensemble's members have the same.
        model: In evaluation mode, on the CPU; several members are one `Ensemble`.
        thresholds: float32 ``(classes,)``, on calibrated scores.
        calibration: Makes the model's scores probabilities; None leaves them.
        version: Empty until it is written.
        subsets: GAP where only these modalities are shown; empty where it was not measured.
        learned_from: The posts that the fusion model was trained on.
    """

    name: str
    labels: LabelMap
    manifest: FeatureManifest
    settings: ModelSettings
    model: FusionModel | Ensemble
    thresholds: npt.NDArray[np.float32]
    metrics: Mapping[str, float] = field(default_factory=dict)
    version: str = ""
    calibration: Calibration | None = None
    subsets: Mapping[str, float] = field(default_factory=dict)
    seen_posts: int = 0
    learned_from: PostSet = field(default_factory=PostSet)

    @property
    def members(self) -> tuple[FusionModel, ...]:
        return members_of(self.model)

    @property
    def averaging(self) -> Averaging:
        return self.model.averaging if isinstance(self.model, Ensemble) else "probabilities"

    @property
    def schema(self) -> InputSchema:
        return self.members[0].schema


def save_bundle(folder: Path, bundle: Bundle, *, made_at: str | None = None) -> str:
    """Write a bundle and return its version; an older one is replaced in one step.

    The version is ``made_at``, a time in UTC, now by default, and the beginning of the weights'
    sha256; later is greater.
    """
    manifest = bundle.manifest
    with (
        told(f"{folder}: the bundle cannot be written", as_=BundleError),
        new_folder(folder) as part,
    ):
        digests = _write_weights(part, bundle)
        text = json.dumps(bundle.labels.as_json(), ensure_ascii=False, indent=1)
        (part / LABELS).write_text(text + "\n", encoding="utf-8")
        digest = (
            hashlib.sha256("".join(digests).encode()).hexdigest() if digests[1:] else digests[0]
        )
        made_at = made_at or f"{datetime.now(timezone.utc):%Y%m%dT%H%M%SZ}"
        version = f"{made_at}-{digest[:8]}"
        about = About(
            format=1,
            name=bundle.name,
            version=version,
            image_as_frames=manifest.image_as_frames,
            ocr_mode=manifest.ocr_mode,
            features={
                m: ModalityEntry(
                    dim=dim,
                    fingerprint=str(manifest.fingerprints[m]),
                    made_of=parts_of(manifest.fingerprints[m]),
                )
                for m, dim in manifest.dims.items()
            },
            model=bundle.settings,
            thresholds=tuple(round(float(t), 6) for t in bundle.thresholds),
            calibration=bundle.calibration,
            metrics={key: float(value) for key, value in bundle.metrics.items()},
            seen_posts=bundle.seen_posts,
            subsets={key: float(value) for key, value in bundle.subsets.items()},
            averaging=bundle.averaging,
            weights_sha256=digests[0],
            members_sha256=digests[1:],
            labels_sha256=sha256_of(part / LABELS),
        )
        content = about.model_dump(mode="json")
        for entry in content["features"].values():
            if not entry["made_of"]:
                del entry["made_of"]
        if not bundle.seen_posts:
            del content["seen_posts"]
        lines = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
        (part / ABOUT).write_text(lines, encoding="utf-8")
    return version


def load_bundle(folder: Path) -> Bundle:
    """Read a bundle and check that its parts belong together; else it is a `BundleError`."""
    about = read_about(folder)
    labels = check_files(folder, about)
    manifest = manifest_of(about)
    with told(f"{folder}", ConfigError, as_=BundleError):
        schema = InputSchema.of(manifest, about.model.tokens, len(labels))
        members = [build_model(schema, about.model) for _ in about.weights]
    for member, file in zip(members, about.weights, strict=True):
        _fill(member, folder / file)
    return Bundle(
        name=about.name,
        version=about.version,
        labels=labels,
        manifest=manifest,
        settings=about.model,
        model=joined(members, about.averaging).requires_grad_(False),
        thresholds=np.array(about.thresholds, dtype=np.float32),
        metrics=about.metrics,
        calibration=about.calibration,
        subsets=about.subsets,
        seen_posts=about.seen_posts,
        learned_from=posts_of_weights(folder / WEIGHTS),
    )


def manifest_of(about: About) -> FeatureManifest:
    return FeatureManifest(
        dims={stream: entry.dim for stream, entry in about.features.items()},
        fingerprints=about.fingerprints,
        image_as_frames=about.image_as_frames,
        ocr_mode=about.ocr_mode,
    )


def members_of(model: FusionModel | Ensemble) -> tuple[FusionModel, ...]:
    """Return an ensemble's members, or the one model."""
    if isinstance(model, Ensemble):
        return tuple(cast("FusionModel", member) for member in model.members)
    return (model,)


def joined(models: Sequence[FusionModel], averaging: Averaging) -> FusionModel | Ensemble:
    """Return one model, or several as an ensemble; in evaluation mode."""
    return (models[0] if len(models) == 1 else Ensemble(models, averaging)).eval()


def _write_weights(folder: Path, bundle: Bundle) -> tuple[str, ...]:
    """Write each member's weights, the first with the posts of all; return the files' digests."""
    from safetensors.torch import save_file

    paths = [folder / file for file in weight_files(len(bundle.members))]
    for member, path in zip(bundle.members, paths, strict=True):
        path.parent.mkdir(exist_ok=True)
        state = {k: v.detach().cpu().contiguous() for k, v in member.state_dict().items()}
        about: dict[str, str] | None = None
        if len(bundle.learned_from) and path.name == WEIGHTS:
            about = {KEY: json.dumps({KEY: bundle.learned_from.as_text()})}
        save_file(state, path, metadata=about)
    return tuple(sha256_of(path) for path in paths)


def _fill(model: FusionModel, path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        model.load_state_dict(load_file(path), strict=True)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise BundleError(
            f"{path}: does not fit the architecture: {one_line(error, 300)}"
        ) from error
