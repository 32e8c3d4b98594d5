"""The plan of a post, branch by branch, and the size of what crosses between processes."""

import itertools
import threading
import time
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import NothingUsable, RetryableError
from common.post import Failure, Features, Media, Modality, Post
from config.features import FeatureSettings, OcrSettings
from config.settings import Settings
from extractors.parts import PartKind, slot_bytes
from tests.support.fakes.pool import FakePool, default_answer
from workers.post_run import PostPlan, PostRun, PostRuns, PostTags, Step
from workers.protocol import (
    NO_SLOT,
    ArrayRef,
    Decoded,
    DecodeTask,
    Done,
    Extracted,
    ExtractTask,
    Fetched,
    FetchTask,
    Part,
    Result,
)

SEPARATE = FeatureSettings(ocr_mode="separate")
APPEND = FeatureSettings(ocr_mode="append")

IMAGE = Media("image", "http://h/i")
VIDEO = Media("video", "http://h/v")
SOUND = Media("audio", "http://h/a")

GONE = Failure("fetch", "FetchRefused", "HTTP 404")
SLOW = Failure("fetch", "FetchRetryable", "timed out after 15 s", retryable=True)
BROKEN = Failure("decode", "MediaError", "truncated")

GIVES: dict[str, tuple[PartKind, ...]] = {
    "image": ("image", "picture"),
    "video": ("frames", "picture", "picture", "sound"),
    "audio": ("sound",),
}


def plan_of(post: Post, settings: FeatureSettings = SEPARATE, max_media: int = 20) -> PostPlan:
    return PostPlan(post, settings, max_media=max_media)


def ref(rows: int = 2) -> ArrayRef:
    return ArrayRef(0, 0, (rows, 4, 4, 3), "uint8")


def result_of(step: Step, read: str = "sign") -> Result:
    """Return a healthy worker's answer to a step."""
    task = step.task
    if isinstance(task, FetchTask):
        return Fetched(f"/spool/{task.media.kind}", 1)
    if isinstance(task, DecodeTask):
        return Decoded(tuple(Part(kind, ref()) for kind in GIVES[task.kind]))
    assert isinstance(task, ExtractTask)
    if task.extractor == "ocr":
        return Extracted(text=read)
    fill = float(len(task.text)) if task.extractor == "text" else float(step.media_index)
    return Extracted(array=np.full((2, 3), fill, np.float16))


def walk(plan: PostPlan, fails: dict[str, Failure] | None = None, read: str = "sign") -> list[Step]:
    """Run a plan to its end; ``fails`` names the steps that fail by stage, kind or modality."""
    todo, seen = plan.start(), []
    while todo:
        step = todo.pop(0)
        seen.append(step)
        names = {step.task.stage}
        if isinstance(step.task, FetchTask):
            names.add(f"fetch {step.task.media.kind}")
        elif isinstance(step.task, DecodeTask):
            names.add(f"decode {step.task.kind}")
        elif isinstance(step.task, ExtractTask):
            names |= {step.task.extractor, f"embed {step.task.modality}"}
        failure = next((f for name, f in (fails or {}).items() if name in names), None)
        todo += plan.failed(step, failure) if failure else plan.done(step, result_of(step, read))
    assert plan.finished
    return seen


def texts(steps: list[Step]) -> dict[str, str]:
    """Modality -> text of the embeddings."""
    return {
        s.task.modality: s.task.text
        for s in steps
        if isinstance(s.task, ExtractTask) and s.task.extractor == "text"
    }


def test_text_alone() -> None:
    plan = plan_of(Post("p", "hello"))
    [step] = plan.start()
    assert step.task.stage == "extract"
    assert not plan.finished
    assert plan.done(step, result_of(step)) == []
    features = plan.features()
    assert features.post_id == "p"
    assert list(features.arrays) == ["text"]
    assert features.statuses == {
        "video": "missing",
        "image": "missing",
        "audio": "missing",
        "text": "ok",
        "ocr": "missing",
    }
    assert features.ocr_text is None


def test_every_media_in_order() -> None:
    plan = plan_of(Post("p", "t", (IMAGE, VIDEO, SOUND)))
    steps = walk(plan)
    assert [s.task.stage for s in steps].count("fetch") == 3
    decodes = [s.task for s in steps if isinstance(s.task, DecodeTask)]
    assert {task.slot for task in decodes} == {NO_SLOT}
    assert {task.path for task in decodes} == {"/spool/image", "/spool/video", "/spool/audio"}
    of_video = [s.task for s in steps if isinstance(s.task, ExtractTask) and s.media_index == 1]
    assert [task.extractor for task in of_video] == ["video", "audio", "ocr"]
    assert len(of_video[2].refs) == 2
    features = plan.features()
    assert set(features.statuses.values()) == {"ok"}
    assert features.arrays["audio"].shape == (4, 3), "the video's sound and the sound file"
    assert features.arrays["audio"][:, 0].tolist() == [1, 1, 2, 2], "in the order of the media"
    assert features.ocr_text == "sign\nsign"


