"""Scheme 2 of videos: TSN rows and the attention LSTM, against plain numpy."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from common.errors import ConfigError, FeatureError, MediaError
from config.features import LstmSizes, VideoLstmSettings, VideoSettings
from config.settings import DecodeSettings
from extractors.media.decode import read_frames
from extractors.media.video import PacketIndex
from extractors.models.visual import AttentionLstm, VideoExtractor, VideoLstm
from extractors.parts import FrameChoice
from extractors.suite import ExtractorSuite
from tests.support import media
from tests.support.tiny_models import TINY_CNN, tiny_features, tiny_timm_weights

SIZES = {"projection": 6, "hidden": 5, "join": 9, "width": 7}
DIM = 96
LIMITS = DecodeSettings()


def settings(**changes: Any) -> VideoSettings:
    values: dict[str, Any] = {
        "arch": TINY_CNN,
        "weights": "random:1",
        "image_size": 32,
        "frames": 6,
        "short_clips": "repeat",
        "precision": "fp32",
        "lstm": {**SIZES, "weights": "random:2", "precision": "fp32"},
    }
    return VideoSettings.model_validate({**values, **changes})


def pixels(count: int, seed: int = 0, size: int = 32) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3)).astype(np.uint8)


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def numpy_direction(w: dict[str, Any], x: Any, ending: str) -> Any:
    """One direction, frame by frame; gates in torch's order: input, forget, cell, output."""
    size = w[f"lstm.weight_hh_l0{ending}"].shape[1]
    state, cell, states = np.zeros(size), np.zeros(size), []
    for row in x:
        gates = w[f"lstm.weight_ih_l0{ending}"] @ row + w[f"lstm.bias_ih_l0{ending}"]
        gates = gates + w[f"lstm.weight_hh_l0{ending}"] @ state + w[f"lstm.bias_hh_l0{ending}"]
        i, f, g, o = np.split(gates, 4)
        cell = sigmoid(f) * cell + sigmoid(i) * np.tanh(g)
        state = sigmoid(o) * np.tanh(cell)
        states.append(state)
    return np.stack(states)


def numpy_lstm(w: dict[str, Any], frames: Any) -> Any:
    """The published layers for one video, in float64."""
    x = np.tanh(frames @ w["project.weight"].T + w["project.bias"])
    ahead = numpy_direction(w, x, "")
    states = np.concatenate([ahead, numpy_direction(w, x[::-1], "_reverse")[::-1]], axis=1)
    scores = (states @ w["attend.weight"].T + w["attend.bias"])[:, 0]
    weights = np.exp(scores - scores.max())
    summed = (weights / weights.sum()) @ states
    joined = np.maximum(summed @ w["join.weight"].T + w["join.bias"], 0)
    return np.tanh(joined @ w["narrow.weight"].T + w["narrow.bias"])


def loaded(**changes: Any) -> VideoLstm:
    values = {**SIZES, "weights": "random:2", "precision": "fp32", **changes}
    lstm = VideoLstm(VideoLstmSettings.model_validate(values), "cpu")
    lstm.load_for(DIM, "frames")
    return lstm


def test_vectors_are_those_of_numpy() -> None:
    """FC, tanh, LSTM both ways, softmax attention, FC, ReLU, FC, tanh: written out once more."""
    chance = np.random.default_rng(3)
    videos = [chance.normal(0, 2, (n, DIM)).astype(np.float16) for n in (12, 1, 7, 12)]
    lstm = loaded()
    vectors = lstm.vectors(videos)
    weights = {k: v.double().numpy() for k, v in lstm.model.state_dict().items()}
    for video, vector in zip(videos, vectors, strict=True):
        assert vector.shape == (1, SIZES["width"])
        assert vector.dtype == np.float16
        expected = numpy_lstm(weights, video.astype(np.float64))
        np.testing.assert_allclose(vector[0], expected, atol=1e-3)
        assert np.abs(expected).max() > 0.01


