"""Backbones out of data files, through `train_net.py`: what is written is what extractors load."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import yaml

import train_net
from common.errors import ConfigError, MediaError
from common.post_set import PostSet
from config.features import (
    AudioSettings,
    FeatureSettings,
    ImageSettings,
    TextSettings,
    VideoSettings,
)
from config.labels import LabelMap
from config.settings import DecodeSettings
from config.train import BackboneTrainSettings
from extractors.learned import learned_from
from extractors.media.decode import decode_media
from extractors.models.audio import AudioExtractor
from extractors.models.text import TextExtractor
from extractors.models.visual import VideoExtractor, VisualExtractor
from fusion.backbones.media import MediaItems
from fusion.backbones.model import MediaTagger, create_backbone
from fusion.backbones.text import TextTagger, save_text
from fusion.backbones.training import train_backbones
from fusion.train.options import train_settings
from tests.support import media
from tests.support.fusion.media_posts import write_labels, write_pictures, write_videos
from tests.support.tiny_models import TINY_CNN, tiny_features

SIZE = 32
FRAMES = 8
LSTM = {"projection": 16, "hidden": 8, "join": 32, "width": 24, "epochs": 2, "batch_size": 6}


@pytest.fixture(scope="module")
def posts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("posts")
    write_labels(folder)
    write_pictures(folder, "pictures", 18)
    write_pictures(folder, "pictures_valid", 6, seed=1)
    write_videos(folder, "videos", 12)
    write_videos(folder, "videos_valid", 6, seed=1)
    return folder


def content(posts: Path, out: Path, task: str, **sections: Any) -> dict[str, Any]:
    name = "pictures" if task == "image_backbone" else "videos"
    values: dict[str, Any] = {
        "task": task,
        "data": {
            "train": str(posts / f"{name}.json"),
            "valid": str(posts / f"{name}_valid.json"),
            "labels": str(posts / "labels.json"),
        },
        "backbone": {"arch": TINY_CNN, "image_size": SIZE},
        "tsn": {"segments": 2, "test_segments": 3, "frames": FRAMES},
        "lstm": LSTM,
        "optimizer": {"learning_rate": 3e-3},
        "trainer": {
            "epochs": 3,
            "batch_size": 6,
            "n_gpu": 0,
            "threads": 1,
            "save_dir": str(out),
            "progress": False,
            "tensorboard": False,
            "fix_random_seed": True,
        },
    }
    for section, changes in sections.items():
        values[section] = {**values[section], **changes}
    return values


def settings(posts: Path, out: Path, task: str, **sections: Any) -> BackboneTrainSettings:
    return BackboneTrainSettings.model_validate(content(posts, out, task, **sections))


def command(posts: Path, out: Path, task: str, *options: str, **sections: Any) -> int:
    file = out.parent / f"{out.name}.yaml"
    file.write_text(yaml.safe_dump(content(posts, out, task, **sections)), encoding="utf-8")
    return train_net.main(["--model_config", str(file), *options])


def events(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]


# Whole runs


def test_pictures_become_the_image_extractors_weights(
    posts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Colours are learned; the file loads into the extractor and gives what was trained."""
    out = tmp_path / "run"
    assert command(posts, out, "image_backbone", "--epoch", "4", "--batch_size", "3") == 0
    said = capsys.readouterr().out
    weights = out / "weights" / f"{TINY_CNN}.safetensors"
    assert "image: epochs 4" in said
    assert str(weights) in said
    log = events(out / "latest" / "log" / "train.jsonl")
    assert [e["epoch"] for e in log if e["event"] == "valid"] == [1, 2, 3, 4]
    assert log[-1]["event"] == "weights"
    assert log[-1]["gap"] == max(e["gap"] for e in log if e["event"] == "valid") > 0.9
    assert (out / "latest" / "ckpt" / "last.pt").exists()

    extractor = VisualExtractor(
        "image",
        ImageSettings(arch=TINY_CNN, weights=str(weights), image_size=SIZE, precision="fp32"),
    )
    extractor.load()
    picture = MediaItems().picture(posts / "pictures" / "0-0.jpg", SIZE)
    [vectors] = extractor.forward([picture[None]])
    best = torch.load(out / "latest" / "ckpt" / "best.pt", weights_only=True)["model"]
    tagger = MediaTagger(
        create_backbone(TINY_CNN, "picture", (SIZE, SIZE), "scratch"), (SIZE, SIZE), 3, 0
    )
    tagger.load_state_dict(best)
    tagger.eval()
    with torch.inference_mode():
        pixels = torch.from_numpy(picture[None]).permute(0, 3, 1, 2).float()
        expected = tagger.backbone(tagger.normalize(pixels))
    np.testing.assert_allclose(vectors, expected, atol=2e-2, rtol=2e-3)


