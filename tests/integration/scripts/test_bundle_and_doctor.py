"""``insighttag bundle rollback`` and ``insighttag doctor``."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pymongo
import pytest

from extractors.suite import ExtractorSuite
from fusion.bundle.bundle import load_bundle
from fusion.bundle.folder import newest_version
from king.jobs import Settled, Superseded, Tagged
from scripts.cli import run
from tests.support.king.store_rig import StoreRig, begin_one, context, mongo_store, started, tagged
from tests.support.tiny_models import tiny_features
from tests.support.workers.small_bundle import write_bundle


@pytest.fixture(scope="module")
def suite() -> Iterator[ExtractorSuite]:
    made = ExtractorSuite(tiny_features())
    made.load()
    yield made
    made.close()


def test_bundle_that_is_rolled_back_overwrites_the_tags_of_the_newer_one(
    tmp_path: Path,
    suite: ExtractorSuite,
    mongo_url: str,
    unique_name: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By hand it does not, and says so; the newer one is kept, and can be rolled back to."""
    old, served = tmp_path / "old", tmp_path / "served"
    write_bundle(old, suite, seed=1)
    about = (old / "bundle.yaml").read_text("utf-8")
    first = str(newest_version(old))
    (old / "bundle.yaml").write_text(about.replace(first, f"20250101T000000Z{first[-9:]}"), "utf-8")
    first, second = str(newest_version(old)), write_bundle(served, suite, seed=2)
    store = mongo_store(mongo_url, unique_name)
    StoreRig(store).insert({"_id": "p1"})
    run_as = {version: context(bundle=("demo", version)) for version in (first, second)}
    store.finish([tagged(started(store, "p1"), second)], run_as[second])

    again = started(store, "p1", run_as[first], force=True)
    [recorded] = store.finish([tagged(again, first)], run_as[first])
    assert recorded == Superseded(again, second, {"fetch": 3, "total": 9})
    assert store.queries.job("p1") is None

    words = ["bundle", "rollback", str(old), "--set", f"fusion.bundle={served}"]
    assert run(words) == 0
    out = capsys.readouterr().out
    third = str(newest_version(served))
    assert f"{first} again, as version {third}" in out
    assert third > second
    assert load_bundle(served).version == third
    kept = tmp_path / f"served.{second}"
    assert load_bundle(kept).version == second
    rolled = context(bundle=("demo", third))
    done = tagged(started(store, "p1", rolled), third)
    assert isinstance(store.finish([done], rolled)[0], Tagged)
    assert begin_one(store, "p1", rolled) == Settled("p1", "tagged")
    store.close()

    assert run(["bundle", "rollback", str(kept), "--set", f"fusion.bundle={served}"]) == 0
    assert str(newest_version(served)) > third
    # Put back by hand: the folder is stamped where it is.
    assert run(["bundle", "rollback", str(served), "--set", f"fusion.bundle={served}"]) == 0
    capsys.readouterr()
    assert run(["bundle", "rollback", str(tmp_path / "none")]) == 2
    assert "holds no bundle" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    assert run([*words[:-1], f"fusion.bundle={tmp_path / 'mine'}"]) == 2
    assert "fusion.bundle: " in capsys.readouterr().err
    assert (tmp_path / "mine" / "notes.txt").exists()


def test_doctor_counts_what_fits_and_what_does_not(
    mongo_url: str, unique_name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pymongo.MongoClient[dict[str, Any]](mongo_url) as client:
        client[unique_name]["posts"].insert_many(
            [
                {"_id": "a", "text": "t", "images": ["u"]},
                {"_id": "b", "text": {"zh": "t"}, "images": [[{"url": "u"}]]},
                {"_id": 3, "text": ["t"], "images": [{"src": "u"}], "labels": ["x"]},
                {"_id": "x" * 600},
            ]
        )
    words = ["doctor", "--set", f"store.url={mongo_url}", "--set", f"store.database={unique_name}"]
    words += ["--set", "features.text.weights=random:1", "--set", "features.text.arch=me/bert"]
    words += [
        "--set",
        "features.image.arch=me/siglip",
        "--set",
        "features.image.weights=pretrained",
    ]
    assert run([*words, "--json"]) == 1  # weights and a bundle are missing
    content = json.loads(capsys.readouterr().out)
    assert content["posts"] == 4
    assert content["ids"] == {"str": 2, "int": 1}
    unread = {name: (f["posts"], f["unread"]) for name, f in content["fields"].items()}
    assert unread == {
        "id": (3, {"its text is longer than 512 bytes": 1}),
        "text": (2, {"object with zh": 1}),
        "images": (2, {"object with src": 1}),
        "videos": (0, {}),
        "audios": (0, {}),
        "labels": (1, {}),
    }
    here = {each["encoder"]: each["here"] for each in content["weights"]}
    assert (here["me/bert"], here["me/siglip"]) == ("random:1", "")
    assert run(words) == 1
    out = capsys.readouterr().out
    assert "1 posts: object with zh" in out
    assert "set store.fields.text to the path inside, as text.KEY" in out
    assert "me/siglip: missing\n         -> insighttag weights get me/siglip" in out
