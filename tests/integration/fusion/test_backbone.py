"""Backbones of posts in memory: they learn what they are shown, and extractors load them."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.errors import ConfigError
from config.features import AudioSettings
from config.train import OptimizerSettings, TrainerSettings
from extractors.models.audio import AudioExtractor
from fusion.backbones.media import Kind, MediaDataset, augment, collate_media
from fusion.backbones.model import MediaTagger, create_backbone, save_weights, where_it_moves
from fusion.backbones.training import StageReport, train_model
from fusion.train import distributed
from fusion.train.trainer import TrainData
from tests.support.mistakes import one_line

ARCH = "test_resnet"  # timm's smallest
SIDE = 32
SIZES: dict[Kind, tuple[int, int]] = {
    "picture": (SIDE, SIDE),
    "clip": (SIDE, SIDE),
    "patch": (96, 64),
}
Posts = tuple[list[np.ndarray], np.ndarray]


def pictures(count: int, seed: int) -> Posts:
    """One to three pictures a post; its tags are the colours of the squares in them."""
    chance = np.random.default_rng(seed)
    items: list[np.ndarray] = []
    targets = np.zeros((count, 3), np.float32)
    for post in range(count):
        array = chance.integers(0, 90, (int(chance.integers(1, 4)), SIDE, SIDE, 3))
        for picture in array:
            colour, (y, x) = int(chance.integers(0, 3)), chance.integers(0, 20, 2)
            picture[y : y + 12, x : x + 12, colour] = 240
            targets[post, colour] = 1
        items.append(array.astype(np.uint8))
    return items, targets


def clips(count: int, seed: int) -> Posts:
    """One clip of a square that moves left, right, up or down: no single frame tells which."""
    chance = np.random.default_rng(seed)
    items: list[np.ndarray] = []
    targets = np.zeros((count, 4), np.float32)
    for post in range(count):
        way, across = int(chance.integers(0, 4)), int(chance.integers(2, 22))
        clip = np.repeat(chance.integers(0, 60, (1, SIDE, SIDE, 3)), 6, axis=0)
        for frame in range(6):
            along = 2 + 4 * (frame if way % 2 else 5 - frame)
            y, x = (across, along) if way < 2 else (along, across)
            clip[frame, y : y + 8, x : x + 8] = 220
        targets[post, way] = 1
        items.append(clip[None].astype(np.uint8))
    return items, targets


def patches(count: int, seed: int) -> Posts:
    """Two or three patches a post, with a tone low or high, or a beat."""
    chance = np.random.default_rng(seed)
    items: list[np.ndarray] = []
    targets = np.zeros((count, 3), np.float32)
    for post in range(count):
        array, what = chance.normal(-3, 0.3, (int(chance.integers(2, 4)), 96, 64)), post % 3
        if what == 2:
            array[:, ::12] += 3
        else:
            array[:, :, 12 + 30 * what] += 3
        targets[post, what] = 1
        items.append(array.astype(np.float32))
    return items, targets


def learn(
    kind: Kind, train: Posts, valid: Posts, folder: Path, *, epochs: int, seed: int = 0
) -> StageReport:
    """A short training on one thread; its weights lie in the folder."""
    trainer = TrainerSettings(
        epochs=epochs,
        batch_size=16,
        n_gpu=0,
        precision="fp32",
        threads=1,
        save_dir=folder / "run",
        tensorboard=False,
        progress=False,
    )
    build_set = partial(MediaDataset.of_arrays, kind, max_items=6)

    def build() -> MediaTagger:
        backbone = create_backbone(ARCH, kind, SIZES[kind], "scratch")
        return MediaTagger(backbone, SIZES[kind], train[1].shape[1], 0.2, kind)

    def save(tagger: MediaTagger, out: Path) -> None:
        save_weights(tagger.backbone, out, "backbone", {"arch": ARCH, "kind": kind})

    def work(fabric: Any) -> StageReport:
        posts = build_set(*train, seed=seed)
        data = TrainData(posts, build_set(*valid), collate_media, len(posts))
        optimizer = OptimizerSettings(learning_rate=4e-3, gradient_clip=1.0)
        more: dict[str, Any] = {"trainer_settings": trainer, "optimizer": optimizer}
        more |= {"name": kind, "signature": "signature", "seed": seed}
        return train_model(fabric, data, build, save, (folder / "weights.safetensors",), **more)

    return distributed.run(trainer, work)


def test_sound_is_learned_and_serves_as_an_extractor(tmp_path: Path) -> None:
    """Patches go in as they are; posts have different numbers of them."""
    report = learn("patch", patches(36, 1), patches(15, 2), tmp_path, epochs=3)
    assert report.metrics["map"] > 0.9
    settings = AudioSettings(arch=ARCH, weights=str(report.weights), precision="fp32")
    extractor = AudioExtractor(settings)
    extractor.load()
    items, _ = patches(2, 3)
    rows = extractor.forward([extractor.preprocess(item) for item in items])
    assert [f.shape for f in rows] == [(len(item), extractor.dim) for item in items]


def test_movements_are_learned_from_ordered_frames(tmp_path: Path) -> None:
    """Directions that no single frame shows are told apart on clips never seen."""
    assert learn("clip", clips(120, 1), clips(30, 2), tmp_path, epochs=3).metrics["gap"] > 0.8


def test_where_it_moves() -> None:
    """A square on a still ground is found where it stands; a still clip has no such place."""
    clip = torch.zeros(2, 5, 3, 70, 70)
    for frame in range(5):
        clip[0, frame, :, 30:40, 10 * frame : 10 * frame + 10] = 255
    maps = where_it_moves(clip).view(2, 5, 7, 7)
    for frame in range(5):
        assert maps[0, frame].flatten().argmax() == 3 * 7 + frame
        assert maps[0, frame].sum() == pytest.approx(1)
    assert not maps[1].any()


def test_the_same_seed_gives_the_same_file(tmp_path: Path) -> None:
    """Weights, order and augmentation come from the seed alone; another seed, another file."""
    made = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        report = learn(
            "picture", pictures(24, 1), pictures(12, 2), tmp_path / name, epochs=1, seed=seed
        )
        made.append(report.weights.read_bytes())
        torch.rand(3)  # what others draw in between changes nothing
    assert made[0] == made[1] != made[2]


def test_posts_without_items_are_left_out() -> None:
    items, targets = pictures(20, 1)
    items[3] = items[3][:0]
    posts = MediaDataset.of_arrays("picture", items, targets, max_items=2)
    assert len(posts) == len(posts.targets) == 19
    assert posts[3].post_id == "4"


@pytest.mark.parametrize("kind", ["picture", "clip", "patch"])
def test_augmentation_keeps_shape_and_kind(kind: Kind) -> None:
    """All frames of a clip are moved alike, and nothing is the same twice."""
    chance = np.random.default_rng(0)
    shape = {"picture": (32, 32, 3), "clip": (4, 32, 32, 3), "patch": (96, 64)}[kind]
    item = chance.uniform(0, 255, shape).astype(np.float32 if kind == "patch" else np.uint8)
    if kind == "clip":
        item[:] = item[:1]
    for _ in range(10):
        augmented = augment(item, kind, chance)
        assert (augmented.shape, augmented.dtype) == (item.shape, item.dtype)
        assert not np.array_equal(augmented, item)
        if kind == "clip":
            np.testing.assert_array_equal(
                augmented, np.broadcast_to(augmented[:1], augmented.shape)
            )


def test_unknown_architectures_and_weights_that_are_not_there() -> None:
    """Near names of timm are offered."""
    with pytest.raises(ConfigError, match=r"'resnet99': timm has no such model; near: .*resnet"):
        create_backbone("resnet99", "picture", (SIDE, SIDE), "scratch")
    with one_line(ConfigError, match=r"/none\.safetensors"):
        create_backbone(ARCH, "picture", (SIDE, SIDE), "/none.safetensors")
