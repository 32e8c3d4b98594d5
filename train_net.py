"""Train a fusion model or a backbone, as the config's ``task`` says."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from common.errors import RetryableError, TaggingError
from config.train import BackboneTrainSettings
from fusion.train.options import train_options, train_settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Train; 0 done, 2 the input is wrong, 1 anything else."""
    options = train_options(arguments)
    try:
        settings = train_settings(options)
        # Imported here: --help and a mistake in the config need no torch.
        from fusion.infer.inference import shown

        if isinstance(settings, BackboneTrainSettings):
            from fusion.backbones.media import MediaItems
            from fusion.backbones.training import train_backbones

            lines = [
                f"{stage.name}: epochs {stage.epochs}  best epoch {stage.best_epoch}  "
                f"{shown(stage.metrics)}\nweights {stage.weights}  {stage.seconds:.1f} s\n"
                for stage in train_backbones(settings, MediaItems(), resume=options.resume)
            ]
        else:
            from fusion.data.dataset import FeatureFiles
            from fusion.train.training import train

            report = train(settings, FeatureFiles(), resume=options.resume)
            lines = []
            if report.version:  # one process of a distributed run writes the bundle, and speaks
                lines = [
                    f"epochs {report.epochs}  best epoch {report.best_epoch}  "
                    f"{shown(report.metrics)}\nbundle {report.bundle}  version {report.version}  "
                    f"{report.seconds:.1f} s  waiting for data {report.data_wait:.1%}\n"
                ]
    except TaggingError as error:
        sys.stderr.write(f"train_net.py: {error}\n")
        return 1 if isinstance(error, RetryableError) else 2
    except KeyboardInterrupt:
        sys.stderr.write("train_net.py: interrupted; go on with --resume\n")
        return 1
    sys.stdout.writelines(lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
