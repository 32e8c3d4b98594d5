"""Extraction: what is read, what is a post's input, what is written of failures."""

import json
from pathlib import Path

import pytest

from common.errors import ConfigError
from common.post import Failure, Modality
from config.settings import Settings
from corpus.extract.options import parse
from corpus.extract.run import FailureFile
from corpus.extract.work import FailedPart, Inputs, Result, Work
from tests.support.corpus.extraction_corpus import write_corpus, write_lines

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
    given = one(tmp_path, TEXT, ocr="SALE", images=["a.jpg"]).digests["ocr"]
    assert one(tmp_path, TEXT, ocr="SALE", images=["b.jpg"]).digests["ocr"] == given
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
