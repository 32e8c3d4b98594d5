"""The edge to the client libraries: their exceptions become ours.

BrokerUnavailable   the connection is lost or was refused: connect again, with back-off
ConfigError         no attempt can succeed: credentials, virtual host, another queue's arguments
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

from common.errors import BrokerUnavailable, ConfigError, TaggingError, one_line
from common.urls import redact


@dataclass(frozen=True)
class ClientErrors:
    """The exceptions of one client library.

    Attributes:
        types: All that may come out of it; others are bugs of ours and pass unchanged.
        is_refusal: True for errors that say, while a connection is set up, that the settings are
            wrong. In service the same errors mean that the connection is lost.
        hints: Text for a type of error, with ``{}`` for its own text.
    """

    types: tuple[type[BaseException], ...] = (OSError, EOFError)
    is_refusal: Callable[[BaseException], bool] = lambda _error: False
    hints: Mapping[type[BaseException], str] = field(default_factory=dict)

    @contextmanager
    def mapped(self, url: str, *, setup: bool = False) -> Iterator[None]:
        """Map the library's errors of the block.

        Args:
            url: The broker's URL; shown without its password.
            setup: The block connects or declares, so that a refusal means wrong settings.

        Raises:
            ConfigError: The broker refuses the settings.
            BrokerUnavailable: It cannot be reached, or the connection is lost.
        """
        try:
            yield
        except TaggingError:
            raise
        except self.types as error:
            text = f"broker {redact(url)}: {self._reason(error, url)}"
            if setup and self.is_refusal(error):
                raise ConfigError(text) from error
            raise BrokerUnavailable(text) from error

    def _reason(self, error: BaseException, url: str) -> str:
        """Return one line that a person understands, without credentials."""
        is_bare = isinstance(error, TimeoutError) and not str(error)
        text = "timed out" if is_bare else one_line(error)
        for kind, hint in self.hints.items():
            if isinstance(error, kind):
                text = hint.format(text)
        for secret in _secrets(url):
            text = text.replace(secret, "***")
        return text


def _secrets(url: str) -> set[str]:
    try:
        password = urlsplit(url).password
    except ValueError:
        return set()
    # Short passwords are words like "guest", which the broker's answer uses for the user's name.
    return {p for p in (password, unquote(password or "")) if p and len(p) > 5}
