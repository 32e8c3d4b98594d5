"""The plan where a modality has two streams, and where only some modalities are wanted."""

import numpy as np
import pytest

from common.errors import NothingUsable
from common.post import Features, Media, Modality, Post
from config.features import FeatureSettings
from tests.unit.workers.test_plan_and_protocol import BROKEN, GONE, result_of, walk
from workers.post_run import PostPlan, Step
from workers.protocol import Decoded, DecodeTask, Extracted, ExtractTask, Fetched, FetchTask

SEPARATE = FeatureSettings(ocr_mode="separate")
APPEND = FeatureSettings(ocr_mode="append")
NO_OCR = FeatureSettings.model_validate({"ocr": {"enabled": False}})
EVERYTHING = Post("p", "hello", (Media("video", "v"), Media("image", "i"), Media("audio", "a")))


def partly(
    *modalities: Modality, settings: FeatureSettings = SEPARATE, post: Post = EVERYTHING
) -> PostPlan:
    return PostPlan(post, settings, max_media=20, modalities=frozenset(modalities))


def done(steps: list[Step]) -> list[str]:
    """The steps in words, sorted."""
    words = []
    for step in steps:
        if isinstance(step.task, FetchTask):
            words.append(f"fetch {step.task.media.kind}")
        elif isinstance(step.task, ExtractTask):
            words.append(f"{step.task.extractor} for {step.task.modality}")
    return sorted(words)


def test_a_video_gives_two_streams_under_one_status() -> None:
    """Frames and whole videos of several files are joined, each in order of the media."""
    plan = PostPlan(
        Post("p", media=(Media("video", "a"), Media("video", "b"))), NO_OCR, max_media=9
    )
    steps = plan.start()
    while steps:
        step = steps.pop()  # the last first: the order of answers does not count
        result = result_of(step)
        if isinstance(step.task, ExtractTask) and step.task.modality == "video":
            fill = float(step.media_index)
            vector = np.full((1, 7), fill, np.float16)
            result = Extracted(np.full((3, 5), fill, np.float16), also={"video_lstm": vector})
        steps += plan.done(step, result)
    found = plan.features()
    assert found.statuses["video"] == "ok"
    assert set(found.statuses) == {"video", "image", "audio", "text", "ocr"}
    assert found.arrays["video"][:, 0].tolist() == [0, 0, 0, 1, 1, 1]
    assert found.arrays["video_lstm"][:, 0].tolist() == [0, 1]
    assert found.arrays["video_lstm"].shape == (2, 7)


def test_a_video_without_frames_has_no_stream() -> None:
    """Empty rows are no feature, and neither is the vector of nothing."""
    plan = PostPlan(Post("p", "text", (Media("video", "a"),)), NO_OCR, max_media=9)
    steps = plan.start()
    while steps:
        step = steps.pop()
        result = result_of(step)
        if isinstance(step.task, ExtractTask) and step.task.modality == "video":
            empty = np.empty((0, 7), np.float16)
            result = Extracted(empty, also={"video_lstm": empty})
        steps += plan.done(step, result)
    found = plan.features()
    assert "video" not in found.arrays
    assert "video_lstm" not in found.arrays
    assert found.statuses["video"] == "missing"


@pytest.mark.parametrize(
    ("wanted", "settings", "expected"),
    [
        (("audio",), SEPARATE, ["audio for audio"] * 2 + ["fetch audio", "fetch video"]),
        (("image",), SEPARATE, ["fetch image", "image for image"]),
        (("video",), SEPARATE, ["fetch video", "video for video"]),
        (("text",), SEPARATE, ["text for text"]),
        (
            ("ocr",),
            SEPARATE,
            ["fetch image", "fetch video", "ocr for ocr", "ocr for ocr", "text for ocr"],
        ),
        (
            ("text",),
            APPEND,
            ["fetch image", "fetch video", "ocr for ocr", "ocr for ocr", "text for text"],
        ),
        (("text",), NO_OCR, ["text for text"]),
        (("ocr",), NO_OCR, []),
        ((), SEPARATE, []),
    ],
)
def test_only_what_is_needed_is_done(
    wanted: tuple[Modality, ...], settings: FeatureSettings, expected: list[str]
) -> None:
    """Media that no wanted modality needs are not fetched; pictures are read for text alone."""
    plan = partly(*wanted, settings=settings)
    steps = walk(plan)
    assert done(steps) == expected
    found = plan.features()
    tasks = [step.task for step in steps if isinstance(step.task, ExtractTask)]
    assert set(found.arrays) == {task.modality for task in tasks if task.extractor != "ocr"}
    for modality, status in found.statuses.items():
        assert status == ("ok" if modality in found.arrays else "missing")
    assert not found.failures


def test_all_modalities_wanted_is_the_whole_post() -> None:
    whole = PostPlan(EVERYTHING, SEPARATE, max_media=20)
    named = partly("video", "image", "audio", "text", "ocr")
    assert done(walk(whole)) == done(walk(named))
    assert _arrays(whole.features()) == _arrays(named.features())


def _arrays(features: Features) -> dict[str, bytes]:
    return {stream: array.tobytes() for stream, array in features.arrays.items()}


def test_failures_of_others_are_left_out() -> None:
    plan = partly("audio", post=Post("p", media=(Media("video", "v"),)))
    [fetch] = plan.start()
    [decode] = plan.done(fetch, Fetched("/spool/v", 1))
    assert isinstance(decode.task, DecodeTask)
    assert plan.done(decode, Decoded((), {"video": BROKEN})) == []
    found = plan.features()
    assert found.failures == {}
    assert found.statuses["audio"] == "missing"


def test_a_lost_file_fails_what_was_wanted_of_it() -> None:
    plan = partly("audio", post=Post("p", media=(Media("video", "v"),)))
    walk(plan, {"fetch": GONE})
    found = plan.features()
    assert found.failures == {"audio": GONE}
    assert found.statuses["audio"] == "failed"
    assert found.statuses["video"] == "missing"
    whole = PostPlan(Post("p", media=(Media("video", "v"),)), SEPARATE, max_media=9)
    walk(whole, {"fetch": GONE})
    with pytest.raises(NothingUsable):  # of a whole post nothing would be left
        whole.features()
