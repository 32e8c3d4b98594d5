"""Sources of settings, their precedence, and the error line of each mistake."""

from pathlib import Path
from typing import Any

import pytest

from common.errors import ConfigError, RetryableError
from config.labels import LabelMap
from config.load import load_settings, parse_overrides, read_yaml, validate
from config.presets import merge
from config.settings import BrokerSettings, InferSettings, Settings
from config.train import BackboneTrainSettings, TrainSettings
from tests.support.mistakes import one_line
from tests.support.processes import no_descriptors


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in list(os.environ):
        if name.startswith("INSIGHTTAG_"):
            monkeypatch.delenv(name)


def yaml(folder: Path, text: str) -> Path:
    file = folder / "settings.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def test_precedence_of_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each later source wins, key by key; what no source names keeps its default."""
    file = yaml(
        tmp_path,
        "broker: {queue: from-file, prefetch: 1, heartbeat_s: 11}\nfetch: {max_bytes: 5}\n",
    )
    monkeypatch.setenv("INSIGHTTAG_BROKER__QUEUE", "from-environment")
    monkeypatch.setenv("INSIGHTTAG_BROKER__PREFETCH", "2")
    monkeypatch.setenv("INSIGHTTAG_FETCH__ALLOW_PRIVATE_HOSTS", "true")
    settings = load_settings(file, ["broker.queue=from-set", "features.video.frames=4"])
    assert settings.broker.queue == "from-set"
    assert settings.broker.prefetch == 2
    assert settings.broker.heartbeat_s == 11
    assert settings.broker.delivery_limit == BrokerSettings().delivery_limit
    assert settings.fetch.max_bytes == 5
    assert settings.fetch.allow_private_hosts is True
    assert settings.features.video.frames == 4


def test_defaults_alone_are_valid(tmp_path: Path) -> None:
    """An absent default file gives the built-in settings; an absent named one is a mistake."""
    assert load_settings(default=tmp_path / "none.yaml") == Settings()
    assert load_settings(yaml(tmp_path, "")) == Settings()
    with pytest.raises(ConfigError, match=r"none\.yaml: no such file"):
        load_settings(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("brokr: {}", "brokr: unknown key; did you mean 'broker'?"),
        ("broker: {prefech: 3}", "broker.prefech: unknown key; did you mean 'prefetch'?"),
        ("features: {video: {arc: x}}", "features.video.arc: unknown key; did you mean 'arch'?"),
        ("zzz: 1", "zzz: unknown key"),
        ("broker: {prefetch: many}", "broker.prefetch: Input should be an integer"),
        ("broker: {prefetch: 0}", "broker.prefetch: "),
        ("broker: 7", "broker: "),
        ('cache: {url: "a\\0b"}', "cache: url: must have no NUL characters"),
        ("broker: {url: 'u:secret@h'}", "broker.url: 'u:***@h' is not a broker URL"),
        ("store: {url: 'redis://h'}", "store.url: 'redis://h' is not a database"),
        ("features: {ocr_mode: both}", "features.ocr_mode: "),
        ("features: {ocr_mode: separat}", "(got 'separat'); did you mean 'separate'?"),
        ("workers: {extractors: [{device: gpu}]}", "workers.extractors.0.device: "),
        ("workers: {extractors: [{extractors: [text]}]}", "no process hosts"),
        ("- a\n- b", "must hold keys and values"),
        ("a: [", "not valid YAML: line 1, column 5: "),
        ("broker: {url: 'amqp://u:secret@h", "not valid YAML: line 1, column 33: "),
        ("a: 2026-13-01", "not valid YAML: month must be in 1..12"),
        pytest.param("a: " + 700 * "[", "not valid YAML: nested too deeply", id="deep"),
        ("1: x", "1: unknown key"),
        ("broker: {1: x}", "broker"),
        ("broker: 'amqp://u:secret@h'", "broker: "),
    ],
)
def test_mistakes_in_the_file_name_file_and_key(tmp_path: Path, text: str, told: str) -> None:
    file = yaml(tmp_path, text)
    with one_line(ConfigError, told, match=f"^{file}: ") as caught:
        load_settings(file)
    assert "secret" not in str(caught.value)


