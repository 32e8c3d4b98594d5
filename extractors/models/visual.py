"""Pictures and frames of videos ─► features of a timm model, by default a ViT.

Scheme 2 of videos is a TSN and an attention LSTM: a row for each segment, and one for the video.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from common.errors import ConfigError
from common.post import FeatureArray, Stream
from config.settings import ExtractorName, ImageSettings, VideoSettings, VisualSettings
from extractors.fingerprint import digest
from extractors.models.base import Rows, check_rows, run_rows
from extractors.models.timm_backbone import TimmBackbone

if TYPE_CHECKING:
    from extractors.models.video_lstm import VideoLstm

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

    def further(self) -> Mapping[Stream, tuple[int, str]]:
        """Columns and fingerprint of streams that it gives beside its own."""
        return {}

    def close(self) -> None:
        """Free the model, unless another extractor still uses it."""
        if self._loaded:
            self._backbone.close()
        self._loaded = False


class VideoExtractor(VisualExtractor):
    """Frames uint8 RGB ``(n, size, size, 3)`` ─► rows of features, and with an LSTM one vector.

    An item's result is an array float16 ``(n, dim)``; with ``features.video.lstm.weights`` the
    streams ``video`` of the rows and ``video_lstm`` ``(1, width)``. With ``short_clips: repeat``
    n becomes ``features.video.frames`` wherever there is a frame at all.
    """

    def __init__(
        self,
        settings: VideoSettings,
        device: str = "cpu",
        *,
        backbone: TimmBackbone | None = None,
    ) -> None:
        super().__init__("video", settings, device, backbone=backbone)
        self._video = settings
        self._lstm: VideoLstm | None = None
        if settings.lstm.weights is not None:
            from extractors.models.video_lstm import VideoLstm

            self._lstm = VideoLstm(settings.lstm, device)

    def load(self) -> None:
        """Load the models.

        Raises:
            ConfigError: The architecture, its size, its weights or the device are not to be had.
        """
        if self._loaded:
            return
        super().load()
        if self._lstm is not None:
            try:
                self._lstm.load(self.dim, self.fingerprint)
            except ConfigError:
                self.close()
                raise

    def forward(self, items: Sequence[Rows]) -> list[Any]:
        """Features of every frame of every item, and of the item as a whole.

        Raises:
            FeatureError: A model gave values that are not finite.
        """
        rows = super().forward(items)
        if self._video.short_clips == "repeat":
            rows = [each[segments(len(each), self._video.frames)] for each in rows]
        if self._lstm is None:
            return rows
        vectors = self._lstm.run(rows)
        return [{"video": r, "video_lstm": v} for r, v in zip(rows, vectors, strict=True)]

    def further(self) -> Mapping[Stream, tuple[int, str]]:
        """Columns and fingerprint of ``video_lstm``, where there is one."""
        if self._lstm is None:
            return {}
        return {"video_lstm": (self._lstm.dim, self._lstm.fingerprint)}

    def close(self) -> None:
        """Free the models."""
        if self._lstm is not None:
            self._lstm.close()
        super().close()


def segments(count: int, wanted: int) -> npt.NDArray[np.intp]:
    """The frame at the centre of each of ``wanted`` equal segments of ``count`` frames.

    Frames of a short clip are repeated; without frames, or with as many as wanted or more, each
    stands once.

    Source: TSN (arXiv 1608.00859), in test.
    """
    if not count or count >= wanted:
        return np.arange(count)
    return ((2 * np.arange(wanted) + 1) * count) // (2 * wanted)


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
        allow_pickle=settings.allow_pickle,
    )


def backbone_key(settings: VisualSettings) -> tuple[object, ...]:
    """What two visual extractors must have in common to share one model."""
    return (settings.arch, settings.weights, settings.image_size, settings.precision)


def _sampling(settings: VisualSettings) -> dict[str, object]:
    if isinstance(settings, VideoSettings):
        found: dict[str, object] = {"frames": settings.frames, "decode": settings.decode}
        if settings.short_clips != "once":  # left out where it is, as before there was a choice
            found["short_clips"] = settings.short_clips
        return found
    if isinstance(settings, ImageSettings):
        return {"max_frames": settings.max_frames}
    return {}
