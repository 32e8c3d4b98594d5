"""The table of parts: from a file into a slot and out of it into an encoder."""

from pathlib import Path

import numpy as np
import pytest

from common.post import MEDIA_KINDS
from config.features import AudioSettings
from config.settings import Settings
from extractors import parts
from extractors.media.sound import sound_rows
from extractors.suite import ExtractorSuite
from tests.support import media
from tests.support.tiny_models import TINY_CNN, tiny_features
from tests.support.waveform_encoder import LINE
from workers.pool.channel import Arena
from workers.protocol import DecodeTask, Extracted, ExtractTask
from workers.roles.batched import run_decode, run_extract


def test_every_line_names_what_exists() -> None:
    """Encoders are named by text, which no type checker follows."""
    models = [line.model for line in parts.AUDIO_ENCODERS.values()]
    models += [line.model for line in parts.VISUAL_ENCODERS.values()]
    assert all(callable(parts.part_of(model)) for model in models)


def test_each_part_is_decoded_from_its_media() -> None:
    assert {kind: parts.parts_of(kind) for kind in MEDIA_KINDS} == {
        "image": ("image", "picture"),
        "video": ("frames", "sound", "picture", "speech"),
        "audio": ("sound", "speech"),
    }


@pytest.mark.parametrize(
    ("seconds", "rows"), [(0.1, 1), (1.0, 1), (1.4, 1), (1.5, 2), (2.0, 2), (2.49, 2), (2.6, 3)]
)
def test_waveform_windows_pad_or_drop_the_rest(seconds: float, rows: int) -> None:
    waveform = np.linspace(0.1, 1, int(48_000 * seconds), dtype=np.float32)
    windows = sound_rows(waveform, parts.WaveformWindows(48_000, 48_000))
    assert windows.shape == (rows, 48_000)
    length = min(len(waveform), windows.size)
    np.testing.assert_array_equal(windows.ravel()[:length], waveform[:length])
    assert not windows.ravel()[length:].any()


@pytest.mark.parametrize("sound", [parts.LogMelPatches(), parts.WaveformWindows(48_000, 30_000)])
@pytest.mark.parametrize("seconds", [0.5, 1.0, 3.1, 7.0])
def test_most_rows_is_never_passed(sound: parts.SoundInput, seconds: float) -> None:
    """As much sound as the limits allow gives no more rows than a slot has room for."""
    rows = sound_rows(np.zeros(int(sound.rate_hz * seconds), np.float32), sound)
    assert rows.shape[1:] == sound.shape
    assert len(rows) <= np.ceil(seconds / sound.row_s)


ENCODERS = {
    "vggish": parts.AUDIO_ENCODERS["vggish"],
    TINY_CNN: parts.AUDIO_ENCODERS["timm"],
    "tiny": LINE,
}


@pytest.mark.parametrize(
    ("arch", "name"), [*((arch, "a.wav") for arch in ENCODERS), ("tiny", "a.mp4")]
)
def test_every_encoder_of_sound(
    arch: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sound goes through a slot into the encoder, as its line says, whatever the file.

    A row gives one vector, which does not depend on the rows beside it; the same seed gives the
    same ones.
    """
    monkeypatch.setitem(parts.AUDIO_ENCODERS, arch, ENCODERS[arch])
    tone, path = media.tone(700, 3, 44_100), tmp_path / name
    if name == "a.wav":
        media.write_wav(path, tone, 44_100)
    else:
        media.write_video(path, media.grey_steps(75), audio=tone, audio_rate_hz=44_100)
    features = tiny_features(audio=AudioSettings(arch=arch, weights="random:1", precision="fp32"))
    settings = Settings(features=features).model_copy(
        update={"decode": Settings().decode.model_copy(update={"max_audio_s": 2})}
    )
    arena = Arena.private(1, parts.slot_bytes(settings))
    task = DecodeTask("video" if name == "a.mp4" else "audio", str(path), slot=0)
    decoded = run_decode(task, features, settings.decode, arena)
    [ref] = [part.ref for part in decoded.parts if part.kind == "sound"]
    sound = ENCODERS[arch].sound
    rows = sound_rows(np.zeros(2 * sound.rate_hz, np.float32), sound).shape
    assert (ref.dtype, ref.shape) == ("float32", rows)

    suite = ExtractorSuite(features, names=("audio",))
    suite.load()
    [outcome] = run_extract(suite, [ExtractTask("audio", "audio", (ref,))], arena)
    assert isinstance(outcome, Extracted)
    assert outcome.array is not None
    assert (outcome.array.shape, outcome.array.dtype.name) == (
        (rows[0], suite.dims["audio"]),
        "float16",
    )
    assert outcome.array.any()
    fingerprint = suite.fingerprints["audio"]
    assert len(fingerprint) == 32
    suite.close()
    again = ExtractorSuite(features, names=("audio",))
    again.load()
    assert again.fingerprints == {"audio": fingerprint}
    [alone] = again.run("audio", [arena.view(ref)[:1]])
    np.testing.assert_allclose(alone, outcome.array[:1], atol=1e-3, rtol=1e-2)
    again.close()