def test_sounds_become_the_audio_extractors_weights(tmp_path: Path) -> None:
    """High and low tones are told apart; the file is where the preset `small` looks for it."""
    write_labels(tmp_path)
    for side, count in (("train", 12), ("valid", 4)):
        entries = []
        for i in range(count):
            tone = np.sin(np.arange(32_000) * (0.9 if i % 2 else 0.1)) * (0.3 + 0.02 * i)
            soundfile.write(tmp_path / f"{side}{i}.wav", tone, 16_000)
            labels = [("red", "blue")[i % 2]]
            entries.append(
                {"post_id": f"{side}{i}", "labels": labels, "audios": [f"{side}{i}.wav"]}
            )
        (tmp_path / f"{side}.json").write_text(json.dumps(entries))
    (tmp_path / "bad.wav").write_bytes(b"RIFF no sound")
    bad = {"post_id": "bad", "labels": ["red"], "audios": ["bad.wav"]}
    entries = json.loads((tmp_path / "train.json").read_text())
    (tmp_path / "train.json").write_text(json.dumps([*entries, bad]))
    out, weights = tmp_path / "run", tmp_path / "placed" / "audio.safetensors"
    data = {key: str(tmp_path / f"{key}.json") for key in ("train", "valid")}
    changes: dict[str, Any] = {
        "data": {**data, "skip_bad": True},
        "backbone": {"arch": "test_resnet", "out": str(weights)},
        "trainer": {"epochs": 6},
    }
    assert command(tmp_path, out, "audio_backbone", **changes) == 0
    assert events(out / "latest" / "log" / "train.jsonl")[-1]["gap"] > 0.9
    [skipped] = events(out / "latest" / "log" / "skipped.jsonl")
    assert skipped["post_id"] == "bad"
    extractor = AudioExtractor(AudioSettings(arch="test_resnet", weights=str(weights)))
    extractor.load()
    [vectors] = extractor.forward([np.zeros((2, 96, 64), np.float32)])
    assert vectors.shape == (2, extractor.dim)
    learned = learned_from(FeatureSettings(audio=AudioSettings(weights=str(weights))))
    assert "train0" in learned["audio"]
    assert "valid0" not in learned["audio"]
    # Another run goes on from there, and a file that cannot be decoded is named.
    assert command(tmp_path, out, "audio_backbone", "--resume", str(out), **changes) == 0
    changes["data"]["skip_bad"] = False
    with pytest.raises(MediaError, match=r"post bad: .*bad\.wav"):
        train_backbones(settings(tmp_path, out, "audio_backbone", **changes), MediaItems())


