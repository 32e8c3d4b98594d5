"""Backbones with a head that tags posts from their pictures, clips, sound or texts."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import nn

from common.errors import ConfigError, one_line
from common.files import write_whole
from common.post_set import PostSet
from config.features import LstmSizes
from extractors.learned import KEY
from extractors.models.visual import AttentionLstm
from fusion.backbones.media import STREAM, Kind, best_of_post
from fusion.models.base import Batch, start_head
from fusion.train.losses import Objective

# Cells a side that tell where something moves. It is the size of a layer's output: weights trained
# with this one do not fit another.
_GRID = 7
# Summed grey levels of the cells: under it a frame counts as still. Much lower takes noise for
# movement, much higher misses small things that move.
_STILL = 5.0
CHANNELS: dict[Kind, int] = {"picture": 3, "clip": 3, "patch": 1}


def create_backbone(arch: str, kind: Kind, size: tuple[int, int], weights: str) -> nn.Module:
    """Return a timm model without its classifier.

    Args:
        arch: timm's name.
        kind: Pictures and clips have three channels, patches one.
        size: Height and width of the input in pixels; models whose parameters depend on it (vision
            transformers) are built for it.
        weights: ``scratch``, ``pretrained``, or the path of a state_dict in safetensors.
    """
    import timm

    if not timm.is_model(arch):
        near = difflib.get_close_matches(arch, timm.list_models(), n=3)
        raise ConfigError(f"arch {arch!r}: timm has no such model; near: {', '.join(near) or '-'}")
    options: dict[str, Any] = {
        "num_classes": 0,
        "in_chans": CHANNELS[kind],
        "pretrained": weights == "pretrained",
    }
    try:
        fixed = timm.get_pretrained_cfg(arch)
        if fixed is not None and fixed.fixed_input_size:  # others take any size and no such option
            options["img_size"] = size
        model = timm.create_model(arch, **options)
        if weights not in ("scratch", "pretrained"):
            model.load_state_dict(load_file(weights), strict=True)
    except Exception as error:  # timm, hub and safetensors share no base class
        reason = one_line(error, 300)
        raise ConfigError(f"arch {arch}, weights {weights}: {reason}") from error
    if not isinstance(model, nn.Module):
        raise ConfigError(f"arch {arch}: is not a torch model")
    return model


class Normalize(nn.Module):
    """Pixels in [0, 255] -> the architecture's normalised input; patches pass as they are."""

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self, backbone: nn.Module, kind: Kind) -> None:
        super().__init__()
        mean, std = (0.0,), (1.0 / 255,)
        if kind != "patch":
            from timm.data.config import resolve_model_data_config

            data_config = resolve_model_data_config(backbone)
            mean, std = data_config["mean"], data_config["std"]
        shape = (1, -1, 1, 1)
        self.register_buffer("mean", torch.tensor(mean).view(shape) * 255, persistent=False)
        self.register_buffer("scale", 1 / (torch.tensor(std).view(shape) * 255), persistent=False)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalise float32 ``(n, channels, height, width)``; the shape stays."""
        return (pixels - self.mean) * self.scale


class MotionHead(nn.Module):
    """Ordered frame features of a clip -> one vector, by a recurrence over time.

    Averaged feature maps forget where things are, and the label of a movement is visible only in
    how positions change. So each frame's feature must also tell where in the frame the clip
    changes (`where_it_moves`): that lesson needs no labels, and the movement follows from it.
    """

    def __init__(self, dim: int, width: int = 128) -> None:
        super().__init__()
        self.project = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, width))
        self.recurrence = nn.GRU(2 * width, width, batch_first=True, bidirectional=True)
        self.locate = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, _GRID * _GRID))
        self.dim = 4 * width + width

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        """Map frame features ``(clips, m, dim)`` to ``(clips, self.dim)``."""
        narrow = self.project(frames)  # (clips, m, width)
        change = torch.diff(narrow, dim=1, prepend=narrow[:, :1])
        states, _ = self.recurrence(torch.cat([narrow, change], dim=2))  # (clips, m, 2·width)
        return torch.cat([states.mean(1), states.amax(1), narrow.mean(1)], dim=1)

    def lesson(self, frames: torch.Tensor, clips: torch.Tensor) -> torch.Tensor:
        """Return the cross entropy of where each frame's feature says that the clip changes.

        Features are ``(clips, m, dim)``, the clips float32 pixels ``(clips, m, 3, S, S)``.
        """
        truth = where_it_moves(clips)  # (clips, m, cells)
        guess = torch.log_softmax(self.locate(frames), dim=2)
        moving = truth.sum(dim=2) > 0
        return -(truth * guess).sum() / moving.sum().clamp(min=1)


@torch.no_grad()
def where_it_moves(clips: torch.Tensor) -> torch.Tensor:
    """Return the places in which each frame differs from what its clip mostly shows.

    Of float32 pixels in [0, 255] ``(clips, m, 3, S, S)`` these are float32 ``(clips, m, 49)``,
    shares of a 7×7 grid that sum to 1; all 0 in a still frame.
    """
    still = clips.median(dim=1, keepdim=True).values
    change = (clips - still).abs().mean(dim=2)  # (clips, m, S, S)
    cells = nn.functional.adaptive_avg_pool2d(change, _GRID).flatten(2)  # (clips, m, cells)
    # A change of all cells alike is noise or a moving camera.
    above = (cells - cells.mean(dim=2, keepdim=True)).clamp(min=0)
    total = above.sum(dim=2, keepdim=True)
    return torch.where(total > _STILL, above / total.clamp(min=1e-6), 0.0)


class Tagger(nn.Module):
    """A model that gives logits ``(posts, classes)`` by a linear layer at its end."""

    classify: nn.Linear

    def start_at(self, frequencies: torch.Tensor) -> None:
        """Let the untrained classifier predict each class's frequency ``(classes,)``."""
        start_head(self.classify, frequencies, 0.01)


