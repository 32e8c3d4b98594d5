"""The publisher of the chaos run loses nothing itself."""

import threading

import pytest
from chaos_rig.posts import Feeder

from common.errors import BrokerUnavailable
from tests.support.services import wait_until


@pytest.mark.parametrize("is_away", [False, True])
def test_what_is_dealt_while_a_message_is_on_its_way_is_published_too(is_away: bool) -> None:
    """Also when the slow part is hurried, and when the broker was away."""
    began, go_on = threading.Event(), threading.Event()
    published: list[str] = []

    def publish(ids: list[str]) -> None:
        if not began.is_set():
            began.set()
            assert go_on.wait(30)
            if is_away:
                raise BrokerUnavailable("away")
        published.extend(ids)

    feeder = Feeder(publish, every_s=0.0)
    feeder.trickle(["a", "b"])
    feeder.start()
    try:
        assert began.wait(30)
        assert not feeder.empty
        feeder.hurry()
        feeder.trickle(["c", "d"])
        go_on.set()
        wait_until(lambda: feeder.empty, 30, "everything to be published")
    finally:
        feeder.stop()
    assert sorted(published) == ["a", "b", "c", "d"]
    assert feeder.published == 4
