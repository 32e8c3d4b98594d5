"""Command lines of the plain scripts: a mistake is one line."""

from __future__ import annotations

import argparse
from typing import NoReturn


class OneLineParser(argparse.ArgumentParser):
    """Mistakes are one line and exit 2, as everywhere; argparse would show the usage as well."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and exit."""
        self.exit(2, f"{self.prog}: {' '.join(message.split())} (see --help)\n")


def whole_number(text: str) -> int:
    """An option's whole number; argparse would tell the name of the function that fails.

    Raises:
        argparse.ArgumentTypeError: It is none.
    """
    try:
        return int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number") from error


def number(text: str) -> float:
    """An option's number, as `whole_number`.

    Raises:
        argparse.ArgumentTypeError: It is none.
    """
    try:
        return float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: must be a number") from error
