"""Extraction of a corpus: what is there already, and how the rest is dealt to processes."""

import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import ConfigError
from common.post import (
    MODALITIES,
    STREAMS,
    Failure,
    Features,
    Modality,
    Post,
    Status,
    Stream,
    modality_of,
)
from config.settings import Settings
from corpus.extract.local import FeatureStore
from corpus.extract.options import parse
from corpus.extract.run import FailureFile
from corpus.extract.work import MODALITIES_OF, FailedPart, Inputs, Kind, Result, Work
from extractors.feature_file import feature_path, features_bytes, read_features, write_features
from tests.support.corpus.extraction_corpus import feature_files, write_corpus, write_lines

MADE_WITH: dict[Stream, str] = {stream: f"fingerprint of {stream}" for stream in STREAMS}
GONE = Failure("fetch", "FetchRefused", "no such file")


def whole(post_id: str = "p", **changes: Failure) -> Features:
    """Features of all modalities; those named by ``changes`` have failed so."""
    rng = np.random.default_rng(7)
    arrays: dict[Stream, np.ndarray] = {
        stream: rng.standard_normal((2, 3)).astype(np.float16) for stream in STREAMS
    }
    statuses: dict[Modality, Status] = {m: "failed" if m in changes else "ok" for m in MODALITIES}
    present = {s: a for s, a in arrays.items() if modality_of(s) not in changes}
    failures = {m: changes[m] for m in MODALITIES if m in changes}
    return Features(post_id, present, statuses, failures, ocr_text="SALE")


def share(features: Features, kind: Kind) -> Features:
    """Return the results for a script of one kind: `workers.post_run` leaves out the rest."""
    modalities = MODALITIES_OF[kind]
    return Features(
        features.post_id,
        {s: a for s, a in features.arrays.items() if modality_of(s) in modalities},
        {m: s if m in modalities else "missing" for m, s in features.statuses.items()},
        {m: f for m, f in features.failures.items() if m in modalities},
        ocr_text=features.ocr_text if kind == "text" else None,
    )


def store(root: Path, kind: Kind, *, version: str = "", retry_failed: bool = False) -> FeatureStore:
    made = {s: f + version for s, f in MADE_WITH.items() if modality_of(s) in MODALITIES_OF[kind]}
    return FeatureStore(root, MODALITIES_OF[kind], made, retry_failed=retry_failed)


def work(kind: Kind, post_id: str = "p", digest: str = "d", **lost: Failure) -> Work:
    digests = {m: f"{digest} {m}" for m in MODALITIES_OF[kind]}
    return Work(0, Post(post_id), digests, {m: lost[m] for m in MODALITIES if m in lost})


def put(root: Path, features: Features, kind: Kind) -> None:
    store(root, kind).put(work(kind, features.post_id), share(features, kind))


def test_the_order_of_the_scripts_does_not_matter(tmp_path: Path) -> None:
    """All 24 orders give the bytes that one run of everything would give."""
    features = whole(image=GONE)
    digests: dict[Modality, str] = {m: f"d {m}" for m in MODALITIES}
    expected = features_bytes(features, MADE_WITH, digests)
    for i, order in enumerate(itertools.permutations(MODALITIES_OF)):
        for kind in order:
            put(tmp_path / str(i), features, kind)
        assert feature_path(tmp_path / str(i), "p").read_bytes() == expected, order


def test_other_modalities_stay_as_they_are(tmp_path: Path) -> None:
    """Also those of other extractors or the daemon; the OCR text belongs to the text."""
    before = whole()
    write_features(tmp_path, before, {s: f"old {s}" for s in STREAMS})
    after = whole(image=GONE)
    store(tmp_path, "image").put(work("image"), share(after, "image"))
    read = read_features(tmp_path, "p", {s: f"old {s}" for s in STREAMS if s != "image"})
    for stream, array in read.arrays.items():
        np.testing.assert_array_equal(array, before.arrays[stream])
    everything = read_features(tmp_path, "p")
    assert everything.statuses == {**before.statuses, "image": "failed"}
    assert "image" not in everything.arrays
    assert everything.ocr_text == "SALE"


