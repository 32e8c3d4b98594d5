"""The schedule under random callers, workers and deaths."""

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.support.workers.driving import decode_task, text_task
from tests.support.workers.scheduling import decoder, extractor, picture, scheduler
from workers.protocol import DecodeTask, Envelope, ExtractTask


class AnyOrder(RuleBasedStateMachine):
    """Random callers, workers and deaths: no slot leaks, none is used twice, no task is lost."""

    def __init__(self) -> None:
        super().__init__()
        self.made = scheduler()
        self.now = 0.0
        self.up: set[str] = set()
        self.owned: set[int] = set()
        self.waited: set[int] = set()
        self.held: dict[str, dict[int, Envelope]] = {}
        self.begun: dict[str, set[int]] = {}
        for name in ("d0", "d1", "e0", "e1"):
            self.worker_comes(name)

    def _submit(self, task: DecodeTask | ExtractTask, seconds: float, priority: int) -> None:
        self.waited.add(self.made.submit(task, self.now + seconds, priority))
        self.dispatch()

    @rule(priority=st.integers(0, 2), seconds=st.floats(0.5, 30))
    def submit_decode(self, priority: int, seconds: float) -> None:
        self._submit(decode_task(), seconds, priority)

    @rule(seconds=st.floats(0.5, 30))
    def submit_text(self, seconds: float) -> None:
        self._submit(text_task("x"), seconds, 0)

    @precondition(lambda self: self.owned)
    @rule(data=st.data(), rows=st.integers(1, 12))
    def submit_video(self, data: st.DataObject, rows: int) -> None:
        self._submit(picture(data.draw(st.sampled_from(sorted(self.owned))), rows), 20, 0)

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(sorted(self.owned)))
        self.owned.discard(slot)
        self.made.slots.release(slot)

    @precondition(lambda self: self.waited)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        task_id = data.draw(st.sampled_from(sorted(self.waited)))
        self.waited.discard(task_id)
        self.made.cancel(task_id)
        self.made.cancel(task_id)

    @rule(name=st.sampled_from(["d0", "d1", "e0", "e1"]))
    def worker_comes(self, name: str) -> None:
        if name not in self.up:
            self.up.add(name)
            self.held[name], self.begun[name] = {}, set()
            self.made.add(decoder(name) if name[0] == "d" else extractor(name))

    @rule()
    def dispatch(self) -> None:
        for name, envelope in self.made.dispatch(self.now):
            assert name in self.up
            assert not any(envelope.task_id in held for held in self.held.values())
            if envelope.solo:
                assert not self.held[name], "a suspect has company"
            self.held[name][envelope.task_id] = envelope

    @precondition(lambda self: any(self.held.values()))
    @rule(data=st.data(), ok=st.booleans(), count=st.integers(1, 3))
    def worker_answers(self, data: st.DataObject, ok: bool, count: int) -> None:
        name = data.draw(st.sampled_from(sorted(n for n in self.up if self.held[n])))
        if not self.begun[name]:
            batch = list(self.held[name])[:count]
            self.begun[name] = set(batch)
            self.made.began(name, batch, self.now)
            if len(batch) % 2:
                return  # and answers another time
        for task_id in sorted(self.begun[name])[:count]:
            task = self.held[name].pop(task_id).task
            self.begun[name].discard(task_id)
            gives = ok and isinstance(task, DecodeTask)
            entry = self.made.ended(name, task_id, self.now, gives_slot=gives)
            assert (entry is not None) == (task_id in self.waited)
            self.waited.discard(task_id)
            if entry is not None and gives and isinstance(task, DecodeTask):
                assert task.slot not in self.owned, "a slot was given twice"
                self.owned.add(task.slot)

    @precondition(lambda self: self.up)
    @rule(data=st.data())
    def worker_dies(self, data: st.DataObject) -> None:
        self._bury(data.draw(st.sampled_from(sorted(self.up))), None)

    def _bury(self, name: str, culprits: frozenset[int] | None) -> None:
        begun = self.begun.pop(name)
        self.up.discard(name)
        held = self.held.pop(name)
        for entry in self.made.died(name, culprits):
            assert entry.task_id in held
            assert entry.task_id in begun or entry.deliveries >= 5, "an innocent was charged"
            assert entry.task_id in self.waited
            self.waited.discard(entry.task_id)

    @rule(seconds=st.floats(0.1, 6))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        late = self.made.overdue(self.now)
        for entry in late.failed:
            assert entry.deadline <= self.now
            assert entry.task_id in self.waited
            self.waited.discard(entry.task_id)
        for name, culprits in late.kill.items():
            self._bury(name, culprits)

    @invariant()
    def nothing_is_lost(self) -> None:
        assert len(self.made) == len(self.waited)
        writing = {
            envelope.task.slot
            for held in self.held.values()
            for envelope in held.values()
            if isinstance(envelope.task, DecodeTask)
        }
        assert not writing & self.owned, "a decoder writes what the caller reads"
        assert self.made.slots.free <= 3 - len(writing) - len(self.owned)

    def teardown(self) -> None:
        """When all is over every slot is free and the pool is empty."""
        for task_id in list(self.waited):
            self.made.cancel(task_id)
        for name in list(self.up):
            self.waited.clear()
            self.made.died(name)
        for slot in self.owned:
            self.made.slots.release(slot)
        assert self.made.slots.free == 3
        assert not self.made.busy
        assert not any(self.made.queued(name) for name in ("decode", "text", "video"))


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(
    max_examples=25,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
