"""`import insighttag`: tagging in one process, beside foreign modules."""

import json
import multiprocessing
import tempfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import insighttag
from insighttag import ConfigError, NothingUsable, Tagger
from scripts.cli import run
from tests.support.mistakes import one_line
from tests.support.processes import python
from tests.support.tiny_models import tiny_site

PICTURE = np.random.default_rng(1).integers(0, 255, (48, 64, 3), dtype=np.uint8)


def cut_picture() -> Image.Image:
    """Return a picture that Pillow opens, and of which half is missing."""
    file = BytesIO()
    Image.fromarray(PICTURE).save(file, "PNG")
    return Image.open(BytesIO(file.getvalue()[: len(file.getvalue()) // 2]))


def closed_picture() -> Image.Image:
    picture = cut_picture()
    picture.close()
    return picture


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Settings of small extractors, their bundle, and a picture."""
    folder = tmp_path_factory.mktemp("api")
    tiny_site(folder).rename(folder / "settings.yaml")
    Image.fromarray(PICTURE).save(folder / "a.png")
    return folder


@pytest.fixture(scope="module")
def tagger(site: Path) -> Iterator[Tagger]:
    with Tagger.load(site / "bundle") as tagger:
        yield tagger


def test_the_tags_are_those_of_insighttag_tag(
    site: Path, tagger: Tagger, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the settings beside the bundle; of posts that fail, and of media that do, too."""
    posts: list[dict[str, Any]] = [
        {"post_id": "1", "text": "cat", "images": [str(site / "a.png")]},
        {"post_id": "2", "text": "sea", "images": [str(site / "settings.yaml")]},
        {"post_id": "3"},
    ]
    file = site / "posts.json"
    file.write_text(json.dumps(posts), encoding="utf-8")
    assert run(["tag", str(file), "--json", "--bundle", str(site / "bundle")]) == 1
    expected = json.loads(capsys.readouterr().out)
    assert [result.answer() for result in tagger.tag_many(posts)] == expected  # type: ignore[arg-type]
    assert [each["status"] for each in expected] == ["tagged", "tagged", "failed"]


def test_a_picture_is_the_same_in_every_form(site: Path, tagger: Tagger) -> None:
    path = site / "a.png"
    expected = tagger.tag(images=[path])
    assert expected.tags
    for image in (str(path), path.read_bytes(), PICTURE, Image.fromarray(PICTURE)):
        assert tagger.tag(images=[image]) == expected


@pytest.mark.parametrize(
    ("post", "named"),
    [
        ({"text": 3}, "post: text must be a text: got 3"),
        ({"text": b"cat"}, "post: text must be a text: got"),
        ({"images": "a.png"}, "post: images: must be a list, even for one file: got str"),
        ({"images": PICTURE}, "post: images: must be a list, even for one file: got ndarray"),
        ({"images": ["no.png"]}, "post: images.0: no such file: no.png"),
        ({"images": [""]}, "post: images.0: must be a path"),
        ({"images": [7]}, "post: images.0: must be a path, a URL, bytes, an array or"),
        ({"images": [PICTURE / 255]}, r"uint8 \(height, width\).*got float64 \(48, 64, 3\)"),
        ({"images": ["x" * 300]}, "post: images.0: no such file: xxx"),
        ({"images": [Image.new("RGB", (0, 9))]}, r"images.0: the picture is empty: \(0, 9\)"),
        ({"images": [cut_picture()]}, "images.0: is not a complete picture: .*truncated"),
        ({"images": [closed_picture()]}, "images.0: is not a complete picture: "),
        ({"videos": [PICTURE]}, "post: videos.0: must be a path, a URL or bytes: got ndarray"),
        ({"text": "x", "post_id": ""}, "must have a post_id"),
    ],
)
def test_a_wrong_argument_is_named(tagger: Tagger, post: dict[str, Any], named: str) -> None:
    with one_line(ConfigError, match=named):
        tagger.tag(**post)


def test_a_post_of_nothing_usable_is_an_error_and_a_broken_file_is_not(tagger: Tagger) -> None:
    with pytest.raises(NothingUsable, match="no text and no media"):
        tagger.tag()
    with pytest.raises(NothingUsable, match="image: is not a picture"):
        tagger.tag(images=[b"hello"])
    result = tagger.tag(text="cat", images=[b"hello"])
    assert result.modalities["image"] == "failed"
    assert result.failures["image"].message == "is not a picture: text"


@pytest.mark.parametrize(
    ("posts", "named"),
    [
        ({"text": "x"}, "posts: must be several posts, each a dict: got dict"),
        ("posts.jsonl", "posts: must be several posts, each a dict: got str"),
        (None, "posts: must be several posts, each a dict: got NoneType"),
        (["x"], "post 1: must be a dict with post_id"),
        ([{"imges": []}], "post 1: imges: unknown key; did you mean 'images'?"),
        ([{1: 2}], "post 1: 1: unknown key"),
    ],
)
def test_wrong_posts_are_named(tagger: Tagger, posts: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=named.replace("?", r"\?")):
        list(tagger.tag_many(posts))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"bundle": "none"}, "bundle: none: no bundle there"),
        ({"bundle": "x" * 300}, "File name too long"),
        ({"bundle": "."}, "did you mean bundle?"),
        ({"config": "none.yaml"}, "none.yaml: no such file"),
        ({"overrides": {"features.imge.x": 1}}, "features.imge: unknown key; did you mean 'image'"),
        ({"overrides": {"a..b": 1}}, "overrides: 'a..b': write it as 'section.key'"),
        ({"overrides": ["a=b"]}, "overrides: must be a dict"),
        ({"overrides": {"features": {"image.weights": "random:2"}}}, "modality image: the bundle"),
        ({"device": "gpu"}, "device: must be cpu or cuda:N, as cuda:0: got 'gpu'"),
        ({"device": 0}, "device: must be cpu or cuda:N, as cuda:0: got 0"),
    ],
)
def test_what_cannot_be_loaded_is_named(
    site: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], named: str
) -> None:
    """Paths are relative to the working directory."""
    monkeypatch.chdir(site)
    with one_line(ConfigError, named):
        Tagger.load(**{"bundle": "bundle", **arguments})