class MediaTagger(Tagger):
    """Backbone -> dropout -> classifier -> mean over segments -> best of the post's media.

    A picture or a patch of sound is a clip of one segment. Clips whose order tells go through a
    `MotionHead` instead of the mean. The labels belong to posts, so a post's score is that of its
    best medium (multiple-instance learning).

    Source: TSN (arXiv 1608.00859), segments with an averaging consensus.
    """

    def __init__(
        self,
        backbone: nn.Module,
        size: tuple[int, int],
        classes: int,
        dropout: float,
        kind: Kind = "picture",
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.normalize = Normalize(backbone, kind)
        self.dim = _feature_dim(backbone, kind, size)
        self.motion = MotionHead(self.dim) if kind == "clip" else None
        self.dropout = nn.Dropout(dropout)
        self.classify = nn.Linear(self.motion.dim if self.motion else self.dim, classes)

    def forward(self, batch: Batch) -> torch.Tensor:
        """Return logits float32 ``(posts, classes)`` of ``(posts, n, segments, H, W, chans)``."""
        return self.outputs(batch)[0]

    def outputs(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logits, and for ordered clips the loss `MotionHead.lesson`, else 0."""
        mask = batch.masks[STREAM]  # (posts, n)
        media = batch.tokens[STREAM][mask].float()  # (media, segments, H, W, channels)
        count, segments = media.shape[:2]
        media = media.permute(0, 1, 4, 2, 3)  # (media, segments, channels, H, W)
        pixels = self.normalize(media.flatten(0, 1))  # (media * segments, channels, H, W)
        vectors = self.backbone(pixels.contiguous(memory_format=torch.channels_last))
        lesson = vectors.new_zeros(())
        if self.motion is None:
            scores = self.classify(self.dropout(vectors))
            # (media * segments, classes) -> (media, segments, classes) -> (media, classes)
            scores = scores.float().view(count, segments, -1).mean(dim=1)
        else:
            frames = vectors.float().view(count, segments, -1)  # (media, segments, dim)
            lesson = self.motion.lesson(frames, media)
            scores = self.classify(self.dropout(self.motion(frames)))
        return best_of_post(scores.float(), mask, self.classify.bias), lesson


class MediaObjective(Objective):
    """The loss of a `MediaTagger`, and what its media teach without labels."""

    model: MediaTagger

    def forward(self, batch: Batch) -> torch.Tensor:
        logits, lesson = self.model.outputs(batch)
        # The lesson counts as much as all classes together: the loss is their mean.
        total: torch.Tensor = self.loss(logits, batch.truth) + lesson / logits.shape[1]
        return total


class LstmTagger(Tagger):
    """Features of the frames of posts' videos -> logits of the posts."""

    def __init__(self, dim: int, sizes: LstmSizes, classes: int) -> None:
        super().__init__()
        self.lstm = AttentionLstm(dim, sizes)
        self.classify = nn.Linear(sizes.width, classes)

    def forward(self, batch: Batch) -> torch.Tensor:
        """Return logits float32 ``(posts, classes)`` from tokens ``(posts, videos, n, dim)``."""
        mask = batch.masks[STREAM]  # (posts, videos)
        scores = self.classify(self.lstm(batch.tokens[STREAM][mask].float()))
        return best_of_post(scores.float(), mask, self.classify.bias)


def _feature_dim(backbone: nn.Module, kind: Kind, size: tuple[int, int]) -> int:
    training = backbone.training
    backbone.eval()
    with torch.no_grad():
        features = backbone(torch.zeros(1, CHANNELS[kind], *size))
    backbone.train(training)
    if features.ndim != 2:
        raise ConfigError(f"the model gives {tuple(features.shape)}, not one vector for each input")
    return int(features.shape[1])


def save_weights(
    model: nn.Module,
    out: Path,
    key: str,
    about: Mapping[str, object],
    learned_from: PostSet | None = None,
) -> None:
    """Write the state_dict that an extractor loads, whole or not at all.

    Args:
        model: A timm model with ``num_classes=0``, or an `AttentionLstm`.
        out: Path of the ``.safetensors`` file.
        key: ``backbone`` or ``lstm``.
        about: Kept in the file's header as JSON under the key, values as texts.
        learned_from: Kept there too: features of these posts will be marked.
    """
    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    texts = {name: str(value) for name, value in about.items()}
    if learned_from is not None:
        texts[KEY] = learned_from.as_text()
    # One key: safetensors writes several in random order, and equal weights must be equal files.
    write_whole(out, save(state, metadata={key: json.dumps(texts, sort_keys=True)}))
