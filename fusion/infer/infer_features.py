"""Posts with feature files ─► tags, for `fusion.infer.inference`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from common.errors import FeatureError
from common.post import Features, Tags
from common.precision import set_threads
from config.infer import InferSettings
from fusion.data.data_file import Record
from fusion.data.dataset import FeatureFiles
from fusion.infer.inferer import Inferer
from fusion.infer.input import Bad
from fusion.infer.outputs import Result
from fusion.infer.processes import Outcome


@dataclass(frozen=True)
class FeatureMaker:
    """Makes taggers of posts with feature files."""

    settings: InferSettings
    reader: FeatureFiles

    def __call__(self, device: str) -> FeatureTagger:
        """Load the bundle on a device."""
        return FeatureTagger(self.settings, self.reader, device)


class FeatureTagger:
    """Posts with feature files ─► tags; see `fusion.infer.processes.Tagger`."""

    def __init__(self, settings: InferSettings, reader: FeatureFiles, device: str) -> None:
        set_threads(settings.threads)
        self._reader = reader
        self._inferer = Inferer.load(settings.bundle, device=device, batch_size=settings.batch_size)

    def run(self, posts: Sequence[Record]) -> list[Outcome]:
        """Their tags; what cannot be read is bad."""
        features = [self._features(post) for post in posts]
        good = [each for each in features if isinstance(each, Features)]
        found = iter(self._predict(good))
        outcomes: list[Outcome] = []
        for post, each in zip(posts, features, strict=True):
            if isinstance(each, Bad):
                outcomes.append(each)
                continue
            tags = next(found)
            if isinstance(tags, Bad):
                outcomes.append(tags)
            else:
                outcomes.append(Result(tags, post.labels, each.statuses, each.failures))
        return outcomes

    def close(self) -> None:
        """Free the model."""
        self._inferer.close()

    def _features(self, post: Record) -> Features | Bad:
        try:
            found = self._reader.features(post.post_id, post.features, self._inferer.fingerprints)
        except FeatureError as error:
            return Bad(post.post_id or str(post.features), str(error))
        for stream, array in found.arrays.items():
            if not np.isfinite(array).all():
                return Bad(found.post_id, f"{stream} features are not finite")
        return found

    def _predict(self, posts: Sequence[Features]) -> list[Tags | Bad]:
        """Tags, or `Bad` for features of a shape that the model does not take."""
        try:
            return list(self._inferer.predict(posts))
        except FeatureError as error:
            if len(posts) == 1:
                return [Bad(posts[0].post_id, str(error))]
        return [found for post in posts for found in self._predict([post])]
