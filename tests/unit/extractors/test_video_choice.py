"""Choosing frames by the packets' times and key frames, without files."""

from __future__ import annotations

from fractions import Fraction
from types import SimpleNamespace

from extractors.media.video import PacketIndex, plan_runs


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
