"""Command lines of the plain scripts: a mistake is one line."""

from __future__ import annotations

import argparse
from typing import NoReturn


class OneLineParser(argparse.ArgumentParser):
    """Mistakes are one line and exit 2, as everywhere; argparse would show the usage as well."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and exit."""
        self.exit(2, f"{self.prog}: {' '.join(message.split())} (see --help)\n")