def test_a_silent_validation_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of few posts those of the validation may be silent: the network is trained all the same."""
    write_labels(tmp_path)
    soundfile.write(tmp_path / "a.wav", np.sin(np.arange(32_000) * 0.1), 16_000)
    train = [{"post_id": f"p{i}", "labels": ["red"], "audios": ["a.wav"]} for i in range(2)]
    (tmp_path / "train.json").write_text(json.dumps(train))
    (tmp_path / "valid.json").write_text(json.dumps([{"post_id": "q", "labels": ["red"]}]))
    data = {key: str(tmp_path / f"{key}.json") for key in ("train", "valid")}
    changes = {"data": data, "backbone": {"arch": "test_resnet"}, "trainer": {"epochs": 1}}
    assert command(tmp_path, tmp_path / "run", "audio_backbone", **changes) == 0
    assert "audio: no validation post has sound" in capsys.readouterr().err
    assert (tmp_path / "run" / "weights" / "audio.safetensors").exists()


def test_texts_become_a_small_bert(tmp_path: Path) -> None:
    write_labels(tmp_path)
    words = ("sea", "forest", "古城")
    for side, count in (("train", 24), ("valid", 6)):
        entries = [
            {"post_id": f"{side}{i}", "labels": [("red", "green", "blue")[i % 3]]}
            | {"text": f"a day {i} by the {words[i % 3]}"}
            for i in range(count)
        ]
        (tmp_path / f"{side}.json").write_text(json.dumps(entries))
    out = tmp_path / "run"
    data = {key: str(tmp_path / f"{key}.json") for key in ("train", "valid")}
    backbone = {"arch": "bert"}
    assert (
        command(tmp_path, out, "text_backbone", "--epoch", "8", data=data, backbone=backbone) == 0
    )
    assert events(out / "latest" / "log" / "train.jsonl")[-1]["gap"] > 0.9
    folder = out / "weights" / "bert"
    extractor = TextExtractor(TextSettings(arch=str(folder)))
    extractor.load()
    [tokens] = extractor.forward([extractor.preprocess("by the sea")])
    assert tokens.shape == (5, extractor.dim)
    # What was served stays when the next one cannot be written.
    content, tagger = (folder / "config.json").read_bytes(), TextTagger(30, 3)
    with pytest.raises(AttributeError, match="save_pretrained"):
        save_text(tagger, None, folder, PostSet())
    assert (folder / "config.json").read_bytes() == content
    entries[0]["labels"] = ["grey"]
    (tmp_path / "valid.json").write_text(json.dumps(entries))
    grey = settings(tmp_path, out, "text_backbone", data=data, backbone=backbone)
    with pytest.raises(ConfigError, match=r"post valid0: label 'grey' is not in the label map"):
        train_backbones(grey, MediaItems())
    wrong = settings(tmp_path, out, "text_backbone", data=data)
    with pytest.raises(ConfigError, match="text_backbone takes tfidf or bert, not"):
        train_backbones(wrong, MediaItems())


def test_videos_become_tsn_and_lstm(posts: Path, tmp_path: Path) -> None:
    """Two stages in one run; both files load into the video extractor, which gives both streams."""
    out = tmp_path / "run"
    tsn, lstm = train_backbones(settings(posts, out, "video_backbone"), MediaItems())
    assert (tsn.name, lstm.name) == ("tsn", "lstm")
    assert tsn.weights == out / "weights" / "tsn.safetensors"
    assert lstm.weights == out / "weights" / "video_lstm.safetensors"
    assert lstm.epochs == LSTM["epochs"]
    assert tsn.metrics["gap"] > 0.5
    served = VideoSettings.model_validate(
        {
            "arch": TINY_CNN,
            "weights": str(tsn.weights),
            "image_size": SIZE,
            "frames": FRAMES,
            "short_clips": "repeat",
            "lstm": {
                **{k: LSTM[k] for k in ("projection", "hidden", "join", "width")},
                "weights": str(lstm.weights),
            },
        }
    )
    extractor = VideoExtractor(served)
    extractor.load()
    clip = posts / "videos" / "0.mp4"
    decoded = decode_media("video", clip, tiny_features(video=served), DecodeSettings())
    assert decoded.frames is not None
    [streams] = extractor.forward([decoded.frames])
    assert streams["video"].shape == (FRAMES, 96)
    assert streams["video_lstm"].shape == (1, LSTM["width"])
    # What the LSTM was trained on is what the extractor gives it.
    frame_rows = [np.load(path) for path in (out / "frames").rglob("*.npy")]
    assert len(frame_rows) == 18
    assert any(np.array_equal(rows, streams["video"]) for rows in frame_rows)


class _Tired(MediaItems):
    """Reads so many files, and then no more."""

    remaining: int

    def picture(self, path: Path, size: int) -> Any:
        self._count()
        return super().picture(path, size)

    def frames(self, path: Path, size: int, count: int, random: Any) -> Any:
        self._count()
        return super().frames(path, size, count, random)

    def _count(self) -> None:
        object.__setattr__(self, "remaining", self.remaining - 1)
        if self.remaining < 0:
            raise MediaError("the disk is gone")

    @classmethod
    def after(cls, reads: int) -> "_Tired":
        made = cls()
        object.__setattr__(made, "remaining", reads)
        return made


PICTURES, VALID_PICTURES = 27, 9


def test_an_interrupted_run_ends_with_the_same_weights(posts: Path, tmp_path: Path) -> None:
    """Two epochs, a third that breaks off, and --resume: three epochs in one go, to the bit."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    ema = {"optimizer": {"ema_decay": 0.9}}
    assert command(posts, whole, "image_backbone", **ema) == 0
    reader = _Tired.after(2 * (PICTURES + VALID_PICTURES) + 10)
    with pytest.raises(MediaError, match=r"post pictures\d+: .*\.jpg: the disk is gone"):
        train_backbones(settings(posts, parts, "image_backbone", **ema), reader)
    assert not (parts / "weights").exists()
    assert command(posts, parts, "image_backbone", "--resume", str(parts), **ema) == 0
    log = [
        e["epoch"]
        for e in events(parts / "latest" / "log" / "train.jsonl")
        if e["event"] == "epoch"
    ]
    assert log == [1, 2, 3]
    name = Path("weights") / f"{TINY_CNN}.safetensors"
    assert (whole / name).read_bytes() == (parts / name).read_bytes()


