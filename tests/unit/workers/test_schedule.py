"""Order of tasks, choice of workers, and the cost of a death or a deadline."""

from dataclasses import replace

import pytest

from common.post import Media
from config.settings import Settings
from tests.support.workers.driving import decode_task, fetch_task, fuse_task, text_task
from tests.support.workers.scheduling import decoder, extractor, ids, picture, scheduler, sent
from workers.pool.scheduler import MAX_QUEUED, WorkerLoad, batch_rows
from workers.protocol import ExtractTask, FetchTask


def test_priority_then_age() -> None:
    made = scheduler()
    low = [made.submit(text_task("x"), 99, 0) for _ in range(2)]
    high = made.submit(text_task("x"), 99, 5)
    made.add(extractor())
    assert ids(sent(made)) == [high, *low]


def test_pipe_holds_one_waiting_batch_behind_the_running_one() -> None:
    """Credits: a full batch waits in the pipe, the rest waits here for later arrivals."""
    made = scheduler(extractor())
    tasks = [made.submit(text_task("x"), 99) for _ in range(12)]
    assert ids(sent(made)) == tasks[:4]
    assert sent(made) == []
    made.began("e", tasks[:4], 0.0)
    assert ids(sent(made)) == tasks[4:8]
    made.ended("e", tasks[0], 0.0, gives_slot=False)
    assert sent(made) == []
    made.began("e", tasks[4:8], 0.0)
    assert ids(sent(made)) == tasks[8:]


def test_a_task_larger_than_a_batch_is_sent() -> None:
    made = scheduler(decoder())
    decode = made.submit(decode_task(), 99)
    sent(made)
    made.ended("d", decode, 0.0, gives_slot=True)
    big = [made.submit(picture(0, 100), 99) for _ in range(2)]
    made.add(extractor())
    assert ids(sent(made)) == big[:1]


def test_work_is_spread_over_workers() -> None:
    made = scheduler(extractor("a"), extractor("b"))
    for _ in range(4):
        made.submit(text_task("x"), 99)
    assert sorted(name for name, _ in sent(made)) == ["a", "a", "b", "b"]


def test_decoding_waits_for_a_slot_and_fetching_for_the_decoders() -> None:
    """A full stage stops the stages before it."""
    made = scheduler(*[decoder(f"d{i}") for i in range(5)])
    for _ in range(9):
        made.submit(decode_task(), 99)
    assert len(sent(made)) == len(made.slots) == 3
    made.add(WorkerLoad("f", ("fetch",), 16, 10.0))
    fetch = made.submit(FetchTask(Media("video", "x")), 99)
    assert made.queued("decode") == 6
    assert sent(made) == []
    for task_id in list(made.load("d0").tasks):  # type: ignore[union-attr]
        made.cancel(task_id)
    for _ in range(3):
        made.cancel(made._queues["decode"][0][1].task_id)
        made._head("decode")
    assert ids(sent(made)) == [fetch]


def test_the_post_whose_turn_is_first_goes_first_in_every_queue() -> None:
    """Whichever of its tasks was submitted last; of one post the oldest task goes first."""
    made = scheduler()
    late = [made.submit(text_task("x"), 99, turn=2) for _ in range(2)]
    early = [made.submit(text_task("x"), 99, turn=1) for _ in range(2)]
    made.add(extractor())
    assert ids(sent(made)) == [*early, *late]


def test_videos_are_not_downloaded_while_decoders_are_behind() -> None:
    """Other media are, until twice as many wait."""
    made = scheduler(WorkerLoad("f", ("fetch",), 16, 10.0))
    waiting = [made.submit(decode_task(), 99) for _ in range(4)]
    video = made.submit(FetchTask(Media("video", "x")), 99, turn=1)
    assert sent(made) == []
    image = made.submit(FetchTask(Media("image", "x")), 99)
    assert ids(sent(made)) == [image]
    made.cancel(waiting[0])
    assert ids(sent(made)) == [video]


@pytest.mark.parametrize(
    ("on_cpu", "queues", "number"),
    [
        (True, ("video", "text", "text"), 1),
        (True, ("text", "video", "text", "video"), 3),  # a text joins the one that waits
        (False, ("video", "text", "text"), 3),
    ],
)
def test_on_a_cpu_one_batch_of_any_queue_waits_for_a_worker(
    on_cpu: bool, queues: tuple[str, ...], number: int
) -> None:
    """Other tasks are free for another worker; on a GPU each queue has its own."""
    made = scheduler(decoder())
    decode = made.submit(decode_task(), 99)
    sent(made)
    made.ended("d", decode, 0.0, gives_slot=True)
    for turn, name in enumerate(queues):
        made.submit(picture(0, 8) if name == "video" else text_task("x"), 99, turn=turn)
    made.add(replace(extractor(), on_cpu=on_cpu))
    assert len(sent(made)) == number


