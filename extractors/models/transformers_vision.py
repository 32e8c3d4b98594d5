"""Pictures and frames -> CLIP, SigLIP, SigLIP 2 with NaFlex, DINOv2, DINOv3."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from common.errors import ConfigError, one_line
from config.features import VisualSettings
from extractors.models.base import PictureEncoder, pass_on_device_errors
from extractors.models.from_transformers import TextQueryable, pooled, processor_values

_SIGLIP_TOKENS = 64  # SigLIP was trained on texts of this length, padding included
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ANY_SIZE = ("dinov2", "dinov2_with_registers", "dinov3_vit", "siglip2")


class TransformersVision(TextQueryable, PictureEncoder):
    """One vector per picture: the projected one of CLIP and SigLIP, the class token of DINO."""

    model_types = (
        "clip",
        "siglip",
        "siglip2",
        "dinov2",
        "dinov2_with_registers",
        "dinov3_vit",
        "dinov3_convnext",
    )

    def __init__(
        self, setting: str, settings: VisualSettings, device: str, *, size: tuple[int, int]
    ) -> None:
        super().__init__(setting, settings, device)
        self.size = size
        self._type, self._patch = "", 0

    def load(self) -> None:
        super().load()
        if not self.dim:
            try:
                self.dim = int(self.run(np.zeros((1, *self.size, 3), np.uint8)).shape[1])
            except (RuntimeError, ValueError) as error:
                pass_on_device_errors(error)
                raise ConfigError(
                    f"{self.setting}.image_size: {self._name} does not take {self.size[0]}: "
                    f"{one_line(error, 200)}"
                ) from error

    def _check(self, config: Any) -> None:
        super()._check(config)
        vision = getattr(config, "vision_config", config)
        self._type, self._patch = config.model_type, int(getattr(vision, "patch_size", 0) or 0)
        size, own = self.size[0], getattr(vision, "image_size", None)
        if self._type in _ANY_SIZE and size % self._patch:
            raise ConfigError(
                f"{self.setting}.image_size: {self._name} takes multiples of {self._patch}, not "
                f"{size}"
            )
        if self._type in ("clip", "siglip") and size != own:
            raise ConfigError(f"{self.setting}.image_size: {self._name} takes {own}, not {size}")

    def _take(self, model: Any, source: str, *, local: bool) -> None:
        super()._take(model, source, local=local)
        values = processor_values(source, local=local)
        self._normalise_by(values["image_mean"], values["image_std"])

    def _call(self, *inputs: torch.Tensor) -> torch.Tensor:
        [pixels] = inputs  # (n, size, size, 3) uint8
        pictures = self._normalised(pixels)
        if self._type == "siglip2":
            return pooled(self._network.get_image_features(**self._patches(pictures)))
        if hasattr(self._network, "get_image_features"):
            return pooled(self._network.get_image_features(pixel_values=pictures))
        return pooled(self._network(pixel_values=pictures))

    def _patches(self, pictures: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """Return all patches of pictures: NaFlex's own processor shrinks what has over 256."""
        count, channels, side = pictures.shape[:3]
        grid, patch = side // self._patch, self._patch
        # (n, 3, g * p, g * p) -> (n, 3, g, p, g, p) -> (n, g, g, p, p, 3) -> (n, g * g, p * p * 3)
        split = pictures.reshape(count, channels, grid, patch, grid, patch)
        patches = split.permute(0, 2, 4, 3, 5, 1).reshape(count, grid * grid, -1)
        mask = torch.ones(patches.shape[:2], dtype=torch.int32, device=patches.device)
        shapes = torch.full((count, 2), grid)  # on the CPU, which reads them picture by picture
        return {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": shapes}

    def _tokens(self, texts: Sequence[str]) -> Mapping[str, torch.Tensor]:
        if not self._type.startswith("siglip"):
            return super()._tokens(texts)
        # Without a mask, as SigLIP was trained: its text vector is that of the last, padded token.
        tokens = self._text_tokenizer()(
            [canonical(text) for text in texts],
            padding="max_length",
            truncation=True,
            max_length=_SIGLIP_TOKENS,
            return_tensors="pt",
        )
        return {"input_ids": tokens["input_ids"]}


def canonical(text: str) -> str:
    """Return a text as SigLIP was trained: lower case, no punctuation, single spaces.

    SigLIP 2's own tokenizer does neither; cased texts cost it up to 12 points of accuracy.
    """
    return re.sub(r"\s+", " ", text.translate(_PUNCTUATION).lower()).strip()
