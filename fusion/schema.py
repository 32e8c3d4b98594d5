"""What a fusion model is fed with: which modalities, how long their features, how many tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from config.errors import ConfigError, FeatureError
from config.train import TokenLimits
from extractors.post import MODALITIES, FeatureArray, Features, Modality

ORDERED: frozenset[Modality] = frozenset({"video", "audio", "text", "ocr"})
"""Modalities whose tokens follow one another in time; images have no order."""


@dataclass(frozen=True)
class FeatureManifest:
    """The features that a model was trained on.

    Attributes:
        dims: Length of one feature of each modality.
        fingerprints: Of the extractors, by modality.
        image_as_frames: Images join the video's frames.
        ocr_mode: How OCR text was embedded.
    """

    dims: Mapping[Modality, int]
    fingerprints: Mapping[Modality, str]
    image_as_frames: bool = False
    ocr_mode: Literal["append", "separate"] = "separate"

    def input_dims(self) -> dict[Modality, int]:
        """Dims of what the model sees, in the order of `MODALITIES`.

        Raises:
            ConfigError: Images shall be frames, and their features differ in length.
        """
        dims = {m: self.dims[m] for m in MODALITIES if m in self.dims}
        if not self.image_as_frames or "image" not in dims:
            return dims
        image = dims.pop("image")
        video = dims.setdefault("video", image)
        if video != image:
            raise ConfigError(
                f"image_as_frames: features of images have length {image}, of frames {video}; "
                "use one extractor for both or set image_as_frames to false"
            )
        return {m: dims[m] for m in MODALITIES if m in dims}


@dataclass(frozen=True)
class InputSchema:
    """Shapes of a model's input and output.

    Attributes:
        dims: Length of one token of each modality, in the order of `MODALITIES`.
        tokens: Most tokens of each modality.
        classes: Number of tags.
    """

    dims: Mapping[Modality, int]
    tokens: Mapping[Modality, int]
    classes: int
    image_as_frames: bool = False

    @classmethod
    def of(cls, manifest: FeatureManifest, limits: TokenLimits, classes: int) -> InputSchema:
        """The schema of a model for these features.

        Raises:
            ConfigError: As `FeatureManifest.input_dims`; or there is no modality at all.
        """
        dims = manifest.input_dims()
        if not dims:
            raise ConfigError("no post has features of any of the modalities asked for")
        tokens: dict[Modality, int] = {m: int(getattr(limits, m)) for m in dims}
        return cls(dims, tokens, classes, manifest.image_as_frames)

    def arrays(
        self, features: Features, without: frozenset[Modality] = frozenset()
    ) -> dict[Modality, FeatureArray]:
        """A post's features as the model takes them: images joined, tokens thinned.

        Args:
            features: Of one post; modalities that the model does not know are left out.
            without: Modalities to leave out.

        Returns:
            float16 ``(n, dim)`` with 1 ≤ n ≤ tokens, for the modalities that are there.

        Raises:
            FeatureError: An array has another shape than the model takes.
        """
        found: dict[Modality, list[FeatureArray]] = {}
        for modality in MODALITIES:
            array = features.arrays.get(modality)
            if array is None or modality in without or not len(array):
                continue
            target = "video" if self.image_as_frames and modality == "image" else modality
            if target not in self.dims:
                continue
            if array.ndim != 2 or array.shape[1] != self.dims[target]:
                raise FeatureError(
                    f"post {features.post_id}: {modality} features are {array.shape}, "
                    f"the model takes (n, {self.dims[target]})"
                )
            found.setdefault(target, []).append(array)
        return {
            m: _thin(parts[0] if len(parts) == 1 else np.concatenate(parts), self.tokens[m], m)
            for m, parts in found.items()
        }


def _thin(array: FeatureArray, most: int, modality: Modality) -> FeatureArray:
    """At most ``most`` tokens ``(n, dim)``: the beginning of a text, evenly spaced otherwise."""
    if len(array) <= most:
        return array
    if modality in ("text", "ocr"):
        return array[:most]
    # Centres of equal segments, as TSN samples.
    centres = ((np.arange(most) + 0.5) * (len(array) / most)).astype(np.intp)
    return array[centres]
