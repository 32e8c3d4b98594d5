"""What a run starts from: a checkpoint to go on exactly, or weights alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from common.errors import ConfigError
from config.fusion_models import ModelSettings
from config.labels import LabelMap
from fusion.bundle.bundle import ABOUT, WEIGHTS, About, load_bundle
from fusion.bundle.legacy import load_legacy
from fusion.data.schema import FeatureManifest, InputSchema
from fusion.train.checkpoint import Checkpoint, Progress, difference, load_checkpoint, signature

LAST, BEST = "last.pt", "best.pt"


@dataclass(frozen=True)
class Start:
    """Where a run begins.

    Attributes:
        path: What was read, for errors.
        checkpoint: Without an optimizer it is weights alone: the run starts anew with them.
        best: The checkpoint with the best weights of an interrupted run, where there is one.
    """

    path: Path
    checkpoint: Checkpoint
    best: Path | None = None

    @property
    def exact(self) -> bool:
        """Whether the run goes on where another one stopped."""
        return bool(self.checkpoint.optimizer)


def model_signature(
    settings: ModelSettings, manifest: FeatureManifest, schema: InputSchema, labels: LabelMap
) -> str:
    """What must be equal for the weights of one run to serve another."""
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


def find_start(path: Path, mark: str, *, allow_pickle: bool = False) -> Start:
    """Read what ``--resume`` names.

    Args:
        path: A run's folder, a checkpoint (``last.pt`` goes on exactly, ``best.pt`` gives its
            weights), a bundle or its weights file (of an ensemble the first member's), or a
            legacy ``.pth`` of weights.
        mark: The `model_signature` of this run; checkpoints and bundles must have the same.
        allow_pickle: Whether a ``.pth`` may be a whole pickled model.

    Raises:
        ConfigError: It is missing, broken, or of another architecture, features or labels.
        BundleError: A bundle is broken.
    """
    if path.is_dir() and (path / ABOUT).exists():
        return _bundled(path, path, mark)
    if path.name == WEIGHTS and (path.parent / ABOUT).exists():
        return _bundled(path.parent, path, mark)
    if path.suffix in {".safetensors", ".pth"}:
        state = load_legacy(path, allow_pickle=allow_pickle, setting="trainer.allow_pickle")
        return Start(path, Checkpoint(mark, Progress(0), state))
    if path.is_dir():
        folders = (path / "ckpt", path)
        path = next((f / LAST for f in folders if (f / LAST).exists()), path / "ckpt" / LAST)
        if not path.exists():
            raise ConfigError(f"{path}: no such checkpoint; start without --resume")
    checkpoint = load_checkpoint(path, mark)
    best = path.with_name(BEST)
    return Start(path, checkpoint, best if best.exists() else None)


def fill(model: torch.nn.Module, start: Start) -> None:
    """Put the weights into a model.

    Raises:
        ConfigError: They do not fit; names the first that does not.
    """
    check_fit(model, start)
    model.load_state_dict(start.checkpoint.model)


def check_fit(model: torch.nn.Module, start: Start) -> None:
    """See whether the weights are this model's, by name and shape.

    Raises:
        ConfigError: They do not fit; names the first that does not.
    """
    wanted, found = model.state_dict(), start.checkpoint.model
    for name in sorted({*wanted, *found}):
        if name not in found or name not in wanted:
            where = "is missing" if name not in found else "is no part of this model"
            raise ConfigError(f"{start.path}: does not fit this model: {name} {where}")
        if wanted[name].shape != found[name].shape:
            shapes = f"has shape {tuple(found[name].shape)}, not {tuple(wanted[name].shape)}"
            raise ConfigError(f"{start.path}: does not fit this model: {name} {shapes}")


def _bundled(folder: Path, path: Path, mark: str) -> Start:
    bundle = load_bundle(folder)
    model = bundle.members[0]
    options = About.model_validate(yaml.safe_load((folder / ABOUT).read_bytes())).model
    found = model_signature(options, bundle.manifest, bundle.schema, bundle.labels)
    if found != mark:
        raise ConfigError(f"{path}: {difference(found, mark)}")
    return Start(path, Checkpoint(mark, Progress(0), model.state_dict()))