def test_media_beyond_the_limit_are_left_out_and_counted() -> None:
    plan = plan_of(Post("p", "", (IMAGE,) * 5), max_media=2)
    assert plan.media_left_out == 3
    assert len(plan.start()) == 2


@pytest.mark.parametrize(
    ("mode", "text", "read", "expected"),
    [
        ("separate", "own", "sign", {"text": "own", "ocr": "sign"}),
        ("separate", "own", " ", {"text": "own"}),
        ("separate", " ", "sign", {"ocr": "sign"}),
        ("append", "own", "sign", {"text": "own\nsign"}),
        ("append", " own ", "", {"text": "own"}),
        ("append", "", "sign", {"text": "sign"}),
        ("append", "", "", {}),
    ],
)
def test_ocr_modes(
    mode: Literal["separate", "append"], text: str, read: str, expected: dict[str, str]
) -> None:
    """Text read in pictures stands alone or joins the post's; empty text is not embedded."""
    plan = plan_of(Post("p", text, (IMAGE,)), FeatureSettings(ocr_mode=mode))
    assert texts(walk(plan, read=read)) == expected
    features = plan.features()
    assert features.statuses["ocr"] == ("ok" if read.strip() else "missing")
    assert ("ocr" in features.arrays) == ("ocr" in expected)
    assert features.ocr_text == (read.strip() or None)


def test_separate_text_does_not_wait_for_media() -> None:
    """With `separate` the post's text is embedded at once; with `append` it waits for OCR."""
    post = Post("p", "own", (IMAGE,))
    assert [s.task.stage for s in plan_of(post).start()] == ["fetch", "extract"]
    assert [s.task.stage for s in plan_of(post, APPEND).start()] == ["fetch"]


@pytest.mark.parametrize("settings", [SEPARATE, APPEND])
def test_known_ocr_text_is_not_read_again(settings: FeatureSettings) -> None:
    for media in ((), (IMAGE,), (VIDEO, SOUND)):
        plan = plan_of(Post("p", "own", media, ocr="known"), settings)
        steps = walk(plan)
        assert not any(getattr(s.task, "extractor", "") == "ocr" for s in steps)
        assert "known" in "".join(texts(steps).values())
        features = plan.features()
        assert features.statuses["ocr"] == "ok"
        assert features.ocr_text == "known"


@pytest.mark.parametrize(
    ("ocr", "read", "enabled", "source"),
    [
        ("known", "sign", True, "given"),
        ("known", "sign", False, "given"),
        (None, "sign", True, "read"),
        ("", "sign", True, "read"),
        (" \n", "sign", True, "read"),
        (None, " ", True, "nothing_found"),
        (None, "sign", False, "off"),
        ("", "sign", False, "off"),
    ],
)
def test_result_tells_where_the_text_of_the_pictures_comes_from(
    ocr: str | None, read: str, enabled: bool, source: str
) -> None:
    """Only a text that is not blank replaces reading."""
    settings = FeatureSettings(ocr=OcrSettings(enabled=enabled))
    plan = plan_of(Post("p", "own", (IMAGE,), ocr=ocr), settings)
    walk(plan, read=read)
    assert plan.features().ocr == source


def test_what_is_read_keeps_the_order_of_the_media() -> None:
    plan = plan_of(Post("p", "", (IMAGE, IMAGE)), APPEND)
    todo = plan.start()
    while todo:
        step = todo.pop()  # newest first: the second image ends before the first
        read = f"line {step.media_index}"
        todo += plan.done(step, result_of(step, read))
    assert plan.features().ocr_text == "line 0\nline 1"


@pytest.mark.parametrize(
    ("fails", "modality"),
    [
        ({"fetch image": GONE}, "image"),
        ({"decode image": BROKEN}, "image"),
        ({"decode audio": BROKEN}, "audio"),
        ({"fetch video": GONE}, "video"),
        ({"embed text": BROKEN}, "text"),
    ],
)
def test_a_broken_side_is_told_the_rest_goes_on(fails: dict[str, Failure], modality: Any) -> None:
    plan = plan_of(Post("p", "own", (IMAGE, VIDEO, SOUND)))
    walk(plan, fails)
    features = plan.features()
    assert features.failures[modality] == next(iter(fails.values()))
    if modality == "audio":
        assert features.statuses["audio"] == "ok", "the video's sound is still there"
        assert len(features.arrays["audio"]) == 2
    else:
        assert features.statuses[modality] == "failed"
    assert set(features.statuses.values()) <= {"ok", "failed"}


