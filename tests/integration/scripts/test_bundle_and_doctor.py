"""`insighttag bundle` and `insighttag doctor` on real bundles and servers."""

import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pymongo
import pytest
import yaml

from common.processes import process_identity
from extractors.suite import ExtractorSuite
from fusion.bundle.bundle import load_bundle
from fusion.bundle.folder import newest_version
from king.jobs import Settled, Superseded, Tagged
from king.status import write_health
from scripts.cli import run
from tests.support.king.store_rig import StoreRig, begin_one, context, mongo_store, started, tagged
from tests.support.ports import free_port
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
    copy = tmp_path / f"served.{second}"
    assert load_bundle(copy).version == second
    rolled = context(bundle=("demo", third))
    done = tagged(started(store, "p1", rolled), third)
    assert isinstance(store.finish([done], rolled)[0], Tagged)
    assert begin_one(store, "p1", rolled) == Settled("p1", "tagged")
    store.close()

    assert run(["bundle", "rollback", str(copy), "--set", f"fusion.bundle={served}"]) == 0
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
    encoders = ("text.weights=random:1", "text.arch=me/bert", "image.arch=me/siglip")
    for each in (*encoders, "image.weights=pretrained"):
        words += ["--set", f"features.{each}"]
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


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Settings that nothing is wrong with, and their bundle."""
    folder = tmp_path_factory.mktemp("site")
    suite = ExtractorSuite(tiny_features())
    suite.load()
    write_bundle(folder / "bundle", suite)
    suite.close()
    content = {
        "features": tiny_features().model_dump(mode="json"),
        "fusion": {"bundle": str(folder / "bundle")},
        "embedded": {"folder": str(folder / "embedded")},
        "fetch": {"spool": str(folder / "spool"), "max_bytes": 1024},
        "king": {"health_file": str(folder / "run" / "king.json")},
        "http": {"port": free_port()},
    }
    (folder / "settings.yaml").write_text(yaml.safe_dump(content))
    return folder


def checks(
    capsys: pytest.CaptureFixture[str], site: Path, *sets: str, code: int
) -> dict[str, dict[str, Any]]:
    words = [word for each in sets for word in ("--set", each)]
    assert run(["doctor", "--json", "--config", str(site / "settings.yaml"), *words]) == code
    out, err = capsys.readouterr()
    assert err == "" or "loading the encoders" in err
    return {check["name"]: check for check in json.loads(out)["checks"]}


def test_where_nothing_is_wrong_it_ends_with_0_and_starts_nothing(
    capsys: pytest.CaptureFixture[str], site: Path
) -> None:
    by_name = checks(capsys, site, code=0)
    assert {check["state"] for check in by_name.values()} == {"ok"}
    assert "fits the encoders" in by_name["bundle"]["said"]
    assert not (site / "embedded").exists()


def test_servers_that_are_down_are_named(capsys: pytest.CaptureFixture[str], site: Path) -> None:
    began = time.monotonic()
    words = ["doctor", "--quick", "--config", str(site / "settings.yaml")]
    words += ["--set", "broker.url=redis://:secret@127.0.0.1:1"]
    words += ["--set", "store.url=mongodb://127.0.0.1:1"]
    assert run(words) == 1
    out, err = capsys.readouterr()
    assert time.monotonic() - began < 20
    assert "broker redis://" in err
    assert "database mongodb://127.0.0.1:1: waiting at most 2 s" in err
    assert "secret" not in out + err
    assert "failed   broker: " in out
    assert "-> start it, or set broker.url; embedded:// needs no server" in out
    assert "failed   database: " in out
    assert "2 failed, 0 warnings" in out


@pytest.mark.parametrize(
    ("sets", "name", "state", "said", "remedy"),
    [
        (["fusion.bundle=/none"], "bundle", "failed", "no bundle there", "insighttag train POSTS"),
        (
            ["features.text.weights=random:9"],
            "bundle",
            "failed",
            "modality text: the bundle needs",
            "as the bundle was trained",
        ),
        (
            ["features.image.arch=me/x", "features.image.weights=pretrained"],
            "weights of image",
            "failed",
            "me/x: missing",
            "insighttag weights get me/x",
        ),
        pytest.param(
            ["decode.hwaccel=cuda"],
            "decode.hwaccel",
            "warning",
            "the CPU decodes",
            "NVIDIA_DRIVER_CAPABILITIES",
            marks=pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="there is a GPU"),
        ),
        (["fusion.device=cuda:9"], "devices", "failed", "cuda:9", "set workers.extractors"),
        (
            ["fetch.spool=SITE/settings.yaml/spool"],
            "fetch.spool",
            "failed",
            "cannot be written",
            "fetch.spool",
        ),
        (["fetch.max_bytes=9000000000000000"], "fetch.spool", "failed", "may grow", "make room"),
        (
            ["cache.url=SITE/cache", "cache.max_mb=900000000"],
            "cache.url",
            "warning",
            "may grow",
            "room",
        ),
    ],
)
def test_a_fault_has_its_remedy(
    *,
    capsys: pytest.CaptureFixture[str],
    site: Path,
    sets: list[str],
    name: str,
    state: str,
    said: str,
    remedy: str,
) -> None:
    changes = [each.replace("SITE", str(site)) for each in sets]
    check = checks(capsys, site, *changes, code=1 if state == "failed" else 0)[name]
    assert check["state"] == state
    assert said in check["said"]
    assert remedy in check["remedy"]


def test_ports_and_dead_kings_are_warnings(capsys: pytest.CaptureFixture[str], site: Path) -> None:
    health = site / "run" / "king.json"
    health.parent.mkdir(exist_ok=True)
    content = {"pid": os.getpid(), "phase": "serving", "updated_at": time.time()}
    write_health(health, {**content, "process": "another"})
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        by_name = checks(capsys, site, f"http.port={taken.getsockname()[1]}", code=0)
    assert by_name["http.port"]["state"] == "warning"
    assert "set http.port to another" in by_name["http.port"]["remedy"]
    assert by_name["king"]["state"] == "warning"
    assert "insighttag work starts it again" in by_name["king"]["remedy"]
    write_health(health, {**content, "process": process_identity(os.getpid())})
    assert checks(capsys, site, code=0)["king"]["said"].startswith("serving, pid ")
    health.unlink()


def test_wrong_settings_end_with_2(capsys: pytest.CaptureFixture[str], site: Path) -> None:
    assert run(["doctor", "--set", "broker.urll=x"]) == 2
    assert "broker.urll" in capsys.readouterr().err
