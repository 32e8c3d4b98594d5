"""Posts from a program: files by path, URL or content, pictures as arrays too."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict

from common.errors import ConfigError, path_error, told
from common.post import Post

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from PIL.Image import Image

FileInput: TypeAlias = "str | os.PathLike[str] | bytes"
"""A path, a URL, or the content of a file."""
ImageInput: TypeAlias = "str | os.PathLike[str] | bytes | npt.NDArray[np.uint8] | Image"
"""Like `FileInput`, or a picture: uint8 ``(height, width)``, or with 3 or 4 channels (RGB, RGBA),
or Pillow's."""


class PostInput(TypedDict, total=False):
    """A post; every key may be left out, and the other keys of data files are allowed."""

    post_id: str
    text: str | None
    ocr: str | None
    """Text in the pictures; when left out, it is read from them."""
    images: Sequence[ImageInput]
    videos: Sequence[FileInput]
    audios: Sequence[FileInput]
    labels: Sequence[str]
    author: str | None
    created: str | None


def read_post(post: PostInput, where: str, folder: Path) -> Post:
    """Return a post whose media are paths and URLs.

    Args:
        post: The caller's post.
        where: Names the post in errors, and is its ID if it has none.
        folder: Media that are not files yet are written here.

    Raises:
        ConfigError: A key or a value is wrong.
    """
    from fusion.data.data_file import MEDIA_KEYS, POST_KEYS, post_to_tag

    if not isinstance(post, Mapping):
        raise ConfigError(f"{where}: must be a dict with {', '.join(POST_KEYS)}: got {_kind(post)}")
    odd = next((key for key in post if not isinstance(key, str)), None)
    if odd is not None:
        raise ConfigError(f"{where}: {odd!r}: unknown key")
    value: dict[str, Any] = {"post_id": where, **post}
    for key in MEDIA_KEYS.values():
        value[key] = [
            _source(each, f"{where}: {key}.{index}", folder / f"{key}.{index}", key)
            for index, each in enumerate(_listed(value.get(key), f"{where}: {key}"))
        ]
    if isinstance(value.get("labels"), tuple):
        value["labels"] = list(value["labels"])
    # Paths are relative to the working directory, as always in Python.
    return post_to_tag(value, Path("post"), where)


def path_of(value: str | os.PathLike[str], name: str) -> Path:
    """Return an argument as a path.

    Raises:
        ConfigError: It is none.
    """
    text = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
    if not isinstance(text, str):
        raise ConfigError(f"{name}: must be a path: got {_kind(value)}")
    if "\0" in text:
        raise ConfigError(f"{name}: must be a path, without NUL characters: got {text!r}")
    return Path(text)


def _listed(media: Any, where: str) -> Sequence[Any]:
    if media is None:
        return ()
    if isinstance(media, (list, tuple)):
        return media
    raise ConfigError(f"{where}: must be a list, even for one file: got {_kind(media)}")


def _source(media: Any, where: str, file: Path, key: str) -> str:
    if isinstance(media, (str, os.PathLike)):
        if source := os.fspath(media):
            path_of(source, where)
            return source
        raise ConfigError(f"{where}: must be a path, got {source!r}")
    try:
        if isinstance(media, (bytes, bytearray, memoryview)):
            file.write_bytes(media)
        elif key == "images":
            picture = _picture(media, where)
            with told(f"{where}: is not a complete picture", OSError, ValueError):
                picture.load()
            if not all(picture.size):
                raise ConfigError(f"{where}: the picture is empty: {picture.size}")
            if picture.mode not in ("1", "L", "LA", "P", "RGB", "RGBA"):
                picture = picture.convert("RGB")
            picture.save(file, "PNG", compress_level=1)
        else:
            raise ConfigError(f"{where}: must be a path, a URL or bytes: got {_kind(media)}")
    except OSError as error:
        raise path_error(f"{where}: cannot be written to {file.parent}", error) from error
    return str(file)


def _picture(media: Any, where: str) -> Image:
    import numpy as np
    from PIL import Image

    if isinstance(media, Image.Image):
        return media
    if not isinstance(media, np.ndarray):
        raise ConfigError(
            f"{where}: must be a path, a URL, bytes, an array or a Pillow image: got {_kind(media)}"
        )
    channels = media.shape[2] if media.ndim == 3 else 0
    if media.dtype != np.uint8 or media.ndim not in (2, 3) or channels not in (0, 3, 4):
        raise ConfigError(
            f"{where}: an array must be uint8 (height, width), or (height, width, 3 or 4) for RGB "
            f"or RGBA: got {media.dtype} {media.shape}"
        )
    if not media.size:
        raise ConfigError(f"{where}: the array is empty: {media.shape}")
    return Image.fromarray(np.ascontiguousarray(media))


def _kind(value: object) -> str:
    return type(value).__name__