def test_more_than_one_mistake_is_counted(tmp_path: Path) -> None:
    """The first is reported in full, the others by their number."""
    with pytest.raises(ConfigError, match="and 1 more"):
        load_settings(yaml(tmp_path, "broker: {prefetch: a, heartbeat_s: b}"))


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("INSIGHTTAG_BROKR__URL", "x", "INSIGHTTAG_BROKR__URL: no section 'brokr'; did you mean"),
        ("INSIGHTTAG_BROKER__PREFETCH", "many", "environment: broker.prefetch: "),
        ("INSIGHTTAG_BROKER__PREFECH", "1", "environment: broker.prefech: unknown key"),
        ("INSIGHTTAG_BROKER", "{", "environment: "),
    ],
)
def test_mistakes_in_the_environment_are_blamed_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, told: str
) -> None:
    monkeypatch.setenv(name, value)
    with one_line(ConfigError, told):
        load_settings(yaml(tmp_path, ""))


def test_variables_of_tests_are_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """INSIGHTTAG_TEST_… names servers for the tests and is left alone."""
    monkeypatch.setenv("INSIGHTTAG_TEST_MONGO_URL", "mongodb://h")
    assert load_settings(yaml(tmp_path, "")) == Settings()


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("broker.prefetch", "write it as section.key=value"),
        ("=3", "write it as section.key=value"),
        ("broker..url=x", "write it as section.key=value"),
        ("broker.prefetch=[", "is not a value"),
        ("broker.prefetch=x", "--set: broker.prefetch: "),
        ("nothing.here=1", "--set: nothing: unknown key"),
        ("broker=amqp://u:secret@h", "--set: broker: "),
        ("broker.url=[amqp://u:secret@h", "is not a value"),
        ("broker.url:amqp://u:secret@h", "write it as section.key=value"),
        ("fetch.spool=2026-13-01", "is not a value"),
    ],
)
def test_mistakes_in_set_are_blamed_on_it(tmp_path: Path, override: str, told: str) -> None:
    """A wrong ``--set`` says how to write it, or what is wrong with its key."""
    with one_line(ConfigError, told, "--set") as caught:
        load_settings(yaml(tmp_path, ""), [override])
    assert "secret" not in str(caught.value)


def test_overrides_are_read_as_yaml() -> None:
    parsed = parse_overrides(
        ["a.b=1", "a.c=true", "a.d=[x, y]", "a.e=k=v", "f=", "a.u=redis://u:p@h:1/0"]
    )
    assert parsed == {
        "a": {"b": 1, "c": True, "d": ["x", "y"], "e": "k=v", "u": "redis://u:p@h:1/0"},
        "f": "",
    }
    with pytest.raises(ConfigError, match="already has a value"):
        parse_overrides(["a=1", "a.b=2"])


def test_values_come_from_files(tmp_path: Path) -> None:
    """So that a password stays off the command line."""
    (tmp_path / "url").write_text("redis://:pw@h:1/0\n")
    assert parse_overrides([f"broker.url=@{tmp_path}/url"]) == {
        "broker": {"url": "redis://:pw@h:1/0"}
    }
    with pytest.raises(ConfigError, match=r"--set broker\.url: @.*none cannot be read: .*No such"):
        parse_overrides([f"broker.url=@{tmp_path}/none"])


def test_merge_is_deep_and_leaves_its_layers_alone() -> None:
    low = {"a": {"b": 1, "l": [1, 2]}, "c": 1}
    assert merge(low, {"a": {"l": [3]}, "c": {"d": 2}}) == {"a": {"b": 1, "l": [3]}, "c": {"d": 2}}
    assert low == {"a": {"b": 1, "l": [1, 2]}, "c": 1}


