"""Posts made of openclipart drawings: what becomes label, text and author, and what is left out."""

import json
from html import escape
from pathlib import Path

import pytest
from PIL import Image

from corpus.openclipart import choose_labels, read_drawings
from fusion.data.data_file import read_posts
from scripts.data_scripts.make_openclipart_posts import main

SVG = """<?xml version="1.0"?>
<svg xmlns="http://www.w3.org/2000/svg" xmlns:cc="http://web.resource.org/cc/"
 xmlns:dc="http://purl.org/dc/elements/1.1/"
 xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><metadata><rdf:RDF><cc:Work>
<dc:title>{title}</dc:title><dc:description>{about}</dc:description>
<dc:subject><rdf:Bag>{words}</rdf:Bag></dc:subject>
<dc:publisher><cc:Agent><dc:title>Open Clip Art Library</dc:title></cc:Agent></dc:publisher>
<dc:creator><cc:Agent><dc:title>{author}</dc:title></cc:Agent></dc:creator>
</cc:Work></rdf:RDF></metadata></svg>"""


def _draw(
    root: Path,
    place: str,
    words: list[str],
    *,
    author: str = "Ann B",
    shade: int = 0,
    about: str = "",
) -> None:
    svg, png = root / "svg" / f"{place}.svg", root / "png" / f"{place}.png"
    for path in (svg, png):
        path.parent.mkdir(parents=True, exist_ok=True)
    bag = "".join(f"<rdf:li>{escape(word)}</rdf:li>" for word in words)
    title = svg.stem.title()
    svg.write_text(SVG.format(title=title, about=about, words=bag, author=author), "utf-8")
    Image.new("L", (4, 4), shade).save(png)


def test_a_drawing_becomes_a_post(tmp_path: Path) -> None:
    about = escape("a &quot;small&quot;\n fish")  # escaped twice, as in the library's files
    _draw(tmp_path, "animals/fish", ["Fish", "sea_food "], author="ANN  B", about=about)

    (drawing,), broken = read_drawings(tmp_path)

    assert not broken
    assert drawing.keywords == {"fish", "sea food"}
    assert drawing.text == 'Fish\na "small" fish'
    assert drawing.author == "ann b"
    assert drawing.picture == tmp_path / "png/animals/fish.png"


def test_links_equal_pictures_and_folders_without_subjects_give_no_post(tmp_path: Path) -> None:
    _draw(tmp_path, "animals/fish", ["fish"])
    _draw(tmp_path, "food/fish", ["food"])  # the same picture, filed twice
    _draw(tmp_path, "logos/mark", ["fish"], shade=9)
    _draw(tmp_path, "animals/no_picture", ["fish"], shade=8)
    (tmp_path / "png/animals/no_picture.png").unlink()
    (tmp_path / "svg/animals/linked.svg").symlink_to("fish.svg")
    (tmp_path / "svg/animals/broken.svg").write_text("<svg")
    (tmp_path / "png/animals/broken.png").write_bytes(b"")

    (drawing,), broken = read_drawings(tmp_path)

    assert drawing.keywords == {"fish", "food"}
    assert broken == [tmp_path / "svg/animals/broken.svg"]


def test_labels_are_carried_often_and_name_neither_medium_nor_creator(tmp_path: Path) -> None:
    for i in range(3):
        _draw(tmp_path, f"animals/a{i}", ["fish", "clip_art", "Ann B"], shade=i)
    _draw(tmp_path, "animals/b", ["whale"], shade=9)

    drawings, _ = read_drawings(tmp_path)

    assert choose_labels(drawings, 3) == {"fish": 3}


def test_a_data_file_and_a_label_map(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _draw(tmp_path, "animals/fish", ["fish"])
    _draw(tmp_path, "animals/hare", ["mammal", "fish"], author="Anonymous", shade=1)
    _draw(tmp_path, "animals/moss", ["moss"], shade=2)

    code = main(["--source", str(tmp_path), "--out", str(tmp_path / "out"), "--min_posts", "2"])

    assert code == 0
    assert "2 posts of 2 authors, 1 labels, 1.00 a post" in capsys.readouterr().out
    assert json.loads((tmp_path / "out/idx2name.json").read_text()) == {"0": "fish"}
    entries = list(read_posts(tmp_path / "out/posts.json"))
    assert [getattr(entry, "author", "?") for entry in entries] == ["ann b", None]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--min_posts", "9"], "--min_posts 9: no keyword of 1 drawings has as many"),
        (["--source", "nowhere"], "nowhere: no svg/ and png/ here; apt-get install"),
    ],
)
def test_a_wrong_source_ends_with_one_line(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _draw(tmp_path, "animals/fish", ["fish"])

    code = main(["--source", str(tmp_path), "--out", str(tmp_path / "out"), *arguments])

    assert code == 2
    assert said in capsys.readouterr().err
