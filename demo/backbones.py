"""Stage: backbones for motion and sound, of which no package brings weights.

They learn from the demo posts' own media; pictures and texts have those of the preset `small`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, TypeAlias

from common.files import new_file
from common.post_set import PostSet
from config.labels import LabelMap
from config.presets import PRESETS
from config.settings import Settings
from config.train import OptimizerSettings, TrainerSettings
from demo.layout import Layout, Sizes
from demo.parallel import run_jobs, tell
from fusion.data.data_file import read_whole_posts

Backbone: TypeAlias = Literal["video", "audio"]

# The loss is the mean over 24 classes; so this is a norm of 5 for their sum. Without a limit the
# first steps of the clips' recurrence can spoil its weights.
_CLIP = 5 / 24


def outputs(settings: Settings) -> tuple[Path, ...]:
    """Return the files that this stage makes."""
    return Path(settings.features.video.weights), Path(settings.features.audio.weights)


def train_backbones(layout: Layout, settings: Settings, sizes: Sizes, labels: LabelMap) -> None:
    """Train both side by side; the one for sound is what the preset ``small`` lacks."""
    names: tuple[Backbone, ...] = ("video", "audio")
    run_jobs({name: (train_backbone, (name, layout, settings, sizes, labels)) for name in names})
    complete_preset(Path(settings.features.audio.weights))


def complete_preset(audio: Path) -> None:
    """Copy the network for sound to where the preset ``small`` looks, unless there is one.

    One that was trained on a platform's own posts is worth more.
    """
    path = Path(PRESETS["small"]["audio"]["weights"])
    if not path.exists():
        with new_file(path) as file:
            file.write(audio.read_bytes())


def train_backbone(
    name: Backbone, layout: Layout, settings: Settings, sizes: Sizes, labels: LabelMap
) -> None:
    """Train one backbone, by the training loop of `train_net.py`."""
    from fusion.backbones.small import SmallBackbone
    from fusion.backbones.training import train_model
    from fusion.train import distributed
    from fusion.train.checkpoint import signature

    optimizer = OptimizerSettings(learning_rate=sizes.learning_rate, gradient_clip=_CLIP)
    trainer = TrainerSettings(
        epochs=sizes.epochs[name],
        batch_size=sizes.batch_size[name],
        n_gpu=0,
        # In full precision whatever the CPU has: the same seed gives the same backbone.
        precision="fp32",
        threads=1,
        fix_random_seed=True,
        save_dir=layout.training / name,
        tensorboard=False,
        progress=False,
    )

    def work(fabric: Any) -> None:
        posts = read_whole_posts(layout.posts("train"))
        backbone = SmallBackbone(
            name,
            posts,
            read_whole_posts(layout.posts("valid")),
            labels,
            settings.features,
            settings.decode,
            decoded=lambda done, total: tell(name, done, total, "decoding"),
        )
        data, build, save = backbone.parts(PostSet.of(post.post_id for post in posts))
        train_model(
            fabric,
            data,
            build,
            save,
            (Path(getattr(settings.features, name).weights),),
            trainer_settings=trainer,
            optimizer=optimizer,
            name=name,
            signature=signature({"stage": name}),
            seed=trainer.seed,
            on_epoch_end=lambda epoch, _: tell(name, epoch, trainer.epochs, "epochs"),
        )

    distributed.run(trainer, work)
