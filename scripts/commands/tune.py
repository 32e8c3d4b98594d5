"""``insighttag tune``: search for the learning rate and other values of a training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from common.cli import option, say
from common.errors import ConfigError
from common.logs import configure_logs
from common.tables import print_table

_SHOWN = 10


def tune(
    model_config: Annotated[
        Path, option("The training's YAML file.", "F", "--config", "--model_config")
    ] = Path("config/train_config.yaml"),
    out: Annotated[
        Path, option("Folder of the search; an existing one is continued.", "DIR")
    ] = Path("workshop/tune"),
    trials: Annotated[int, option("Trainings in total.", min=1)] = 30,
    search: Annotated[
        list[str] | None,
        option(
            "A key and its range, KEY=LOW..HIGH, or its choices, KEY=A|B; repeatable. Default: "
            "learning rate, weight decay, average.",
            "KEY=X",
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None, option("Override one setting of the file; repeatable.", "a.b=c", "--set")
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
