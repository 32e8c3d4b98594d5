"""Tag posts from their feature files, or from raw media."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from common.cli import exit_code
from common.errors import ConfigError, PermanentError
from fusion.infer.options import infer_options, infer_settings


def run(arguments: Sequence[str] | None) -> None:
    """Infer.

    Raises:
        TaggingError: One line that says what is wrong.
    """
    options = infer_options(arguments)
    settings = infer_settings(options)
    # Imported here: --help and a mistake in the config need no torch.
    from scripts.inference.run import run as infer

    infer(settings, options)


def main(arguments: Sequence[str] | None = None) -> int:
    """Infer; 0 done, 2 the input is wrong, 1 anything else."""
    return exit_code(
        "infer_net.py",
        lambda: run(arguments),
        mistakes=(ConfigError, PermanentError),
        interrupted="interrupted; the same command goes on",
        again="; the same command goes on",
    )


if __name__ == "__main__":
    sys.exit(main())