def test_one_of_two_images_broken() -> None:
    plan = plan_of(Post("p", "", (IMAGE, IMAGE)))
    first, second = plan.start()
    assert plan.failed(first, GONE) == []
    todo = plan.done(second, result_of(second))
    while todo:
        step = todo.pop()
        todo += plan.done(step, result_of(step))
    features = plan.features()
    assert features.statuses["image"] == "ok"
    assert features.failures["image"] == GONE


def test_failures_inside_a_decoded_file() -> None:
    plan = plan_of(Post("p", "", (VIDEO,)))
    [fetch] = plan.start()
    [decode] = plan.done(fetch, result_of(fetch))
    half = Decoded((Part("frames", ref()),), {"audio": BROKEN})
    [extract] = plan.done(decode, half)
    plan.done(extract, result_of(extract))
    features = plan.features()
    assert (features.statuses["video"], features.statuses["audio"]) == ("ok", "failed")
    assert features.failures == {"audio": BROKEN}


def test_ocr_that_fails() -> None:
    for settings in (SEPARATE, APPEND):
        plan = plan_of(Post("p", "own", (IMAGE,)), settings)
        walk(plan, {"ocr": BROKEN})
        features = plan.features()
        assert features.statuses["ocr"] == "failed"
        assert features.statuses["image"] == features.statuses["text"] == "ok"


def test_nothing_usable() -> None:
    """Empty post, or all broken: one line with every reason, permanent or to be tried again."""
    plan = plan_of(Post("p", " "))
    walk(plan)
    with pytest.raises(NothingUsable, match=r"^the post has no text and no media$"):
        plan.features()
    plan = plan_of(Post("p", "", (IMAGE, SOUND)))
    walk(plan, {"fetch image": GONE, "decode audio": BROKEN})
    with pytest.raises(NothingUsable, match=r"^nothing usable: image: HTTP 404; audio: truncated$"):
        plan.features()
    plan = plan_of(Post("p", "", (IMAGE, SOUND)))
    walk(plan, {"fetch image": GONE, "fetch audio": SLOW})
    with pytest.raises(RetryableError, match=r"^nothing usable yet: image: HTTP 404; audio: timed"):
        plan.features()


@given(
    media=st.lists(st.sampled_from([IMAGE, VIDEO, SOUND]), max_size=4),
    text=st.sampled_from(["", "own"]),
    ocr=st.sampled_from([None, "", "known"]),
    mode=st.sampled_from([SEPARATE, APPEND]),
    order=st.tuples(st.randoms(use_true_random=False), st.integers(2, 9)),
)
def test_any_order_ends_and_gives_the_same(
    media: list[Media], text: str, ocr: str | None, mode: FeatureSettings, order: tuple[Any, int]
) -> None:
    post = Post("p", text, tuple(media), ocr=ocr)
    random, fail_every = order

    def fails(step: Step) -> bool:
        return (len(step.task.stage) + 3 * step.media_index) % fail_every == 0

    def run(pick: Any) -> Any:
        plan, count = plan_of(post, mode), 0
        todo = plan.start()
        while todo:
            assert not plan.finished
            step = todo.pop(pick(len(todo)))
            count += 1
            assert count < 200
            todo += plan.failed(step, BROKEN) if fails(step) else plan.done(step, result_of(step))
        assert plan.finished
        try:
            features = plan.features()
        except (NothingUsable, RetryableError) as error:
            return type(error)
        arrays = {m: a.tolist() for m, a in features.arrays.items()}
        return arrays, features.statuses, features.ocr_text

    assert run(lambda n: 0) == run(random.randrange)


def test_reference_knows_its_size() -> None:
    assert ArrayRef(0, 0, (3, 96, 64), "float32").nbytes == 3 * 96 * 64 * 4
    assert ArrayRef(0, 0, (), "uint8").nbytes == 1


