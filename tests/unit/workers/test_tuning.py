"""Placements that follow from the costs of stages, and which of them is taken."""

from typing import Any

import pytest

from config.settings import Settings
from workers.pool.placement import Host
from workers.sample_posts import Mix, SampleFiles
from workers.tuning import (
    BatchRate,
    Stage,
    Trial,
    best_of,
    best_sizes,
    candidates,
    rising_rates,
    rows_of_post,
)

REALISTIC = [
    Stage("decode", 116, 200),
    Stage("video", 445, 600),
    Stage("image", 112, 600),
    Stage("audio", 26, 400),
    Stage("text", 16, 500),
    Stage("ocr", 830, 300),
    Stage("fuse", 2, 400),
]


def numbers(values: Any) -> tuple[int, list[tuple[str, int, int]]]:
    groups = [
        ("ocr" if each["extractors"] == ["ocr"] else each["device"], each["processes"],
         each["threads"])
        for each in values["workers"]["extractors"]
    ]  # fmt: skip
    return values["decode"]["processes"], groups


@pytest.mark.parametrize(
    ("cpus", "free_mb", "gpus", "gpu_s", "expected"),
    [
        # Found by hand before: a second process for OCR, one thread each.
        (2, 20_000, (), 0.0, {"processes": (1, [("cpu", 1, 1), ("ocr", 2, 1)]),
                              "threads": (1, [("cpu", 1, 1), ("ocr", 1, 2)])}),
        (16, 200_000, (), 0.0, {"processes": (2, [("cpu", 7, 1), ("ocr", 9, 1)]),
                                "threads": (2, [("cpu", 4, 2), ("ocr", 5, 2)])}),
        # Models of 2.1 GB, of which 10 GB hold two: these have more threads instead.
        (16, 10_000, (), 0.0, {"processes": (2, [("cpu", 2, 1), ("ocr", 9, 1)]),
                               "threads": (2, [("cpu", 2, 2), ("ocr", 5, 2)])}),
        # A GPU that is slow limits, and the cores have less to do.
        (16, 200_000, ("G",), 1.0, {"processes": (1, [("cuda:0", 1, 2), ("ocr", 1, 1)])}),
        # OCR needs nearly six processes, three on each GPU.
        (16, 200_000, ("G",) * 2, 0.3, {"processes": (1, [("cuda:0", 1, 2), ("cuda:1", 1, 2),
                                                         ("ocr", 3, 1), ("ocr", 3, 1)])}),
    ],
)  # fmt: skip
def test_stages_have_their_share_of_the_cores(
    cpus: int, free_mb: float, gpus: tuple[str, ...], gpu_s: float, expected: dict[str, Any]
) -> None:
    host = Host("c", cpus, 512, gpus)
    placements = candidates(Settings(), host, REALISTIC, gpu_s=gpu_s, free_mb=free_mb)
    del placements["rule"]
    assert {name: numbers(values) for name, values in placements.items()} == expected


def test_without_ocr_no_process_has_it() -> None:
    settings = Settings.model_validate({"features": {"ocr": {"enabled": False}}})
    stages = [each for each in REALISTIC if each.name != "ocr"]
    placements = candidates(settings, Host("c", 2, 24), stages, gpu_s=0, free_mb=20_000)
    assert numbers(placements["processes"]) == (1, [("cpu", 2, 1)])


@pytest.mark.parametrize(
    ("rule", "other", "best"),
    [
        ((1.0, 1.0, 1.0), (1.2, 1.2, 1.2), "processes"),
        ((1.0, 1.0, 1.0), (1.02, 1.02, 1.02), "rule"),  # no more than noise
        ((1.0, 1.0, 1.0), (0.8, 0.8, 0.8), "rule"),
        ((1.0, 0.5, 1.0), (1.1, 0.6, 1.1), "processes"),  # a slow round slows both
        ((1.0, 1.0, 1.0), (1.0, 5.0, 1.0), "rule"),  # one lucky turn
        ((0.21, 0.29, 0.25), (0.24, 0.28, 0.27), "rule"),  # lucky twice, of three
        ((1.0, 1.0), (1.5, 1.5), "rule"),  # two turns prove nothing
    ],
)
def test_the_rule_stays_unless_another_is_faster(
    rule: tuple[float, ...], other: tuple[float, ...], best: str
) -> None:
    assert best_of([Trial("rule", {}, rule), Trial("processes", {}, other)]) == best


@pytest.mark.parametrize(
    ("per_s", "memory", "sizes", "best"),
    [
        ({32: 100, 64: 180, 128: 300, 256: 305}, 1, [32, 64, 128, 256], 128),
        ({32: 100, 64: 90}, 1, [32, 64], 32),
        ({32: 100, 64: 200, 128: 400}, 40, [32, 64], 64),  # 128 rows take more than 4,000 MB
    ],
)
def test_batches_grow_while_it_pays_and_fits(
    per_s: dict[int, float], memory: float, sizes: list[int], best: int
) -> None:
    rates = rising_rates("image", lambda rows: (per_s[rows], rows * memory), 32, 4000)
    assert [rate.rows for rate in rates] == sizes
    assert best_sizes(rates) == {"image": best}


def test_a_batch_that_does_not_fit_ends_the_search() -> None:
    def measure(rows: int) -> tuple[float, float]:
        if rows > 32:
            raise RuntimeError("CUDA out of memory")
        return 10.0, 1.0

    assert rising_rates("image", measure, 32, 100) == [BatchRate("image", 32, 10.0, 1.0)]


def test_rows_follow_the_media_of_a_post() -> None:
    rows = rows_of_post(Settings().features, Mix(videos=2, images=3, audios=1))
    assert rows == {"video": 32, "image": 3, "audio": 63, "text": 1}


def test_an_average_post_comes_in_pieces_and_has_one_text() -> None:
    posts = SampleFiles({"image": [], "video": []}).post(Mix(0, 0, 0), 3)
    assert [(bool(post.text), post.media) for post in posts] == [(True, ())]
