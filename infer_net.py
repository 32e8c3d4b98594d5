"""Tag posts from their feature files."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from config.errors import TaggingError
from fusion.infer_options import infer_options, infer_settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Infer; 0 done, 2 the input is wrong, 1 anything else."""
    options = infer_options(arguments)
    try:
        settings = infer_settings(options)
        # Imported here: --help and a mistake in the config need no torch.
        from fusion.inference import infer, shown
        from scripts.feature_files import FeatureFiles

        report = infer(settings, options.input, options.output, FeatureFiles(settings.features))
    except TaggingError as error:
        sys.stderr.write(f"infer_net.py: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("infer_net.py: interrupted\n")
        return 1
    # Beside the JSON lines on standard output, a line for people goes to standard error.
    people = sys.stderr if options.output is None else sys.stdout
    people.write(f"posts {report.posts}  labelled {report.labelled}  {shown(report.metrics)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
