"""Mistakes in the options of the corpus scripts: exit 2, and one line that names what is wrong."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest

from corpus.build import label_map
from corpus.extract import run
from scripts.data_scripts import analyze_posts, download_mp, pull_posts

MAINS: dict[str, Callable[[Sequence[str]], int]] = {
    "pull_posts": pull_posts.main,
    "download_mp": download_mp.main,
    "analyze_posts": analyze_posts.main,
    "build_label_map.py": label_map.main,
    "extract_image_features": partial(run.main, "image"),
}
NO_DATABASE = "--set store.url=mongodb://127.0.0.1:9"
CASES = {
    "pull_posts --out p.jsonl --query {": "--query: not JSON",
    "pull_posts --out p.jsonl --query [1]": "--query: must be an object",
    # Extended JSON whose values cannot be made, whatever reading them raises.
    'pull_posts --out p.jsonl --query {"a":{"$oid":"123"}}': "--query: not JSON: ",
    'pull_posts --out p.jsonl --query {"a":{"$numberDecimal":"many"}}': "--query: not JSON: ",
    'pull_posts --out p.jsonl --query {"a":{"$date":{"$numberLong":"9999999999999999999"}}}': (
        "--query: not JSON: "
    ),
    'pull_posts --out p.jsonl --query {"a":{"$date":1e30}}': "--query: not JSON: ",
    'pull_posts --out p.jsonl --query {"a":{"$binary":{"base64":"eA=="}}}': "--query: not JSON: ",
    f"pull_posts --out p.jsonl {NO_DATABASE} --since soon": "--since soon: write it as",
    f"pull_posts --out p.jsonl {NO_DATABASE} --until soon": "--until soon: write it as",
    "pull_posts --out p.jsonl --set store.fields.nope=x": "store.fields.nope: unknown key",
    "pull_posts --out p.json": "must end in .jsonl",
    "pull_posts --out p.jsonl --sample 0": "'--sample'",
    "download_mp none.jsonl --out o": "none.jsonl: no such data file",
    "download_mp empty.jsonl --out o": "empty.jsonl: holds no readable post: it is empty",
    "download_mp bad.jsonl --out o": "all 2 lines are broken; line 1: not JSON",
    "download_mp p.json --out o": "p.json: not a JSON data file",
    "download_mp p.jsonl --out p.jsonl": "p.jsonl/.state: cannot be written: Not a directory",
    "download_mp p.jsonl --out o --set fetch.nope=1": "fetch.nope: unknown key",
    "download_mp p.jsonl": "Missing option '--out'",
    "download_mp p.jsonl --out o --per_host 0": "'--per_host'",
    "analyze_posts none.jsonl --out o": "none.jsonl: no such file",
    "analyze_posts p.jsonl --out o --media none": "none: no such folder",
    "analyze_posts p.jsonl --out o --labels none.json": "none.json: no such label map",
    "analyze_posts p.jsonl --out o --media .": "manifest.jsonl: line 1: ",
    "analyze_posts p.jsonl --out o --text_threshold 2": "must be from 0 to 1",
    "analyze_posts p.jsonl --out o --hash_distance 17": "'--hash_distance'",
    "build_label_map.py --input p.jsonl --min_posts 9": "no tag has 9 posts or more",
    "build_label_map.py --input p.jsonl --min_posts -1": "'--min_posts'",
    "extract_image_features --input p.jsonl --features s3://bucket/f": "must be a folder",
    "extract_image_features --input p.jsonl --features f --address auto": "add --engine ray",
    "extract_image_features --input p.jsonl --features f --set decode.x=3": "decode.x: unknown key",
    "extract_image_features --features f": "name the posts with either --input or --manifest",
}


@pytest.mark.parametrize("line", CASES)
def test_mistakes_are_one_line(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    texts = {"p.jsonl": json.dumps({"post_id": "a"}), "p.json": "{", "bad.jsonl": "{\n[]"}
    for name, text in {**texts, "empty.jsonl": "", "manifest.jsonl": "{}"}.items():
        Path(name).write_text(text)
    script, *arguments = line.split(" ")
    assert MAINS[script](arguments) == 2
    [said] = [part for part in capsys.readouterr().err.splitlines() if part.startswith(script)]
    assert CASES[line] in said
