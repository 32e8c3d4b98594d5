"""ASR: sound -> words -> features as of a text; a stream of its own, off by default."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import ConfigError, FeatureError
from config.features import AsrSettings, AudioSettings, FeatureSettings
from config.settings import DecodeSettings, Settings
from extractors.learned import learned_from
from extractors.media.decode import decode_media
from extractors.models.asr import Whisper, level_db, words_of
from extractors.models.catalog import needs
from extractors.parts import SPEECH, slot_bytes
from extractors.suite import ExtractorSuite
from tests.support import media
from tests.support.tiny_encoders import sentence_bert, talking_whisper
from tests.support.tiny_models import tiny_features


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return talking_whisper(tmp_path_factory.mktemp("whisper"))


def asr(folder: Path, **options: Any) -> AsrSettings:
    values = {"arch": str(folder), "enabled": True, "precision": "fp32", "no_speech": 1.0}
    return AsrSettings(**{**values, **options})


def loaded(folder: Path, **options: Any) -> Whisper:
    whisper = Whisper(asr(folder, **options), "cpu")
    whisper.load()
    return whisper


def windows() -> np.ndarray:
    """Noise, silence, a click, quiet noise, a tone."""
    rng = np.random.default_rng(0)
    rows = np.zeros((5, *SPEECH.shape), np.float32)
    rows[0] = rng.standard_normal(SPEECH.shape) * 0.1
    rows[2, 1000] = 0.02
    rows[3] = rng.standard_normal(SPEECH.shape) * 0.004
    rows[4] = np.sin(np.arange(SPEECH.samples) * 0.05)
    return rows


def reference(folder: Path, window: np.ndarray, **options: Any) -> str:
    """Return what transformers itself hears, from the spectrogram on, one window at a time."""
    import transformers

    made: Any = transformers
    model = made.WhisperForConditionalGeneration.from_pretrained(folder).eval()
    sound = made.WhisperFeatureExtractor.from_pretrained(folder)
    values = sound([window], sampling_rate=16_000, return_tensors="pt").input_features
    ids = model.generate(values, max_new_tokens=16, **options)
    tokens = made.AutoTokenizer.from_pretrained(folder)
    return " ".join(str(tokens.batch_decode(ids, skip_special_tokens=True)[0]).split())


def test_words_are_those_of_transformers_and_silence_has_none(folder: Path) -> None:
    """In batches, with the language told by the model or set; silence and a click are not heard."""
    texts = loaded(folder).transcribe(windows())
    assert [bool(text) for text in texts] == [True, False, False, True, True]
    for row in (0, 3):
        assert texts[row] == reference(folder, windows()[row], task="transcribe")
    for code in ("en", "de"):
        one = loaded(folder, language=code, batch_size=1).transcribe(windows()[3:4])
        assert one == [words_of(reference(folder, windows()[3], task="transcribe", language=code))]
    bf16 = loaded(folder, precision="bf16").transcribe(windows())
    assert [bool(text) for text in bf16] == [bool(text) for text in texts]


def test_what_whisper_calls_no_speech_has_no_words(folder: Path) -> None:
    """The probability of its first token decides, against the setting."""
    assert loaded(folder, no_speech=0.0).transcribe(windows()) == [""] * 5


def test_a_model_of_one_language(tmp_path: Path) -> None:
    """It is asked for no language, and refuses another."""
    folder = talking_whisper(tmp_path / "w", languages=())
    assert loaded(folder, language="en").transcribe(windows()[3:4]) != [""]
    with pytest.raises(ConfigError, match=r"features\.asr\.language: .* knows no 'de', but en"):
        loaded(folder, language="de")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (" Hello, world. ", "Hello, world."),
        ("[Music] so it begins (applause)", "so it begins"),
        ("\u266a la la \u266a", "la la"),
        ("\uff08\u97f3\u4e50\uff09\u4f60\u597d", "\u4f60\u597d"),
        ("*sighs*", ""),
        ("...", ""),
        (" \u266a\u266a ", ""),
        ("Thank you. " * 20, ""),
        ("no, no, no", "no, no, no"),
    ],
)
def test_only_words_are_kept(text: str, words: str) -> None:
    assert words_of(text) == words


def test_the_level_is_that_of_the_loudest_tenth_of_a_second() -> None:
    window = np.zeros(SPEECH.shape, np.float32)
    assert level_db(window) == -200
    window[1600:3200] = 0.1
    assert level_db(window) == pytest.approx(-20, abs=1e-4)


def test_the_stream_is_the_text_encoders_vector_of_the_words(folder: Path) -> None:
    """One sound's windows are one text; the same encoder serves text and asr in one process."""
    suite = ExtractorSuite(tiny_features(asr=asr(folder)), names=("text", "asr"))
    suite.load()
    some = windows()
    [words, silence] = suite.run("asr", [some[[0, 3]], some[1:2]])
    heard = loaded(folder).transcribe(some[[0, 3]])
    np.testing.assert_array_equal(words, suite.run("text", [" ".join(heard)])[0])
    assert silence.shape == (0, 64)
    assert suite.dims["asr"] == 64
    with pytest.raises(FeatureError, match="asr: an item must be finite"):
        suite.run("asr", [some[:, :100]])
    suite.close()


