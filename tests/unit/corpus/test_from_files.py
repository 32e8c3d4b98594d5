"""Posts out of folders, tables and files: what is read, and what each mistake says."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from common.errors import ConfigError
from corpus.from_files.posts import read_own_posts
from corpus.from_files.training import advice
from tests.support.media import solid, tone, write_png, write_wav
from tests.support.mistakes import one_line

POST = '{"post_id": "p", "labels": ["cat"], "images": ["%s"]}'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two pictures, one in a subfolder, a sound, a text and a hidden picture."""
    media = tmp_path / "media"
    (media / "sub").mkdir(parents=True)
    for name in ("a.png", "sub/b;c.png", ".hidden.png"):
        write_png(media / name, solid(8, 8, (200, 0, 0)))
    write_wav(media / "s.wav", tone(duration_s=0.2))
    (media / "notes.txt").write_text("no media", encoding="utf-8")
    return media


def labels_of(source: Path, labels: Path | None = None) -> dict[str, list[str]]:
    return {entry["post_id"]: entry["labels"] for entry in read_own_posts(source, labels)}


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


NONE: dict[str, list[str]] = {"a.png": [], "s.wav": [], "sub/b;c.png": []}


@pytest.mark.parametrize(
    ("table", "labels"),
    [
        ("file,labels\na.png,cat;dog\n", {"a.png": ["cat", "dog"]}),
        ("file,tag\na.png,cat\na.png,dog\na.png,cat\n", {"a.png": ["cat", "dog"]}),
        ("\ufeffFile;Tags\r\na.png; cat | dog |\r\n\r\ns.wav;猫\r\n",
         {"a.png": ["cat", "dog"], "s.wav": ["猫"]}),
        ("filename\tlabel\tsplit\na.png\tcat\ttrain\n", {"a.png": ["cat"]}),
        ("a.png,cat\ns.wav,\n", {"a.png": ["cat"]}),
        ("path,label\n./sub/b;c.png,cat\n", {"sub/b;c.png": ["cat"]}),
        ("label,path\ncat,sub\\b;c.png\n", {"sub/b;c.png": ["cat"]}),
        ('file,labels\na.png,"cat, big;dog"\n', {"a.png": ["cat, big", "dog"]}),
        ("file,labels\nMEDIA/a.png,cat\n", {"a.png": ["cat"]}),
    ],
)  # fmt: skip
def test_labels_of_a_folder_are_read(
    folder: Path, tmp_path: Path, table: str, labels: dict[str, list[str]]
) -> None:
    """With the usual names of columns, delimiters, encodings and ways to write several tags."""
    file = write(tmp_path / "l.csv", table.replace("MEDIA", str(folder)))
    assert labels_of(folder, file) == {**NONE, **labels}


def test_each_media_file_of_a_folder_is_a_post(folder: Path) -> None:
    """Of the kind that its bytes tell; hidden files and what is not media are passed over."""
    posts = list(read_own_posts(folder))
    assert [post["post_id"] for post in posts] == list(NONE)
    assert posts[0]["images"] == [str(folder / "a.png")]
    assert posts[1]["audios"] == [str(folder / "s.wav")]
    write(folder / "labels.csv", "file,labels\ns.wav,bell\n")
    assert labels_of(folder) == {**NONE, "s.wav": ["bell"]}
    assert [post["images"] for post in read_own_posts(folder / "a.png")] == [posts[0]["images"]]


@pytest.mark.parametrize(
    ("table", "named"),
    [
        ("", "is empty: the first row must name the columns"),
        ("naem,labels\na.png,cat\n", "row 2: the table has no column file"),
        ("fil,lables\na.png,cat\n", "row 1: has no known column, such as file,labels: got 'fil'"),
        ("fil,lables\na.png,cat\n", "did you mean 'file'?"),
        ("file,tag,labels\na.png,x,y\n", "row 1: the columns 'tag' and 'labels' both hold labels"),
        ("file,labels\na.png,cat,dog\n", "row 2: has 3 cells, the header 2: put a value that"),
        ("file,labels\na.png\n", "row 2: has 1 cells, the header 2"),
        ("file,labels\na.png,cat\na.pgn,dog\n", "row 3: file 'a.pgn': no such file in"),
        ("file,labels\na.png,cat\na.pgn,dog\n", "did you mean 'a.png'?"),
        ("file,labels\n,cat\n", "row 2: file is empty: name a file of"),
        ("file,labels\nnotes.txt,cat\n", "file 'notes.txt': is not a picture, video or sound"),
        ('file,labels\na.png,"cat\n', "line 2: not CSV: unexpected end of data"),
        (b"file,labels\na.png,caf\xe9\n", "line 2: not UTF-8 (byte 0xe9): save it as CSV UTF-8"),
        (b"PK\x03\x04\0\0", "line 1: not text: save it as CSV UTF-8"),
    ],
)
def test_mistakes_in_the_labels_are_one_line(
    folder: Path, tmp_path: Path, table: str | bytes, named: str
) -> None:
    file = write(tmp_path / "l.csv", table)
    with one_line(ConfigError, named, str(file)):
        list(read_own_posts(folder, file))


