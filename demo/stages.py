"""The stages before the daemon, each skipped when it was done from the same inputs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from common.processes import cores
from common.progress import progress_bars
from common.stages import run_stage
from config.labels import LabelMap
from config.settings import Settings
from demo.backbones import outputs, train_backbones
from demo.features import extract_features
from demo.layout import Layout, Sizes
from demo.posts.plan import SPLITS, Split, plan_posts
from demo.training import LABELS, train_fusion, train_settings
from extractors.models.weights import parse_weights

_PRODUCT = Path(__file__).resolve().parents[1]


def prepare(layout: Layout, settings: Settings, sizes: Sizes, seed: int) -> None:
    """Make everything that the daemon needs: posts, backbones, features, bundle.

    What was done before a stage that fails is kept.
    """
    features, stamps = settings.features, layout.root / "stamps"
    for name in ("image", "text"):  # packages that are missing are said before minutes of work
        section = getattr(features, name)
        parse_weights(section.weights, setting=f"features.{name}.weights", arch=section.arch)
    labels = LabelMap.load(LABELS)
    made = digest(dict(sizes.posts), seed, code_digest("demo/posts"))
    run_stage(
        stamps / "posts",
        made,
        tuple(map(layout.posts, SPLITS)),
        lambda: make_splits(layout, sizes.posts, seed),
    )
    code = code_digest("extractors"), code_digest("fusion/backbones")
    backbones = digest(made, features.model_dump(mode="json"), sizes, labels.names, *code)
    train = partial(train_backbones, layout, settings, sizes, labels)
    run_stage(stamps / "backbones", backbones, outputs(settings), train)
    vectors = digest(backbones, settings.decode.model_dump())
    run_stage(
        stamps / "features", vectors, (layout.features,), lambda: extract_features(layout, settings)
    )
    training = train_settings(layout, settings, sizes).model_dump(mode="json")
    bundle = digest(vectors, training, code_digest("fusion/models"))
    fuse = partial(train_fusion, layout, settings, sizes)
    run_stage(stamps / "fusion", bundle, (settings.fusion.bundle,), fuse)


def make_splits(
    layout: Layout, counts: Mapping[Split, int], seed: int, *, noise: float = 0, missing: float = 0
) -> None:
    """Make the posts of some splits, as `plan_posts` plans them."""
    from demo.posts.make import make_posts

    with progress_bars() as bars:
        for split, count in counts.items():
            plans = plan_posts(count, seed, split, noise=noise, missing=missing)
            bar = bars.add(f"{split} posts", count)
            for _ in make_posts(layout.posts(split).parent, plans, cores()):
                bar.advance()


def digest(*parts: Any) -> str:
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


def code_digest(package: str) -> str:
    """Return a digest of the Python files of a package: other code, other outputs."""
    files = sorted((_PRODUCT / package).glob("*.py"))
    return digest([(file.name, file.read_text(encoding="utf-8")) for file in files])
