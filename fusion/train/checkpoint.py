"""Checkpoints: the state of a training run, written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch

from common.errors import ConfigError
from common.files import part_of, publish, sync_file

FORMAT = "insighttag.checkpoint/1"


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        seed: Of the run; epochs derive their own from it, so that a resumed epoch is the same.
        epoch: Epochs that are done.
        step: Steps that are done in the epoch after them.
        loss: Sum of the losses of the posts of these steps.
        posts: How many posts these were.
        shape: What an epoch is made of; a run that stopped inside one goes on with the same only.
        best_gap: Best validation GAP so far, -1 before the first.
        best_epoch: Its epoch, 0 before the first.
        stale: Validations since then.
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
    """Everything that a run needs to go on.

    Attributes:
        signature: What must be equal for the weights to fit: architecture, features, labels.
        model: state_dict.
        optimizer: state_dict; empty in a checkpoint that only holds weights.
        schedule: state_dict.
        average: state_dict of the moving average, or None.
        scaler: state_dict of what scales the loss in fp16; empty without.
    """

    signature: str
    progress: Progress
    model: dict[str, torch.Tensor]
    optimizer: dict[str, Any] = field(default_factory=dict)
    schedule: dict[str, Any] = field(default_factory=dict)
    average: dict[str, Any] | None = None
    scaler: dict[str, Any] = field(default_factory=dict)


def signature(parts: Mapping[str, Any]) -> str:
    """One text for JSON values, independent of the order of their keys."""
    return json.dumps(parts, sort_keys=True, ensure_ascii=False)


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint; the one before stays intact until this one is whole.

    Raises:
        ConfigError: The folder cannot be written, or the disk is full.
    """
    part = part_of(path)
    content = {
        "format": FORMAT,
        "signature": checkpoint.signature,
        "progress": vars(checkpoint.progress),
        "model": checkpoint.model,
        "optimizer": checkpoint.optimizer,
        "schedule": checkpoint.schedule,
        "average": checkpoint.average,
        "scaler": checkpoint.scaler,
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, part)
        sync_file(part)
        publish(part, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        part.unlink(missing_ok=True)
        raise ConfigError(f"{path}: the checkpoint cannot be written: {error}") from error


def load_checkpoint(path: Path, wanted_signature: str) -> Checkpoint:
    """Read a checkpoint; nothing in it can run code.

    Raises:
        ConfigError: It is missing, broken, of another release, or of another architecture,
            features or labels.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such checkpoint") from error
    except Exception as error:  # torch has no error of its own for what a damaged file may hold
        raise ConfigError(f"{path}: cannot be read as a checkpoint") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ConfigError(f"{path}: is no checkpoint of {FORMAT}")
    try:
        checkpoint = _checkpoint(content)
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{path}: is a checkpoint of another release of this program") from error
    if checkpoint.signature != wanted_signature:
        raise ConfigError(f"{path}: {difference(checkpoint.signature, wanted_signature)}")
    return checkpoint


def _checkpoint(content: Mapping[str, Any]) -> Checkpoint:
    return Checkpoint(
        signature=cast(str, content["signature"]),
        progress=Progress(**content["progress"]),
        model=content["model"],
        optimizer=content["optimizer"],
        schedule=content["schedule"],
        average=content["average"],
        scaler=content.get("scaler", {}),
    )


def difference(found: str, wanted: str) -> str:
    """What two signatures differ in first, as the end of a sentence."""
    before, now = json.loads(found), json.loads(wanted)
    key = next(k for k in sorted({*before, *now}) if before.get(k) != now.get(k))
    was, wants = (json.dumps(side.get(key), ensure_ascii=False)[:200] for side in (before, now))
    return f"was made with another {key}: {was}, this run has {wants}"