def test_a_table_of_posts_is_read(folder: Path) -> None:
    """Files of any kind, columns of one kind, URLs, texts; rows that add labels are one post."""
    table = write(
        folder / "posts.csv",
        "id,file,images,text,tags,author,likes\n"
        "1,a.png|s.wav,https://host/x.jpg,a cat,cat,ann,7\n"
        "2,sub/b;c.png,,,dog,,\n"
        "1,a.png|s.wav,https://host/x.jpg,a cat,bell;cat,ann,7\n"
        "3,,,only words,,,\n",
    )
    one, two, three = read_own_posts(table)
    assert one == {
        "post_id": "1",
        "labels": ["cat", "bell"],
        "text": "a cat",
        "ocr": None,
        "images": [str(folder / "a.png"), "https://host/x.jpg"],
        "videos": [],
        "audios": [str(folder / "s.wav")],
        "author": "ann",
    }
    assert (two["post_id"], two["images"]) == ("2", [str(folder / "sub/b;c.png")])
    assert (three["text"], three["labels"]) == ("only words", [])


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("p.csv", "file,labels\nx.png,cat\n", "row 2: file 'x.png': no such file relative to"),
        ("p.csv", "file,labels\nhttps://h/x.png,cat\n", "row 2: file 'https://h/x.png': is a URL"),
        ("p.csv", "images,text\na.png;none.png,x\n", "row 2: images 'none.png': no such file"),
        ("p.csv", "file,labels\nnotes.txt,cat\n", "row 2: file 'notes.txt': is not a picture"),
        ("p.csv", "text,labels\nhello,cat\n", "row 2: post_id is empty: give the post an ID"),
        ("p.csv", "id,text\n1,a\n1,b\n", "row 3: post_id '1'"),
        ("p.jsonl", '{"post_id": "p"', "line 1: not JSON"),
        ("p.jsonl", '{"labels": ["cat"]}', "line 1: must have a post_id"),
        ("p.jsonl", '{"post_id": "p", "labels": "cat"}', "line 1: labels must be a list"),
        ("p.csv", f"images,text\n{'a.png;' * 50}none.png,x\n", "images 'none.png': no such file"),
        ("p.jsonl", POST % ("x" * 300), "line 1: images.0: no such file: xxx"),
        ("p.jsonl", POST % "none.png", "line 1: images.0: no such file: none.png"),
        ("p.json", "7", "must be a list of posts"),
        ("p.json", " \n", "must be a list of posts; it is empty"),
        ("p.zip", b"PK\x03\x04", "must be a folder of media, a table (.csv), a posts file"),
        ("none.jsonl", None, "no such file or folder"),
    ],
)
def test_mistakes_in_posts_are_one_line(
    folder: Path, name: str, content: str | bytes | None, named: str
) -> None:
    file = folder / name
    if content is not None:
        write(file, content)
    with one_line(ConfigError, named, str(file)):
        list(read_own_posts(file))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.csv", "file,labels\nx.png,cat\na.png,cat\n"),
        ("p.jsonl", "{\n" + POST % "x.png" + "\n" + POST % "a.png"),
    ],
)
def test_mistakes_in_single_posts_can_be_passed_over(folder: Path, name: str, content: str) -> None:
    mistakes: list[ConfigError] = []
    (post,) = read_own_posts(write(folder / name, content), refuse=mistakes.append)
    assert post["images"] == [str(folder / "a.png")]
    assert mistakes


def test_labels_beside_posts_that_have_their_own_are_refused(folder: Path) -> None:
    file = write(folder / "p.json", json.dumps([{"post_id": "p"}]))
    with pytest.raises(ConfigError, match="only with a folder of media"):
        list(read_own_posts(file, folder / "l.csv"))


@pytest.mark.parametrize(
    ("posts", "said"),
    [
        (40, "enough to try it"),
        (4_999, "under 5,000 posts the encoders stay as they are"),
        (5_000, "a picture encoder that is trained on them may pay"),
        (100_000, "several GPUs or machines"),
    ],
)
def test_advice_goes_by_the_size_of_the_data(posts: int, said: str) -> None:
    tags: Any = {"cat": posts, "dog": 9}
    first, *others = advice(Counter(posts=posts + 3, labels=posts), tags)
    assert said in first
    assert f"{posts:,} posts with labels, 2 tags" in first
    assert others == [
        "3 posts have no labels and are left out",
        "tags with fewer than 10 posts: dog (9); --min-posts 10 leaves them out",
    ]