def test_settings_survive_json() -> None:
    settings = load_settings(Path("/dev/null"), ["workers.extractors=[{device: 'cuda:1'}]"])
    assert Settings.model_validate_json(settings.model_dump_json()) == settings


def test_a_file_that_is_no_text_is_the_users_mistake(tmp_path: Path) -> None:
    """Bytes that are no UTF-8, and a folder, are reported in one line."""
    file = tmp_path / "settings.yaml"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_yaml(file)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_yaml(tmp_path)


def test_a_file_that_cannot_be_read_now_is_no_mistake(tmp_path: Path) -> None:
    """A supervisor does not start again what ends with a mistake."""
    file = tmp_path / "file"
    file.write_text("{}")
    for read in (
        lambda: read_yaml(file),
        lambda: parse_overrides([f"broker.url=@{file}"]),
        lambda: LabelMap.load(file),
    ):
        with no_descriptors(), pytest.raises(RetryableError, match="Too many open files"):
            read()


def test_the_shipped_configurations_are_valid() -> None:
    folder = Path(__file__).resolve().parents[3] / "config"
    settings = load_settings(folder / "infer_config_e2e.yaml")
    models: dict[str, type[Any]] = {
        "train_config.yaml": TrainSettings,
        "train_image_eff103.yaml": BackboneTrainSettings,
        "train_video_tsn_lstm.yaml": BackboneTrainSettings,
        "train_text.yaml": BackboneTrainSettings,
        "train_audio.yaml": BackboneTrainSettings,
        "infer_config.yaml": InferSettings,
    }
    for file in folder.glob("*.yaml"):
        validate(models.get(file.name, Settings), read_yaml(file), file.name)
    trained = TrainSettings.model_validate(read_yaml(folder / "train_config.yaml"))
    inferred = InferSettings.model_validate(read_yaml(folder / "infer_config.yaml"))
    assert {settings.fusion.bundle, inferred.bundle} == {trained.bundle.folder}
    assert Settings().fusion.bundle == TrainSettings().bundle.folder == InferSettings().bundle


@pytest.mark.parametrize(
    ("written", "address"),
    [
        ("9465", "127.0.0.1:9465"),
        ("127.0.0.1:9465", "127.0.0.1:9465"),
        ("0.0.0.0:1", "0.0.0.0:1"),
        ("king.local:65535", "king.local:65535"),
        ("'[::1]:80'", "[::1]:80"),
        ("null", None),
    ],
)
def test_metrics_are_on_a_local_port_or_a_named_host(written: str, address: str | None) -> None:
    assert load_settings(Path("/dev/null"), [f"king.metrics={written}"]).king.metrics == address


@pytest.mark.parametrize(
    "written",
    ["0", "65536", "localhost", "localhost:", "'::1:80'", "http://a:80", "a:b", "true", "a:1/x"],
)
def test_what_is_no_address_of_metrics_is_refused_by_its_key(written: str) -> None:
    with pytest.raises(ConfigError, match=r"king\.metrics: .*(HOST:PORT|65535)"):
        load_settings(Path("/dev/null"), [f"king.metrics={written}"])


def test_paths_in_a_file_lead_from_its_folder_where_there_is_such_a_file(tmp_path: Path) -> None:
    """Others stay, and so do the words that are no paths."""
    (tmp_path / "encoders").mkdir()
    for name in ("encoders/words.safetensors", "pretrained", "bundle"):
        (tmp_path / name).touch()
    text = (
        "features: {text: {arch: x, pooling: mean, tfidf: encoders/words.safetensors},"
        " image: {weights: pretrained}, audio: {weights: other/net.pth}}\n"
        "fusion: {bundle: bundle}\n"
    )
    settings = load_settings(yaml(tmp_path, text))
    assert settings.features.text.tfidf == str(tmp_path / "encoders" / "words.safetensors")
    assert settings.features.image.weights == "pretrained"
    assert settings.features.audio.weights == "other/net.pth"
    assert settings.fusion.bundle == tmp_path / "bundle"
