"""`Tagger` and `extract`: from posts to tags or features, by the same executor as everywhere."""

from __future__ import annotations

import os
import re
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import ConfigError, path_error
from common.post import Features, Post, TagResult
from insighttag.posts import FileInput, ImageInput, PostInput, path_of, read_post

if TYPE_CHECKING:
    from typing_extensions import Self

    from config.presets import Preset
    from config.settings import Settings
    from workers.runner import PostRunner

Overrides = Mapping[str, object]
"""Settings by their path, such as ``{"features.image.batch_size": 8}``, or nested."""


class Tagger:
    """A bundle and its encoders, loaded into this process; tag posts with it, then `close` it.

    Several threads may call `tag`; their posts run one after the other.

    Attributes:
        labels: Names of all tags, by their ID.
        model: Name of the bundle.
        version: Version of the bundle.
    """

    def __init__(self, runner: PostRunner, labels: Sequence[str]) -> None:
        """Use a runner that has been started; `load` is the usual way to get a Tagger."""
        self.labels = tuple(labels)
        self.model, self.version = runner.bundle or ("", "")
        self._runner = runner
        self._process = os.getpid()
        # Also at exit, if nobody called `close`: its thread must not outlive the models.
        self._close = weakref.finalize(self, _close, runner, self._process)

    @classmethod
    def load(
        cls,
        bundle: str | os.PathLike[str],
        config: str | os.PathLike[str] | None = None,
        *,
        overrides: Overrides | None = None,
        device: str | None = None,
    ) -> Self:
        """Load a bundle and its encoders.

        Args:
            bundle: The bundle's folder.
            config: Settings file; by default the ``settings.yaml`` that `insighttag train` writes
                next to the bundle, or the built-in defaults if there is none.
            overrides: Settings that override those of the file.
            device: ``cpu`` or ``cuda:N``; by default the device in the settings.

        Raises:
            ConfigError: The bundle is missing, broken or made for other encoders, weights are
                missing, or a setting is wrong.
        """
        from config.labels import LabelMap
        from config.load import settings_beside

        folder = path_of(bundle, "bundle")
        _check_bundle(folder)
        file = path_of(config, "config") if config is not None else settings_beside(folder)
        settings = _settings(file, overrides, {"fusion.bundle": str(folder.absolute())})
        labels = LabelMap.load(folder / "labels.json")
        runner = _runner(settings, device, fuse=True)
        return cls(runner, labels.names)

    def tag(
        self,
        *,
        text: str = "",
        images: Sequence[ImageInput] = (),
        videos: Sequence[FileInput] = (),
        audios: Sequence[FileInput] = (),
        ocr: str | None = None,
        post_id: str = "post",
    ) -> TagResult:
        """Return the tags of one post.

        A modality whose media cannot be used fails, and `TagResult.failures` says why.

        Args:
            text: The post's text.
            images: Paths, URLs, bytes, uint8 arrays ``(height, width[, channels])`` in RGB, or
                Pillow images.
            videos: Paths, URLs or bytes.
            audios: Paths, URLs or bytes.
            ocr: Text in the pictures; by default it is read from them.
            post_id: The post's ID, as in the result.

        Raises:
            ConfigError: An argument is wrong, or a file does not exist.
            NothingUsable: Nothing in the post can be used.
            RetryableError: Nothing in the post can be used now, but a download may succeed later.
        """
        post: PostInput = {
            **{"post_id": post_id, "text": text, "ocr": ocr},
            **{"images": images, "videos": videos, "audios": audios},
        }
        with _post(post, "post") as ready:
            return self._open().run(ready).result

    def tag_many(self, posts: Iterable[PostInput]) -> Iterator[TagResult]:
        """Yield the result of each post, in order, as the posts are read.

        A post with nothing that can be used has ``status == "failed"`` and an `error`, as with
        `insighttag tag`. Posts are dicts with the arguments of `tag`; without `post_id` they are
        called ``post 1``, ``post 2`` and so on.

        Raises:
            ConfigError: A post has wrong keys or values, or one of its files does not exist.
        """
        from workers.runner import result_of

        for number, post in enumerate(_several(posts), 1):
            with _post(post, f"post {number}") as ready:
                result = result_of(self._open(), ready)
            yield result

    def close(self) -> None:
        """Free the models; calling it twice is fine."""
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "" if self._close.alive else ", closed"
        return f"<Tagger {self.model} {self.version}, {len(self.labels)} tags{state}>"

    def _open(self) -> PostRunner:
        if not self._close.alive:
            raise ConfigError("this Tagger is closed: load the bundle again")
        if os.getpid() != self._process:  # its thread has stayed in the other one
            raise ConfigError(
                "this Tagger belongs to another process: load the bundle after the fork"
            )
        return self._runner


