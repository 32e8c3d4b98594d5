"""SQLite files of the corpus commands: scratch, and state that survives a kill."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from common.errors import ConfigError

# No durability and a small cache: nobody reads the file after its process has ended.
_SCRATCH = """
PRAGMA journal_mode = OFF;
PRAGMA synchronous = OFF;
PRAGMA cache_size = -1024;
PRAGMA temp_store = FILE;
"""


def open_scratch(path: Path | str, tables: str) -> sqlite3.Connection:
    """Make a database that is thrown away, so that nothing is ever committed.

    An empty path is a file without a name in the system's temporary folder (``TMPDIR``).
    """
    base = sqlite3.connect(path, isolation_level=None)
    base.executescript(_SCRATCH + tables)
    base.execute("BEGIN")
    return base


def open_state(path: Path, tables: str, version: int) -> sqlite3.Connection:
    """Open or make a database that outlives its run; ConfigError for one of another version.

    In WAL mode a transaction is in the kernel's hands when `commit` returns: a kill loses nothing;
    a power cut may lose the last ones, but never damages the rest.
    """
    base = sqlite3.connect(path, isolation_level=None)
    for pragma in ("journal_mode = WAL", "synchronous = NORMAL", "cache_size = -1024"):
        base.execute(f"PRAGMA {pragma}")
    base.executescript(tables)
    (made_by,) = base.execute("PRAGMA user_version").fetchone()
    if made_by not in (0, version):
        raise ConfigError(
            f"{path}: made by version {made_by} of this script, not {version}; delete it"
        )
    base.execute(f"PRAGMA user_version = {version}")
    return base
