"""URLs: telling them from paths, and showing them without credentials."""

from __future__ import annotations

import re
from urllib.parse import unquote, urlsplit

_SECRET_OPTION = re.compile(r"([?&][^=&#]*(?:password|passwd|secret|token)[^=&#]*=)[^&#]*", re.I)


# Java writes file:/a/b for file:///a/b.
_LOCAL_FILE = re.compile(r"file:(?:///|//localhost/|/(?!/))(.*)", re.I | re.S)
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]+://|data:", re.I)


def is_url(source: str) -> bool:
    """Return True for a URL (``//host/a.png`` is one), False for a path (``C:/a.png`` is one)."""
    return source.startswith("//") or _SCHEME.match(source) is not None


def local_source(source: str) -> str:
    """Return the path of a ``file:`` URL of this host; anything else as it is."""
    match = _LOCAL_FILE.fullmatch(source)
    # One slash: what begins with two is a URL without its scheme.
    return "/" + unquote(match[1]).lstrip("/") if match else source


def redact(url: str) -> str:
    """Hide the password of a URL, for logs, errors and `status`.

    What is no URL is hidden in the same way: mistakes are shown too.
    """
    try:
        urlsplit(url)
    except ValueError:
        return "<unreadable URL>"
    scheme, separator, rest = url.partition("://") if "://" in url else ("", "", url)
    # Up to the last @ and not to the first slash: a password that was not escaped may hold both.
    before_options = rest.partition("?")[0]
    login = (before_options if "@" in before_options else rest).rpartition("@")[0]
    user, colon, _ = login.partition(":")
    if colon:
        rest = f"{user}:***{rest[len(login) :]}"
    return scheme + separator + _SECRET_OPTION.sub(r"\1***", rest)


def split_address(address: str) -> tuple[str, int]:
    """Return host and port of ``HOST:PORT``; the host of ``[::1]:80`` is ``::1``."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def is_database(output: str) -> bool:
    """Return True for a MongoDB URL."""
    return output.startswith(("mongodb://", "mongodb+srv://"))


def collection_of(url: str) -> tuple[str, str] | None:
    """Return the database and collection that a URL ends in, before its options."""
    base = url.partition("?")[0]
    rest = base.partition("://")[2].rpartition("@")[2]
    database, _, collection = rest.partition("/")[2].partition(".")
    return (database, collection) if database and collection else None