def _close(runner: PostRunner, process: int) -> None:
    if os.getpid() == process:
        runner.close()


def extract(
    posts: Iterable[PostInput],
    *,
    preset: Preset | None = None,
    config: str | os.PathLike[str] | None = None,
    overrides: Overrides | None = None,
    device: str | None = None,
) -> Iterator[Features]:
    """Yield the features of each post, in order; each model is loaded when a post first needs it.

    `Features.arrays` has a float16 array ``(n, dim)`` for each stream that the post has;
    `Features.failures` says which modalities could not be used, and why.

    Args:
        posts: Dicts, as for `Tagger.tag_many`.
        preset: The encoders (docs/encoders.md); ``small`` if there is no `config`.
        config: Settings file, such as the ``settings.yaml`` next to a bundle.
        overrides: Settings that override those of the file and the preset.
        device: ``cpu`` or ``cuda:N``; by default the device in the settings.

    Raises:
        ConfigError: A setting or a post is wrong, a file does not exist, or weights are missing.
    """
    chosen = preset or ("small" if config is None else None)
    encoders = {"features.preset": chosen} if chosen else {}
    settings = _settings(
        path_of(config, "config") if config is not None else None, overrides, encoders
    )
    return _features(settings, device, _several(posts))


def _features(
    settings: Settings, device: str | None, posts: Iterable[PostInput]
) -> Iterator[Features]:
    runner = _runner(settings, device, fuse=False)
    try:
        for number, post in enumerate(posts, 1):
            with _post(post, f"post {number}") as ready:
                features = runner.run(ready).features
            yield features
    finally:
        runner.close()


def _runner(settings: Settings, device: str | None, *, fuse: bool) -> PostRunner:
    from common.post import MODALITIES
    from workers.local import local_runner

    if device is not None and not re.fullmatch(r"cpu|cuda:\d+", str(device)):
        raise ConfigError(f"device: must be cpu or cuda:N, as cuda:0: got {device!r}")
    # With all modalities named, a post that has none gives no features instead of an error.
    only = None if fuse else frozenset(MODALITIES)
    runner = local_runner(settings, fuse=fuse, device=device, modalities=only, lazy=not fuse)
    return runner.__enter__()


def _settings(file: Path | None, overrides: Overrides | None, own: Overrides) -> Settings:
    """Return the settings of a file, overridden by our own, and these by the caller's."""
    from config.load import nested, settings_with
    from config.presets import merge

    values = merge(nested(own, "overrides"), nested(overrides or {}, "overrides"))
    settings = settings_with(file, values, "overrides")
    quiet_logs(settings)
    return settings


def quiet_logs(settings: Settings) -> None:
    """Log only warnings and errors, unless the program has set up structlog itself."""
    import structlog

    from common.logs import configure_logs

    if not structlog.is_configured():
        level = "warning" if settings.log.level == "info" else settings.log.level
        configure_logs(settings.log.format, level)


@contextmanager
def _post(post: PostInput, where: str) -> Iterator[Post]:
    try:
        folder = tempfile.TemporaryDirectory(prefix="insighttag-")
    except OSError as error:
        raise path_error("the folder of temporary files (TMPDIR)", error) from error
    with folder as path:
        yield read_post(post, where, Path(path))


def _several(posts: Any) -> Iterable[PostInput]:
    wrong = isinstance(posts, (str, bytes, os.PathLike, Mapping))
    if wrong or not isinstance(posts, Iterable):
        raise ConfigError(
            f"posts: must be several posts, each a dict: got {type(posts).__name__}; to tag a file "
            "of posts use the command `insighttag tag`"
        )
    return posts


def _check_bundle(folder: Path) -> None:
    """Refuse a folder that is not a bundle, before the slow loading of the encoders."""
    from fusion.bundle.folder import ABOUT

    try:
        if (folder / ABOUT).is_file():
            return
    except OSError as error:
        raise path_error(f"bundle: {folder}", error) from error
    inner = folder / "bundle"
    hint = f"; did you mean {inner}?" if (inner / ABOUT).is_file() else ""
    raise ConfigError(f"bundle: {folder}: no bundle there{hint or ': insighttag.train makes one'}")