def test_the_published_sizes_are_the_defaults() -> None:
    """1024, 512 each way, 8192 and 4096 of the frames' 2048."""
    with torch.device("meta"):
        model = AttentionLstm(2048, LstmSizes())
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items() if k.endswith("weight")}
    assert shapes == {
        "project.weight": (1024, 2048),
        "attend.weight": (1, 1024),
        "join.weight": (8192, 1024),
        "narrow.weight": (4096, 8192),
    }
    assert model.state_dict()["lstm.weight_hh_l0_reverse"].shape == (4 * 512, 512)
    assert LstmSizes().dropout == 0.5


def test_a_vector_does_not_depend_on_its_neighbours() -> None:
    chance = np.random.default_rng(5)
    videos = [chance.normal(0, 1, (n, DIM)).astype(np.float16) for n in (3, 9, 3, 0, 3, 9)]
    together = loaded(batch_size=2).vectors(videos)
    lstm = loaded()
    for video, vector in zip(videos, together, strict=True):
        np.testing.assert_allclose(vector, lstm.vectors([video])[0], atol=1e-3)
    assert together[3].shape == (0, SIZES["width"])


def test_weights_that_do_not_fit_are_one_line(tmp_path: Path) -> None:
    """Other sizes, missing and unpublished weights are refused, with the setting's name."""
    save_file(AttentionLstm(DIM, LstmSizes(**SIZES)).state_dict(), tmp_path / "lstm.safetensors")
    loaded(weights=str(tmp_path / "lstm.safetensors"))
    with pytest.raises(ConfigError, match=r"lstm\.weights: .* does not fit frames of length 96"):
        loaded(weights=str(tmp_path / "lstm.safetensors"), hidden=4)
    with pytest.raises(ConfigError, match=r"features\.video\.lstm\.weights: .*: no such file"):
        loaded(weights=str(tmp_path / "none.safetensors"))
    with pytest.raises(ConfigError, match="nobody publishes these weights"):
        loaded(weights="pretrained")


def test_what_is_not_finite_is_refused() -> None:
    with pytest.raises(FeatureError, match=r"video\.lstm: .* not finite"):
        loaded().vectors([np.full((2, DIM), np.nan, np.float16)])


def test_a_video_gives_rows_and_a_vector() -> None:
    suite = ExtractorSuite(tiny_features(video=settings()), names=("video",))
    suite.load()
    [streams] = suite.run("video", [pixels(6)])
    assert {stream: array.shape for stream, array in streams.items()} == {
        "video": (6, DIM),
        "video_lstm": (1, 7),
    }
    assert suite.dims == {"video": DIM, "video_lstm": 7}
    assert set(suite.fingerprints) == {"video", "video_lstm"}
    plain = VideoExtractor(settings(lstm={"weights": None}))
    plain.load()
    np.testing.assert_array_equal(plain.forward([pixels(6)])[0], streams["video"])
    np.testing.assert_array_equal(loaded().vectors([streams["video"]])[0], streams["video_lstm"])


def test_short_clips_repeat_their_frames() -> None:
    """Each segment takes the frame at its centre; one without frames gives no row and no vector."""
    extractor = VideoExtractor(settings())
    extractor.load()
    once = VideoExtractor(settings(short_clips="once", lstm={"weights": None}))
    once.load()
    clips = [pixels(count) for count in (0, 1, 2, 4, 5, 6)]
    for count, streams, rows in zip(
        (0, 1, 2, 4, 5, 6), extractor.forward(clips), once.forward(clips), strict=True
    ):
        assert rows.shape == (count, DIM)
        centres = [int(np.floor((k + 0.5) / 6 * count)) for k in range(6)] if count else []
        np.testing.assert_allclose(streams["video"], rows[centres], atol=1e-3)
        assert streams["video_lstm"].shape == (min(count, 1), 7)


