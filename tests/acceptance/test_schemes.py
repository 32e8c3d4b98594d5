"""Both feature schemes with every switch: real media to features, a training, and tags served.

Backbones are small and have random weights, so that tags mean nothing: what counts is that each
combination goes all the way, and that a post gets the same tags offline and online.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import pytest
import torch
import yaml

import infer_net
import train_net
from common.post import Features, Media, Post, Stream, Tags, modality_of
from config.features import FeatureSettings, ImageSettings, OcrSettings, VideoSettings
from config.load import load_settings
from config.settings import Settings
from extractors.feature_file import read_features, write_features
from extractors.parts import slot_bytes
from tests.support import media
from tests.support.fakes.broker import MemoryBroker, MemoryQueue
from tests.support.fakes.store import FakeStore
from tests.support.processes import file_server
from tests.support.tiny_models import TINY_CNN, tiny_features
from workers.local import local_runner
from workers.pool.pool import ProcessPool

Scheme = Literal[1, 2]
OcrMode = Literal["append", "separate"]
POSTS, FRAMES = 12, 6
LABELS = ("cat", "dog", "sea")
# Every pair of switches once: what three of them do together, two do already.
CASES = [(1, False, "append"), (1, True, "separate"), (2, False, "separate"), (2, True, "append")]


def features_of(scheme: Scheme, mode: OcrMode) -> FeatureSettings:
    """Small extractors in the form of a scheme."""
    ocr = OcrSettings(max_side=256, detect_side=96, frames=0)
    if scheme == 1:
        return tiny_features(ocr_mode=mode).model_copy(update={"ocr": ocr})
    visual = {"arch": TINY_CNN, "image_size": 48, "batch_size": 8, "precision": "fp32"}
    lstm = {"projection": 16, "hidden": 8, "join": 32, "width": 24, "weights": "random:4"}
    video = VideoSettings.model_validate(
        {**visual, "weights": "random:2", "frames": FRAMES, "short_clips": "repeat", "lstm": lstm}
    )
    image = ImageSettings.model_validate({**visual, "weights": "random:3"})
    return tiny_features(video=video, image=image, ocr_mode=mode).model_copy(update={"ocr": ocr})


def write_media(folder: Path) -> list[Post]:
    """Posts of which some lack text, pictures, clips or sound; every third picture has words."""
    posts = []
    for i in range(POSTS):
        attached: list[Media] = []
        if i % 2 == 0:
            picture = media.noise(96, 64, seed=i)
            if i % 3 == 0:
                picture = np.full((64, 192, 3), 245, np.uint8)
                cv2.putText(picture, f"SALE {i}", (8, 44), cv2.FONT_HERSHEY_SIMPLEX, 1.1, 0, 3)
            path = media.write_png(folder / f"{i}.png", picture)
            attached.append(Media("image", str(path)))
        if i % 3 != 1:
            steps = media.grey_steps(4 + i, lowest=10 * i)
            sound = media.tone(duration_s=1.2) if i % 4 == 0 else None
            path = media.write_video(folder / f"{i}.mp4", steps, audio=sound)
            attached.append(Media("video", str(path)))
        if i == 7:
            attached.append(Media("audio", str(media.write_wav(folder / "7.wav", media.tone()))))
        text = "" if i == 6 else f"post {i} about a {LABELS[i % 3]}"
        posts.append(Post(f"p{i}", text, tuple(attached), labels=(LABELS[i % 3],)))
    return posts


@dataclass
class Corpus:
    """Posts with real media, and their features in each form that was asked for."""

    folder: Path
    posts: list[Post]
    done: dict[tuple[Scheme, OcrMode], Path] = field(default_factory=dict)

    def features(self, scheme: Scheme, mode: OcrMode) -> Path:
        key = (scheme, mode)
        if key not in self.done:
            root = self.folder / f"features-{scheme}-{mode}"
            with local_runner(Settings(features=features_of(scheme, mode)), fuse=False) as runner:
                for post in self.posts:
                    write_features(root, runner.run(post).features, runner.fingerprints)
            self.done[key] = root
        return self.done[key]

    def read(self, scheme: Scheme, mode: OcrMode) -> dict[str, Features]:
        root = self.features(scheme, mode)
        return {post.post_id: read_features(root, post.post_id) for post in self.posts}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Corpus]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("schemes")
    (folder / "media").mkdir()
    yield Corpus(folder, write_media(folder / "media"))
    torch.set_num_threads(threads)


def data_file(corpus: Corpus, root: Path, out: Path, posts: list[Post]) -> Path:
    from extractors.feature_file import feature_path

    entries = [
        {
            "post_id": post.post_id,
            "labels": list(post.labels),
            "features": str(feature_path(root, post.post_id)),
        }
        for post in posts
    ]
    out.write_text(json.dumps(entries))
    return out


def train(corpus: Corpus, out: Path, scheme: Scheme, mode: OcrMode, *, as_frames: bool) -> Path:
    """One epoch through `train_net.py`; the bundle."""
    root = corpus.features(scheme, mode)
    (out / "labels.json").write_text(json.dumps({str(i): n for i, n in enumerate(LABELS)}))
    train_file = data_file(corpus, root, out / "train.json", corpus.posts[:9])
    valid_file = data_file(corpus, root, out / "valid.json", corpus.posts[9:])
    settings = {
        "data": {
            "train": str(train_file),
            "valid": str(valid_file),
            "labels": str(out / "labels.json"),
            "image_as_frames": as_frames,
            "ocr_mode": mode,
        },
        "model": {"name": "token_transformer", "token_transformer": {"width": 32, "layers": 1}},
        "trainer": {
            "epochs": 1,
            "batch_size": 3,
            "n_gpu": 0,
            "fix_random_seed": True,
            "save_dir": str(out / "run"),
            "tensorboard": False,
            "progress": False,
        },
        "bundle": {"name": "small", "out": str(out / "bundle")},
        "report": {"enabled": False},
    }
    (out / "train.yaml").write_text(yaml.safe_dump(settings))
    assert train_net.main(["--model_config", str(out / "train.yaml")]) == 0
    return out / "bundle"


def infer(corpus: Corpus, out: Path, root: Path, bundle: Path) -> dict[str, dict[str, Any]]:
    """`infer_net.py` over all posts: post ID to its line."""
    file = data_file(corpus, root, out / "all.json", corpus.posts)
    config = {"bundle": str(bundle), "features": str(root), "n_gpus": 0, "progress": False}
    (out / "infer.yaml").write_text(yaml.safe_dump(config))
    output = out / "tags.jsonl"
    arguments = ["--infer_config", str(out / "infer.yaml"), "--input", str(file)]
    assert infer_net.main([*arguments, "--output", str(output)]) == 0
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    return {line["post_id"]: line for line in lines}


def daemon_settings(
    out: Path, scheme: Scheme, mode: OcrMode, bundle: Path, *, as_frames: bool
) -> Settings:
    """The online side of a combination."""
    return Settings.model_validate(
        {
            "features": features_of(scheme, mode).model_dump(),
            "fetch": {"spool": str(out / "spool"), "allow_private_hosts": True},
            "decode": {"processes": 1, "max_audio_s": 5},
            "workers": {"slots": 4, "extractors": [{"threads": 1}]},
            "fusion": {"bundle": str(bundle), "image_as_frames": as_frames},
            "king": {"health_file": str(out / "king.json")},
            "log": {"level": "warning"},
        }
    )


def same_tags(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    """The same tags in the same order, with scores within the rounding of features."""
    assert [(t["id"], t["name"]) for t in ours] == [(t["id"], t["name"]) for t in theirs]
    np.testing.assert_allclose([t["score"] for t in ours], [t["score"] for t in theirs], atol=1e-4)


def as_dicts(tags: Tags) -> list[dict[str, Any]]:
    return [{"id": tag.id, "name": tag.name, "score": tag.score} for tag in tags.tags]


def test_scheme_2_gives_every_clip_all_its_segments(corpus: Corpus) -> None:
    """Rows of TSN and one vector for each clip, those shorter than the segments too."""
    for post_id, features in corpus.read(2, "separate").items():
        clips = sum(
            m.kind == "video" for p in corpus.posts if p.post_id == post_id for m in p.media
        )
        assert ("video" in features.arrays) == ("video_lstm" in features.arrays) == bool(clips)
        if clips:
            assert features.arrays["video"].shape == (FRAMES, 96)
            assert features.arrays["video_lstm"].shape == (1, 24)
        assert {modality_of(stream) for stream in features.arrays} == {
            m for m, status in features.statuses.items() if status == "ok"
        }


@pytest.mark.parametrize("scheme", [1, 2])
def test_words_in_pictures_join_the_text_or_stand_alone(corpus: Corpus, scheme: Scheme) -> None:
    """OCR text is in the text's tokens, or in tokens of its own; never in both."""
    append, separate = corpus.read(scheme, "append"), corpus.read(scheme, "separate")
    read = [post_id for post_id, features in separate.items() if "ocr" in features.arrays]
    assert "p0" in read
    assert "p6" in read
    for post_id in append:
        assert "ocr" not in append[post_id].arrays
        assert append[post_id].statuses["ocr"] == separate[post_id].statuses["ocr"]
        lengths = [len(f[post_id].arrays.get("text", ())) for f in (append, separate)]
        assert (lengths[0] > lengths[1]) == (post_id in read)


