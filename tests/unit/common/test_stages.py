"""Stages that are skipped when they are done."""

from functools import partial
from pathlib import Path

from common.stages import run_stage


def test_a_stage_is_done_only_with_its_inputs_and_outputs(tmp_path: Path) -> None:
    """Other inputs or a missing output: the stage runs again."""
    ran: list[int] = []
    output, stamp = tmp_path / "output", tmp_path / "stage"

    def work(number: int) -> None:
        assert not stamp.exists(), "killed now, the stage is not done"
        ran.append(number)
        output.touch()

    for number, inputs in enumerate(("a", "a", "b", "b", "b")):
        run_stage(stamp, inputs, (output,), partial(work, number))
        if number == 3:
            output.unlink()
    assert ran == [0, 2, 4]
