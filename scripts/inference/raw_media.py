"""From posts with raw media to their tags, with the same extractors and fusion as the daemon."""

from __future__ import annotations

from collections.abc import Sequence

from common.errors import TaggingError, one_line
from common.post import Post
from config.settings import Settings
from fusion.infer.outputs import Bad, Outcome, Result
from workers.local import local_runner


class RawTagger:
    """A `fusion.infer.inference.Tagger` of posts with raw media.

    It runs on the device of the settings where they name no GPUs for the inference.
    """

    def __init__(self, settings: Settings, device: str) -> None:
        chosen = device if settings.infer.n_gpus is not None else None
        self._runner = local_runner(settings, device=chosen)
        self._runner.start()

    def run(self, posts: Sequence[Post]) -> list[Outcome]:
        """Return the posts' tags; a post with nothing usable is bad."""
        return [self._tag(post) for post in posts]

    def close(self) -> None:
        self._runner.close()

    def _tag(self, post: Post) -> Outcome:
        try:
            tagged = self._runner.run(post)
        except TaggingError as error:
            return Bad(post.post_id, f"{type(error).__name__}: {one_line(error)}")
        return Result(tagged.result, tagged.tags.scores, post.labels)
