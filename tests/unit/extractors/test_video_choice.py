"""Choosing frames by the packets' times and key frames, without files."""

from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest

from extractors.media.video import PacketIndex, choose_frames, plan_runs
from extractors.parts import FrameChoice


def index(times: list[int | None], keys: set[int], duration: int = 40) -> PacketIndex:
    stream = SimpleNamespace(
        time_base=Fraction(1, 1000),
        average_rate=25,
        guessed_rate=25,
        codec_context=SimpleNamespace(name="h264"),
    )
    made = PacketIndex(stream, 3600)
    for i, time in enumerate(times):
        made.add(SimpleNamespace(pts=time, dts=None, duration=duration, is_keyframe=i in keys))
    return made


def test_runs() -> None:
    """Groups of pictures without a chosen frame are passed over; touching runs are joined."""
    made = index([40 * i for i in range(100)], {0, 20, 40, 60, 80})
    runs = [(run.first, run.last, len(run.times)) for run in plan_runs(made, [5, 45, 50, 95])]
    assert runs == [(0, 5, 1), (40, 50, 2), (80, 95, 1)]
    assert [(r.first, r.last) for r in plan_runs(made, [39, 41])] == [(20, 41)]


def test_open_groups_of_pictures() -> None:
    """A frame behind a key frame in the file and before it in time needs the key frame before."""
    made = index([0, 40, 200, 120, 160, 240], {0, 2})
    assert made.key_before(3) == 0
    assert made.key_before(5) == 2


def test_without_any_time_stamps() -> None:
    """Packets without times are counted; with all times alike, frames are chosen by number."""
    assert index([None] * 10, {0}).choose(2) == [2, 7]
    assert index([0] * 10, {0}, duration=0).choose(2) in ([2, 7], [9])


def test_without_key_frames() -> None:
    made = index([40 * i for i in range(20)], set())
    assert [(r.first, r.last) for r in plan_runs(made, [5, 15])] == [(0, 15)]
    assert made.nearest_keys([5, 15]) == [5, 15]


EVERY_2_S = [50 * i for i in range(10)]  # of 20 s at 25 Hz


@pytest.mark.parametrize(
    ("frames", "keys", "count", "least", "chosen"),
    [
        (500, EVERY_2_S, 16, 8, EVERY_2_S),
        (500, EVERY_2_S, 4, 4, [50, 200, 300, 450]),
        # Segments without key frames give their first frame, others what is decoded on the way.
        (40, [0, 2, 20], 4, 4, [0, 10, 25, 30]),
        # A scene of its own between two others gives its key frame too.
        (500, sorted([*EVERY_2_S, 110]), 16, 8, sorted([*EVERY_2_S, 110])),
        # On the way to the last of four segments, other frames come for nothing; none behind it.
        (40, [0], 8, 4, [2, 7, 12, 17, 22, 27, 30]),
        (40, range(40), 4, 2, [5, 15, 25, 35]),
        (40, [], 4, 4, [5, 15, 25, 30]),  # without key frames, decoding starts at the beginning
        (3, [0], 8, 4, [0, 1, 2]),
    ],
)
def test_cheap_frames(
    frames: int, keys: list[int], count: int, least: int, chosen: list[int]
) -> None:
    assert index([40 * i for i in range(frames)], set(keys)).choose_cheap(count, least) == chosen


@pytest.mark.parametrize("seed", range(30))
def test_cheap_frames_of_any_clip(seed: int) -> None:
    """One in each of the segments that have frames, `count` at most, decoded from fewer packets."""
    random = np.random.default_rng(seed)
    total, count = int(random.integers(1, 400)), int(random.integers(1, 20))
    least = int(random.integers(1, count + 1))
    gaps = random.integers(1, 80, total)
    keys = {0, *random.integers(0, total, random.integers(0, 20)).tolist()}
    made = index(np.cumsum(gaps).tolist(), keys, duration=40)
    chosen = made.choose_cheap(count, least)
    assert chosen == sorted(set(chosen))
    assert len(chosen) <= count
    times = np.array(made.times)
    if total > least and times[-1] + 40 - times[0] >= count:
        length = (times[-1] + 40 - times[0]) / least
        segments = (times - times[0]) // length
        assert set(segments) == set(segments[chosen])

    def packets(frames: list[int]) -> int:
        return sum(run.last - run.first + 1 for run in plan_runs(made, frames))

    assert packets(chosen) <= max(packets(made.choose(count)), packets(made.choose(least)))


def test_random_frames_are_those_of_training_whatever_the_mode() -> None:
    made = index([40 * i for i in range(100)], {0})
    modes = [FrameChoice(8), FrameChoice(8, "auto", 4)]
    drawn = [choose_frames(made, choice, np.random.default_rng(3)) for choice in modes]
    assert drawn[0] == drawn[1]
