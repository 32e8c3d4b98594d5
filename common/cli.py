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


def count(text: str) -> int:
    """An option's whole number from 1 on.

    Raises:
        argparse.ArgumentTypeError: It is none.
    """
    value = whole_number(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be 1 or more")
    return value


def natural(text: str) -> int:
    """An option's whole number from 0 on.

    Raises:
        argparse.ArgumentTypeError: It is none.
    """
    value = whole_number(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text}: must be 0 or more")
    return value


def share(text: str) -> float:
    """An option's part of a whole, 0 to 1.

    Raises:
        argparse.ArgumentTypeError: It is none.
    """
    value = number(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text}: must lie in 0 to 1")
    return value


def seconds(text: str) -> float:
    """An option's time in seconds, above 0.

    Raises:
        argparse.ArgumentTypeError: It is none.
    """
    value = number(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: must be above 0")
    return value
