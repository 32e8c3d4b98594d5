"""A King on fake workers as a process: ``python -m tests.support.king.king_child SETTINGS``.

Tests send it signals. The argument is a JSON file: ``{settings, latency_s, drain}``.
"""

import json
import sys
from pathlib import Path

from common.errors import ConfigError
from common.logs import configure_logs
from config.settings import Settings
from king.king import King
from tests.support.king.king_rig import fake_pool


def main(file: str) -> int:
    """Run the King; gives the exit code."""
    content = json.loads(Path(file).read_text())
    configure_logs("json")
    settings = Settings.model_validate(content["settings"])
    pool = fake_pool(settings.fetch.spool.parent, latency_s=content["latency_s"])
    try:
        return King(settings, pool=pool).run(drain=content["drain"])
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
