"""The base of every section of the settings, and numbers that many of them take."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

PositiveInt = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    """Base of every section: frozen, unknown keys refused; docstrings describe keys in schemas."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), use_attribute_docstrings=True
    )

    @model_validator(mode="before")
    @classmethod
    def _no_nul(cls, values: Any) -> Any:
        # The system takes no NUL in a path or a name, and Python raises ValueError there.
        for key, value in values.items() if isinstance(values, Mapping) else ():
            if isinstance(value, (str, Path)) and "\0" in str(value):
                raise ValueError(f"{key}: must have no NUL characters")
        return values
