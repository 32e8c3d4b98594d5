"""Ports on loopback for the servers of the tests."""

import random
import socket
from pathlib import Path

PORTS = range(20000, 25000)
_given: set[int] = set()


def free_port() -> int:
    """A TCP port on 127.0.0.1 that nobody listens on now, each time another.

    It lies outside the range from which the kernel takes ports for connections and for servers
    that let it choose, so that nobody gets it by chance before its server starts, or while its
    server is away between a kill and the next start.
    """
    if PORTS.stop <= _kernels_first_port():
        for port in random.SystemRandom().sample(PORTS, len(PORTS)):
            if port not in _given and _is_free(port):
                _given.add(port)
                return port
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _kernels_first_port() -> int:
    """Return the first port that the kernel gives out by itself; 0 if unknown."""
    try:
        return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 0


def answers_tcp(port: int) -> bool:
    """Tell if something accepts connections on this loopback port."""
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0
