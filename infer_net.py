"""Tag posts from their feature files, or from raw media."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from common.errors import RetryableError, TaggingError
from fusion.infer.options import infer_options, infer_settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Infer; 0 done, 2 the input is wrong, 1 anything else."""
    options = infer_options(arguments)
    try:
        settings = infer_settings(options)
        # Imported here: --help and a mistake in the config need no torch.
        from scripts.inference.run import run

        run(settings, options)
    except RetryableError as error:
        sys.stderr.write(f"infer_net.py: {error}; the same command goes on\n")
        return 1
    except TaggingError as error:
        sys.stderr.write(f"infer_net.py: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("infer_net.py: interrupted; the same command goes on\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
