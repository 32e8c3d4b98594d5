"""Pictures and frames of videos ─► features of a timm model, by default a ViT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from config.settings import ExtractorName, ImageSettings, VideoSettings, VisualSettings
from extractors.backbone import TimmBackbone
from extractors.base import Rows, check_rows, run_rows
from extractors.fingerprint import digest
from extractors.post import FeatureArray

_PREPROCESSING = "whole picture squashed to a square, area interpolation, RGB"


class VisualExtractor:
    """uint8 RGB ``(n, size, size, 3)`` ─► float16 ``(n, dim)``, one row per picture.

    Args:
        backbone: A model to share with another extractor of the same `backbone_key`.
    """

    def __init__(
        self,
        name: Literal["video", "image"],
        settings: VisualSettings,
        device: str = "cpu",
        *,
        backbone: TimmBackbone | None = None,
    ) -> None:
        self.name: ExtractorName = name
        self.dim = 0
        self.fingerprint = ""
        self._settings = settings
        self._backbone = backbone or make_backbone(name, settings, device)
        self._loaded = False

    def load(self) -> None:
        """Load the model.

        Raises:
            ConfigError: The architecture, its size, its weights or the device are not to be had.
        """
        if self._loaded:
            return
        self._backbone.load()
        self._loaded = True
        self.dim = self._backbone.dim
        self.fingerprint = digest(
            {
                "kind": "timm",
                "arch": self._backbone.arch,
                "weights": self._backbone.digest,
                "dim": self.dim,
                "size": self._settings.image_size,
                "mean": self._backbone.mean,
                "std": self._backbone.std,
                "preprocessing": _PREPROCESSING,
                "sampling": _sampling(self._settings),
            }
        )

    def preprocess(self, item: Rows) -> Rows:
        """Check one item.

        Raises:
            FeatureError: It is not uint8 ``(n, size, size, 3)``.
        """
        size = self._settings.image_size
        return check_rows(self.name, item, (size, size, 3), "uint8")

    def forward(self, items: Sequence[Rows]) -> list[FeatureArray]:
        """Features of every picture of every item.

        Raises:
            FeatureError: The model gave values that are not finite.
        """
        return run_rows(
            items,
            dim=self.dim,
            batch_size=self._settings.batch_size,
            run=lambda rows: self._backbone.run(rows, self.name),
        )

    def close(self) -> None:
        """Free the model, unless another extractor still uses it."""
        if self._loaded:
            self._backbone.close()
        self._loaded = False


def make_backbone(
    name: Literal["video", "image"], settings: VisualSettings, device: str
) -> TimmBackbone:
    """The model that the settings of one visual extractor name; not loaded yet."""
    return TimmBackbone(
        settings.arch,
        settings.weights,
        channels=3,
        size=(settings.image_size, settings.image_size),
        precision=settings.precision,
        device=device,
        setting=f"features.{name}",
    )


def backbone_key(settings: VisualSettings) -> tuple[object, ...]:
    """What two visual extractors must have in common to share one model."""
    return (settings.arch, settings.weights, settings.image_size, settings.precision)


def _sampling(settings: VisualSettings) -> dict[str, object]:
    if isinstance(settings, VideoSettings):
        return {"frames": settings.frames, "decode": settings.decode}
    if isinstance(settings, ImageSettings):
        return {"max_frames": settings.max_frames}
    return {}
