"""Extraction: actors of Ray, on a cluster of two nodes on this machine."""

from __future__ import annotations

import builtins
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import ConfigError
from common.post import Post
from config.settings import Settings
from corpus.extract import on_ray
from corpus.extract.on_ray import IN, OUT, ExtractActor, Order, PartFolder, trouble_of
from corpus.extract.run import main
from corpus.extract.work import MODALITIES_OF, Result, Work
from tests.support.corpus.extraction_corpus import feature_files, write_config, write_pictures

POSTS = 64  # four files of work: two for each actor


@pytest.mark.filterwarnings("ignore")  # Ray warns of itself, of its processes and of its sockets
@pytest.mark.slow
def test_ray_gives_the_same_features_on_two_nodes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Byte for byte those of the local engine; both nodes work; nothing is left running."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    pytest.importorskip("ray", reason="the extra insighttag[ray] is not installed")
    from ray.cluster_utils import Cluster
    from ray.data import DataContext

    posts, config = write_pictures(tmp_path / "in", POSTS), write_config(tmp_path)
    common = ["--config", str(config), "--input", str(posts)]
    assert main("image", [*common, "--features", str(tmp_path / "local")]) == 0
    capsys.readouterr()
    small: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 100 * 1024 * 1024}
    cluster: Any = Cluster(
        initialize_head=True, head_node_args={**small, "include_dashboard": False}
    )
    try:
        cluster.add_node(**small)
        # Else the node whose models load first may have done all when the other is ready.
        DataContext.get_current().wait_for_min_actors_s = 240
        on_ray = ["--engine", "ray", "--address", cluster.address, "--workers", "2"]
        root = tmp_path / "ray"
        assert main("image", [*common, "--features", str(root), *on_ray]) == 0
    finally:
        DataContext.get_current().wait_for_min_actors_s = -1
        cluster.shutdown()
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("node ")]
    counts = [int(line.rpartition(": ")[2].removesuffix(" posts")) for line in said]
    assert len(counts) == 2
    assert sum(counts) == POSTS
    assert feature_files(root) == feature_files(tmp_path / "local")
    assert not list(root.glob(".extract-*"))


class FakeEngine:
    """Does nothing to posts, and dies of one as its process would."""

    poison = -1

    def __init__(self, *arguments: Any, **names: Any) -> None:
        self.done: list[int] = []

    def open(self) -> None:
        pass

    def run(self, works: Iterable[Work]) -> Iterator[Result]:
        for work in works:
            if work.index == self.poison:
                raise SystemExit  # leaves the actor as a signal does: nothing of ours catches it
            yield Result(work.index, work.post.post_id, "done")


def order(tmp_path: Path, folder: Path) -> Order:
    settings = Settings().model_dump_json()
    return Order(settings, str(tmp_path), MODALITIES_OF["image"], str(folder), ".", False, False)


def test_a_post_that_kills_its_actor_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray begins a file of work again when its actor dies: the third time only that post fails."""
    monkeypatch.setattr(on_ray, "LocalEngine", FakeEngine)
    monkeypatch.setattr(FakeEngine, "poison", 2)
    parts = PartFolder(tmp_path / "features")
    paths = parts.write([Work(i, Post(f"p{i}"), {"image": "d"}) for i in range(5)])
    batch = {IN: np.array(paths, dtype=object)}
    for _ in range(2):
        with pytest.raises(SystemExit):
            ExtractActor(order(tmp_path, parts.folder), node="n")(batch)
    found = ExtractActor(order(tmp_path, parts.folder), node="n")(batch)
    results = [Result.of_json(line) for line in found[OUT]]
    parts.close()
    assert [r.index for r in results] == [0, 1, 2, 3, 4]
    assert [r.state for r in results] == ["done", "done", "failed", "done", "done"]
    assert results[2].failures[0].failure.message == "its actor died of it twice"


def test_a_mistake_of_the_settings_reaches_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An actor that cannot load says so in its first batch; Ray would start it for ever."""

    class Refusing(FakeEngine):
        def open(self) -> None:
            raise ConfigError("features.image.weights: none")

    monkeypatch.setattr(on_ray, "LocalEngine", Refusing)
    found = ExtractActor(order(tmp_path, tmp_path), node="n")({IN: np.array(["x"], dtype=object)})
    trouble = trouble_of(found[OUT][0])
    assert isinstance(trouble, ConfigError)
    assert str(trouble) == "features.image.weights: none"


def test_without_ray_the_way_out_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit 2, and which extra to install."""
    real = builtins.__import__

    def without_ray(name: str, *arguments: Any, **names: Any) -> Any:
        if name.partition(".")[0] == "ray":
            raise ImportError("no", name="ray")
        return real(name, *arguments, **names)

    monkeypatch.setattr(builtins, "__import__", without_ray)
    posts = tmp_path / "posts.jsonl"
    posts.write_text(json.dumps({"post_id": "p"}) + "\n", encoding="utf-8")
    options = ["--input", str(posts), "--features", str(tmp_path / "f"), "--engine", "ray"]
    assert main("image", options) == 2
    said = capsys.readouterr().err
    assert "pip install 'insighttag[ray]'" in said
    assert "Traceback" not in said
