"""Put posts on the queue from a command, with confirms."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

from common.errors import TaggingError
from config.settings import BrokerSettings
from king.broker.connect import open_link
from king.broker.errors import mapped
from king.messages import PostMessage


def publish_posts(settings: BrokerSettings, messages: Iterable[PostMessage]) -> int:
    """Publish the messages; returns when the broker has all of them.

    Returns:
        How many were published.

    Raises:
        BrokerUnavailable: It cannot be reached, or stopped answering; some of the messages may
            have arrived, and publishing them again is harmless.
        ConfigError: It refuses the credentials, or the queue has other arguments.
    """
    link = open_link(settings)
    try:
        with mapped(settings.url):
            count = link.publish(messages)
    except BaseException:
        link.abandon()
        raise
    with contextlib.suppress(TaggingError), mapped(settings.url):
        link.close([])
    return count
