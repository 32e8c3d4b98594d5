"""Checkpoints, and what a run starts from: a checkpoint to go on from exactly, or weights alone."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric

from common.errors import ConfigError, replaced
from common.files import part_of, publish, sync_file
from common.post_set import PostSet
from common.pth import load_weights
from config.fusion_models import ModelSettings
from config.labels import LabelMap
from config.train import TrainerSettings
from fusion.bundle.about import WEIGHTS
from fusion.bundle.bundle import load_bundle
from fusion.bundle.folder import ABOUT
from fusion.models.base import FeatureManifest, FusionModel, InputSchema

FORMAT = "insighttag.checkpoint/1"
LAST, BEST = "last.pt", "best.pt"


@dataclass
class Progress:
    """The progress of a run.

    Attributes:
        seed: Of the run; epochs derive their own from it, so that a resumed epoch is the same.
        step: Steps that are done in the epoch after the last whole one.
        loss: Sum of the losses of the posts of these steps.
        posts: Number of these posts.
        shape: What an epoch is made of; a run that stopped inside one goes on with the same only.
        stale: Validations since the best one.
    """

    seed: int
    epoch: int = 0
    step: int = 0
    loss: float = 0.0
    posts: int = 0
    shape: tuple[int, ...] = ()
    best_gap: float = -1.0
    best_epoch: int = 0
    stale: int = 0


@dataclass
class Checkpoint:
    """Everything that a run needs to go on; with empty states of the optimizer only weights.

    Attributes:
        signature: What must be equal for the weights to fit: architecture, features, labels.
        scaler: State of what scales the loss in fp16; empty without.
        learned_from: The posts that the weights were trained on, as `PostSet.as_text`.
    """

    signature: str
    progress: Progress
    model: dict[str, torch.Tensor]
    optimizer: dict[str, Any] = field(default_factory=dict)
    schedule: dict[str, Any] = field(default_factory=dict)
    average: dict[str, Any] | None = None
    scaler: dict[str, Any] = field(default_factory=dict)
    learned_from: str = ""


def signature(parts: Mapping[str, Any]) -> str:
    """Return one text for JSON values, independent of the order of their keys."""
    return json.dumps(parts, sort_keys=True, ensure_ascii=False)


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint; the one before stays intact until this one is whole."""
    part = part_of(path)
    content = {"format": FORMAT, **vars(checkpoint), "progress": vars(checkpoint.progress)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, part)
        sync_file(part)
        publish(part, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        part.unlink(missing_ok=True)
        why = error if isinstance(error, OSError) else "is the disk full?"
        raise ConfigError(f"{path}: the checkpoint cannot be written: {why}") from error


def load_checkpoint(path: Path, wanted_signature: str) -> Checkpoint:
    """Read a checkpoint; nothing in it can run code."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such checkpoint") from error
    except Exception as error:  # torch has no error of its own for what a damaged file may hold
        raise ConfigError(f"{path}: cannot be read as a checkpoint") from error
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise ConfigError(f"{path}: is not a checkpoint of {FORMAT}")
    with replaced(
        ConfigError(f"{path}: is a checkpoint of another release of this program"),
        KeyError,
        TypeError,
    ):
        checkpoint = Checkpoint(**{**content, "progress": Progress(**content["progress"])})
    if checkpoint.signature != wanted_signature:
        raise ConfigError(f"{path}: {difference(checkpoint.signature, wanted_signature)}")
    return checkpoint


def difference(saved: str, current: str) -> str:
    """Return the first difference of two signatures, as the end of a sentence."""
    before, now = json.loads(saved), json.loads(current)
    key = next(k for k in sorted({*before, *now}) if before.get(k) != now.get(k))
    was, wants = (json.dumps(side.get(key), ensure_ascii=False)[:200] for side in (before, now))
    return f"was made with another {key}: {was}, this run has {wants}"


@dataclass(frozen=True)
class Start:
    """The start of a run: where it stopped, or from step 0 with weights alone.

    Attributes:
        path: What was read, for errors.
        best: The checkpoint with the best weights of an interrupted run, where there is one.
    """

    path: Path
    checkpoint: Checkpoint
    best: Path | None = None

    @property
    def learned_from(self) -> PostSet:
        return PostSet.from_text(self.checkpoint.learned_from)

    @property
    def exact(self) -> bool:
        """Return True if the run goes on where another one stopped."""
        return bool(self.checkpoint.optimizer)


def model_signature(
    settings: ModelSettings, manifest: FeatureManifest, schema: InputSchema, labels: LabelMap
) -> str:
    """Return everything that must be equal for the weights of one run to fit another."""
    options = settings.model_dump(mode="json")
    name = settings.name
    return signature(
        {
            "model": {"name": name, "own_heads": options["auxiliary"] > 0, **options[name]},
            "features": dict(manifest.dims),
            "fingerprints": dict(manifest.fingerprints),
            "image_as_frames": manifest.image_as_frames,
            "tokens": dict(schema.tokens),
            "labels": list(labels.names),
        }
    )


def find_start(path: Path, signed: str, *, allow_pickle: bool = False) -> Start:
    """Read what ``--resume`` names.

    Args:
        path: A run's folder, a checkpoint (``last.pt`` goes on exactly, ``best.pt`` gives its
            weights), a bundle or its weights file (of an ensemble the first member's), or a legacy
            ``.pth`` of weights.
        signed: The `model_signature` of this run; checkpoints and bundles must have the same.
        allow_pickle: Whether a ``.pth`` may be a whole pickled model.
    """
    if path.is_dir() and (path / ABOUT).exists():
        return _bundled(path, path, signed)
    if path.name == WEIGHTS and (path.parent / ABOUT).exists():
        return _bundled(path.parent, path, signed)
    if path.suffix in {".safetensors", ".pth"}:
        state = load_weights(path, allow_pickle=allow_pickle, setting="trainer.allow_pickle")
        return Start(path, Checkpoint(signed, Progress(0), state))
    if path.is_dir():
        folders = (path / "ckpt", path)
        path = next((f / LAST for f in folders if (f / LAST).exists()), path / "ckpt" / LAST)
        if not path.exists():
            raise ConfigError(f"{path}: no such checkpoint; start without --resume")
    checkpoint = load_checkpoint(path, signed)
    best = path.with_name(BEST)
    return Start(path, checkpoint, best if best.exists() else None)


def seed_of(fabric: Fabric, settings: TrainerSettings, start: Start | None) -> int:
    """Return the seed of a run: the interrupted run's, the fixed one, or a new one."""
    if start is not None and start.exact:
        return start.checkpoint.progress.seed
    seed = settings.seed if settings.fix_random_seed else secrets.randbits(31)
    return int(fabric.broadcast(seed))


def fill(model: torch.nn.Module, start: Start) -> None:
    check_fit(model, start)
    model.load_state_dict(start.checkpoint.model)


def check_fit(model: torch.nn.Module, start: Start) -> None:
    """See whether the weights are this model's, by name and shape."""
    saved = start.checkpoint.model
    if isinstance(model, FusionModel):
        model.make_room(saved)
    current = model.state_dict()
    for name in sorted({*current, *saved}):
        if name not in saved or name not in current:
            reason = "is missing" if name not in saved else "is no part of this model"
        elif current[name].shape != saved[name].shape:
            reason = f"has shape {tuple(saved[name].shape)}, not {tuple(current[name].shape)}"
        else:
            continue
        raise ConfigError(f"{start.path}: does not fit this model: {name} {reason}")


def _bundled(folder: Path, path: Path, signed: str) -> Start:
    bundle = load_bundle(folder)
    model = bundle.members[0]
    signature = model_signature(bundle.settings, bundle.manifest, bundle.schema, bundle.labels)
    if signature != signed:
        raise ConfigError(f"{path}: {difference(signature, signed)}")
    learned = bundle.learned_from.as_text()
    return Start(path, Checkpoint(signed, Progress(0), model.state_dict(), learned_from=learned))
