"""`train_net.py` and `infer_net.py` together, and mistakes in their options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import infer_net
import train_net
from fusion.metrics import ranking as metrics
from tests.support.fusion import runs, support


def test_the_commands_train_infer_and_agree(
    posts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All options of training; then GAP of validation, inference and the written scores agree."""
    config = str(runs.config_file(posts))
    given = ["--batch_size", "24", "--learning_rate", "4e-3", "--n_gpu", "0", "--epoch", "4"]
    given += ["--save_dir", str(posts / "run"), "--valid_interval", "2", "--log_interval", "2"]
    given += ["--fix_random_seed", "True", "--set", "trainer.threads=1"]
    assert train_net.main(["--model_config", config, *given]) == 0
    events = runs.events(posts)
    assert [e["epoch"] for e in events if e["event"] == "valid"] == [2, 4]
    assert {e["step"] for e in events if e["event"] == "step"} == {2, 4}
    gap = next(e for e in reversed(events) if e["event"] == "bundle")["gap"]

    (posts / "infer.yaml").write_text(f"progress: false\nfeatures: {posts / 'features'}\n")
    arguments = ["--infer_config", str(posts / "infer.yaml"), "--n_gpus", "0"]
    arguments += ["--best_model", str(posts / "bundle")]
    capsys.readouterr()
    output = posts / "out" / "tags.jsonl"
    again = [*arguments, "--input", str(posts / "valid.json"), "--output", str(output)]
    assert infer_net.main(again) == 0
    assert f"gap {gap:.4f}" in capsys.readouterr().out
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    targets = [[name in line["labels"] for name in support.LABELS.names] for line in lines]
    scores = [line["scores"] for line in lines]
    assert metrics.global_average_precision(scores, targets) == pytest.approx(gap, abs=1e-9)

    listed = [lines[0]["post_id"], json.loads((posts / "valid.json").read_text())[1]["features"]]
    (posts / "list.txt").write_text("\n".join(listed) + "\n\n")
    assert infer_net.main([*arguments, "--input", str(posts / "list.txt")]) == 0
    printed = capsys.readouterr()
    found = [json.loads(line) for line in printed.out.splitlines()]
    assert [f["post_id"] for f in found] == [line["post_id"] for line in lines[:2]]
    np.testing.assert_allclose(found[0]["scores"], scores[0], atol=1e-5)
    assert "labels" not in found[0]

    more = [
        "--model_config",
        config,
        "--resume",
        str(posts / "run" / "latest" / "ckpt" / "last.pt"),
    ]
    assert train_net.main([*more, "--epoch", "5", "--set", "trainer.progress=true"]) == 0
    assert runs.checkpoint(posts)["progress"]["epoch"] == 5


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model_config", "none.yaml"], "none.yaml: no such file"),
        (["--batch_size", "many"], "options: trainer.batch_size"),
        (["--learning_rate", "-1"], "options: optimizer.learning_rate"),
        (["--set", "trainer.epoch=3"], "unknown key; did you mean 'epochs'?"),
        (["--set", "model.name=magic"], "--set: model.name"),
        (["--set", "data.train=none.json", "--set", "data.labels=none.json"], "none.json"),
    ],
)
def test_a_mistake_in_the_options_exits_2(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line on standard error that names the key or file."""
    assert train_net.main(arguments) == 2
    printed = capsys.readouterr().err
    assert says in printed
    assert len(printed.splitlines()) == 1


@pytest.mark.parametrize("main", [train_net.main, infer_net.main])
def test_an_unknown_option_is_one_line(main: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--nothing"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
