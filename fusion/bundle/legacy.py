"""Legacy ``.pth`` weights of fusion models: into a bundle and out of one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from common.errors import BundleError, ConfigError, told
from common.pth import load_weights
from fusion.bundle.about import WEIGHTS
from fusion.bundle.bundle import joined, load_bundle, save_bundle
from fusion.bundle.folder import ABOUT, WEIGHT_FILES

if TYPE_CHECKING:
    from fusion.models import FusionModel


def save_legacy(model: torch.nn.Module, path: Path, *, whole: bool) -> None:
    """Write a ``.pth`` file that plain ``torch.load`` reads: the whole model, or its state dict."""
    torch.save(model if whole else dict(model.state_dict()), path)


def fit(model: FusionModel, state: Mapping[str, torch.Tensor], path: Path) -> None:
    """Fill a model with weights; heads that are there for training only may be missing or extra."""
    own = {key: value for key, value in model.state_dict().items() if key.startswith("own.")}
    weights = {k: v for k, v in state.items() if not k.startswith("own.") or k in own}
    try:
        model.load_state_dict({**own, **weights}, strict=True)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = " ".join(lines[1:2] or lines)[:300]
        raise ConfigError(
            f"{path}: does not fit the architecture of the bundle: {reason}"
        ) from error


def resolve_model(
    model: Path, bundle: Path, target: Path, *, allow_pickle: bool, setting: str = "allow_pickle"
) -> Path:
    """Return the folder of the bundle that ``--best_model`` means.

    That is a bundle's folder, its ``model.safetensors``, or a file with other weights for
    ``bundle``, of which a bundle is made in ``target``. The rest is as in `load_weights`.
    """
    if model.is_dir() or model.suffix not in WEIGHT_FILES:
        return model
    if model.name == WEIGHTS and (model.parent / ABOUT).exists():
        return model.parent
    with_weights(bundle, model, target, allow_pickle=allow_pickle, setting=setting)
    return target


def with_weights(
    bundle: Path,
    weights: Path,
    target: Path,
    *,
    allow_pickle: bool = False,
    setting: str = "allow_pickle",
) -> str:
    """Make a bundle that differs from another in its weights only; return its version.

    Labels, thresholds and calibration stay; the version gets the new weights' digest. Weights of
    one model make an ensemble's bundle one of that model alone.
    """
    state = load_weights(weights, allow_pickle=allow_pickle, setting=setting)
    with told(
        f"{weights}: holds weights alone; the rest comes from the bundle of the config", BundleError
    ):
        base = load_bundle(bundle)
    parts = _of_members(state) if all(k.startswith("members.") for k in state) else [state]
    members = base.members[: len(parts)]
    if len(parts) > len(members):
        raise ConfigError(f"{weights}: holds {len(parts)} members, bundle {bundle} {len(members)}")
    for member, part in zip(members, parts, strict=True):
        fit(member, part, weights)
    changed = replace(
        base, model=joined(members, base.averaging), metrics={}, subsets={}, seen_posts=0
    )
    return save_bundle(target, changed, made_at=base.version.partition("-")[0])


def _of_members(state: Mapping[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Split an ensemble's state dict into its members'."""
    parts: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in state.items():
        _, index, name = key.split(".", 2)
        parts.setdefault(int(index), {})[name] = value
    return [parts[index] for index in sorted(parts)]
