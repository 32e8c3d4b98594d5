"""Train a fusion model or a backbone, as the config's ``task`` says."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from common.cli import exit_code, say
from common.errors import ConfigError, PermanentError
from config.train import BackboneTrainSettings
from fusion.train.options import train_options, train_settings


def run(arguments: Sequence[str] | None) -> None:
    """Train, and say what came of it; a `TaggingError` says in one line what is wrong."""
    options = train_options(arguments)
    settings = train_settings(options)
    # Imported here: --help and a mistake in the config need no torch.
    from fusion.infer.inference import shown

    if isinstance(settings, BackboneTrainSettings):
        from fusion.backbones.media import MediaItems
        from fusion.backbones.training import train_backbones

        for stage in train_backbones(settings, MediaItems(), resume=options.resume):
            say(
                f"{stage.name}: epochs {stage.epochs}  best epoch {stage.best_epoch}  "
                f"{shown(stage.metrics, seen=stage.seen)}\n"
                f"weights {stage.weights}  {stage.seconds:.1f} s\n"
            )
        return
    from fusion.data.dataset import FeatureFiles
    from fusion.train.training import train

    report = train(settings, FeatureFiles(), resume=options.resume)
    if report.version:  # one process of a distributed run writes the bundle, and speaks
        say(
            f"epochs {report.epochs}  best epoch {report.best_epoch}  "
            f"{shown(report.metrics, seen=report.seen_posts > 0)}\n"
            f"bundle {report.bundle}  version {report.version}  "
            f"{report.seconds:.1f} s  waiting for data {report.data_wait:.1%}\n"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Train; 0 done, 2 the input is wrong, 1 anything else."""
    return exit_code(
        "train_net.py",
        lambda: run(arguments),
        mistakes=(ConfigError, PermanentError),
        interrupted="interrupted; go on with --resume",
    )


if __name__ == "__main__":
    sys.exit(main())