def test_a_video_run_goes_on_in_either_stage(posts: Path, tmp_path: Path) -> None:
    """Broken off in the TSN, or between its end and the LSTM's: the results are the same."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    task = "video_backbone"
    assert command(posts, whole, task, "--epoch", "2") == 0
    with pytest.raises(MediaError):
        train_backbones(settings(posts, parts, task, trainer={"epochs": 2}), _Tired.after(18 + 5))
    assert command(posts, parts, task, "--epoch", "2", "--resume", str(parts)) == 0
    for name in ("tsn.safetensors", "video_lstm.safetensors"):
        assert (whole / "weights" / name).read_bytes() == (parts / "weights" / name).read_bytes()
    # Killed before the LSTM's end: its last checkpoint is the one of the first epoch.
    longer = {"lstm": {"epochs": 4}}
    assert command(posts, parts, task, "--epoch", "2", "--resume", str(parts), **longer) == 0
    log = [
        e
        for e in events(parts / "latest" / "lstm" / "log" / "train.jsonl")
        if e["event"] == "epoch"
    ]
    assert [e["epoch"] for e in log] == [1, 2, 3, 4]


# Mistakes


def broken(posts: Path, folder: Path) -> Path:
    """The pictures and two more posts: one of a cut picture alone, one of a whole one too."""
    entries = json.loads((posts / "pictures.json").read_text())
    for entry in entries:
        entry["images"] = [str(posts / name) for name in entry["images"]]
    cut = media.truncate(posts / "pictures" / "0-0.jpg", folder / "cut.jpg", 0.4)
    images = [str(cut), str(posts / "pictures" / "0-0.jpg")]
    entries.append({"post_id": "bad", "labels": ["red"], "images": images})
    entries.append({"post_id": "worse", "labels": ["red"], "images": [str(cut)]})
    file = folder / "broken.json"
    file.write_text(json.dumps(entries))
    return file


def test_a_broken_picture_is_one_line_or_a_listed_skip(
    posts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run ends and names post and file; with skip_bad it is left out and listed.

    One validation post is enough then, too.
    """
    file = broken(posts, tmp_path)
    one = tmp_path / "one.json"
    one.write_text(json.dumps([{**json.loads(file.read_text())[0], "post_id": "v"}]))
    data = {"data": {"train": str(file), "valid": str(one)}}
    assert command(posts, tmp_path / "a", "image_backbone", **data) == 2
    said = capsys.readouterr().err.strip()
    assert len(said.splitlines()) == 1
    assert "cut.jpg" in said
    out = tmp_path / "b"
    options = ("--skip_bad", "--epoch", "1")
    assert command(posts, out, "image_backbone", *options, **data) == 0
    skipped = events(out / "latest" / "log" / "skipped.jsonl")
    assert [(e["post_id"], e["kind"]) for e in skipped] == [("bad", "media")]
    assert "cut.jpg" in skipped[0]["file"]
    assert "left out 1 files that cannot be decoded" in capsys.readouterr().err
    one.write_text(json.dumps([{**json.loads(file.read_text())[-1], "post_id": "v"}]))
    assert command(posts, tmp_path / "c", "image_backbone", *options, **data) == 2
    assert "one.json: none of its images can be decoded; the first: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("data", "match"),
    [
        ({"train": "none.json"}, "none.json: no such data file"),
        ({"train": "VIDEOS"}, "videos.json: no post has images"),
        ({"labels": "OTHER"}, "label 'red' is not in the label map"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(
    posts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    data: dict[str, str],
    match: str,
) -> None:
    (tmp_path / "other.json").write_text('{"0": "cat"}')
    places = {"VIDEOS": str(posts / "videos.json"), "OTHER": str(tmp_path / "other.json")}
    named = {key: places.get(value, value) for key, value in data.items()}
    assert command(posts, tmp_path / "run", "image_backbone", data=named) == 2
    said = capsys.readouterr().err
    assert match in said
    assert len(said.strip().splitlines()) == 1


def test_one_file_is_served_where_the_settings_say(posts: Path, tmp_path: Path) -> None:
    """A video backbone writes two, and takes no name for them; sound knows no n-grams."""
    served = {"out": str(tmp_path / "served" / "image.safetensors")}
    out = tmp_path / "run"
    assert command(posts, out, "image_backbone", "--epoch", "1", backbone=served) == 0
    assert Path(served["out"]).exists()
    for task, backbone, text in (
        ("video_backbone", served, "backbone.out: a video_backbone writes two files"),
        ("audio_backbone", {"arch": "tfidf"}, "no post to train on has sound"),
    ):
        wrong = settings(posts, out, task, backbone=backbone)
        with pytest.raises(ConfigError, match=text):
            train_backbones(wrong, MediaItems())


def test_the_configs_of_the_backbones_are_valid() -> None:
    """The files in config/ have the published sizes, and every key is known."""
    image = train_settings(
        train_net.SCRIPT.read(["--model_config", "config/train_image_eff103.yaml"])
    )
    assert isinstance(image, BackboneTrainSettings)
    assert image.backbone.arch == "efficientnet_b5"
    assert len(LabelMap.load(image.data.labels)) == 103
    video = train_settings(
        train_net.SCRIPT.read(["--model_config", "config/train_video_tsn_lstm.yaml"])
    )
    assert isinstance(video, BackboneTrainSettings)
    assert (video.backbone.arch, video.tsn.frames) == ("resnet50", 300)
    assert (video.lstm.projection, video.lstm.hidden, video.lstm.dropout) == (1024, 512, 0.5)
    assert (video.lstm.join, video.lstm.width) == (8192, 4096)