@pytest.mark.parametrize(
    ("device", "share", "expected"),
    [
        ("cpu", True, {"video": 3, "image": 2, "text": 8, "audio": 64, "ocr": 2}),
        ("cuda:0", True, {"video": 128, "image": 2, "text": 16, "audio": 64, "ocr": 8}),
        ("cpu", False, {"video": 1, "image": 1, "text": 1, "audio": 1, "ocr": 1}),
    ],
)
def test_batches_are_small_on_a_cpu(device: str, share: bool, expected: dict[str, int]) -> None:
    workers = {"extractors": [{"device": device, "threads": 2}], "share_batches": share}
    features = {"image": {"batch_size": 2}}
    rows = batch_rows(Settings.model_validate({"workers": workers, "features": features}))
    assert {name: rows[name] for name in expected} == expected


def test_posts_are_gathered_for_fusion_while_much_else_is_open() -> None:
    """Until they are a quarter of the open tasks beyond eight, or a tenth of a second is over."""
    made = scheduler(WorkerLoad("f", ("fuse",), None, 10.0))
    alone = made.submit(fuse_task("p0"), 99)
    assert ids(sent(made)) == [alone]
    made.began("f", [alone], 0.0)
    for _ in range(16):
        made.submit(text_task("x"), 99)
    first = made.submit(fuse_task("p1"), 99)
    assert sent(made) == []
    second = made.submit(fuse_task("p2"), 99)
    assert ids(sent(made)) == [first, second]
    late = made.submit(fuse_task("p3"), 99)
    assert sent(made, 0.05) == []
    assert ids(sent(made, 0.11)) == [late]


def test_texts_are_gathered_while_much_else_is_open() -> None:
    """Until they are an eighth of the open tasks beyond eight, or a worker has nothing else."""
    made = scheduler(extractor())
    for _ in range(23):
        made.submit(decode_task(), 99)
    alone = made.submit(text_task("x"), 99)
    assert ids(sent(made)) == [alone]
    made.began("e", [alone], 0.0)
    first = made.submit(text_task("x"), 99)
    assert sent(made) == []
    second = made.submit(text_task("x"), 99)
    assert ids(sent(made)) == [first, second]


def test_a_suspect_is_fused_alone_and_not_held_back() -> None:
    made = scheduler(WorkerLoad("f", ("fuse",), None, 10.0))
    pair = [made.submit(fuse_task(f"p{i}"), 99) for i in range(2)]
    sent(made)
    made.began("f", pair, 0.0)
    made.died("f")
    made.add(WorkerLoad("f", ("fuse",), None, 10.0))
    assert ids(sent(made)) == pair[:1]
    made.ended("f", pair[0], 0.0, gives_slot=False)
    assert ids(sent(made)) == pair[1:]


def test_queue_is_bounded() -> None:
    """A caller that submits without end gets an error before memory runs out."""
    made = scheduler()
    for _ in range(MAX_QUEUED):
        made.submit(text_task("x"), 99)
    with pytest.raises(RuntimeError, match="intake"):
        made.submit(text_task("x"), 99)


def test_cancelled_tasks_do_not_pile_up() -> None:
    """A queue without a worker does not keep what was cancelled."""
    made = scheduler()
    for _ in range(500):
        made.cancel(made.submit(text_task("x"), 99))
    assert len(made._queues["text"]) < 50
    assert len(made) == 0
    assert not made.busy


def test_submit_for_a_foreign_slot_changes_nothing() -> None:
    """A task that names a slot which the caller does not own is refused whole."""
    made = scheduler(decoder())
    decode = made.submit(decode_task(), 99)
    sent(made)
    made.ended("d", decode, 0.0, gives_slot=True)
    both = ExtractTask("video", "video", (*picture(0).refs, *picture(1).refs))
    with pytest.raises(ValueError, match="slot 1"):
        made.submit(both, 99)
    made.slots.release(0)
    assert made.slots.free == 3


def test_death_of_a_batch_makes_suspects_that_run_alone() -> None:
    made = scheduler(extractor())
    batch = [made.submit(text_task("x"), 99) for _ in range(3)]
    later = made.submit(text_task("x"), 99)
    sent(made)
    made.began("e", batch, 0.0)
    assert made.died("e") == []
    made.add(extractor())
    [(_, first)] = sent(made)
    assert (first.task_id, first.solo) == (batch[0], True)
    assert sent(made) == [], "nothing runs beside a suspect"
    made.began("e", [batch[0]], 0.0)
    assert [entry.task_id for entry in made.died("e")] == [batch[0]]
    made.add(extractor())
    for member in batch[1:]:
        assert ids(sent(made)) == [member]
        made.began("e", [member], 0.0)
        assert made.ended("e", member, 0.0, gives_slot=False) is not None
    [(_, innocent)] = sent(made)
    assert (innocent.task_id, innocent.solo) == (later, False)


