"""Train a fusion model or a backbone, as the config's ``task`` says."""

from __future__ import annotations

import sys

from common.cli import Script, say
from common.errors import ConfigError, PermanentError
from config.train import BackboneTrainSettings
from fusion.train.options import TrainOptions, train_settings


def run(options: TrainOptions) -> None:
    """Train, and say what came of it; a `TaggingError` says in one line what is wrong."""
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


SCRIPT = Script(
    "train_net.py",
    TrainOptions,
    run,
    about="Train a fusion model on feature files and write its bundle; or a backbone.",
    flags=("--fix_random_seed", "--skip_bad"),
    mistakes=(ConfigError, PermanentError),
    interrupted="interrupted; go on with --resume",
)
main = SCRIPT.main

if __name__ == "__main__":
    sys.exit(main())
