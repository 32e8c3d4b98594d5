"""From the features of posts to their tags, with the model of a bundle."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from common.errors import FeatureError
from common.post import Features, Modality, NearMiss, Stream, Tag, TagResult, Tags
from common.precision import require_device, set_threads
from config.settings import InferSettings
from config.tag_rules import TagRules
from fusion.bundle.bundle import Bundle, load_bundle
from fusion.data.data_file import Record
from fusion.data.dataset import FeatureFiles
from fusion.infer.outputs import Bad, Outcome, Result
from fusion.metrics.calibration import calibrated
from fusion.models.base import Batch, Collate, Sample

# Part of its threshold from which on a score is a near miss; less says that the tag is not meant.
_NEAR = 0.5
_TINY = 1e-9  # thresholds of 0 are always reached


class Inferer:
    """One loaded bundle; ``rules`` is the digest of the rules of serving.

    On a CPU it computes in float32, and a post's scores do not depend on its neighbours
    (within 1e-5).
    """

    def __init__(
        self,
        bundle: Bundle,
        device: str = "cpu",
        *,
        batch_size: int = 64,
        rules: TagRules | None = None,
    ) -> None:
        self.bundle, self.labels = bundle, bundle.labels
        self.name, self.version = bundle.name, bundle.version
        self.image_as_frames = bundle.manifest.image_as_frames
        self._chooser = TagChooser(bundle, rules or TagRules())
        self.rules = self._chooser.digest
        self._device = require_device(device)
        self._batch_size = batch_size
        self._schema = bundle.schema
        self._collate = Collate(self._schema)
        self._model: torch.nn.Module | None = bundle.model.to(self._device)

    @classmethod
    def load(
        cls,
        bundle: Path,
        *,
        device: str = "cpu",
        threads: int | None = None,
        batch_size: int = 64,
        rules: TagRules | None = None,
    ) -> Inferer:
        """Load a bundle from its folder, or a link to it; ConfigError for rules that do not fit."""
        set_threads(threads)
        return cls(load_bundle(bundle), device, batch_size=batch_size, rules=rules)

    @property
    def fingerprints(self) -> dict[Stream, str]:
        """Return the fingerprints of the extractors whose features it takes, by stream."""
        return dict(self.bundle.manifest.fingerprints)

    def predict(
        self, posts: Sequence[Features], *, without: frozenset[Modality] = frozenset()
    ) -> list[Tags]:
        """Return tags of posts, in their order.

        A tag is given where its score reaches its threshold, so a post may get none; rules may
        change that. Modalities that the bundle does not know, and those in ``without``, are left
        out.
        """
        scores = self.scores(posts, without=without)
        return [self._tags(post.post_id, row) for post, row in zip(posts, scores, strict=True)]

    def scores(
        self, posts: Sequence[Features], *, without: frozenset[Modality] = frozenset()
    ) -> npt.NDArray[np.float64]:
        """Return float64 ``(posts, classes)``; arguments are those of `predict`."""
        samples = [Sample(post.post_id, self._schema.arrays(post, without)) for post in posts]
        rows = [
            self._scores(self._collate(samples[start : start + self._batch_size]))
            for start in range(0, len(samples), self._batch_size)
        ]
        return np.concatenate([np.empty((0, self._schema.classes)), *rows])

    def close(self) -> None:
        self._model = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _scores(self, batch: Batch) -> npt.NDArray[np.float64]:
        if self._model is None:
            raise RuntimeError("the inferer is closed")
        with torch.inference_mode():
            logits = self._model(batch.to(self._device))
            # In float32 all logits above 17 would give exactly 1, and posts that differ would tie.
            scores: npt.NDArray[np.float64] = torch.sigmoid(logits.double().cpu()).numpy()
        return calibrated(self.bundle.calibration, scores)

    def _tags(self, post_id: str, scores: npt.NDArray[np.float64]) -> Tags:
        tags, near_misses = self._chooser.choose(scores)
        return Tags(
            post_id=post_id,
            model=self.name,
            version=self.version,
            tags=tags,
            scores=scores.copy(),
            rules=self.rules,
            near_misses=near_misses,
        )


class TagChooser:
    """The choice of a post's tags out of its scores, by a bundle's thresholds and the rules."""

    def __init__(self, bundle: Bundle, rules: TagRules) -> None:
        self.digest = rules.digest
        self._rules, self._served = rules, rules.served(bundle.labels)
        self._classes = np.array([i for tag in self._served for i in tag.classes], np.intp)
        sizes = [len(tag.classes) for tag in self._served]
        self._starts = np.cumsum([0, *sizes[:-1]])
        self._thresholds = bundle.thresholds[self._classes]

    def choose(
        self, scores: npt.NDArray[np.float64]
    ) -> tuple[tuple[Tag, ...], tuple[NearMiss, ...]]:
        """Return the tags for scores ``(classes,)``, highest first, and the nearest of the others.

        A tag that stands for several classes is given where one of them reaches its threshold, and
        has the highest of their scores.
        """
        own, rules = scores[self._classes], self._rules
        best = np.maximum.reduceat(own, self._starts)  # (served,)
        reached = np.logical_or.reduceat(own >= self._thresholds, self._starts)
        chosen = np.flatnonzero(reached)
        if len(chosen) < rules.min_tags:
            others = np.flatnonzero(~reached)
            more = others[np.argsort(-best[others], kind="stable")][: rules.min_tags - len(chosen)]
            reached[more] = True
            chosen = np.flatnonzero(reached)
        ranked = chosen[np.argsort(-best[chosen], kind="stable")][: rules.max_tags]
        served = ((self._served[i], best[i]) for i in ranked)
        tags = tuple(Tag(tag.id, tag.name, float(score)) for tag, score in served)
        return tags, tuple(self._near(own, ~reached)) if rules.near_misses else ()

    def _near(
        self, own: npt.NDArray[np.float64], others: npt.NDArray[np.bool_]
    ) -> Iterator[NearMiss]:
        """Yield those of the other tags whose score is the largest part of a threshold."""
        parts = own / np.maximum(self._thresholds, _TINY)
        nearest = np.maximum.reduceat(parts, self._starts)
        near = np.flatnonzero(others & (nearest >= _NEAR))
        for i in near[np.argsort(-nearest[near], kind="stable")][: self._rules.near_misses]:
            tag, start = self._served[i], self._starts[i]
            at = start + int(parts[start : start + len(tag.classes)].argmax())
            yield NearMiss(tag.id, tag.name, float(own[at]), float(self._thresholds[at]))


class FeatureTagger:
    """A `fusion.infer.inference.Tagger` of posts with feature files, on one device."""

    def __init__(self, settings: InferSettings, reader: FeatureFiles, device: str) -> None:
        set_threads(settings.threads)
        self._reader = reader
        rules = TagRules.read(settings)
        self._inferer = Inferer.load(
            settings.bundle, device=device, batch_size=settings.batch_size, rules=rules
        )
        self.bundle = self._inferer.bundle

    def run(self, posts: Sequence[Record]) -> list[Outcome]:
        """Return the posts' tags, and `Bad` for those whose features cannot be used."""
        features = [self._features(post) for post in posts]
        tags = iter(self._predict([each for each in features if isinstance(each, Features)]))
        outcomes: list[Outcome] = []
        for post, each in zip(posts, features, strict=True):
            outcome = each if isinstance(each, Bad) else next(tags)
            if isinstance(each, Features) and isinstance(outcome, Tags):
                tagged = TagResult.tagged(outcome, each)
                outcomes.append(Result(tagged, outcome.scores, post.labels))
            elif isinstance(outcome, Bad):
                outcomes.append(outcome)
        return outcomes

    def close(self) -> None:
        self._inferer.close()

    def _features(self, post: Record) -> Features | Bad:
        try:
            features = self._reader.features(
                post.post_id, post.features, self._inferer.fingerprints
            )
        except FeatureError as error:
            return Bad(post.post_id or str(post.features), str(error))
        for stream, array in features.arrays.items():
            if not np.isfinite(array).all():
                return Bad(features.post_id, f"{stream} features are not finite")
        return features

    def _predict(self, posts: Sequence[Features]) -> list[Tags | Bad]:
        """Return tags, or `Bad` for features of a shape that the model does not take."""
        try:
            return list(self._inferer.predict(posts))
        except FeatureError as error:
            if len(posts) == 1:
                return [Bad(posts[0].post_id, str(error))]
        # One of the batch is bad: each is tried alone.
        return [outcome for post in posts for outcome in self._predict([post])]


def has_seen(bundle: Bundle, files: FeatureFiles, post: Record) -> bool:
    """Return True when the bundle, or the weights behind a post's features, were trained on it."""
    try:
        return post.post_id in bundle.learned_from or files.has_learned(
            post.post_id, post.features, bundle.manifest.dims
        )
    except FeatureError:
        return False  # the tagger says what is wrong with its features
