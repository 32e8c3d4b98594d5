"""nx-27017 on a unix socket, which it has no option for: ``mongo_server.py SOCKET DATA_FOLDER``.

It knows no passwords. On a port every user of the host could read and write the posts; a socket in
a folder of mode 0700 is for its owner alone.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

from nx_27017 import nx_27017


def main(socket: Path, data: Path) -> None:
    """Serve until SIGTERM."""

    async def listen(handle: Any, *_address: object) -> asyncio.Server:
        return await asyncio.start_unix_server(handle, socket)

    asyncio.start_server = listen  # type: ignore[assignment]  # called with these three alone
    socket.unlink(missing_ok=True)
    os.umask(0o077)
    # Its own pid file is a plain number that may name a stranger after a crash; ours decide.
    pid_file = data.with_name("nx.pid")
    pid_file.unlink(missing_ok=True)
    sys.argv[1:] = ["--data-dir", str(data), "--pid-file", str(pid_file), "--log-file", os.devnull]
    nx_27017.main()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
