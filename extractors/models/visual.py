"""Pictures and frames of videos -> features of a timm model, by default a ViT.

Scheme 2 of videos is a TSN and an attention LSTM: a row for each segment, and one for the video.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from common.errors import ConfigError
from common.post import Stream
from config.settings import ExtractorName, ImageSettings, VideoSettings, VisualSettings
from extractors.models.base import Extractor, Rows, check_rows, run_rows
from extractors.models.timm_backbone import TimmBackbone

if TYPE_CHECKING:
    from extractors.models.video_lstm import VideoLstm

_PREPROCESSING = "whole picture squashed to a square, area interpolation, RGB"


class VisualExtractor(Extractor):
    """uint8 RGB ``(n, size, size, 3)`` -> float16 ``(n, dim)``, one row per picture.

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
        self._settings = settings
        self._backbone = backbone or make_backbone(name, settings, device)

    def preprocess(self, item: Rows) -> Rows:
        size = self._settings.image_size
        return check_rows(self.name, item, (size, size, 3), "uint8")

    def forward(self, items: Sequence[Rows]) -> list[Any]:
        return run_rows(
            items,
            dim=self.dim,
            batch_size=self._settings.batch_size,
            run=lambda rows: self._backbone.run(rows, self.name),
        )

    def _load(self) -> Mapping[str, Any]:
        backbone = self._backbone
        backbone.load()
        self.dim = backbone.dim
        return {
            "kind": backbone.kind,
            "arch": backbone.arch,
            "weights": backbone.digest,
            "dim": self.dim,
            "size": self._settings.image_size,
            "mean": backbone.mean,
            "std": backbone.std,
            "preprocessing": _PREPROCESSING,
            "sampling": _sampling(self._settings),
        }

    def _close(self) -> None:
        self._backbone.close()


class VideoExtractor(VisualExtractor):
    """Frames uint8 RGB ``(n, size, size, 3)`` -> rows of features, and with an LSTM one vector.

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
        if self._loaded:
            return
        super().load()
        if self._lstm is not None:
            try:
                self._lstm.load_for(self.dim, self.fingerprint)
            except ConfigError:
                self.close()
                raise

    def forward(self, items: Sequence[Rows]) -> list[Any]:
        rows = super().forward(items)
        if self._video.short_clips == "repeat":
            rows = [each[segments(len(each), self._video.frames)] for each in rows]
        if self._lstm is None:
            return rows
        vectors = self._lstm.vectors(rows)
        return [{"video": r, "video_lstm": v} for r, v in zip(rows, vectors, strict=True)]

    def further(self) -> Mapping[Stream, tuple[int, str]]:
        if self._lstm is None:
            return {}
        return {"video_lstm": (self._lstm.dim, self._lstm.fingerprint)}

    def _close(self) -> None:
        if self._lstm is not None:
            self._lstm.close()
        super()._close()


def segments(count: int, wanted: int) -> npt.NDArray[np.intp]:
    """Return the frame at the centre of each of ``wanted`` equal segments of ``count`` frames.

    Frames of a short clip are repeated; ``wanted`` frames or more, or none, are taken once each.

    Source: TSN (arXiv 1608.00859), in test.
    """
    if not count or count >= wanted:
        return np.arange(count)
    return ((2 * np.arange(wanted) + 1) * count) // (2 * wanted)


def make_backbone(
    name: Literal["video", "image"], settings: VisualSettings, device: str
) -> TimmBackbone:
    """Return the encoder that the settings of a visual extractor name; nothing is loaded yet."""
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
    """Return what two visual extractors must have in common to share one model."""
    return (settings.arch, settings.weights, settings.image_size, settings.precision)


def _sampling(settings: VisualSettings) -> dict[str, object]:
    if isinstance(settings, VideoSettings):
        sampling: dict[str, object] = {"frames": settings.frames, "decode": settings.decode}
        if settings.short_clips != "once":  # older fingerprints know only "once", and do not say so
            sampling["short_clips"] = settings.short_clips
        return sampling
    if isinstance(settings, ImageSettings):
        return {"max_frames": settings.max_frames}
    return {}