def test_overflow_is_clamped_to_float16(tmp_path: Path) -> None:
    """Rows beyond float16's range stay finite, and so does the vector made of them."""
    path = tiny_timm_weights(tmp_path, TINY_CNN)
    state = load_file(path)
    last = max(k for k in state if k.startswith("layer4") and k.endswith("bn2.weight"))
    state[last] = state[last] + 1e7
    save_file(state, path)
    extractor = VideoExtractor(settings(weights=str(path)))
    extractor.load()
    [streams] = extractor.forward([pixels(6)])
    assert np.abs(streams["video"]).max() == np.finfo(np.float16).max
    assert np.isfinite(streams["video"]).all()
    assert np.isfinite(streams["video_lstm"]).all()


def test_fingerprints_tell_what_a_stream_was_made_with() -> None:
    """Another LSTM leaves the rows' fingerprint; other rows change both."""

    def prints(**changes: Any) -> tuple[str, str]:
        extractor = VideoExtractor(settings(**changes))
        extractor.load()
        streams = extractor.streams()
        return extractor.fingerprint, streams["video_lstm"][1] if "video_lstm" in streams else ""

    rows, vector = prints()
    for lstm in ({"weights": "random:3"}, {"join": 10, "weights": "random:2"}):
        changed = prints(lstm={**SIZES, **lstm})
        assert changed[0] == rows
        assert changed[1] != vector
    assert prints(lstm={"weights": None}, decode="accurate") == (rows, "")
    for changes in ({"weights": "random:9"}, {"short_clips": "once"}):
        other = prints(**changes)
        assert other[0] != rows
        assert other[1] != vector


class _Packet:
    """A packet of a stream of 25 frames a second."""

    def __init__(self, pts: int) -> None:
        self.pts, self.dts, self.duration = pts, pts, 40
        self.is_keyframe, self.is_discard = pts % 480 == 0, False


class _Stream:
    time_base, average_rate, guessed_rate = 0.001, 25, 25
    codec_context = SimpleNamespace(name="h264")


def index_of(count: int) -> PacketIndex:
    index = PacketIndex(_Stream(), 3600)
    for i in range(count):
        index.add(_Packet(i * 40))
    return index


@pytest.mark.parametrize(("total", "count"), [(300, 300), (1000, 300), (31, 8), (9, 3)])
def test_test_sampling_is_the_centre_of_each_segment(total: int, count: int) -> None:
    """TSN in test: frame floor((k + 0.5) * N / S)."""
    centres = [int(np.floor((k + 0.5) * total / count)) for k in range(count)]
    assert index_of(total).choose(count) == centres


def test_training_sampling_is_one_frame_of_each_segment() -> None:
    """TSN in training: every draw has a frame of each segment, and all frames come up."""
    index, total, count = index_of(40), 40, 8
    seen: set[int] = set()
    for seed in range(60):
        chosen = index.choose(count, np.random.default_rng(seed))
        assert [i * count // total for i in chosen] == list(range(count))
        seen.update(chosen)
    assert seen == set(range(total))
    same = [index.choose(count, np.random.default_rng(1)) for _ in range(2)]
    assert same[0] == same[1]


def test_frames_are_read_without_the_sound(tmp_path: Path) -> None:
    """`read_frames` gives grey levels of the right frames; a file of sound is refused."""
    steps = media.grey_steps(12)
    path = media.write_video(tmp_path / "v.mp4", steps, audio=media.tone(duration_s=0.4))
    frames = read_frames(path, choice=FrameChoice(3), side=16, limits=LIMITS)
    greys = [steps[i].mean() for i in (2, 6, 10)]
    np.testing.assert_allclose(frames.mean(axis=(1, 2, 3)), greys, atol=3)
    one = media.write_video(tmp_path / "one.mp4", steps[:1])
    assert read_frames(one, choice=FrameChoice(3), side=16, limits=LIMITS).shape == (1, 16, 16, 3)
    sound = media.write_wav(tmp_path / "s.wav", media.tone(duration_s=1))
    with pytest.raises(MediaError):
        read_frames(sound, choice=FrameChoice(3), side=16, limits=LIMITS)
