"""Extraction: actors of Ray, on a cluster of two nodes on this machine."""

import builtins
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from common.errors import ConfigError
from common.post import Post
from corpus.extract.on_ray import RayEngine
from corpus.extract.options import parse
from corpus.extract.run import main
from corpus.extract.work import Result, Work
from corpus.runs import Interrupt
from tests.support.corpus.extraction_corpus import feature_files, write_config, write_pictures

POSTS = 64  # four chunks: two for each actor


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A cluster of two nodes with a core each."""
    pytest.importorskip("ray", reason="the extra insighttag[ray] is not installed")
    # Workers started in advance would lack the environment of the actors, and be of no use.
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_prestart_worker_first_driver": "0"}
    from ray.cluster_utils import Cluster

    small: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 100 * 1024 * 1024}
    head = {**small, "include_dashboard": False, "include_log_monitor": False, "no_monitor": True}
    cluster: Any = Cluster(initialize_head=True, head_node_args=head)
    try:
        cluster.add_node(**small)
        yield cluster.address
    finally:
        cluster.shutdown()


@pytest.mark.filterwarnings("ignore")  # Ray warns of itself, of its processes and of its sockets
@pytest.mark.slow
def test_ray_gives_the_same_features_on_two_nodes(
    address: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Byte for byte those of the local engine; both nodes work; nothing is left running."""
    import ray

    # Else the node whose models load first may have done all when the other is ready.
    wait = ray.wait
    monkeypatch.setattr(ray, "wait", lambda refs, timeout: wait(refs, num_returns=len(refs)))
    posts, config = write_pictures(tmp_path / "in", POSTS), write_config(tmp_path)
    common = ["--config", str(config), "--input", str(posts)]
    assert main("image", [*common, "--features", str(tmp_path / "local")]) == 0
    capsys.readouterr()
    root = tmp_path / "ray"
    on_ray = ["--engine", "ray", "--address", address, "--workers", "2"]
    assert main("image", [*common, "--features", str(root), *on_ray]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("node ")]
    counts = [int(line.rpartition(": ")[2].removesuffix(" posts")) for line in said]
    assert len(counts) == 2
    assert sum(counts) == POSTS
    assert feature_files(root) == feature_files(tmp_path / "local")


class DyingActor:
    """Does nothing to posts, dies of one as its process would, and refuses another."""

    def __init__(self, *_: Any) -> None:
        """Take the options of a real one."""

    def run(self, works: list[Work]) -> list[Result]:
        if any(work.index == 2 for work in works):
            os._exit(1)
        if any(work.index == 9 for work in works):
            raise ConfigError("features.image.weights: none")
        return [Result(work.index, work.post.post_id, "done") for work in works]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_a_post_that_kills_its_actor_is_found(address: str, tmp_path: Path) -> None:
    """The posts of a dead actor are sent again one by one; a mistake ends the run as itself."""
    line = ["--input", "p.jsonl", "--features", str(tmp_path), "--engine", "ray", "--workers", "1"]
    options = parse("image", [*line, "--devices", "cpu", "--address", address])
    engine = RayEngine(options, Interrupt(), DyingActor)
    engine.open()
    try:
        works = [Work(i, Post(f"p{i}"), {"image": "d"}) for i in range(10)]
        results = sorted(engine.run(works[:5]), key=lambda result: result.index)
        with pytest.raises(ConfigError, match=r"features\.image\.weights: none"):
            list(engine.run(works[9:]))
    finally:
        engine.close()
    assert [r.index for r in results] == [0, 1, 2, 3, 4]
    assert [r.state for r in results] == ["done", "done", "failed", "done", "done"]
    assert results[2].failures[0].failure.message == "its actor died of it twice"


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
    assert "pip install '.[ray]'" in said
    assert "Traceback" not in said
