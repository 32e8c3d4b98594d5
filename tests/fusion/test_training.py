"""Training from feature files to a bundle: it learns, resumes exactly, and names mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import infer_net
import train_net
from config.errors import ConfigError, FeatureError, TaggingError
from extractors.feature_file import write_features
from fusion import metrics
from fusion.checkpoint import Checkpoint, Progress, load_checkpoint, save_checkpoint
from fusion.collate import Batch
from fusion.inferer import Inferer
from fusion.losses import binary_cross_entropy
from fusion.optimizer import MovingAverage, warm_up_cosine
from fusion.sampling import EpochBatches
from fusion.thresholds import best_f1_threshold, fit_thresholds
from fusion.trainer import Trainer, _targets
from fusion.training import TrainReport, train
from scripts.feature_files import FeatureFiles
from tests.fusion import support


@pytest.fixture
def posts(tmp_path: Path) -> Path:
    """A folder with 120 posts to learn from and 48 to validate on."""
    support.write_posts(tmp_path, "train", 120, 1)
    support.write_posts(tmp_path, "valid", 48, 2)
    return tmp_path


def run(folder: Path, resume: Path | None = None, **sections: Any) -> TrainReport:
    """One small training."""
    return train(support.train_settings(folder, **sections), FeatureFiles(), resume=resume)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of the last checkpoint."""
    content = torch.load(folder / "run" / "ckpt" / "last.pt", weights_only=True)
    found: dict[str, torch.Tensor] = content["model"]
    return found


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Bit by bit."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("name", ["token_transformer", "concat_se"])
def test_it_learns_and_writes_a_bundle(name: str, posts: Path) -> None:
    """Tags whose evidence is planted in five modalities are found on posts never seen."""
    epochs = {"token_transformer": 8, "concat_se": 14}[name]
    report = run(posts, model={"name": name}, trainer={"epochs": epochs})
    assert report.metrics["gap"] > 0.9
    assert report.version == json.loads(_log(posts)[-1])["version"]
    assert (report.bundle / "bundle.yaml").exists()
    events = [json.loads(line)["event"] for line in _log(posts)]
    assert events.count("epoch") == events.count("valid") == epochs


