"""The fusion models, chosen by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from config.fusion_models import ModelName, ModelSettings
from fusion.models.attention_lstm import AttentionLSTM
from fusion.models.base import FusionModel, InputSchema
from fusion.models.late import LateFusion
from fusion.models.ml_decoder import MLDecoder
from fusion.models.pooled import GMU, ConcatMLP
from fusion.models.probe import LinearProbe
from fusion.models.transformers import MBT, TokenTransformer
from fusion.models.vlad import ConcatSE, NeXtVLADSE

__all__ = ["MODELS", "FusionModel", "build_model"]

MODELS: Mapping[ModelName, Callable[[InputSchema, ModelSettings], FusionModel]] = {
    "token_transformer": TokenTransformer,
    "concat_mlp": ConcatMLP,
    "concat_se": ConcatSE,
    "gmu": GMU,
    "nextvlad_se": NeXtVLADSE,
    "attention_lstm": AttentionLSTM,
    "mbt": MBT,
    "ml_decoder": MLDecoder,
    "late": LateFusion,
    "linear_probe": LinearProbe,
}


def build_model(schema: InputSchema, settings: ModelSettings) -> FusionModel:
    """Return the model that the settings name, with fresh weights."""
    return MODELS[settings.name](schema, settings)
