"""The real King on fake workers and real servers, which a test can make stall.

It stands in for ``online_process.py``. The test writes words into the file ``trouble`` of the
current folder, which the broker thread reads in its draining loop:

    block    the loop never comes round again
    lose     the subscription is cancelled on the server, and the King does not know
    lose!    the same, after every new connection too, as long as this process lives
"""

import sys
import threading
from pathlib import Path

from common.logs import configure_logs
from config.load import load_settings
from king.broker.base import OnDelivery
from king.broker.redis import RedisBroker
from king.king import King
from tests.support.king.king_rig import fake_pool

TROUBLE = Path("trouble")


class StallingBroker(RedisBroker):
    """A broker whose loop and subscription can be broken."""

    deaf = False

    def drain(self, timeout_s: float) -> int:
        """Break what the test asks for, once."""
        trouble = ""
        if TROUBLE.exists():
            trouble = TROUBLE.read_text().strip()
            TROUBLE.unlink()
        if trouble == "block":
            threading.Event().wait()
        if trouble.startswith("lose"):
            self.deaf = self.deaf or trouble == "lose!"
            self._lose()
        return super().drain(min(timeout_s, 0.05))  # trouble is looked for between drains

    def consume(self, on_delivery: OnDelivery) -> None:
        """Subscribe; a deaf one loses its subscription at once."""
        super().consume(on_delivery)
        if self.deaf:
            self._lose()

    def _lose(self) -> None:
        self.cancel()


def main() -> int:
    settings = load_settings(sys.argv[sys.argv.index("--config") + 1])
    configure_logs("json")
    pool = fake_pool(settings.fetch.spool.parent)
    return King(settings, pool=pool, broker=StallingBroker(settings.broker)).run()


if __name__ == "__main__":
    sys.exit(main())
