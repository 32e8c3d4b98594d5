"""Ray Data: ``ray_app.py PROCESSES BATCH`` maps IDs over a pool of actors that hold the models."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import ray
import tagger


class Tag:
    """An actor."""

    def __init__(self) -> None:
        """Load the models."""
        self._tagger = tagger.load_tagger()
        self._warm = frozenset(json.loads((tagger.FOLDER / "warm.json").read_text()))

    def __call__(self, rows: dict[str, Any]) -> dict[str, Any]:
        """Tag the posts of one row."""
        ids = json.loads(str(rows["ids"][0]))
        if not self._warm.issuperset(ids):
            tagger.wait_for_go()
        self._tagger.tag(ids)
        return rows


def main() -> None:
    """Tag all posts, and stay until the bench has looked."""
    processes, size = map(int, sys.argv[1:])
    keys = ("PEERS_", "PYTHONPATH", "OMP_")
    variables = {key: value for key, value in os.environ.items() if key.startswith(keys)}
    ray.init(
        num_cpus=processes,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=256 << 20,
        runtime_env={"env_vars": variables},
    )
    # A row is a batch, so that warm-up and measured posts never share one.
    rows = [{"ids": json.dumps(each)} for each in tagger.batches(processes, size)]
    data = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        Tag, batch_size=1, num_cpus=1, compute=ray.data.ActorPoolStrategy(size=processes)
    )
    for _ in data.iter_batches(batch_size=None):
        pass
    sys.stdin.read()


if __name__ == "__main__":
    main()
