"""Typed settings of offline inference: `infer_net.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from config.settings import PositiveInt, Section

Count = Annotated[int, Field(ge=0)]


class InferSettings(Section):
    """All settings of `infer_net.py`."""

    bundle: Path = Path("workshop/weights/insight")
    features: Path = Path("workshop/features")
    """Root of the feature files, for inputs that name only post IDs."""
    n_gpus: Count | None = None
    """0 runs on the CPU; null takes one GPU where there is one."""
    threads: PositiveInt | None = None
    batch_size: PositiveInt = 64
    scores: bool = True
    """Write the score of every class beside the tags."""
    progress: bool = True
