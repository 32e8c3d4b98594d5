"""``insighttag tune``: search for the learning rate and other values of a training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from common.cli import say
from common.errors import ConfigError
from common.logs import configure_logs
from common.tables import print_table

_SHOWN = 10


def tune(
    model_config: Annotated[
        Path,
        typer.Option("--config", "--model_config", metavar="F", help="The training's YAML file."),
    ] = Path("config/train_config.yaml"),
    out: Annotated[
        Path,
        typer.Option(metavar="DIR", help="Folder of the search; an existing one is continued."),
    ] = Path("workshop/tune"),
    trials: Annotated[int, typer.Option(min=1, help="Trainings in total.")] = 30,
    search: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=LOW..HIGH|KEY=A|B",
            help="A key and its values; repeatable. Default: learning rate, weight decay, average.",
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="a.b=c", help="Override one setting of the file; repeatable."
        ),
    ] = None,
) -> None:
    """Train many times with other values, and write the best ones as DIR/best.yaml.

    Trials that fall behind end early. What was interrupted goes on when the same command is run
    again. Needs the extra tune: pip install '.[tune]'.
    """
    from config.load import parse_overrides, read_yaml
    from config.presets import merge
    from fusion.train.tuning import DEFAULT_SEARCH, Range, Search

    configure_logs("pretty", "error")
    config = merge(read_yaml(model_config), parse_overrides(overrides or ()))
    if config.get("task", "fusion") != "fusion":
        raise ConfigError(f"{model_config}: task: only trainings of fusion models are searched")
    ranges = [Range.parse(text) for text in search or DEFAULT_SEARCH]
    outcome = Search(config, ranges, out).run(trials)
    best = sorted(outcome.rows, key=lambda row: -(row[2] or 0.0))[:_SHOWN]
    keys = [one.key for one in ranges]
    print_table(
        f"the best {len(best)} of {len(outcome.rows)} trials",
        ["trial", "state", "GAP", *keys],
        [
            (number, state, "" if gap is None else f"{gap:.4f}", *(values.get(k) for k in keys))
            for number, state, gap, values in best
        ],
        right=range(2, 3 + len(keys)),
    )
    say(f"python train_net.py --model_config {outcome.file}\n")
