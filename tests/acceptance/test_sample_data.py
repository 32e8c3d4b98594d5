"""The sample data of ``data/``, and the commands of the README on them."""

import json
from pathlib import Path

import numpy as np
import pytest

import infer_net
import train_net
from common.post import Post
from config.labels import LabelMap
from config.load import load_settings
from extractors.feature_file import read_features, read_header
from fusion.data.data_file import read_whole_posts
from tests.support.fusion import support
from workers.local import local_runner

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "data"
SPLITS = ("train", "valid", "test")


@pytest.mark.parametrize("split", SPLITS)
def test_every_sample_is_whole(split: str) -> None:
    labels = LabelMap.load(ROOT / "config/idx2name_cls24.json")
    for record in support.records(DATA / f"{split}_cls24_samples.json"):
        assert labels.encode(record.labels)
        assert record.features is not None
        assert record.features.is_file()
    posts = read_whole_posts(DATA / f"{split}_cls24_samples.json")
    assert all(Path(media.source).is_file() for post in posts for media in post.media)


def test_the_splits_share_no_post() -> None:
    posts = [read_whole_posts(DATA / f"{split}_cls24_samples.json") for split in SPLITS]
    names = [{post.post_id for post in split} for split in posts]
    media = [{m.source for post in split for m in post.media} for split in posts]
    for sets in (names, media):
        assert len(set.union(*sets)) == sum(map(len, sets))


def test_sample_features_can_be_made_again() -> None:
    settings = load_settings(ROOT / "config/infer_config_sample.yaml")
    posts: list[Post] = list(read_whole_posts(DATA / "test_cls24_samples.json"))[:4]
    with local_runner(settings, fuse=False) as runner:
        for post in posts:
            made, stored = runner.run(post).features, read_features(DATA / "features", post.post_id)
            assert made.statuses == stored.statuses
            for stream, array in stored.arrays.items():
                np.testing.assert_allclose(made.arrays[stream], array, atol=2e-2, rtol=2e-2)
        file = next((DATA / "features").rglob(f"{posts[0].post_id}.safetensors"))
        assert read_header(file).fingerprints == runner.fingerprints


@pytest.mark.slow
def test_train_and_inference_run_as_the_readme_writes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training with custom parameters, inference from ``.json`` and ``.txt``, raw media to tags."""
    monkeypatch.chdir(ROOT)
    bundle = tmp_path / "bundle"
    assert train_net.main([
        "--model_config", "config/train_config.yaml", "--batch_size", "8",
        "--learning_rate", "0.002", "--n_gpu", "0", "--epoch", "2", "--save_dir", str(tmp_path),
        "--valid_interval", "1", "--log_interval", "1", "--fix_random_seed", "True",
        "--set", f"bundle.out={bundle}", "--set", "report.subset_posts=0",
    ]) == 0  # fmt: skip
    assert "gap" in capsys.readouterr().out
    assert (tmp_path / "latest" / "ckpt" / "last.pt").is_file()
    assert (tmp_path / "latest" / "report" / "report.html").is_file()

    def tags(config: str, name: str) -> list[dict[str, object]]:
        output = tmp_path / f"{config}-{name}.jsonl"
        assert infer_net.main([
            "--infer_config", f"config/{config}.yaml", "--input", f"data/{name}",
            "--n_gpus", "0", "--best_model", str(bundle), "--output", str(output),
        ]) == 0  # fmt: skip
        return [json.loads(line) for line in output.read_text().splitlines()]

    of_json = tags("infer_config", "test_cls24_samples.json")
    of_text = tags("infer_config", "test_cls24_samples.txt")
    of_media = tags("infer_config_sample", "test_cls24_samples.json")
    assert len(of_json) == 10
    for first, second, raw in zip(of_json, of_text, of_media, strict=True):
        assert first["scores"] == second["scores"]
        assert first["post_id"] == second["post_id"] == raw["post_id"]
        np.testing.assert_allclose(
            np.asarray(raw["scores"], float), np.asarray(first["scores"], float), atol=1e-2
        )
