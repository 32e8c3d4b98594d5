"""Feature files as training and offline inference read them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from common.errors import FeatureError
from common.post import Features, Stream
from extractors.feature_file import feature_path, read_features, read_fingerprints


@dataclass(frozen=True)
class FeatureFiles:
    """A `fusion.data.dataset.FeatureReader` over a folder of feature files.

    Attributes:
        root: Where posts without a path of their own are looked for; None refuses them.
    """

    root: Path | None = None

    def fingerprints(self, post_id: str, path: Path | None) -> Mapping[Stream, str]:
        """What a post's features were made with.

        Raises:
            FeatureError: There is no such file, or it is broken.
        """
        return read_fingerprints(path or feature_path(self._root(post_id), post_id))

    def features(
        self, post_id: str, path: Path | None, fingerprints: Mapping[Stream, str] | None
    ) -> Features:
        """A post's features.

        Args:
            post_id: Its ID; empty takes it from the file's name.
            path: Its file, in the layout of `extractors.feature_file`; None finds it by ID.
            fingerprints: The streams wanted and what they must be made with; None is all.

        Raises:
            FeatureError: There is no such file, it is broken, or made otherwise.
        """
        if path is None:
            return read_features(self._root(post_id), post_id, fingerprints)
        wanted = post_id or unquote(path.stem)
        root = path.parent.parent
        if feature_path(root, wanted) != path:
            raise FeatureError(f"{path}: is not where the features of post {wanted!r} lie")
        return read_features(root, wanted, fingerprints)

    def _root(self, post_id: str) -> Path:
        if self.root is None:
            raise FeatureError(f"post {post_id}: the data file names no feature file for it")
        return self.root
