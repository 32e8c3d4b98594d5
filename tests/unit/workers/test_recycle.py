"""Worker processes are replaced before what they leak adds up."""

from config.settings import WorkerSettings
from workers.roles.loop import Recycler

MIB = 2**20


def test_ends_after_so_many_tasks() -> None:
    recycler = Recycler(WorkerSettings(recycle_tasks=10, recycle_growth_mb=0))
    assert recycler.served(4) is None
    assert recycler.served(5) is None
    assert recycler.served(3) == "served 12 tasks (workers.recycle_tasks 10)"


def test_ends_after_so_much_growth_over_its_warm_size() -> None:
    """Growth counts from the size after the warm-up."""
    held = [500 * MIB]
    recycler = Recycler(WorkerSettings(recycle_tasks=0, recycle_growth_mb=100), lambda: held[0])
    for _ in range(50):
        assert recycler.served(10) is None
    held[0] += 100 * MIB
    assert [recycler.served(10) for _ in range(10)] == [None] * 10
    held[0] += 1 * MIB
    reasons = [recycler.served(10) for _ in range(10)]
    assert "grew by 101 MiB (workers.recycle_growth_mb 100)" in reasons


def test_zero_switches_it_off() -> None:
    recycler = Recycler(WorkerSettings(recycle_tasks=0, recycle_growth_mb=0), lambda: 2**60)
    assert [recycler.served(1000) for _ in range(1000)] == [None] * 1000
