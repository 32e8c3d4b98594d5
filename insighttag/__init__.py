"""InsightTag in Python: tag posts, extract features, and train, without a queue or a database.

    import insighttag

    with insighttag.Tagger.load("mine/bundle") as tagger:
        result = tagger.tag(text="a red car", images=["car.jpg"])
        print([(tag.name, tag.score) for tag in result.tags])

The import loads no models: `Tagger.load`, `extract` and `train` do. See docs/python.md.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

# In a checkout these are top-level packages; in a wheel they are inside this one.
_OURS = (
    *("common", "config", "corpus", "deploy", "extractors", "fusion", "king", "scripts", "web"),
    "workers",
)


def _refuse_others() -> None:
    """Refuse other modules with our names: those in a notebook's folder are found before ours."""
    root = Path(__file__).resolve().parent.parent
    if not (root / "common" / "errors.py").exists():
        return
    for name in _OURS:
        known = sys.modules.get(name)
        spec = getattr(known, "__spec__", None) if known else importlib.util.find_spec(name)
        file = getattr(known, "__file__", None) or (spec.origin if spec is not None else None)
        if file is not None and Path(file).resolve() != root / name / "__init__.py":
            raise ImportError(
                f"insighttag: the name {name!r} is taken by {file}, and a checkout of InsightTag "
                f"has a package of that name: install the wheel instead, which has none (pip "
                f"install {root}), or rename that module",
                name=name,
            )


_refuse_others()

from common.errors import (  # noqa: E402 - after the check of what `common` is
    BundleError,
    ConfigError,
    DeadlineExceeded,
    FeatureError,
    FetchRefused,
    FetchRetryable,
    MediaError,
    NothingUsable,
    PermanentError,
    RetryableError,
    TaggingError,
)
from common.post import Failure, Features, Tag, TagResult  # noqa: E402
from insighttag.posts import FileInput, ImageInput, PostInput  # noqa: E402
from insighttag.tagger import Tagger, extract  # noqa: E402
from insighttag.training import train  # noqa: E402

__all__ = [
    "BundleError",
    "ConfigError",
    "DeadlineExceeded",
    "Failure",
    "FeatureError",
    "Features",
    "FetchRefused",
    "FetchRetryable",
    "FileInput",
    "ImageInput",
    "MediaError",
    "NothingUsable",
    "PermanentError",
    "PostInput",
    "RetryableError",
    "Tag",
    "TagResult",
    "Tagger",
    "TaggingError",
    "extract",
    "train",
]
