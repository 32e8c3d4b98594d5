"""Presets of encoders: what they set, and what goes before them."""

from pathlib import Path
from typing import get_args

import pytest

from common.errors import ConfigError
from config.features import FeatureSettings
from config.load import load_settings
from config.presets import PRESETS, TRAINED, Preset
from extractors.models.weights import PACKAGES
from extractors.parts import audio_encoder, visual_encoder


def test_every_preset_sets_the_same_keys() -> None:
    """Otherwise one preset after another would leave keys of the first."""

    def keys(values: object, at: str = "") -> set[str]:
        if not isinstance(values, dict):
            return {at}
        return {name for key, value in values.items() for name in keys(value, f"{at}.{key}")}

    assert set(PRESETS) == set(get_args(Preset))
    assert len({frozenset(keys(values)) for values in PRESETS.values()}) == 1


def test_classic_is_the_default() -> None:
    assert FeatureSettings(preset="classic").model_copy(update={"preset": None}) == (
        FeatureSettings()
    )


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_names_encoders_that_exist(preset: Preset) -> None:
    features = FeatureSettings(preset=preset)
    for section in (features.video, features.image):
        assert visual_encoder(section).model
    assert audio_encoder(features.audio).sound.rate_hz
    for arch, weights in ((each.arch, each.weights) for each in (features.image, features.text)):
        assert weights != "package" or arch in PACKAGES


def test_later_sources_go_before_a_preset_and_it_before_earlier_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("features: {image: {arch: resnet50, precision: fp32}, text: {max_tokens: 9}}")
    small = load_settings(path, ["features.preset=small", "features.text.prefix=q"]).features
    assert (small.image.arch, small.image.precision) == ("tf_efficientnet_lite0", "fp32")
    assert (small.text.pooling, small.text.prefix, small.text.max_tokens) == ("mean", "q", 256)

    path.write_text("features: {preset: modern, image: {image_size: 384}}")
    modern = load_settings(path, ["features.video.frames=4"]).features
    assert (modern.image.image_size, modern.video.image_size, modern.video.frames) == (384, 256, 4)

    monkeypatch.setenv("INSIGHTTAG_FEATURES__PRESET", "classic")
    assert load_settings(path).features.image.arch == "vit_large_patch16_224"


def test_files_of_presets_are_written_by_a_training(project_root: Path) -> None:
    """Each file that a preset names is in the table, and its settings exist."""

    def files(values: object) -> set[str]:
        if isinstance(values, dict):
            return {file for value in values.values() for file in files(value)}
        return {values} if isinstance(values, str) and values.endswith(".safetensors") else set()

    assert files(PRESETS) == set(TRAINED)
    for settings in TRAINED.values():
        assert (project_root / settings).is_file()


def test_an_unknown_preset_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"features.preset: .*'small'"):
        load_settings(None, ["features.preset=smal"])


def test_a_preset_that_changes_nothing_is_refused(tmp_path: Path) -> None:
    """Its own source names another encoder for each modality; one that it leaves is enough."""
    path = tmp_path / "config.yaml"
    archs = {"video": "resnet50", "image": "resnet50", "audio": "test_vit", "text": "me/bert"}
    others = ", ".join(f"{name}: {{arch: {arch}}}" for name, arch in archs.items())
    path.write_text(f"features: {{preset: small, {others}}}")
    with pytest.raises(ConfigError, match=r"config.yaml: features.preset: changes nothing.*delete"):
        load_settings(path)
    path.write_text(f"features: {{preset: small, {others.replace('test_vit', 'test_resnet')}}}")
    assert load_settings(path).features.audio.weights == "workshop/pretrained/audio.safetensors"
    path.write_text(f"features: {{{others}}}")
    assert load_settings(path, ["features.preset=small"]).features.text.pooling == "mean"
    path.write_text("features: {preset: small}")
    sets = [f"features.{name}.arch={arch}" for name, arch in archs.items()]
    assert load_settings(path, sets).features.image.arch == "resnet50"


@pytest.mark.parametrize("preset", PRESETS)
def test_the_shipped_configuration_takes_any_preset(preset: Preset, tmp_path: Path) -> None:
    """Its name in the file is all that there is to change."""
    text = Path("config/infer_config_e2e.yaml").read_text("utf-8")
    assert load_settings(Path("config/infer_config_e2e.yaml")).features.preset == "classic"
    path = tmp_path / "config.yaml"
    path.write_text(text.replace("preset: classic ", f"preset: {preset} "))
    expected = FeatureSettings(preset=preset)
    assert load_settings(path).features == expected
