"""Tag posts from their feature files, or from raw media."""

from __future__ import annotations

import sys

from common.cli import Script
from common.errors import ConfigError, PermanentError
from fusion.infer.options import InferOptions, infer_settings


def run(options: InferOptions) -> None:
    """Infer.

    Raises:
        TaggingError: One line that says what is wrong.
    """
    settings = infer_settings(options)
    # Imported here: --help and a mistake in the config need no torch.
    from scripts.inference.run import run as infer

    infer(settings, options)


SCRIPT = Script(
    "infer_net.py",
    InferOptions,
    run,
    about=__doc__,
    mistakes=(ConfigError, PermanentError),
    interrupted="interrupted; the same command continues",
    again="; the same command continues",
)
main = SCRIPT.main

if __name__ == "__main__":
    sys.exit(main())
