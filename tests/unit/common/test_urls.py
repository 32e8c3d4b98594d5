"""Sources of media: what is downloaded, and what lies on this host."""

import pytest

from common.urls import is_url, local_source


@pytest.mark.parametrize(
    ("source", "path"),
    [
        *((url, None) for url in ("http://h/a", "HTTPS://h/a", "//h/a.png", "http://[broken")),
        *((url, None) for url in ("ftp://h/a", "s3://b/a", "data:image/png;base64,AA")),
        ("file://other-host/a.png", None),
        ("file:///a/b.png", "/a/b.png"),
        ("FILE://localhost/a%20b.png", "/a b.png"),
        ("file://LOCALHOST/%2Fa.png", "/a.png"),
        ("file:/a/b%0Ac.png", "/a/b\nc.png"),
        ("file:////a/b.png", "/a/b.png"),
        *(
            (path, path)
            for path in ("a.png", "/a/b.png", "./a", "C:/a.png", "IMG:1.png", "", "a//b")
        ),
    ],
)
def test_urls_and_paths_are_told_apart(source: str, path: str | None) -> None:
    """A file URL of this host is a path; any other scheme is for the downloader, which names it."""
    local = local_source(source)
    assert is_url(local) is (path is None)
    assert local == (path if path is not None else source)