def test_a_stream_that_is_no_longer_made_goes(tmp_path: Path) -> None:
    """Video without its second stream leaves none of an older model behind."""
    put(tmp_path, whole(), "video")
    only: dict[Stream, str] = {"video": "new"}
    features = share(whole(), "video")
    single = Features("p", {"video": features.arrays["video"]}, features.statuses)
    FeatureStore(tmp_path, MODALITIES_OF["video"], only).put(work("video"), single)
    assert set(read_features(tmp_path, "p").arrays) == {"video"}


def test_a_finished_post_is_found_with_its_failures(tmp_path: Path) -> None:
    """So that a second run tells the same failures; ``retry_failed`` does it again."""
    put(tmp_path, whole(), "video")
    done = store(tmp_path, "image").put(work("image"), share(whole(image=GONE), "image"))
    finished: Any = store(tmp_path, "image").find(work("image"))
    assert finished.state == "there"
    assert (finished.statuses, finished.failures) == (done.statuses, done.failures)
    assert store(tmp_path, "image", retry_failed=True).find(work("image")) is None
    assert store(tmp_path, "video", retry_failed=True).find(work("video")) is not None


def test_what_was_made_otherwise_is_not_found(tmp_path: Path) -> None:
    """By other extractors, from other media, by a script that knew not what from; or broken."""
    put(tmp_path, whole(), "image")
    assert store(tmp_path, "image").find(work("image")) is not None
    assert store(tmp_path, "image", version="2").find(work("image")) is None
    assert store(tmp_path, "image").find(work("image", digest="e")) is None
    assert store(tmp_path, "audio").find(work("audio")) is None
    write_features(tmp_path, whole("daemon"), MADE_WITH)
    assert store(tmp_path, "image").find(work("image", "daemon")) is None
    path = feature_path(tmp_path, "p")
    path.write_bytes(path.read_bytes()[:40])
    assert store(tmp_path, "image").find(work("image")) is None
    put(tmp_path, whole(), "image")
    assert store(tmp_path, "image").find(work("image")) is not None


@pytest.mark.parametrize(
    ("failure", "again"),
    [
        (GONE, False),
        (Failure("fetch", "FetchRetryable", "timed out", retryable=True), True),
        (Failure("decode", "WorkerDied", "worker decode-1 died (signal SIGSEGV)", True), False),
    ],
)
def test_what_may_pass_is_tried_again(tmp_path: Path, failure: Failure, again: bool) -> None:
    """A time-out is; a file that killed two workers is not."""
    features = whole(image=failure)
    store(tmp_path, "image").put(work("image"), share(features, "image"))
    assert (store(tmp_path, "image").find(work("image")) is None) == again


def test_which_worker_died_is_not_written(tmp_path: Path) -> None:
    """It is chance, and files are the same however often one runs."""
    died = Failure("decode", "WorkerDied", "worker decode-1 died (signal SIGSEGV)", True)
    result = store(tmp_path, "image").put(work("image"), share(whole(image=died), "image"))
    assert result.failures[0].failure.message == "its worker died (signal SIGSEGV)"


def test_media_lost_before_are_failures_of_their_modality(tmp_path: Path) -> None:
    """Without other media the modality has failed; with some, the failure is kept next to them."""
    missing = Features("p", {}, dict.fromkeys(MODALITIES, "missing"))
    result = store(tmp_path, "image").put(work("image", image=GONE), missing)
    assert result.statuses == {"image": "failed"}
    beside = store(tmp_path, "image").put(
        work("image", "q", image=GONE), share(whole("q"), "image")
    )
    assert beside.statuses == {"image": "ok"}
    assert [part.failure for part in beside.failures] == [GONE]


def _write_all(root: Path, kind: Kind) -> None:
    for i in range(40):
        put(root, whole(f"p{i % 8}"), kind)


def test_scripts_side_by_side_lose_nothing(tmp_path: Path) -> None:
    """Four of them write 40 times each into the same eight files.

    The lock belongs to what is opened, not to the process: threads compete as processes do.
    """
    with ThreadPoolExecutor(len(MODALITIES_OF)) as pool:
        for future in [pool.submit(_write_all, tmp_path / "many", kind) for kind in MODALITIES_OF]:
            future.result()
    for kind in MODALITIES_OF:
        _write_all(tmp_path / "one", kind)
    assert len(feature_files(tmp_path / "one")) == 8
    assert feature_files(tmp_path / "many") == feature_files(tmp_path / "one")


IMAGE: frozenset[Modality] = frozenset({"image"})
TEXT: frozenset[Modality] = frozenset({"text", "ocr"})
AUDIO: frozenset[Modality] = frozenset({"audio"})
SHA = "ab" * 32