def test_death_charges_who_ran_alone_and_spares_who_waited() -> None:
    made = scheduler(extractor())
    running, waiting = (made.submit(text_task("x"), 99) for _ in range(2))
    sent(made)
    made.began("e", [running], 0.0)
    assert [entry.task_id for entry in made.died("e")] == [running]
    made.add(extractor())
    assert ids(sent(made)) == [waiting]


def test_death_before_anything_began_is_bounded() -> None:
    made = scheduler()
    task = made.submit(text_task("x"), 99)
    for _ in range(4):
        made.add(extractor())
        assert ids(sent(made)) == [task]
        assert made.died("e") == []
    made.add(extractor())
    sent(made)
    assert [entry.task_id for entry in made.died("e")] == [task]
    assert not made.busy


def test_concurrent_downloads_are_suspects_too() -> None:
    """Tasks that began one by one but ran at the same time are not charged for one crash."""
    made = scheduler(WorkerLoad("f", ("fetch",), 4, 10.0))
    two = [made.submit(fetch_task("x"), 99) for _ in range(2)]
    sent(made)
    for task in two:
        made.began("f", [task], 0.0)
    assert made.died("f") == []
    made.add(WorkerLoad("f", ("fetch",), 4, 10.0))
    assert ids(sent(made)) == two[:1]


def test_overdue_download_is_charged_alone() -> None:
    made = scheduler(WorkerLoad("f", ("fetch",), 4, 10.0))
    slow, other = (made.submit(fetch_task("x"), 99) for _ in range(2))
    sent(made)
    made.began("f", [slow], 0.0)
    made.began("f", [other], 9.0)
    kill = made.overdue(10.5).kill
    assert kill == {"f": frozenset({slow})}
    assert [entry.task_id for entry in made.died("f", kill["f"])] == [slow]
    made.add(WorkerLoad("f", ("fetch",), 4, 10.0))
    [(_, again)] = sent(made)
    assert (again.task_id, again.solo) == (other, False)


def test_hanging_batch_is_rerun_one_by_one() -> None:
    """A batch that hangs says not which member hangs: none is charged yet."""
    made = scheduler(extractor())
    batch = [made.submit(text_task("x"), 99) for _ in range(2)]
    sent(made)
    made.began("e", batch, 0.0)
    assert made.died("e", made.overdue(11.0).kill["e"]) == []
    made.add(extractor())
    [(_, first)] = sent(made, 11.0)
    assert first.solo


def test_deadline_fails_the_task_now_and_kills_the_worker_after_grace() -> None:
    """Each task fails exactly at its deadline; the worker has had its fair time first."""
    made = scheduler(decoder())
    running = made.submit(decode_task(), 5.0)
    queued = made.submit(decode_task(), 5.0)
    sent(made)
    made.began("d", [running], 4.5)
    late = made.overdue(5.0)
    assert {entry.task_id for entry in late.failed} == {running, queued}
    assert late.kill == {}
    assert made.overdue(5.4).failed == ()
    assert made.overdue(5.6).kill == {"d": frozenset({running})}
    assert made.died("d", frozenset({running})) == []
    assert made.slots.free == 3
    assert not made.busy


def test_worker_that_never_begins_is_killed() -> None:
    """A stopped worker that reads nothing is killed at its task's deadline, or at the limit."""
    made = scheduler(extractor())
    task = made.submit(text_task("x"), 99.0)
    sent(made, 0.0)
    assert made.overdue(9.0).kill == {}
    assert made.overdue(10.5).kill == {"e": frozenset({task})}
    assert made.died("e", frozenset({task})) == [], "it had not begun: it is innocent"


def test_waiting_behind_a_batch_is_no_reason_to_kill() -> None:
    """A task that waits in the pipe behind a running batch has no limit of its own."""
    made = scheduler(extractor())
    running, waiting = (made.submit(text_task("x"), 99.0) for _ in range(2))
    sent(made, 0.0)
    made.began("e", [running], 8.0)
    assert made.overdue(17.0).kill == {}
    made.ended("e", running, 17.5, gives_slot=False)
    assert made.overdue(26.0).kill == {}
    assert made.overdue(28.0).kill == {"e": frozenset({waiting})}


def test_fuse_tasks_have_their_own_queue() -> None:
    """Fusion is batched apart from the extractors."""
    made = scheduler(WorkerLoad("u", ("fuse",), None, 10.0))
    fuse = made.submit(fuse_task("p"), 99)
    text = made.submit(text_task("x"), 99)
    assert ids(sent(made)) == [fuse]
    assert made.queued("text") == 1
    made.cancel(text)
