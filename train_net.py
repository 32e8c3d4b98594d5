"""Train a fusion model or a backbone, as the config's ``task`` says."""

from __future__ import annotations

import sys

from common.cli import Script, say
from common.errors import ConfigError, PermanentError
from config.train import BackboneTrainSettings
from fusion.train.options import TRAIN_CONFIG, TrainOptions, train_settings


def run(options: TrainOptions) -> None:
    """Train, and say what came of it; a `TaggingError` says in one line what is wrong."""
    settings = train_settings(options)
    again = ["python", "train_net.py", "--model_config", str(options.model_config or TRAIN_CONFIG)]
    # Imported here: --help and a mistake in the config need no torch.
    if isinstance(settings, BackboneTrainSettings):
        from fusion.backbones.media import MediaItems
        from fusion.backbones.training import train_backbones

        for stage in train_backbones(settings, MediaItems(), resume=options.resume, again=again):
            say(stage.text)
        return
    from fusion.data.dataset import FeatureFiles
    from fusion.train.training import train

    report = train(settings, FeatureFiles(), resume=options.resume, again=again)
    if report.version:  # one process of a distributed run writes the bundle, and speaks
        say(report.text)


SCRIPT = Script(
    "train_net.py",
    TrainOptions,
    run,
    about="Train a fusion model on feature files and write its bundle; or a backbone.",
    flags=("--fix_random_seed", "--skip_bad"),
    mistakes=(ConfigError, PermanentError),
    interrupted="interrupted; continue with --resume",
)
main = SCRIPT.main

if __name__ == "__main__":
    sys.exit(main())
