"""``insighttag init``: a folder whose settings every command takes up by itself."""

from pathlib import Path

import pytest

import train_net
from config.load import load_settings
from config.presets import PRESETS
from config.train import TrainSettings
from fusion.train.options import train_settings
from scripts.cli import run


@pytest.mark.parametrize("preset", [*PRESETS, None])
def test_settings_of_a_new_project_are_those_of_its_preset(
    preset: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a terminal nothing is asked: the preset is small."""
    given = [] if preset is None else ["--preset", preset]
    assert run(["init", str(tmp_path / "mine"), *given]) == 0
    monkeypatch.chdir(tmp_path / "mine")
    expected = load_settings()
    text = Path("config/infer_config_e2e.yaml").read_text()
    assert f"preset: {preset or 'small'} " in text
    assert text.count("#") > 20  # what each key means
    other = load_settings(overrides=[f"features.preset={preset or 'small'}"])
    assert expected.features == other.features
    training = train_settings(train_net.SCRIPT.read([]))
    assert isinstance(training, TrainSettings)
    assert str(training.data.train) == "data/train_clsN.json"
    for file in Path("config").iterdir():
        first, *rest = file.read_text().splitlines()
        assert (file.parent / first.rpartition("=")[2]).is_file(), "an editor finds the schema"
        assert not any(".py" in line or "python " in line for line in rest), "nothing of a checkout"


def test_what_is_there_is_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config" / "train_config.yaml"
    file.parent.mkdir()
    file.write_text("mine")
    assert run(["init", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"insighttag: init: {file}: already exists; name another folder\n"
    )
    assert file.read_text() == "mine"
    assert [each.name for each in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["init"], "Missing argument 'FOLDER'"),
        (["init", "x", "--preset", "large"], "'--preset': 'large' is not one of"),
        (["init", "/proc/none/x"], "init: /proc/none/x: "),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(words) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
