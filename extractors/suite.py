"""Several extractors on one device, loaded and run together; importing this loads no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import structlog

from common.errors import ConfigError, FeatureError
from common.post import Stream
from config.settings import ExtractorName, FeatureSettings, VisualSettings
from extractors.fingerprint import stream_fingerprints
from extractors.models.base import Extractor

if TYPE_CHECKING:
    from extractors.models.timm_backbone import TimmBackbone

ALL_EXTRACTORS: tuple[ExtractorName, ...] = ("video", "image", "audio", "text", "ocr")

_log = structlog.get_logger()


Backbones: TypeAlias = "dict[tuple[object, ...], TimmBackbone]"


def build_extractor(
    name: ExtractorName,
    features: FeatureSettings,
    device: str = "cpu",
    *,
    threads: int = 1,
    backbones: Backbones | None = None,
) -> Extractor:
    """Return one extractor; nothing is loaded yet.

    Args:
        name: Of the modality.
        features: Settings of all of them.
        device: ``cpu`` or ``cuda:N``; OCR runs on the CPU in any case.
        threads: CPU threads that OCR reads pictures with; the others follow torch's setting.
        backbones: Models that the extractors of this process share where their settings are equal.
    """
    from extractors.models.audio import AudioExtractor
    from extractors.models.ocr import OcrExtractor
    from extractors.models.text import TextExtractor
    from extractors.models.visual import (
        VideoExtractor,
        VisualExtractor,
        backbone_key,
        make_backbone,
    )

    def backbone(name: Literal["video", "image"], own: VisualSettings) -> TimmBackbone:
        made = make_backbone(name, own, device)
        return made if backbones is None else backbones.setdefault(backbone_key(own), made)

    match name:
        case "video":
            shared = backbone("video", features.video)
            return VideoExtractor(features.video, device, backbone=shared)
        case "image":
            shared = backbone("image", features.image)
            return VisualExtractor("image", features.image, device, backbone=shared)
        case "audio":
            return AudioExtractor(features.audio, device)
        case "text":
            return TextExtractor(features.text, device)
        case "ocr":
            return OcrExtractor(features.ocr, threads=threads)


class ExtractorSuite:
    """The extractors that one process hosts.

    Args:
        names: Those to load; OCR is left out where the settings disable it.
        threads: CPU threads for torch and OCR; None leaves torch's setting and gives OCR one.
    """

    def __init__(
        self,
        features: FeatureSettings,
        device: str = "cpu",
        names: Sequence[ExtractorName] = ALL_EXTRACTORS,
        *,
        threads: int | None = None,
    ) -> None:
        self.features = features
        self.device = device
        self.names = tuple(n for n in names if n != "ocr" or features.ocr.enabled)
        self._threads = threads
        self._extractors: dict[ExtractorName, Extractor] = {}

    def load(self) -> None:
        """Load every extractor; a second call does nothing.

        Raises:
            ConfigError: One of them cannot be loaded; none is left half loaded.
        """
        if self._extractors:
            return
        self._set_threads()
        try:
            backbones: Backbones = {}
            for name in self.names:
                extractor = build_extractor(
                    name,
                    self.features,
                    self.device,
                    threads=self._threads or 1,
                    backbones=backbones,
                )
                extractor.load()
                self._extractors[name] = extractor
                _log.info(
                    "extractors.loaded",
                    extractor=name,
                    device=self.device,
                    dim=extractor.dim,
                    fingerprint=extractor.fingerprint,
                )
        except ConfigError:
            self.close()
            raise

    def run(self, name: ExtractorName, items: Sequence[Any]) -> list[Any]:
        """Return the results of a batch, in order.

        float16 ``(n, dim)`` arrays, texts for ``ocr``; for ``video`` with an LSTM the arrays of
        both its streams.

        Raises:
            FeatureError: An item is not what the extractor takes, or its result is no feature;
                the whole batch fails, so run its members one at a time to learn which.
        """
        extractor = self._extractors.get(name)
        if extractor is None:
            raise FeatureError(f"{name}: this process does not host that extractor")
        results = extractor.forward([extractor.preprocess(item) for item in items])
        if len(results) != len(items):
            raise FeatureError(f"{name}: {len(items)} items gave {len(results)} results")
        return results

    @property
    def by_extractor(self) -> Mapping[Stream, str]:
        """Return the fingerprint of each loaded extractor, and of the video's LSTM."""
        return {name: fingerprint for name, (_, fingerprint) in self._loaded().items()}

    @property
    def extractor_dims(self) -> Mapping[Stream, int]:
        """Return the columns of each loaded extractor and of the video's LSTM; 0 for OCR."""
        return {name: dim for name, (dim, _) in self._loaded().items()}

    @property
    def fingerprints(self) -> dict[Stream, str]:
        """Return the fingerprint of each stream that the loaded extractors serve."""
        return stream_fingerprints(self.features, self.by_extractor)

    @property
    def dims(self) -> dict[Stream, int]:
        """Return the columns of each stream's arrays."""
        return {s: self.extractor_dims["text" if s == "ocr" else s] for s in self.fingerprints}

    def close(self) -> None:
        """Free every model."""
        for extractor in self._extractors.values():
            extractor.close()
        self._extractors = {}

    def _loaded(self) -> dict[Stream, tuple[int, str]]:
        """Return columns and fingerprint of each stream that an extractor makes by itself."""
        streams: dict[Stream, tuple[int, str]] = {}
        for name, extractor in self._extractors.items():
            streams[name] = (extractor.dim, extractor.fingerprint)
            streams.update(extractor.further())
        return streams

    def _set_threads(self) -> None:
        if self._threads is None or set(self.names) <= {"ocr"}:
            return
        import torch

        torch.set_num_threads(self._threads)
