"""Where the numbers of workers are from: the settings, what was measured here, or a quick rule."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common.errors import ConfigError
from common.processes import cores
from config.load import load_settings, validate
from config.settings import Settings
from workers.pool.placement import (
    Host,
    features_key,
    group,
    place,
    quick_rule,
    summary,
    write_measured,
)

TWO = Host("some CPU", 2, 24)
GPUS = Host("some CPU", 16, 128, ("H100", "H100"))
TUNED = {
    "decode": {"processes": 1},
    "workers": {
        "extractors": [
            group("cpu", ("video", "image", "audio", "text", "asr"), 1, 1),
            group("cpu", ("ocr",), 2, 1),
        ],
        "slots": 24,
    },
}


def settings_with(file: Path | None, **sections: Any) -> Settings:
    workers = {"host_file": file, **sections.pop("workers", {})}
    return validate(Settings, {"workers": workers, **sections}, "test")


def shape(settings: Settings) -> list[tuple[str, str, int, int]]:
    return [
        (each.device, "+".join(each.extractors), each.processes, each.threads)
        for each in settings.workers.extractors
    ]


@pytest.mark.parametrize(
    ("host", "engine", "decoders", "groups"),
    [
        (TWO, "onnxruntime", 2, [("cpu", "video+image+audio+text+asr+ocr", 2, 1)]),
        (Host("c", 8, 64), "onnxruntime", 4, [("cpu", "video+image+audio+text+asr+ocr", 8, 1)]),
        (Host("c", 1, 2), "onnxruntime", 2, [("cpu", "video+image+audio+text+asr+ocr", 1, 1)]),
        (  # 8 GiB hold two copies of the encoders
            Host("c", 16, 8),
            "onnxruntime",
            8,
            [("cpu", "video+image+audio+text+asr", 2, 2), ("cpu", "ocr", 8, 1)],
        ),
        (
            replace(GPUS, gpus=("H100",)),
            "onnxruntime",
            8,
            [("cuda:0", "video+image+audio+text+asr", 1, 2), ("cpu", "ocr", 6, 1)],
        ),
        (
            replace(GPUS, gpus=("H100",)),
            "torch",
            8,
            [("cuda:0", "video+image+audio+text+asr", 1, 2), ("cuda:0", "ocr", 4, 1)],
        ),
        (
            Host("c", 64, 512, ("H100",)),
            "auto",
            32,
            [("cuda:0", "video+image+audio+text+asr", 1, 2), ("cuda:0", "ocr", 8, 1)],
        ),
        (
            Host("c", 2, 16, ("T4",)),
            "auto",
            2,
            [("cuda:0", "video+image+audio+text+asr", 1, 2), ("cuda:0", "ocr", 1, 1)],
        ),
    ],
)
def test_the_rule_goes_by_cores_memory_and_gpus(
    host: Host, engine: str, decoders: int, groups: list[tuple[str, str, int, int]]
) -> None:
    ruled = place(settings_with(None, features={"ocr": {"engine": engine}}), host).settings
    assert ruled.decode.processes == decoders
    assert shape(ruled) == groups
    assert ruled.fusion.device == ("cuda:0" if host.gpus else "cpu")


def test_every_gpu_has_the_encoders_and_ocr() -> None:
    groups = quick_rule(Settings(), GPUS)["workers"]["extractors"]
    assert [each["device"] for each in groups] == ["cuda:0", "cuda:1"] * 2
    assert [each["processes"] for each in groups] == [1, 1, 2, 2]


def test_slots_stay_within_an_eighth_of_the_memory() -> None:
    wide = settings_with(None, features={"video": {"frames": 300}})
    many = [place(each, Host("c", 64, 16)).settings.workers.slots for each in (Settings(), wide)]
    assert many[0] > many[1] >= 16


def test_what_was_measured_here_is_taken(tmp_path: Path) -> None:
    settings = settings_with(tmp_path / "host.yaml")
    write_measured(tmp_path / "host.yaml", TWO, settings.features, TUNED, {"seconds": 60})
    placement = place(settings, TWO)
    assert placement.source == str(tmp_path / "host.yaml")
    assert placement.settings.decode.processes == 1
    assert [each[1:] for each in shape(placement.settings)] == [
        ("video+image+audio+text+asr", 1, 1),
        ("ocr", 2, 1),
    ]
    assert place(placement.settings, TWO).settings == placement.settings


@pytest.mark.parametrize(
    ("host", "features"),
    [
        (replace(TWO, cpus=4), {}),
        (replace(TWO, gpus=("H100",)), {}),
        (replace(TWO, cpu="another"), {}),
        (TWO, {"image": {"image_size": 160}}),
        (TWO, {"ocr": {"engine": "openvino"}}),
    ],
)
def test_others_have_the_rule(tmp_path: Path, host: Host, features: dict[str, Any]) -> None:
    file = tmp_path / "host.yaml"
    write_measured(file, TWO, Settings().features, TUNED, {})
    assert place(settings_with(file, features=features), host).source == "rule"


def test_batch_sizes_are_no_other_encoders() -> None:
    other = settings_with(None, features={"image": {"batch_size": 7}})
    assert features_key(other.features) == features_key(Settings().features)


@pytest.mark.parametrize(
    ("values", "decoders", "slots", "processes"),
    [
        ({"decode": {"processes": 5}}, 5, 24, [1, 2]),
        ({"workers": {"slots": 17}}, 1, 17, [1, 2]),
        ({"workers": {"extractors": [{"processes": 3}]}}, 1, 24, [3]),
    ],
)
def test_what_the_settings_name_goes_before_it(
    tmp_path: Path, values: dict[str, Any], decoders: int, slots: int, processes: list[int]
) -> None:
    file = tmp_path / "host.yaml"
    settings = settings_with(file, **values)
    write_measured(file, TWO, settings.features, TUNED, {})
    chosen = place(settings, TWO).settings
    assert (chosen.decode.processes, chosen.workers.slots) == (decoders, slots)
    assert [each.processes for each in chosen.workers.extractors] == processes


def test_settings_that_name_everything_are_the_source(tmp_path: Path) -> None:
    settings = settings_with(
        tmp_path / "none.yaml",
        decode={"processes": 1},
        workers={"slots": 2, "extractors": [{"threads": 1}]},
    )
    assert place(settings, GPUS).source == "settings"


def test_entries_of_other_hosts_stay_and_ones_own_is_replaced(tmp_path: Path) -> None:
    file, features = tmp_path / "new" / "host.yaml", Settings().features
    write_measured(file, GPUS, features, TUNED, {})
    for decoders in (3, 4):
        write_measured(file, TWO, features, {**TUNED, "decode": {"processes": decoders}}, {})
    settings = settings_with(file)
    assert place(settings, GPUS).settings.decode.processes == 1
    assert place(settings, TWO).settings.decode.processes == 4
    assert file.read_text("utf-8").count("- host:") == 2


@pytest.mark.parametrize(
    "content", ["[1, 2]", "hosts: {a: 1}", "hosts: [1]", "a: [", "{}", "hosts: 3"]
)
def test_a_file_that_is_none_of_ours_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "host.yaml").write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"host\.yaml: .*delete it, and insighttag tune-host"):
        place(settings_with(tmp_path / "host.yaml"), TWO)


def test_a_wrong_number_in_the_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "host.yaml"
    write_measured(file, TWO, Settings().features, {"decode": {"processes": 0}}, {})
    with pytest.raises(ConfigError, match=r"host\.yaml: decode\.processes: "):
        place(settings_with(file), TWO)


def test_workers_auto_is_as_if_nothing_were_set(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("workers: {slots: 3, host_file: null}", encoding="utf-8")
    assert not load_settings(config, ["workers=auto"]).workers.model_fields_set
    with pytest.raises(ConfigError, match="workers: "):
        load_settings(config, ["workers=automatic"])


def test_the_log_says_where_the_numbers_are_from(tmp_path: Path) -> None:
    file = tmp_path / "host.yaml"
    settings = settings_with(file)
    assert summary(place(settings, TWO).settings, TWO)["source"] == "rule"
    write_measured(file, TWO, settings.features, TUNED, {})
    assert summary(place(settings, TWO).settings, TWO)["source"] == str(file)
    own = settings_with(file, decode={"processes": 7})
    assert summary(place(own, TWO).settings, TWO)["source"] == "settings"


@pytest.mark.parametrize(
    ("quota", "count"), [("100000 100000", 1), ("max 100000", None), ("", None), ("10 0", None)]
)
def test_a_containers_quota_limits_cores(tmp_path: Path, quota: str, count: int | None) -> None:
    (tmp_path / "cpu.max").write_text(quota, encoding="ascii")
    unlimited = cores(tmp_path / "absent")
    assert cores(tmp_path / "cpu.max") == (count or unlimited)
