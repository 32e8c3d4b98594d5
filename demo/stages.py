"""The stages before the daemon, each skipped when it was done from the same inputs."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

from common.progress import progress_bars
from config.labels import LabelMap
from config.settings import Settings
from demo.backbones import outputs, train_backbones
from demo.features import extract_features
from demo.layout import Layout, Sizes
from demo.parallel import cores
from demo.posts.plan import SPLITS
from demo.reading import read_pictures
from demo.stamps import Stamp, digest, source_digest
from demo.training import LABELS, train_fusion, train_settings

_PRODUCT = Path(__file__).resolve().parents[1]


def prepare(layout: Layout, settings: Settings, sizes: Sizes, seed: int) -> None:
    """Make everything that the daemon needs: posts, backbones, features, bundle.

    Raises:
        TaggingError: A stage failed; what was done before it is kept.
    """
    labels, features = LabelMap.load(LABELS), settings.features
    made = digest(dict(sizes.posts), seed, source_digest(_PRODUCT / "demo" / "posts"))
    ocr = digest(made, features.ocr.model_dump(), _code("extractors"))
    backbones = digest(ocr, features.model_dump(mode="json"), sizes, labels.names, _code("fusion"))
    vectors = digest(backbones, settings.decode.model_dump())
    training = train_settings(layout, settings, sizes)
    bundle = digest(vectors, training.model_dump(mode="json"), _code("fusion/models"))
    stages: tuple[tuple[str, str, tuple[Path, ...], Callable[[], None]], ...] = (
        ("posts", made, tuple(map(layout.posts, SPLITS)), lambda: _posts(layout, sizes, seed)),
        (
            "words",
            ocr,
            (layout.read("train"), layout.read("valid")),
            lambda: read_pictures(layout, settings, ("train", "valid")),
        ),
        (
            "backbones",
            backbones,
            outputs(settings),
            lambda: train_backbones(layout, settings, sizes, labels),
        ),
        ("features", vectors, (layout.features,), lambda: extract_features(layout, settings)),
        (
            "fusion",
            bundle,
            (settings.fusion.bundle,),
            lambda: train_fusion(layout, settings, sizes),
        ),
    )
    for name, inputs, made_files, work in stages:
        _run(Stamp.of(layout.stamps, name, inputs, made_files), name, work)


def _code(package: str) -> str:
    return source_digest(_PRODUCT / package)


def _run(stamp: Stamp, name: str, work: Callable[[], None]) -> None:
    if stamp.valid:
        sys.stderr.write(f"{name}: there already\n")
        return
    sys.stderr.write(f"{name}\n")
    stamp.clear()
    started = time.monotonic()
    work()
    stamp.write()
    sys.stderr.write(f"  {time.monotonic() - started:.0f} s\n")


def _posts(layout: Layout, sizes: Sizes, seed: int) -> None:
    from demo.posts.make import make_posts
    from demo.posts.plan import plan_posts

    with progress_bars() as bars:
        for split in SPLITS:
            plans = plan_posts(sizes.posts[split], seed, split)
            bar = bars.add(f"{split} posts", len(plans))
            for _ in make_posts(layout.posts(split).parent, plans, cores()):
                bar.advance()