def _log(folder: Path) -> list[str]:
    return (folder / "run" / "log" / "train.jsonl").read_text().splitlines()


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_resumed_run_ends_with_the_same_weights(ema: float, posts: Path) -> None:
    """Interrupted within the third epoch and resumed: bit-equal to the run that was left alone."""
    options: dict[str, Any] = {"optimizer": {"ema_decay": ema}, "trainer": {"epochs": 4}}
    run(posts, **options)
    whole = weights(posts)
    best = load_file(posts / "bundle" / "model.safetensors")

    class Interrupted(Exception):
        pass

    settings = support.train_settings(
        posts, **{**options, "trainer": {"epochs": 4, "save_dir": str(posts / "second")}}
    )
    steps = 0
    original = Trainer._step

    def fail(self: Any, *given: Any) -> float:
        nonlocal steps
        steps += 1
        if steps == 20:
            raise Interrupted
        return original(self, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_step", fail)
        with pytest.raises(Interrupted):
            train(settings, FeatureFiles())
    torch.manual_seed(12345)  # what the interrupted process had drawn is lost
    train(settings, FeatureFiles(), resume=posts / "second")
    resumed = torch.load(posts / "second" / "ckpt" / "last.pt", weights_only=True)
    assert resumed["progress"]["epoch"] == 4
    assert equal(whole, resumed["model"])
    assert equal(best, load_file(posts / "bundle" / "model.safetensors"))


def test_a_run_goes_on_in_another_folder(posts: Path) -> None:
    """The best weights so far come along, also when no later epoch is better."""
    run(posts, trainer={"epochs": 3})
    first = load_file(posts / "bundle" / "model.safetensors")
    other = {"save_dir": str(posts / "other"), "epochs": 3}
    report = run(posts, resume=posts / "run" / "ckpt" / "last.pt", trainer=other)
    assert equal(first, load_file(posts / "bundle" / "model.safetensors"))
    assert (posts / "other" / "ckpt" / "best.pt").exists()
    assert report.epochs == 3


def test_a_best_checkpoint_is_a_start_of_a_new_run(posts: Path) -> None:
    """It holds weights and no optimizer: training begins at epoch one, further along."""
    run(posts, trainer={"epochs": 4})
    losses = [json.loads(line)["loss"] for line in _log(posts) if '"epoch",' in line]
    report = run(posts, resume=posts / "run" / "ckpt" / "best.pt", trainer={"epochs": 1})
    again = [json.loads(line)["loss"] for line in _log(posts) if '"epoch",' in line]
    assert report.epochs == 1
    assert again[-1] < losses[0]


def test_a_fixed_seed_gives_the_same_weights_and_another_seed_others(posts: Path) -> None:
    """Two runs are bit-equal on a CPU; without a fixed seed they differ."""
    run(posts, trainer={"epochs": 1})
    first = weights(posts)
    run(posts, trainer={"epochs": 1})
    assert equal(first, weights(posts))
    run(posts, trainer={"epochs": 1, "fix_random_seed": False})
    assert not equal(first, weights(posts))


def test_early_stopping(posts: Path) -> None:
    """Training ends once so many validations brought no better GAP."""
    report = run(
        posts,
        trainer={"epochs": 30, "patience": 2},
        optimizer={"learning_rate": 1e-9},
    )
    assert report.epochs <= 6


def test_without_validation(posts: Path) -> None:
    """The last epoch is kept, thresholds are 0.5, and early stopping does not apply."""
    report = run(posts, data={"valid": None}, trainer={"epochs": 2, "patience": 1})
    assert (report.epochs, report.best_epoch, report.metrics) == (2, 2, {})


def test_bfloat16_trains(posts: Path) -> None:
    """Mixed precision runs through Fabric and still gives a float32 bundle."""
    report = run(posts, trainer={"epochs": 1, "precision": "bf16"})
    state = load_file(report.bundle / "model.safetensors")
    assert {t.dtype for t in state.values() if t.is_floating_point()} == {torch.float32}


def test_images_as_frames_train(posts: Path) -> None:
    """The bundle remembers the switch, and both fingerprints."""
    report = run(posts, data={"image_as_frames": True}, trainer={"epochs": 1})
    inferer = Inferer.load(report.bundle)
    assert inferer.image_as_frames
    assert inferer.fingerprints == support.FINGERPRINTS


@pytest.mark.slow
def test_loader_processes_read_the_same(posts: Path) -> None:
    """Reading in other processes changes nothing in the result."""
    run(posts, trainer={"epochs": 1})
    first = weights(posts)
    run(posts, trainer={"epochs": 1}, data={"loaders": 1})
    assert equal(first, weights(posts))


# Mistakes ------------------------------------------------------------------------------------


def _entries(folder: Path, change: Any) -> None:
    file = folder / "train.json"
    entries = json.loads(file.read_text())
    change(entries)
    file.write_text(json.dumps(entries))


def _other_fingerprint(folder: Path) -> None:
    found = support.features("train50", seed=1)
    write_features(folder / "features", found, {**support.FINGERPRINTS, "audio": "audio-2"})


def _not_finite(folder: Path) -> None:
    found = support.features("train50", seed=1)
    found.arrays["text"][0, 0] = np.inf
    write_features(folder / "features", found, support.FINGERPRINTS)


MISTAKES: dict[str, tuple[Any, str]] = {
    "label": (
        lambda d: _entries(d, lambda e: e[3].update(labels=["nope"])),
        "post train3: label 'nope' is not in the label map",
    ),
    "no file": (
        lambda d: _entries(d, lambda e: e[3].update(features="features/00/x.safetensors")),
        "features/00/x.safetensors",
    ),
    "no path": (
        lambda d: _entries(d, lambda e: e[3].pop("features")),
        "post train3: the data file names no feature file",
    ),
    "empty": (lambda d: (d / "train.json").write_text("[]"), "train.json: holds no posts"),
    "no JSON": (lambda d: (d / "train.json").write_text("[{"), "train.json: not a JSON data file"),
    "no list": (lambda d: (d / "train.json").write_text("{}"), "must be a list"),
    "no ID": (lambda d: (d / "train.json").write_text("[{}]"), "entry 0: must have a post_id"),
    "twice": (
        lambda d: _entries(d, lambda e: e.append(e[5])),
        "post 'train5' stands twice",
    ),
    "missing": (lambda d: (d / "valid.json").unlink(), "valid.json: no such data file"),
    "fingerprint": (_other_fingerprint, "audio was made with audio-2, but audio-1 is needed"),
    "not finite": (_not_finite, "post train50: text features are not finite"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_the_data_is_one_line(name: str, posts: Path) -> None:
    """The line names the file or post, and the bundle that was there stays."""
    spoil, says = MISTAKES[name]
    spoil(posts)
    with pytest.raises(TaggingError) as caught:
        run(posts, trainer={"epochs": 1})
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_loss_that_is_no_number_stops_the_run(posts: Path) -> None:
    """The epoch and step are named, and the checkpoint from before is intact."""
    run(posts, trainer={"epochs": 1})
    before = weights(posts)
    with pytest.raises(ConfigError, match=r"epoch 1, step \d+: the loss is"):
        run(posts, trainer={"epochs": 3}, optimizer={"learning_rate": 1e30})
    assert equal(before, weights(posts))


def load_checkpoint_epoch(folder: Path) -> int:
    """Epochs done in the last checkpoint."""
    content = torch.load(folder / "run" / "ckpt" / "last.pt", weights_only=True)
    return int(content["progress"]["epoch"])


def test_a_checkpoint_of_another_architecture_is_refused(posts: Path) -> None:
    """The line says what differs."""
    run(posts, trainer={"epochs": 1})
    with pytest.raises(ConfigError, match=r"made with another model: .*token_transformer"):
        run(posts, resume=posts / "run", model={"name": "concat_se"})


@pytest.mark.parametrize("content", [b"", b"no checkpoint", None])
def test_a_broken_checkpoint_is_refused(content: bytes | None, tmp_path: Path) -> None:
    """Missing, empty or other files are named, not unpickled."""
    path = tmp_path / "last.pt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=str(path)):
        load_checkpoint(path, "{}")


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk while saving: the file from before is whole and nothing lies beside it."""
    path = tmp_path / "last.pt"
    save_checkpoint(path, Checkpoint("{}", Progress(1, epoch=3), {}))

    def full(*_: Any, **__: Any) -> None:
        path.with_name(".last.pt.part").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(ConfigError, match=r"cannot be written.*No space left"):
        save_checkpoint(path, Checkpoint("{}", Progress(1, epoch=4), {}))
    assert load_checkpoint(path, "{}").progress.epoch == 3
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_more_gpus_than_there_are(posts: Path) -> None:
    """One line says how many this machine has."""
    with pytest.raises(ConfigError, match=r"trainer.n_gpu: 99 GPUs wanted"):
        run(posts, trainer={"n_gpu": 99})


def test_broken_feature_files(tmp_path: Path) -> None:
    """The first one is named."""
    support.write_posts(tmp_path, "train", 4, 1)
    support.write_posts(tmp_path, "valid", 4, 2)
    for file in (tmp_path / "features").rglob("*.safetensors"):
        file.write_bytes(b"broken")
    with pytest.raises(FeatureError, match="cannot be read as a feature file"):
        run(tmp_path)


def test_posts_without_the_modalities_asked_for(tmp_path: Path) -> None:
    """There is nothing to learn from; the line names the modalities."""
    for name in ("train", "valid"):
        entries = []
        for i in range(4):
            found = support.features(f"{name}{i}", lengths={"audio": 0, "ocr": 0})
            path = write_features(tmp_path / "features", found, support.FINGERPRINTS)
            entries.append({"post_id": found.post_id, "labels": ["tag1"], "features": str(path)})
        (tmp_path / f"{name}.json").write_text(json.dumps(entries))
    with pytest.raises(ConfigError, match="no post has features of audio, ocr"):
        run(tmp_path, data={"modalities": ["audio", "ocr"]})


# Parts ---------------------------------------------------------------------------------------


def test_the_loss_is_the_logits_form() -> None:
    """It equals the definition in float64 and stays finite where probabilities would not."""
    chance = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 5, generator=chance)
    targets = (torch.rand(7, 5, generator=chance) < 0.4).float()
    p = torch.sigmoid(logits.double())
    wanted = -(targets * p.log() + (1 - targets) * (1 - p).log()).mean()
    assert float(binary_cross_entropy(logits, targets)) == pytest.approx(float(wanted), abs=1e-6)
    assert float(binary_cross_entropy(torch.tensor([[200.0]]), torch.tensor([[0.0]]))) == 200.0


def test_every_post_once_an_epoch_in_a_new_order() -> None:
    """The order depends on seed and epoch alone, and no batch is left with one post."""
    batches = EpochBatches(33, 8, 5, rank=0, world=1)
    seen = []
    for epoch in (1, 2, 1):
        batches.epoch = epoch
        seen.append(list(batches))
    assert seen[0] == seen[2] != seen[1]
    assert sorted(i for batch in seen[0] for i in batch) == list(range(33))
    assert [len(b) for b in seen[0]] == [8, 8, 8, 9]
    assert len(batches) == 4


@pytest.mark.parametrize(("count", "size"), [(5, 8), (2, 1), (16, 8), (17, 8), (18, 8), (3, 2)])
def test_batches_know_their_number(count: int, size: int) -> None:
    """What `len` says is what comes, for sets smaller than a batch too."""
    batches = EpochBatches(count, size, 0, rank=0, world=1)
    found = list(batches)
    assert len(found) == len(batches)
    assert sorted(i for batch in found for i in batch) == list(range(count))


def test_processes_share_an_epoch() -> None:
    """Two processes see every post together, in the same number of steps."""
    shares = [EpochBatches(21, 4, 0, rank=r, world=2) for r in range(2)]
    both = [list(share) for share in shares]
    assert len(both[0]) == len(both[1])
    assert {i for share in both for batch in share for i in batch} == set(range(21))


def test_the_learning_rate_goes_up_and_down() -> None:
    """Linear over the warm-up, at its peak after it, near zero at the end."""
    rates = [warm_up_cosine(step, 100, 0.1) for step in range(100)]
    assert rates[:10] == pytest.approx(np.arange(1, 11) / 10)
    assert max(rates) == rates[10] == 1
    assert rates[-1] < 0.001
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_the_moving_average() -> None:
    """It follows the weights, is applied for a while, and gives the own weights back."""
    model = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(0)
    average = MovingAverage(model, 0.5)
    with torch.no_grad():
        model.weight.fill_(1)
    average.update(model)
    with average.applied(model):
        assert model.weight.item() == pytest.approx(1 - 2 / 11)
    assert model.weight.item() == 1


def test_a_threshold_lies_between_what_it_parts() -> None:
    """The best F1 by trying every threshold, and midway between the two scores beside it."""
    chance = np.random.default_rng(0)
    for _ in range(20):
        scores, targets = chance.random(40), chance.random(40) < 0.4
        found = best_f1_threshold(scores, targets)
        tried = [metrics.f1_scores(scores[:, None], targets[:, None], t).micro for t in scores]
        here = metrics.f1_scores(scores[:, None], targets[:, None], found).micro
        assert here >= max(tried) - 1e-12 or found in (0.05, 0.95)
    assert best_f1_threshold([0.9, 0.8, 0.3, 0.2], [1, 1, 0, 0]) == pytest.approx(0.55)
    assert best_f1_threshold([0.9, 0.8], [0, 0]) == 0.5


def test_rare_tags_take_the_common_threshold() -> None:
    """A tag with fewer positives than asked for gets the threshold of all tags together."""
    scores = np.array([[0.9, 0.2], [0.8, 0.1], [0.3, 0.15], [0.2, 0.05]])
    targets = np.array([[1, 1], [1, 0], [0, 0], [0, 0]])
    fitted = fit_thresholds(scores, targets, min_positives=2)
    assert fitted[0] == pytest.approx(0.55)
    assert fitted[1] == pytest.approx(best_f1_threshold(scores, targets), abs=1e-6)
    own = fit_thresholds(scores, targets, min_positives=1)
    assert own[1] == pytest.approx(0.175)


# Commands ------------------------------------------------------------------------------------


def command_config(folder: Path) -> Path:
    """A YAML file of the settings for `train_net.py`."""
    file = folder / "train.yaml"
    file.write_text(json.dumps(support.train_settings(folder).model_dump(mode="json")))
    return file


def test_the_commands_train_infer_and_agree(
    posts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All options of training; then GAP of validation, inference and the written scores agree."""
    config = str(command_config(posts))
    given = ["--batch_size", "24", "--learning_rate", "4e-3", "--n_gpu", "0", "--epoch", "4"]
    given += ["--save_dir", str(posts / "run"), "--valid_interval", "2", "--log_interval", "2"]
    given += ["--fix_random_seed", "True", "--set", "trainer.threads=1"]
    assert train_net.main(["--model_config", config, *given]) == 0
    events = [json.loads(line) for line in _log(posts)]
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

    more = ["--model_config", config, "--resume", str(posts / "run" / "ckpt" / "last.pt")]
    assert train_net.main([*more, "--epoch", "5", "--set", "trainer.progress=true"]) == 0
    assert load_checkpoint_epoch(posts) == 5


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


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--input", "a.csv"], "must be a .json data file or a .txt list"),
        (["--input", "none.json"], "none.json: no such data file"),
        (["--input", "none.txt"], "none.txt: no such file"),
        (["--input", "a.json", "--set", "bundel=x"], "did you mean 'bundle'?"),
    ],
)
def test_a_mistake_in_the_inference_exits_2(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line on standard error that names the key or file."""
    assert infer_net.main(arguments) == 2
    printed = capsys.readouterr().err
    assert says in printed
    assert len(printed.splitlines()) == 1


@pytest.mark.parametrize("main", [train_net.main, infer_net.main])
def test_an_unknown_option_is_one_line(main: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """No usage text of ten lines around it."""
    with pytest.raises(SystemExit) as caught:
        main(["--nothing"])
    assert caught.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_targets_are_required_in_training() -> None:
    """A batch without targets is a mistake of the caller, not a zero loss."""
    with pytest.raises(ValueError, match="needs targets"):
        _targets(Batch(("a",), {}, {}))