@pytest.mark.parametrize(("ocr", "padded"), [(True, False), (False, False), (False, True)])
def test_slot_holds_the_most_a_file_can_give(ocr: bool, padded: bool) -> None:
    settings = Settings.model_validate(
        {
            "features": {
                "video": {"frames": 7, "image_size": 50},
                "image": {"max_frames": 3, "image_size": 70, "padded": padded},
                "ocr": {"enabled": ocr, "max_side": 101, "frames": 3},
            },
            "decode": {"max_audio_s": 10},
        }
    )
    picture = [(101, 101, 3)] if ocr else []
    video = [(7, 50, 50, 3), *picture * 3, (11, 96, 64, 4)]
    image = [(6 if padded else 3, 70, 70, 3), *picture]
    for shapes in (video, image):
        sizes = [int(np.prod(shape)) for shape in shapes]
        aligned = list(itertools.accumulate(-(-size // 64) * 64 for size in sizes))
        assert aligned[-1] <= slot_bytes(settings)
    assert slot_bytes(settings) % 4096 == 0


def test_the_times_of_stages_add_up_to_the_total(tmp_path: Path) -> None:
    """They are times by the clock, though media are worked on side by side."""
    ended: list[PostTags] = []
    runs = PostRuns(FakePool(tmp_path))
    post = Post("p", "a text", (IMAGE, IMAGE, VIDEO))
    run = PostRun(
        plan_of(post),
        time.monotonic() + 60,
        "60 s",
        last=False,
        on_end=lambda _, outcome: ended.append(cast("PostTags", outcome)),
    )
    runs.begin(run)
    while run.tasks:
        task_id, step = min(run.tasks.items())
        threading.Event().wait(0.003)  # the stages take time
        answer = Decoded(()) if isinstance(step.task, DecodeTask) else default_answer(step.task)
        runs.handle(Done(task_id, cast("Result", answer)))
    times = dict(ended[0].timings_ms)
    total = times.pop("total")
    assert set(times) == {"fetch", "decode", "fuse"}  # the text was extracted beside downloads
    assert total - len(times) - 5 <= sum(times.values()) <= total
    assert min(times.values()) > 0


def test_posts_overtake_fifty_earlier_ones_with_a_video_at_most(tmp_path: Path) -> None:
    """A small post does not wait for long videos; where small ones keep coming, a video does."""
    runs = PostRuns(FakePool(tmp_path))

    def turn(*media: Media) -> int:
        run = PostRun(plan_of(Post("p", "", media)), 1e9, "", last=False, on_end=lambda *_: None)
        runs.begin(run)
        return run.turn

    [video, *others] = [turn(VIDEO, IMAGE), *(turn(IMAGE) for _ in range(60))]
    assert sum(other < video for other in others) in (49, 50)
    assert turn(VIDEO) > video
    assert others == sorted(others)


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
    features = plan.features()
    assert features.statuses["video"] == "ok"
    assert set(features.statuses) == {"video", "image", "audio", "text", "ocr"}
    assert features.arrays["video"][:, 0].tolist() == [0, 0, 0, 1, 1, 1]
    assert features.arrays["video_lstm"][:, 0].tolist() == [0, 1]
    assert features.arrays["video_lstm"].shape == (2, 7)


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
    features = plan.features()
    assert "video" not in features.arrays
    assert "video_lstm" not in features.arrays
    assert features.statuses["video"] == "missing"


@pytest.mark.parametrize(
    ("modalities", "settings", "expected"),
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
    modalities: tuple[Modality, ...], settings: FeatureSettings, expected: list[str]
) -> None:
    """Media that no wanted modality needs are not fetched; pictures are read for text alone."""
    plan = partly(*modalities, settings=settings)
    steps = walk(plan)
    assert done(steps) == expected
    features = plan.features()
    tasks = [step.task for step in steps if isinstance(step.task, ExtractTask)]
    assert set(features.arrays) == {task.modality for task in tasks if task.extractor != "ocr"}
    for modality, status in features.statuses.items():
        assert status == ("ok" if modality in features.arrays else "missing")
    assert not features.failures


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
    features = plan.features()
    assert features.failures == {}
    assert features.statuses["audio"] == "missing"


def test_a_lost_file_fails_what_was_wanted_of_it() -> None:
    plan = partly("audio", post=Post("p", media=(Media("video", "v"),)))
    walk(plan, {"fetch": GONE})
    features = plan.features()
    assert features.failures == {"audio": GONE}
    assert features.statuses["audio"] == "failed"
    assert features.statuses["video"] == "missing"
    whole = PostPlan(Post("p", media=(Media("video", "v"),)), SEPARATE, max_media=9)
    walk(whole, {"fetch": GONE})
    with pytest.raises(NothingUsable):  # of a whole post nothing would be left
        whole.features()
