"""Training of backbones: they learn what they are shown, and load as extractors load them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from common.errors import ConfigError
from config.settings import AudioSettings, ImageSettings
from demo.backbone_data import ItemArray, ItemSet
from demo.train_backbone import BackboneReport, train_backbone
from extractors.models.audio import AudioExtractor
from extractors.models.visual import VisualExtractor
from fusion.backbones.augment import Kind, augment
from fusion.backbones.model import where_it_moves

ARCH = "test_resnet"  # timm's smallest
SIDE = 32
Posts = tuple[list[ItemArray], np.ndarray]


def pictures(count: int, seed: int) -> Posts:
    """One to three pictures a post; its tags are the colours of the squares in them."""
    chance = np.random.default_rng(seed)
    items: list[ItemArray] = []
    targets = np.zeros((count, 3))
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
    items: list[ItemArray] = []
    targets = np.zeros((count, 4))
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
    items: list[ItemArray] = []
    targets = np.zeros((count, 3))
    for post in range(count):
        array, what = chance.normal(-3, 0.3, (int(chance.integers(2, 4)), 96, 64)), post % 3
        if what == 2:
            array[:, ::12] += 3
        else:
            array[:, :, 12 + 30 * what] += 3
        targets[post, what] = 1
        items.append(array.astype(np.float32))
    return items, targets


def learn(kind: Kind, train: Posts, valid: Posts, out: Path, **how: object) -> BackboneReport:
    """A short training on one thread."""
    given = {"epochs": 6, "batch_size": 16, "learning_rate": 4e-3, "progress": False, "threads": 1}
    return train_backbone(ARCH, *train, *valid, kind=kind, out=out, **{**given, **how})  # type: ignore[arg-type]


def test_pictures_are_learned_and_serve_as_an_extractor(tmp_path: Path) -> None:
    """The file loads strictly into timm, and the extractor gives features that tell colours."""
    out = tmp_path / "image.safetensors"
    report = learn("picture", pictures(120, 1), pictures(60, 2), out)
    assert report.gap > 0.9
    assert report.losses[-1] < report.losses[0]
    model: Any = timm.create_model(ARCH, num_classes=0, in_chans=3)
    model.load_state_dict(load_file(out), strict=True)
    assert report.dim == model.num_features
    extractor = VisualExtractor(
        "image", ImageSettings(arch=ARCH, weights=str(out), image_size=SIDE, precision="fp32")
    )
    extractor.load()
    items, _ = pictures(3, 3)
    found = extractor.forward([extractor.preprocess(item) for item in items])
    model.eval()
    mean = torch.tensor(model.pretrained_cfg["mean"]) * 255
    std = torch.tensor(model.pretrained_cfg["std"]) * 255
    with torch.inference_mode():
        wanted = model(((torch.from_numpy(items[0]) - mean) / std).permute(0, 3, 1, 2)).numpy()
    np.testing.assert_allclose(found[0], wanted, atol=2e-2, rtol=2e-2)
    with safe_open(out, framework="pt") as file:
        about = json.loads(file.metadata()["backbone"])
    assert about == {"arch": ARCH, "kind": "picture", "height": "32", "width": "32"}


def test_sound_is_learned_and_serves_as_an_extractor(tmp_path: Path) -> None:
    """Patches go in as they are; posts have different numbers of them."""
    out = tmp_path / "audio.safetensors"
    report = learn("patch", patches(60, 1), patches(30, 2), out, epochs=8)
    assert report.gap > 0.9
    extractor = AudioExtractor(AudioSettings(arch=ARCH, weights=str(out), precision="fp32"))
    extractor.load()
    items, _ = patches(2, 3)
    found = extractor.forward([extractor.preprocess(item) for item in items])
    assert [f.shape for f in found] == [(len(item), report.dim) for item in items]


@pytest.mark.slow
def test_movements_are_learned_from_ordered_frames(tmp_path: Path) -> None:
    """Directions that no single frame shows are told apart on clips never seen."""
    out = tmp_path / "video.safetensors"
    report = learn("clip", clips(160, 1), clips(60, 2), out, epochs=12)
    assert report.hit_at_1 > 0.8
    assert np.nanmin(report.per_class_ap) > 0.7


def test_where_it_moves() -> None:
    """A square on a still ground is found where it stands; a still clip has no such place."""
    clip = torch.zeros(2, 5, 3, 70, 70)
    for frame in range(5):
        clip[0, frame, :, 30:40, 10 * frame : 10 * frame + 10] = 255
    found = where_it_moves(clip).view(2, 5, 7, 7)
    for frame in range(5):
        assert found[0, frame].flatten().argmax() == 3 * 7 + frame
        assert found[0, frame].sum() == pytest.approx(1)
    assert not found[1].any()


def test_the_same_seed_gives_the_same_file(tmp_path: Path) -> None:
    """Weights, order and augmentation come from the seed alone."""
    files = [tmp_path / f"{name}.safetensors" for name in "abc"]
    for file, seed in zip(files, (1, 1, 2), strict=True):
        learn("picture", pictures(24, 1), pictures(12, 2), file, epochs=1, seed=seed)
        torch.rand(3)  # what others draw in between changes nothing
    assert files[0].read_bytes() == files[1].read_bytes() != files[2].read_bytes()


def test_training_goes_on_from_a_file(tmp_path: Path) -> None:
    first = learn("picture", pictures(60, 1), pictures(30, 2), tmp_path / "a.safetensors")
    again = learn(
        "picture",
        pictures(60, 1),
        pictures(30, 2),
        tmp_path / "b.safetensors",
        weights=str(first.path),
        epochs=1,
    )
    assert again.losses[0] < first.losses[0]


def test_posts_without_items_are_left_out(tmp_path: Path) -> None:
    items, targets = pictures(20, 1)
    items[3] = items[3][:0]
    out = tmp_path / "x.safetensors"
    report = learn("picture", (items, targets), pictures(10, 2), out, epochs=1, pooling="mean")
    assert (report.posts, report.valid_posts) == (19, 10)


@pytest.mark.parametrize("kind", ["picture", "clip", "patch"])
def test_augmentation_keeps_shape_and_range(kind: Kind) -> None:
    """Pixels stay within [0, 255]; all frames of a clip are moved alike."""
    chance = np.random.default_rng(0)
    shape = {"picture": (32, 32, 3), "clip": (4, 32, 32, 3), "patch": (96, 64)}[kind]
    item = chance.uniform(0, 255, shape).astype(np.float32)
    if kind == "clip":
        item[:] = item[:1]
    for _ in range(10):
        found = augment(item, kind, chance)
        assert found.shape == item.shape
        assert found.dtype == np.float32
        assert not np.array_equal(found, item)
        if kind != "patch":
            assert found.min() >= 0
            assert found.max() <= 255
        if kind == "clip":
            np.testing.assert_array_equal(found, np.broadcast_to(found[:1], found.shape))


def test_validation_sees_every_post_once_and_in_order() -> None:
    """Without chance the batches are the set as it is, thinned evenly to the most items."""
    items = [np.full((n, 8, 8, 3), n, np.uint8) for n in (1, 9, 2)]
    found = ItemSet.build("picture", items, np.eye(3), "posts")
    batches = list(found.batches(2, 4, None))
    assert np.concatenate([b.rows for b in batches]).tolist() == [0, 1, 2]
    assert [b.owners.tolist() for b in batches] == [[0, 1, 1, 1, 1], [0, 0]]


@pytest.mark.parametrize(
    ("how", "error", "says"),
    [
        ({"weights": "/none.safetensors"}, ConfigError, "/none.safetensors"),
        ({"device": "cuda:77"}, ConfigError, "cuda:77"),
        ({"image_size": 64}, ValueError, "not 64"),
        ({"epochs": 0}, ConfigError, "epochs"),
    ],
)
def test_what_cannot_be_trained_is_said_in_one_line(
    how: dict[str, object], error: type[Exception], says: str, tmp_path: Path
) -> None:
    """Nothing is written."""
    out = tmp_path / "x.safetensors"
    with pytest.raises(error, match=says) as caught:
        learn("picture", pictures(20, 1), pictures(4, 2), out, **{"epochs": 2, **how})
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_items_that_are_not_finite(tmp_path: Path) -> None:
    items, targets = patches(20, 1)
    items[7][0, 0, 0] = np.nan
    with pytest.raises(ConfigError, match="the training loss is nan"):
        learn("patch", (items, targets), patches(4, 2), tmp_path / "x.safetensors", epochs=1)
    assert not list(tmp_path.iterdir())


def test_unknown_architectures_and_wrong_shapes(tmp_path: Path) -> None:
    """Near names of timm are offered; arrays of the wrong kind are refused."""
    items, targets = pictures(4, 1)
    out = tmp_path / "x.safetensors"
    with pytest.raises(ConfigError, match=r"'resnet99': timm has no such model; near: .*resnet"):
        train_backbone("resnet99", items, targets, items, targets, kind="picture", out=out)
    with pytest.raises(ValueError, match="clip items must all have one shape"):
        learn("clip", (items, targets), (items, targets), out)
    with pytest.raises(ValueError, match="no post has a picture"):
        learn("picture", ([items[0][:0]], targets[:1]), (items, targets), out)
    with pytest.raises(ValueError, match="need targets"):
        learn("picture", (items, targets[:2]), (items, targets), out)
