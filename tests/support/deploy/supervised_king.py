"""The daemon itself with an extractor that loads nothing; a test makes its trouble with files.

It stands in for ``online_process.py``. Files in the current folder:

    full     no folder can be made, as on a full disk
    deadly   the extractor is killed while it loads
"""

import errno
import json
import os
import runpy
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

import king.king
from config.features import FeatureSettings
from extractors.suite import ExtractorSuite
from tests.support.deploy.checkout import ROOT
from tests.support.workers.small_bundle import write_bundle
from workers.pool.pool import ProcessPool
from workers.pool.supervisor import ROLES
from workers.protocol import Extracted, Task
from workers.roles.loop import Context, Handler, Outcome, serve

FULL, DEADLY = Path("full"), Path("deadly")
FINGERPRINTS = {name: f"fp-{name}" for name in ("video", "image", "audio", "text")}
DIM = 8


def fitting_bundle(folder: Path) -> None:
    """Save a bundle for the features of the extractor here."""
    suite = SimpleNamespace(
        dims=dict.fromkeys(FINGERPRINTS, DIM), fingerprints=FINGERPRINTS, features=FeatureSettings()
    )
    write_bundle(folder, cast("ExtractorSuite", suite))


class _Extractor(Handler):
    def load(self) -> Mapping[str, str]:
        if DEADLY.exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return {"fingerprints": json.dumps(FINGERPRINTS)}

    def run(self, tasks: Sequence[Task]) -> list[Outcome]:
        return [Extracted(np.ones((1, DIM), np.float16)) for _ in tasks]


def extract(context: Context) -> None:
    serve(context, _Extractor())


def _no_space(path: Any, *_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def main() -> None:
    """Run the daemon with the words of the command line."""
    if FULL.exists():
        os.mkdir = _no_space
    roles = {**ROLES, "extract": f"{__name__}:extract"}
    king.king._real_pool = lambda settings: ProcessPool(settings, roles=roles)
    runpy.run_path(str(ROOT / "online_process.py"), run_name="__main__")