def works(path: Path, modalities: frozenset[Modality] = IMAGE, **changes: object) -> list[Work]:
    settings = Settings.model_validate(changes)
    return [entry for entry in Inputs(path, settings, modalities) if isinstance(entry, Work)]


def one(tmp_path: Path, modalities: frozenset[Modality] = IMAGE, **post: object) -> Work:
    (work,) = works(write_lines(tmp_path / "one.jsonl", [{"post_id": "p", **post}]), modalities)
    return work


def test_posts_are_read_in_order_with_whole_paths(tmp_path: Path) -> None:
    """Sources lie beside the file; a broken line and a second post of an ID have their places."""
    entries = list(Inputs(write_corpus(tmp_path), Settings(), IMAGE))
    assert [entry.index for entry in entries] == list(range(8))
    first = entries[0]
    assert isinstance(first, Work)
    assert first.post.media[0].source == str(tmp_path / "media" / "a.jpg")
    bad, again = entries[4], entries[6]
    assert isinstance(bad, Result)
    assert bad.failures[0].failure.message.startswith("line 5: not JSON")
    assert isinstance(again, Result)
    assert again.state == "repeated"


def test_the_count_is_that_of_lines_and_is_limited(tmp_path: Path) -> None:
    """Also where the last line has no end, and for a list in JSON."""
    path = write_corpus(tmp_path)
    path.write_text(path.read_text(encoding="utf-8").rstrip("\n"), encoding="utf-8")
    assert Inputs(path, Settings(), IMAGE).count() == 8
    assert Inputs(path, Settings(), IMAGE, limit=3).count() == 3
    assert len(list(Inputs(path, Settings(), IMAGE, limit=3))) == 3
    listed = tmp_path / "posts.json"
    listed.write_text(json.dumps([{"post_id": "1"}, {"post_id": "2"}]), encoding="utf-8")
    assert Inputs(listed, Settings(), IMAGE).count() == 2
    with pytest.raises(ConfigError, match=r"none\.jsonl: no such data file"):
        Inputs(tmp_path / "none.jsonl", Settings(), IMAGE).count()


def test_a_digest_is_that_of_what_the_features_are_made_from(tmp_path: Path) -> None:
    """Text does not touch a picture; another size, number or place of pictures does."""
    picture = tmp_path / "a.jpg"
    picture.write_bytes(b"1234")
    plain = one(tmp_path, images=["a.jpg"], text="x").digests["image"]
    assert one(tmp_path, images=["a.jpg"], text="y", audios=["s"]).digests["image"] == plain
    assert one(tmp_path, images=["a.jpg", "a.jpg"]).digests["image"] != plain
    picture.write_bytes(b"12345")
    assert one(tmp_path, images=["a.jpg"]).digests["image"] != plain
    assert one(tmp_path, images=["none.jpg"]).digests["image"] != plain
    sounds = one(tmp_path, AUDIO, videos=["v.mp4"]).digests["audio"]
    assert one(tmp_path, AUDIO, videos=["w.mp4"]).digests["audio"] != sounds


def test_words_of_pictures_belong_to_the_text(tmp_path: Path) -> None:
    """Pictures count for the text where OCR reads them, not where the post brings its OCR text."""
    read = one(tmp_path, TEXT, text="x", images=["a.jpg"]).digests
    other = one(tmp_path, TEXT, text="x", images=["b.jpg"]).digests
    assert read["text"] == other["text"]
    assert read["ocr"] != other["ocr"]
    with_ocr = one(tmp_path, TEXT, ocr="SALE", images=["a.jpg"]).digests["ocr"]
    assert one(tmp_path, TEXT, ocr="SALE", images=["b.jpg"]).digests["ocr"] == with_ocr
    path = write_lines(tmp_path / "p.jsonl", [{"post_id": "p", "text": "x", "images": ["a.jpg"]}])
    (appended,) = works(path, TEXT, features={"ocr_mode": "append"})
    path = write_lines(tmp_path / "p.jsonl", [{"post_id": "p", "text": "x", "images": ["b.jpg"]}])
    (moved,) = works(path, TEXT, features={"ocr_mode": "append"})
    assert appended.digests["text"] != moved.digests["text"]


