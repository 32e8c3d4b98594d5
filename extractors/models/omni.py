"""Pictures, frames and sound -> EmbeddingGemma 2: one space, that of its texts too.

Texts need no class here: `TextExtractor` with the pooling ``mean`` runs the same model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from common.precision import autocast
from config.features import AudioSettings, VisualSettings
from extractors.models.base import PictureEncoder, clean
from extractors.models.from_transformers import TransformersEncoder, processor_digest
from extractors.models.text import pool
from extractors.models.transformers_audio import without_end


class OmniEncoder(TransformersEncoder):
    """The mean of the states of what its processor makes of an item, marks around it included."""

    model_types = ("embedding_gemma2",)

    _processor: Any = None

    def embed_texts(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        if not texts:
            return np.empty((0, self.dim), np.float32)
        with torch.inference_mode(), autocast(self.device, self._mixed):
            vectors = self._embed(text=[clean(text) for text in texts])
        unit: npt.NDArray[np.float32] = torch.nn.functional.normalize(vectors, dim=-1).cpu().numpy()
        return unit

    def _take(self, model: Any, source: str, *, local: bool) -> None:
        from transformers import AutoProcessor

        super()._take(model, source, local=local)
        auto: Any = AutoProcessor
        self._processor = auto.from_pretrained(
            source, local_files_only=local, trust_remote_code=self._trust
        )
        self.processing = processor_digest(source, local=local)
        self.dim = int(model.config.text_config.embedding_dim)

    def _embed(self, **items: Any) -> torch.Tensor:
        """Return float32 ``(n, dim)`` of items as the processor takes them."""
        with torch.autocast(torch.device(self.device).type, enabled=False):
            made = self._processor(**items, return_tensors="pt", padding=True)
        inputs = {key: value.to(self.device) for key, value in made.items()}
        states = self._network(**inputs).last_hidden_state.float()
        return pool(states, inputs["attention_mask"], "mean")


class OmniPictures(OmniEncoder, PictureEncoder):
    """Pictures, which its processor normalises and fits into its number of patches."""

    def __init__(
        self, setting: str, settings: VisualSettings, device: str, *, size: tuple[int, int]
    ) -> None:
        super().__init__(setting, settings, device)
        self.size = size

    def _call(self, *inputs: torch.Tensor) -> torch.Tensor:
        [pixels] = inputs  # (n, size, size, 3) uint8
        return self._embed(images=[[picture] for picture in pixels.cpu().numpy()])


class OmniSound(OmniEncoder):
    """Windows of sound, without the silence at their end."""

    def __init__(self, settings: AudioSettings, device: str) -> None:
        super().__init__("features.audio", settings, device)

    def _call(self, *inputs: torch.Tensor) -> torch.Tensor:
        [windows] = inputs  # (n, samples) float32, 16 kHz
        return self._embed(audio=[without_end(window) for window in windows.cpu().numpy()])
