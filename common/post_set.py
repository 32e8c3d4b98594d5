"""Sets of posts that are stored with weights: the posts that these were trained on."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt


def post_hash(post_id: str) -> int:
    """Return a signed 64-bit hash of an ID; collisions are negligible."""
    raw = post_id.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little", signed=True)


class PostSet:
    """A set of post IDs as sorted hashes, 8 bytes a post; the IDs cannot be listed."""

    def __init__(self, hashes: npt.ArrayLike = ()) -> None:
        self.hashes: npt.NDArray[np.int64] = np.unique(np.asarray(hashes, np.int64))

    @classmethod
    def of(cls, post_ids: Iterable[str]) -> PostSet:
        return cls([post_hash(post_id) for post_id in post_ids])

    def __len__(self) -> int:
        """Return the number of posts."""
        return len(self.hashes)

    def __contains__(self, post_id: str) -> bool:
        return bool(self.holds([post_hash(post_id)])[0])

    def __or__(self, other: PostSet) -> PostSet:
        """Return the posts of both."""
        return PostSet(np.concatenate([self.hashes, other.hashes]))

    def holds(self, hashes: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """Return for each hash, as bool, True when its post is in the set."""
        queries = np.asarray(hashes, np.int64)
        places = np.searchsorted(self.hashes, queries)
        padded = np.append(self.hashes, 0)  # behind the last there is none
        is_held: npt.NDArray[np.bool_] = (places < len(self)) & (padded[places] == queries)
        return is_held

    def as_text(self) -> str:
        """Return the set as base64, which `from_text` reads."""
        return base64.b64encode(self.hashes.astype("<i8").tobytes()).decode("ascii")

    @classmethod
    def from_text(cls, text: str) -> PostSet:
        """Read what `as_text` returned; ValueError when it is something else."""
        return cls(np.frombuffer(base64.b64decode(text, validate=True), "<i8"))
