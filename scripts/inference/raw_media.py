"""From posts with raw media to their tags, with the same extractors and fusion as the daemon."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from common.errors import TaggingError
from common.post import Post
from config.settings import Settings
from fusion.infer.outputs import Bad, Outcome, Result
from workers.local import local_runner
from workers.runner import PostRunner


@dataclass(frozen=True)
class RawMaker:
    """A maker of taggers of posts with raw media, for `fusion.infer.inference.Job`."""

    settings: Settings

    def __call__(self, device: str) -> RawTagger:
        """Load the extractors and the bundle; on the config's device where no GPUs are named."""
        chosen = device if self.settings.infer.n_gpus is not None else None
        return RawTagger(local_runner(self.settings, device=chosen))


class RawTagger:
    """A `fusion.infer.inference.Tagger` of posts with raw media."""

    def __init__(self, runner: PostRunner) -> None:
        self._runner = runner
        runner.start()

    def run(self, posts: Sequence[Post]) -> list[Outcome]:
        """Return the posts' tags; a post with nothing usable is bad."""
        return [self._tag(post) for post in posts]

    def close(self) -> None:
        """Free the models and downloads."""
        self._runner.close()

    def _tag(self, post: Post) -> Outcome:
        try:
            tagged = self._runner.run(post)
        except TaggingError as error:
            return Bad(post.post_id, f"{type(error).__name__}: {' '.join(str(error).split())}")
        features = tagged.features
        return Result(tagged.tags, post.labels, features.statuses, features.failures)
