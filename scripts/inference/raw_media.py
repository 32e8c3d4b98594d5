"""Posts with raw media ─► tags, with the same extractors and fusion as the daemon."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from common.errors import BundleError, ConfigError, TaggingError
from common.post import Post
from config.settings import Settings
from fusion.infer.input import Bad
from fusion.infer.outputs import Result
from fusion.infer.processes import Outcome
from workers.local import LocalTagger


@dataclass(frozen=True)
class RawMaker:
    """Makes taggers of posts with raw media."""

    settings: Settings

    def __call__(self, device: str) -> RawTagger:
        """Load the extractors and the bundle; on the config's device where no GPUs are named."""
        chosen = device if self.settings.infer.n_gpus is not None else None
        return RawTagger(LocalTagger(self.settings, device=chosen))


class RawTagger:
    """See `fusion.infer.processes.Tagger`."""

    def __init__(self, tagger: LocalTagger) -> None:
        self._tagger = tagger
        try:
            tagger.load()
        except BundleError as error:
            tagger.close()
            raise ConfigError(f"fusion.bundle: {error}") from error

    def run(self, posts: Sequence[Post]) -> list[Outcome]:
        """Their tags; a post with nothing usable is bad."""
        return [self._tag(post) for post in posts]

    def close(self) -> None:
        """Free the models and downloads."""
        self._tagger.close()

    def _tag(self, post: Post) -> Outcome:
        try:
            features = self._tagger.features(post)
            tags = self._tagger.fuse(features)
        except TaggingError as error:
            return Bad(post.post_id, f"{type(error).__name__}: {' '.join(str(error).split())}")
        return Result(tags, post.labels, features.statuses, features.failures)
