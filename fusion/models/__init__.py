"""The fusion models, chosen by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

from config.fusion_models import DEFAULT_MODEL, ModelName, ModelSettings
from fusion.models.attention_lstm import AttentionLSTM
from fusion.models.base import FusionModel, InputSchema
from fusion.models.knn import KNN
from fusion.models.late import LateFusion
from fusion.models.pooled import GMU, ConcatMLP
from fusion.models.probe import LinearProbe
from fusion.models.tag_text import TagText
from fusion.models.transformers import MBT, MLDecoder, TokenTransformer
from fusion.models.vlad import ConcatSE, NeXtVLADSE

__all__ = ["MODELS", "FusionModel", "build_model", "chosen"]

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
    "knn": KNN,
    "tag_text": TagText,
}


def chosen(settings: ModelSettings, posts: int, *, ordered: bool) -> ModelSettings:
    """Return the settings with the model's name in place of `auto`.

    Args:
        settings: Of the model.
        posts: To train on.
        ordered: The order of some stream's tokens may tell something, which a mean forgets.
    """
    if settings.name != "auto":
        return settings
    small = posts < settings.auto_posts and not ordered
    name: ModelName = "linear_probe" if small else DEFAULT_MODEL
    return settings.model_copy(update={"name": name})


def build_model(schema: InputSchema, settings: ModelSettings) -> FusionModel:
    """Return the model that the settings name, with fresh weights; `chosen` goes before it."""
    return MODELS[cast("ModelName", settings.name)](schema, settings)
