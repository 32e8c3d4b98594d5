"""Options of the commands become settings."""

from __future__ import annotations

from pathlib import Path

from config.settings import InferSettings
from fusion.infer.options import infer_options, infer_settings
from fusion.train.options import train_options, train_settings


def test_folders_are_taken_as_they_are_written(tmp_path: Path) -> None:
    """A folder may be named by a number or a date, which YAML would make something else of."""
    (tmp_path / "empty.yaml").write_text("")
    config = str(tmp_path / "empty.yaml")
    options = train_options(["--model_config", config, "--save_dir", "2026", "--epoch", "3"])
    trainer = train_settings(options).trainer
    assert (trainer.save_dir, trainer.epochs) == (Path("2026"), 3)
    asked = ["--infer_config", config, "--input", "x.json", "--best_model", "2026-01-31"]
    settings = infer_settings(infer_options([*asked, "--n_gpus", "0"]))
    assert isinstance(settings, InferSettings)
    assert (settings.bundle, settings.n_gpus) == (Path("2026-01-31"), 0)