def test_the_fingerprint_holds_the_models_and_their_options(folder: Path, tmp_path: Path) -> None:
    """It changes with all that changes the words or their vector; a batch size does not."""

    def made_with(features: FeatureSettings) -> str:
        suite = ExtractorSuite(features, names=("asr",))
        suite.load()
        print_of = suite.fingerprints["asr"]
        suite.close()
        return print_of

    base = tiny_features(asr=asr(folder))
    other = talking_whisper(tmp_path / "other", languages=("en", "fr"))
    text = base.text.model_copy(update={"weights": "random:2"})
    changed = [
        base,
        tiny_features(asr=asr(folder, language="de")),
        tiny_features(asr=asr(folder, max_s=60)),
        tiny_features(asr=asr(other)),
        tiny_features(asr=asr(folder), text=text),
    ]
    assert len(set(map(made_with, changed))) == len(changed)
    assert made_with(tiny_features(asr=asr(folder, batch_size=1))) == made_with(base)


@pytest.mark.parametrize("arch", ["vggish", "laion/clap-htsat-unfused"])
def test_sound_is_cut_into_windows_of_30_seconds_up_to_the_limit(tmp_path: Path, arch: str) -> None:
    """Also of a video, and at 16 kHz whatever the encoder of sound takes; the end is filled up."""
    sound = media.tone(440, 40, 16_000)
    wav = media.write_wav(tmp_path / "a.wav", sound)
    film = media.write_video(
        tmp_path / "a.mp4", media.grey_steps(20), audio=media.tone(440, 2, 16_000)
    )
    on = FeatureSettings(asr=AsrSettings(enabled=True, max_s=35), audio=AudioSettings(arch=arch))
    speech: Any = decode_media("audio", wav, on, DecodeSettings()).speech
    assert speech.shape == (2, 480_000)
    assert [np.flatnonzero(row)[-1] for row in speech] == pytest.approx([479_999, 79_999], abs=2)
    np.testing.assert_allclose(speech[0], sound[:480_000], atol=2e-4)
    shown: Any = decode_media("video", film, on, DecodeSettings()).speech
    assert shown.shape == (1, 480_000)
    short: Any = decode_media("audio", wav, on, DecodeSettings(max_audio_s=3)).speech
    assert np.flatnonzero(short[0])[-1] < 3 * 16_000
    off = FeatureSettings(audio=AudioSettings(arch=arch))
    assert decode_media("audio", wav, off, DecodeSettings()).speech is None


def test_off_it_costs_nothing(folder: Path) -> None:
    """No model, no place in a slot, no weights to fetch, no stream; on, all of these."""
    off, on = tiny_features(), tiny_features(asr=asr(folder))
    assert [n for n in ExtractorSuite(off).names if n not in ExtractorSuite(on).names] == []
    assert "asr" not in ExtractorSuite(off).names
    assert "asr" in ExtractorSuite(on).names
    assert slot_bytes(Settings(features=on)) - slot_bytes(Settings(features=off)) == pytest.approx(
        4 * 480_000 * 4, abs=8192
    )
    assert not [need for need in needs(off) if "asr" in need.modalities]
    assert [need.name for need in needs(on) if "asr" in need.modalities] == [str(folder)]
    assert "asr" not in learned_from(off)


def test_mistakes_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another model, half a folder, no network, and no process that hosts it."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    bert = sentence_bert(tmp_path / "bert")
    with pytest.raises(ConfigError, match=r"features\.asr\.arch: .* is a bert, .* one of whisper"):
        loaded(bert)
    half = talking_whisper(tmp_path / "half")
    (half / "preprocessor_config.json").unlink()
    with pytest.raises(ConfigError, match=r"features\.asr: .* cannot be loaded .* tokenizer's"):
        loaded(half)
    with pytest.raises(ConfigError, match=r"features\.asr\.arch: nobody/whisper-none") as error:
        loaded(Path("nobody/whisper-none"))
    assert "insighttag weights get nobody/whisper-none" in str(error.value)
    assert "\n" not in str(error.value)
    group = {"extractors": ["video", "image", "audio", "text", "ocr"]}
    with pytest.raises(ValueError, match=r"features\.asr is enabled: add asr to a list in workers"):
        Settings.model_validate(
            {"features": {"asr": {"enabled": True}}, "workers": {"extractors": [group]}}
        )