def test_a_closed_tagger_says_so(site: Path) -> None:
    tagger = Tagger.load(site / "bundle")
    assert tagger.labels == ("cat", "dog", "sea")
    tagger.close()
    tagger.close()
    with pytest.raises(ConfigError, match="closed"):
        tagger.tag(text="cat")


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_tagger_of_another_process_says_so(tagger: Tagger) -> None:
    """A fork has its memory and not its thread: it would wait for ever."""
    context = multiprocessing.get_context("fork")
    said = context.SimpleQueue()

    def tag() -> None:
        try:
            tagger.tag(text="cat")
        except ConfigError as error:
            said.put(str(error))
        tagger.close()

    child = context.Process(target=tag)
    child.start()
    child.join(timeout=20)
    child.kill()
    assert child.exitcode == 0
    assert said.get() == "this Tagger belongs to another process: load the bundle after the fork"
    assert tagger.tag(text="cat").tags


def test_a_missing_tmpdir_is_named(tagger: Tagger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/nonexistent")
    with pytest.raises(ConfigError, match=r"TMPDIR.*: No such file"):
        tagger.tag(text="cat")


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: insighttag.train("posts", "a\0b"), "out"),
        (lambda: insighttag.train("a\0b", "out"), "posts"),
        (lambda: insighttag.train("posts", "out", labels="a\0b"), "labels"),
        (lambda: insighttag.train("posts", "out", config="a\0b"), "config"),
        (lambda: Tagger.load("a\0b"), "bundle"),
        (lambda: insighttag.extract([], config="a\0b"), "config"),
        (lambda: list(insighttag.extract([{"images": ["a\0b"]}])), r"post 1: images\.0"),
    ],
)
def test_a_path_that_is_none_is_named(call: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=rf"{named}: must be a path, without NUL characters"):
        call()


def test_features_load_the_encoders_that_the_posts_need(site: Path) -> None:
    """Weights that are missing are told with the first post that needs them."""
    posts: list[insighttag.PostInput] = [{"text": "cat"}, {"images": [PICTURE]}]
    values = {"features.image.weights": str(site / "none.safetensors")}
    features = insighttag.extract(posts, config=site / "settings.yaml", overrides=values)
    assert list(next(features).arrays) == ["text"]
    with pytest.raises(ConfigError, match=r"none\.safetensors"):
        next(features)


def test_features_of_posts_in_their_order(site: Path) -> None:
    """A post of nothing has none; relative paths of the file of settings lead from its folder."""
    posts: list[insighttag.PostInput] = [{"text": "cat", "images": [PICTURE]}, {}]
    one, none = insighttag.extract(posts, config=site / "settings.yaml")
    assert {stream: array.shape[1] for stream, array in one.arrays.items()} == {
        "image": 64,
        "text": 64,
    }
    assert one.arrays["image"].dtype == np.float16
    assert (none.post_id, dict(none.arrays)) == ("post 2", {})
    with pytest.raises(ConfigError, match=r"features\.preset: Input should be 'classic'"):
        insighttag.extract(posts, preset="tiny")  # type: ignore[arg-type]


@pytest.fixture
def importing(tmp_path: Path) -> str:
    """The code of a notebook in a folder that goes before ours."""
    return f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import insighttag"


def test_a_module_with_the_name_of_one_of_ours_is_named(tmp_path: Path, importing: str) -> None:
    (tmp_path / "config.py").touch()
    done = python("-c", importing)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert f"the name 'config' is taken by {tmp_path / 'config.py'}" in last
    assert "pip install" in last


def test_a_folder_without_code_does_no_harm(tmp_path: Path, importing: str) -> None:
    """Many projects have a folder config/ or scripts/."""
    for name in ("config", "scripts"):
        (tmp_path / name).mkdir()
    code = f"{importing}; import config.load, scripts.cli; print(config.__file__)"
    done = python("-c", code, check=True)
    assert Path(done.stdout.strip()).parent.parent == Path(__file__).resolve().parents[3]