def test_content_addressed_files_may_move(tmp_path: Path) -> None:
    """A name that is the hash of the content says all, wherever it lies."""
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{SHA}.jpg").write_bytes(b"1234")
    here = one(tmp_path, images=[f"one/{SHA}.jpg"]).digests
    assert one(tmp_path, images=[f"two/{SHA}.jpg"]).digests == here


def test_a_relative_path_stays_in_its_folder(tmp_path: Path) -> None:
    """One that climbs out is a failure with its reason; a whole path is the user's own word."""
    (tmp_path / "in").mkdir()
    (tmp_path / "out.jpg").write_bytes(b"1")
    climbing = one(tmp_path / "in", images=["sub/../../out.jpg"])
    assert climbing.post.media == ()
    assert "leaves the folder of one.jsonl" in climbing.lost["image"].message
    whole = one(tmp_path / "in", images=[str(tmp_path / "out.jpg")])
    assert whole.lost == {}
    assert whole.post.media[0].source == str(tmp_path / "out.jpg")


def test_a_manifest_tells_why_media_are_not_there(tmp_path: Path) -> None:
    """Its failures go to the modality that misses them; lines of another run are refused."""
    posts: list[dict[str, object]] = [
        {"post_id": "a", "images": [f"media/ab/{SHA}.jpg"]},
        {"post_id": "b"},
        {"post_id": "c"},
    ]
    path = write_lines(tmp_path / "posts.jsonl", posts)
    gone = {"stage": "fetch", "type": "FetchRefused", "message": "HTTP 404"}
    line = {"post_id": "a", "kind": "image", "source": "http://h/1.jpg", "status": "ok"}
    lost = {"post_id": "c", "kind": "video", "source": "u", "status": "failed", "reason": gone}
    manifest = write_lines(tmp_path / "manifest.jsonl", [line, lost])
    entries = list(Inputs(path, Settings(), AUDIO, manifest=manifest))
    failure = Failure("fetch", "FetchRefused", "HTTP 404")
    assert [dict(e.lost) for e in entries if isinstance(e, Work)] == [{}, {}, {"audio": failure}]
    images = list(Inputs(path, Settings(), IMAGE, manifest=manifest))
    assert all(not e.lost for e in images if isinstance(e, Work))
    write_lines(manifest, [{**line, "post_id": "z"}, lost])
    with pytest.raises(ConfigError, match=r"line 1: post 'z' is not at its place"):
        list(Inputs(path, Settings(), AUDIO, manifest=manifest))


def test_failures_are_listed_in_the_order_of_the_input(tmp_path: Path) -> None:
    """They may arrive in any order; an exception leaves the file of the last run."""
    path = tmp_path / "failures.jsonl"
    parts = [FailedPart(f"p{i}", "image", Failure("decode", "MediaError", "ü")) for i in range(9)]
    with FailureFile(path) as failures:
        for i in (5, 0, 8, 3):
            failures.add(i, [parts[i], parts[i]])
        failures.add(1, [])
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [line["post_id"] for line in lines] == ["p0", "p0", "p3", "p3", "p5", "p5", "p8", "p8"]
    assert lines[0] == {
        "post_id": "p0",
        "modality": "image",
        "stage": "decode",
        "type": "MediaError",
        "message": "ü",
    }
    before = path.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        _interrupted(path, parts[0])
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["failures.jsonl"]


def _interrupted(path: Path, part: FailedPart) -> None:
    with FailureFile(path) as failures:
        failures.add(0, [part])
        raise KeyboardInterrupt


def test_the_command_decides_on_processes(tmp_path: Path) -> None:
    """Devices take processes in turn; models share passes only on GPUs, unless told."""
    base = ["--input", "p.jsonl", "--features", str(tmp_path)]
    two = parse("image", [*base, "--workers", "3", "--devices", "cuda:0,cuda:1"]).settings
    assert [(g.device, g.processes) for g in two.workers.extractors] == [
        ("cuda:0", 2),
        ("cuda:1", 1),
    ]
    assert two.workers.share_batches
    cpu = parse("image", [*base, "--devices", "cpu", "--batch", "5"]).settings
    assert not cpu.workers.share_batches
    assert cpu.features.image.batch_size == 5
    assert parse(
        "image", [*base, "--devices", "cpu", "--share", "yes"]
    ).settings.workers.share_batches
    assert parse("text", base).failures == tmp_path / "failures_text.jsonl"
