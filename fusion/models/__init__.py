"""The fusion models, chosen by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from config.train import ModelName, ModelSettings
from fusion.models.base import FusionModel
from fusion.models.concat_se import ConcatSE
from fusion.models.token_transformer import TokenTransformer
from fusion.schema import InputSchema

__all__ = ["MODELS", "FusionModel", "build_model"]

MODELS: Mapping[ModelName, Callable[[InputSchema, ModelSettings], FusionModel]] = {
    "token_transformer": TokenTransformer,
    "concat_se": ConcatSE,
}


def build_model(schema: InputSchema, settings: ModelSettings) -> FusionModel:
    """The model that the settings name, with fresh weights.

    Raises:
        ConfigError: Its options do not fit together.
    """
    return MODELS[settings.name](schema, settings)
