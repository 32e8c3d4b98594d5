"""Train a fusion model on feature files and write its bundle."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from config.errors import TaggingError
from fusion.options import train_options, train_settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Train; 0 done, 2 the input is wrong, 1 anything else."""
    options = train_options(arguments)
    try:
        settings = train_settings(options)
        # Imported here: --help and a mistake in the config need no torch.
        from fusion.inference import shown
        from fusion.training import train
        from scripts.feature_files import FeatureFiles

        report = train(settings, FeatureFiles(), resume=options.resume)
    except TaggingError as error:
        sys.stderr.write(f"train_net.py: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("train_net.py: interrupted; go on with --resume\n")
        return 1
    if report.version:  # one process of a distributed run writes the bundle, and speaks
        sys.stdout.write(
            f"epochs {report.epochs}  best epoch {report.best_epoch}  {shown(report.metrics)}\n"
            f"bundle {report.bundle}  version {report.version}  {report.seconds:.1f} s\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
