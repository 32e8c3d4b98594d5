"""Extraction: feature files that grow a modality at a time."""

import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

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
from corpus.extract.local import FeatureStore
from corpus.extract.work import MODALITIES_OF, Kind, Work
from extractors.feature_file import feature_path, features_bytes, read_features, write_features
from tests.support.corpus.extraction_corpus import feature_files

MADE_WITH: dict[Stream, str] = {stream: f"fingerprint of {stream}" for stream in STREAMS}
GONE = Failure("fetch", "FetchRefused", "no such file")


def whole(post_id: str = "p", **changes: Failure) -> Features:
    """Features of all modalities; those named by ``changes`` have failed so."""
    rng = np.random.default_rng(7)
    arrays: dict[Stream, np.ndarray] = {
        stream: rng.standard_normal((2, 3)).astype(np.float16) for stream in STREAMS
    }
    statuses: dict[Modality, Status] = {m: "failed" if m in changes else "ok" for m in MODALITIES}
    there = {s: a for s, a in arrays.items() if modality_of(s) not in changes}
    failures = {m: changes[m] for m in MODALITIES if m in changes}
    return Features(post_id, there, statuses, failures, ocr_text="SALE")


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
    found = store(tmp_path, "image").find(work("image"))
    assert found is not None
    assert found.state == "there"
    assert (found.statuses, found.failures) == (done.statuses, done.failures)
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
