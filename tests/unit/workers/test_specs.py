"""Specs of workers: pins, back-off, fingerprints, memory."""

from dataclasses import replace

import pytest

from common.errors import ConfigError
from common.fingerprint import mismatch
from config.settings import Settings
from workers.pool.pool import extractor_fingerprints
from workers.pool.supervisor import ManagedProcess, pinned_environment, worker_specs


def test_workers_of_the_settings() -> None:
    settings = Settings.model_validate(
        {
            "decode": {"processes": 3, "deadline_s": 7},
            "fetch": {"connections": 5},
            "features": {"ocr": {"enabled": False}},
            "workers": {
                "task_timeout_s": 9,
                "extractors": [
                    {"device": "cuda:1", "extractors": ["video", "image"], "processes": 2},
                    {"extractors": ["audio", "text", "ocr"], "threads": 4},
                ],
            },
        }
    )
    specs = {spec.name: spec for spec in worker_specs(settings)}
    assert list(specs) == [
        "fetch-0",
        *("decode-0", "decode-1", "decode-2"),
        *("extract-0", "extract-1", "extract-2"),
        "fuse-0",
    ]
    assert (specs["fetch-0"].at_most, specs["decode-0"].at_most) == (5, 2)
    assert (specs["decode-0"].limit_s, specs["extract-0"].limit_s) == (7, 9)
    assert specs["extract-1"].queues == ("video", "image")
    assert specs["extract-2"].queues == ("audio", "text"), "OCR is disabled"


def test_devices_are_pinned_before_birth() -> None:
    """A worker sees its one device and no other; the King's own restriction is kept."""
    spec = worker_specs(Settings())[0]
    cpu = pinned_environment(replace(spec, threads=3), {"PATH": "/bin", "PYTHONPATH": "/x"})
    assert cpu["CUDA_VISIBLE_DEVICES"] == ""
    assert {cpu[f"{name}_NUM_THREADS"] for name in ("OMP", "MKL", "OPENBLAS")} == {"3"}
    assert cpu["PATH"] == "/bin"
    assert cpu["OMP_WAIT_POLICY"] == "PASSIVE"
    assert pinned_environment(spec, {"OMP_WAIT_POLICY": "ACTIVE"})["OMP_WAIT_POLICY"] == "ACTIVE"
    assert cpu["PYTHONPATH"].endswith(":/x")
    gpu = replace(spec, device="cuda:1")
    assert pinned_environment(gpu, {})["CUDA_VISIBLE_DEVICES"] == "1"
    assert pinned_environment(gpu, {"CUDA_VISIBLE_DEVICES": "4,6"})["CUDA_VISIBLE_DEVICES"] == "6"
    # No other device stands in for one that is hidden.
    for hidden in ("1", "4", ""):
        assert (
            pinned_environment(gpu, {"CUDA_VISIBLE_DEVICES": hidden})["CUDA_VISIBLE_DEVICES"] == ""
        )


@pytest.mark.parametrize(
    ("hwaccel", "groups", "devices"),
    [
        ("none", ["cuda:0", "cuda:1"], ["cpu", "cpu", "cpu"]),
        ("cuda", ["cuda:0", "cuda:1", "cpu"], ["cuda:0", "cuda:1", "cuda:0"]),
        ("cuda", ["cpu"], ["cuda:0", "cuda:0", "cuda:0"]),
    ],
)
def test_decoders_see_a_gpu_only_to_decode_on_it(
    hwaccel: str, groups: list[str], devices: list[str]
) -> None:
    """They share the GPUs of the encoders in turn, or take the first."""
    settings = Settings.model_validate(
        {
            "decode": {"processes": 3, "hwaccel": hwaccel},
            "workers": {"extractors": [{"device": device} for device in groups]},
        }
    )
    decoders = [spec for spec in worker_specs(settings) if spec.role == "decode"]
    assert [spec.device for spec in decoders] == devices
    visible = [pinned_environment(spec, {})["CUDA_VISIBLE_DEVICES"] for spec in decoders]
    assert visible == [device.removeprefix("cuda:").replace("cpu", "") for device in devices]


def test_back_off_grows_has_a_cap_and_forgets() -> None:
    worker = ManagedProcess(worker_specs(Settings())[0])
    delays = [worker.ended(0.0, answered=0, planned=False) for _ in range(12)]
    assert delays[:3] == [0.1, 0.2, 0.4]
    assert delays[-1] == 30.0
    assert worker.ended(0.0, answered=5, planned=False) == 0.1
    assert worker.deaths == 13
    assert worker.ended(0.0, answered=5, planned=True) == 0.0
    assert worker.deaths == 13


def test_bundle_is_held_against_the_extractors() -> None:
    infos = [{"fingerprints": '{"video": "v1", "image": "i1"}'}, {"fingerprints": '{"text": "t"}'}]
    expected = extractor_fingerprints(infos)
    assert expected["video"] == "v1"
    assert expected["text"] == "t"
    assert mismatch({"video": "v1"}, expected) is None
    wrong = mismatch({"video": "v1", "image": "i2"}, expected)
    assert wrong == "modality image: the bundle needs i2, the extractors give i1"
    assert "not enabled" in str(mismatch({"audio": "a"}, expected))
    assert extractor_fingerprints([{}]) == {}


def test_workers_that_disagree_are_refused() -> None:
    """The same extractor must give the same features on every worker."""
    infos = [{"fingerprints": '{"text": "one"}'}, {"fingerprints": '{"text": "two"}'}]
    with pytest.raises(ConfigError, match="extractor text differs between workers: one and two"):
        extractor_fingerprints(infos)
