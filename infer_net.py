"""Tag posts from their feature files, or from raw media."""

from __future__ import annotations

import sys
from dataclasses import asdict

from common.cli import Script, json_report
from common.errors import ConfigError, PermanentError
from common.urls import redact
from fusion.infer.options import InferOptions, infer_settings, run_settings


def run(options: InferOptions) -> None:
    """Infer.

    Raises:
        TaggingError: One line that says what is wrong.
    """
    settings = infer_settings(options)
    output = run_settings(settings).output
    if options.as_json and output is None:
        raise ConfigError("--json: the tags go to standard output: name a file with --out")
    # Imported here: --help and a mistake in the config need no torch.
    from scripts.inference.run import run as infer

    with json_report(options.as_json) as figures:
        figures |= {"out": redact(output or ""), **asdict(infer(settings, options))}


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