def test_the_daemons_config_of_scheme_2_is_the_published_form() -> None:
    """Models, segments and sizes of the file, and slots that hold 300 frames."""
    settings = load_settings(Path("config/infer_config_scheme2.yaml"))
    video, image = settings.features.video, settings.features.image
    assert (video.arch, video.frames, video.short_clips) == ("resnet50", 300, "repeat")
    assert (video.lstm.projection, video.lstm.hidden, video.lstm.dropout) == (1024, 512, 0.5)
    assert (video.lstm.join, video.lstm.width) == (8192, 4096)
    assert image.arch == "efficientnet_b5"
    assert slot_bytes(settings) > 300 * 224 * 224 * 3


@pytest.mark.parametrize(("scheme", "as_frames", "mode"), CASES)
def test_a_combination_trains_infers_and_serves(
    corpus: Corpus, tmp_path: Path, scheme: Scheme, as_frames: bool, mode: OcrMode
) -> None:
    """One epoch, tags offline for every post, and the same tags for raw media in one process.

    With all that scheme 2 adds, the King gives them too: a message, downloads, worker processes.
    """
    bundle = train(corpus, tmp_path, scheme, mode, as_frames=as_frames)
    about = yaml.safe_load((bundle / "bundle.yaml").read_text())
    assert (about["image_as_frames"], about["ocr_mode"]) == (as_frames, mode)
    streams: set[Stream] = {"video", "image", "audio", "text"}
    streams |= {"video_lstm"} if scheme == 2 else set()
    streams |= {"ocr"} if mode == "separate" else set()
    assert set(about["features"]) == streams
    offline = infer(corpus, tmp_path, corpus.features(scheme, mode), bundle)
    assert set(offline) == {post.post_id for post in corpus.posts}
    assert any(line["tags"] for line in offline.values())
    settings = daemon_settings(tmp_path, scheme, mode, bundle, as_frames=as_frames)
    with local_runner(settings) as runner:
        for post in (corpus.posts[0], corpus.posts[6]):
            same_tags(as_dicts(runner.run(post).tags), offline[post.post_id]["tags"])
    if (scheme, as_frames) == (2, True):
        result = served(corpus, settings)
        assert result["status"] == "tagged"
        assert set(result["modalities"].values()) == {"ok"}
        same_tags(result["tags"], offline[corpus.posts[0].post_id]["tags"])


def served(corpus: Corpus, settings: Settings) -> Any:
    """The document that the King writes for the first post, which has every modality."""
    from king.king import King

    post = corpus.posts[0]
    with file_server(corpus.folder / "media") as url:
        document: dict[str, Any] = {"_id": post.post_id, "text": post.text}
        for medium in post.media:
            where = f"{url}/{Path(medium.source).name}"
            document.setdefault(f"{medium.kind}s", []).append(where)
        store, queue = FakeStore([document]), MemoryQueue()
        queue.put(json.dumps({"post_id": post.post_id}).encode())
        king = King(settings, pool=ProcessPool(settings), store=store, broker=MemoryBroker(queue))
        assert king.run(drain=True) == 0
    return store.posts[post.post_id]["insight"]
