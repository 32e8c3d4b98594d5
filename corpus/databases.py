"""SQLite files of the corpus commands: scratch, and state that survives a kill."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from common.errors import ConfigError

# Nothing is safe and little is in memory: the file goes with its process.
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
    """Open or make a database that goes on from run to run; ConfigError for one of another version.

    In WAL mode a transaction is in the kernel's hands when `commit` returns: a kill loses nothing;
    a power cut may lose the last ones, never spoils the rest.
    """
    base = sqlite3.connect(path, isolation_level=None)
    for pragma in ("journal_mode = WAL", "synchronous = NORMAL", "cache_size = -1024"):
        base.execute(f"PRAGMA {pragma}")
    base.executescript(tables)
    (found,) = base.execute("PRAGMA user_version").fetchone()
    if found not in (0, version):
        raise ConfigError(f"{path}: made by another version of this script; delete it")
    base.execute(f"PRAGMA user_version = {version}")
    return base
