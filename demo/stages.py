"""The stages before the daemon, each skipped when it was done from the same inputs."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.files import write_whole
from common.progress import progress_bars
from config.labels import LabelMap
from config.settings import Settings
from demo.backbones import outputs, train_backbones
from demo.features import extract_features, read_pictures
from demo.layout import Layout, Sizes
from demo.parallel import cores
from demo.posts.plan import SPLITS
from demo.training import LABELS, train_fusion, train_settings

_PRODUCT = Path(__file__).resolve().parents[1]


def prepare(layout: Layout, settings: Settings, sizes: Sizes, seed: int) -> None:
    """Make everything that the daemon needs: posts, backbones, features, bundle.

    Raises:
        TaggingError: A stage failed; what was done before it is kept.
    """
    labels, features = LabelMap.load(LABELS), settings.features

    def stage(name: str, inputs: str, outputs: tuple[Path, ...], work: Callable[[], None]) -> None:
        stamp = Stamp(layout.root / "stamps" / f"{name}.json", inputs, outputs)
        sys.stderr.write(f"{name}: there already\n" if stamp.valid else f"{name}\n")
        if not stamp.valid:
            stamp.clear()
            started = time.monotonic()
            work()
            stamp.write()
            sys.stderr.write(f"  {time.monotonic() - started:.0f} s\n")

    made = digest(dict(sizes.posts), seed, _code("demo/posts"))
    stage("posts", made, tuple(map(layout.posts, SPLITS)), lambda: _posts(layout, sizes, seed))
    ocr = digest(made, features.ocr.model_dump(), _code("extractors"))
    texts = (layout.read("train"), layout.read("valid"))
    stage("words", ocr, texts, lambda: read_pictures(layout, settings, ("train", "valid")))
    backbones = digest(
        ocr, features.model_dump(mode="json"), sizes, labels.names, _code("fusion/backbones")
    )
    stage(
        "backbones",
        backbones,
        outputs(settings),
        lambda: train_backbones(layout, settings, sizes, labels),
    )
    vectors = digest(backbones, settings.decode.model_dump())
    stage("features", vectors, (layout.features,), lambda: extract_features(layout, settings))
    training = train_settings(layout, settings, sizes).model_dump(mode="json")
    bundle = digest(vectors, training, _code("fusion/models"))
    stage(
        "fusion", bundle, (settings.fusion.bundle,), lambda: train_fusion(layout, settings, sizes)
    )


def _code(package: str) -> str:
    return source_digest(_PRODUCT / package)


def _posts(layout: Layout, sizes: Sizes, seed: int) -> None:
    from demo.posts.make import make_posts
    from demo.posts.plan import plan_posts

    with progress_bars() as bars:
        for split in SPLITS:
            plans = plan_posts(sizes.posts[split], seed, split)
            bar = bars.add(f"{split} posts", len(plans))
            for _ in make_posts(layout.posts(split).parent, plans, cores()):
                bar.advance()


def digest(*parts: Any) -> str:
    """Return a hex digest of JSON values."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


def source_digest(folder: Path) -> str:
    """Return a digest of the Python files of a folder: other code, other outputs."""
    files = sorted(folder.glob("*.py"))
    return digest([(file.name, file.read_text(encoding="utf-8")) for file in files])


@dataclass(frozen=True)
class Stamp:
    """A note of what a stage's outputs were made from.

    Attributes:
        path: The note's file; written last, so that half an output has none.
        inputs: Digest of everything that the outputs follow from.
        outputs: Files and folders that must be there.
    """

    path: Path
    inputs: str
    outputs: tuple[Path, ...]

    @property
    def valid(self) -> bool:
        """Tell whether the stage ran from these inputs and its outputs still exist."""
        try:
            noted = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return noted == {"inputs": self.inputs} and all(path.exists() for path in self.outputs)

    def clear(self) -> None:
        """Forget that the stage was done: its outputs are about to change."""
        self.path.unlink(missing_ok=True)

    def write(self) -> None:
        """Note that the stage is done."""
        write_whole(self.path, json.dumps({"inputs": self.inputs}) + "\n")
