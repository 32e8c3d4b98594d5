"""Optimizers, schedules, clipping, accumulation and exact resume."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from torch import nn

from common.errors import ConfigError
from config.load import validate
from config.train import LossSettings, OptimizerSettings, TrainSettings
from fusion.models import MODELS
from fusion.models.base import Collate, Sample
from fusion.train.losses import Objective, TaggingLoss
from fusion.train.optimizer import SCHEDULES, average_of, build_optimizer, cycle_ends
from fusion.train.run_log import read_run
from fusion.train.trainer import TrainData, Trainer
from tests.support.fusion import support

STEPS = 40


def settings(**values: Any) -> OptimizerSettings:
    return OptimizerSettings.model_validate(values)


def rates(of: OptimizerSettings) -> list[float]:
    """The learning rate of each step, as the optimizer sees it."""
    optimizer, schedule = build_optimizer(nn.Linear(2, 2), of, STEPS)
    steps = []
    for _ in range(STEPS):
        steps.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return steps


def reference(make: Any) -> list[float]:
    """The same for a schedule of torch's own, on SGD with rate 0.1."""
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    schedule = make(optimizer)
    steps = []
    for step in range(STEPS):
        steps.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if step + 1 < STEPS:
            schedule.step()
    return steps


def test_one_cycle_equals_torchs() -> None:
    for share in (0.1, 0.3):
        theirs = reference(
            lambda o, share=share: torch.optim.lr_scheduler.OneCycleLR(
                o, 0.1, total_steps=STEPS, pct_start=share, cycle_momentum=False
            )
        )
        ours = rates(settings(learning_rate=0.1, schedule="one_cycle", warm_up=share))
        np.testing.assert_allclose(ours, theirs, rtol=1e-9)


def test_steps_equal_torchs() -> None:
    theirs = reference(lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [20, 30], gamma=0.2))
    options = {"learning_rate": 0.1, "schedule": "step", "step_factor": 0.2}
    np.testing.assert_allclose(rates(settings(**options, warm_up=0)), theirs, rtol=1e-9)
    warmed = rates(settings(**options, warm_up=0.1))
    np.testing.assert_allclose(warmed[:4], [0.025, 0.05, 0.075, 0.1])
    np.testing.assert_allclose(warmed[4:], theirs[4:], rtol=1e-9)


def test_cosine_equals_torchs_and_constant_stays() -> None:
    ours = rates(settings(learning_rate=0.1, warm_up=0.1))
    theirs = reference(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, STEPS - 4))
    np.testing.assert_allclose(ours[4:], theirs[: STEPS - 4], rtol=1e-6)
    steady = rates(settings(learning_rate=0.1, warm_up=0.1, schedule="constant"))
    np.testing.assert_allclose(steady, [0.025, 0.05, 0.075] + [0.1] * 37)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("warm_up", [0.0, 0.5, 0.9])
def test_short_runs_have_a_rate(name: str, steps: int, warm_up: float) -> None:
    """Even one step learns, and no factor lies outside 0 and 1."""
    factor = SCHEDULES[name](settings(warm_up=warm_up), steps)  # type: ignore[index]
    factors = [factor(step) for step in range(steps + 1)]
    assert all(0 <= f <= 1 for f in factors)
    assert factors[0] > 0


def test_a_cosine_that_starts_anew() -> None:
    """Three cycles are three short cosines; their ends are the epochs of the snapshots."""
    alone = rates(settings(learning_rate=0.1, warm_up=0.1))
    anew = rates(settings(learning_rate=0.1, warm_up=0.1, cycles=4))
    short = [SCHEDULES["cosine"](settings(warm_up=0.1), STEPS // 4)(i) for i in range(STEPS // 4)]
    np.testing.assert_allclose(anew, np.tile(short, 4) * 0.1, rtol=1e-9)
    np.testing.assert_allclose(rates(settings(learning_rate=0.1, cycles=1)), alone, rtol=1e-9)
    factor = SCHEDULES["cosine"](settings(cycles=7), 100)
    assert all(0 < factor(step) <= 1 for step in range(100))
    assert cycle_ends(12, 3) == (4, 8, 12)
    assert cycle_ends(10, 3) == (4, 7, 10)
    assert cycle_ends(2, 3)[-1] == 2


def test_groups_keep_their_proportion_under_a_schedule() -> None:
    """The schedule is a factor: each group's rate is its own share of it at every step."""
    model = support.model("concat_se")
    options = settings(group_rates={"modality": 1e-4, "head": 1e-2}, schedule="one_cycle")
    optimizer, schedule = build_optimizer(model, options, 10)
    first = [g["lr"] for g in optimizer.param_groups]
    assert first == sorted(first, reverse=True), "the highest is what the log shows"
    for _ in range(4):
        optimizer.step()
        schedule.step()
    assert len({round(g["lr"] / g["initial_lr"], 9) for g in optimizer.param_groups}) == 1
    assert {g["initial_lr"] for g in optimizer.param_groups} == {1e-4, 1e-3, 1e-2}


@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [
        ("adamw", torch.optim.AdamW, {"betas": (0.9, 0.999), "eps": 1e-7}),
        ("adam", torch.optim.Adam, {"betas": (0.9, 0.999), "eps": 1e-7}),
        ("sgd", torch.optim.SGD, {"momentum": 0.8, "nesterov": False}),
        ("rmsprop", torch.optim.RMSprop, {"momentum": 0.8, "alpha": 0.99, "eps": 1e-7}),
    ],
)
def test_an_optimizer_is_torchs_and_decays_matrices_alone(
    name: str, kind: type[torch.optim.Optimizer], options: dict[str, Any]
) -> None:
    model = nn.Linear(3, 2)
    chosen = settings(name=name, learning_rate=0.05, weight_decay=0.1, momentum=0.8)
    optimizer, _ = build_optimizer(model, chosen, 5)
    assert type(optimizer) is kind
    matrix, bias = optimizer.param_groups
    assert (matrix["params"], bias["params"]) == ([model.weight], [model.bias])
    assert (matrix["weight_decay"], bias["weight_decay"]) == (0.1, 0.0)
    for group in optimizer.param_groups:
        assert group["initial_lr"] == 0.05
        assert {key: group[key] for key in options} == options


def test_steps_that_do_not_rise_are_refused() -> None:
    with pytest.raises(ConfigError, match="steps_at must rise"):
        validate(TrainSettings, {"optimizer": {"steps_at": [0.7, 0.5]}}, "test")


def test_the_moving_average() -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(0)
    average = average_of(model, 0.5)
    with torch.no_grad():
        model.weight.fill_(1)
    average.update_parameters(model)
    assert next(average.module.parameters()).item() == pytest.approx(1 - 2 / 11)
    assert model.weight.item() == 1


# In the trainer


def posts(count: int) -> list[Sample]:
    schema, chance = support.schema(), np.random.default_rng(3)
    samples = []
    for i in range(count):
        truth = (chance.random(support.CLASSES) < 0.3).astype(np.float32)
        gaps = {"audio": 0} if i % 3 == 0 else {}
        post = support.features(f"p{i}", seed=i, lengths={"video": 1 + i % 4, **gaps})
        samples.append(Sample(post.post_id, schema.arrays(post), truth))
    return samples


def one_step(
    folder: Path, samples: list[Sample], batch_size: int, **values: Any
) -> tuple[nn.Module, float]:
    torch.manual_seed(0)
    options = support.SMALL.model_copy(update={"auxiliary": 0.5, "modality_dropout": 0.0})
    model = MODELS["token_transformer"](support.schema(), options).train()
    run_settings = support.train_settings(
        folder, trainer={"epochs": 1, "batch_size": batch_size, "tensorboard": False}
    ).trainer.model_copy(update={"save_dir": folder / str(len(list(folder.iterdir())))})
    fabric = Fabric(accelerator="cpu", devices=1)
    trainer = Trainer(fabric, run_settings, settings(**values), signature="{}", seed=0)
    objective = Objective(model, TaggingLoss(LossSettings(), torch.ones(6)), auxiliary=0.5)
    posts: Any = samples  # a list is as good as a data set
    trainer.fit(objective, TrainData(posts, None, Collate(support.schema()), len(samples)))
    [epoch] = [e for e in read_run(trainer.log.path) if e["event"] == "epoch"]
    return model, float(epoch["loss"])


def test_accumulated_batches_equal_one_large_batch(tmp_path: Path) -> None:
    """Loss and weights after a step are the same, with own heads and batches of unlike sizes.

    With SGD: optimizers that divide by the gradient's size blow up rounding where it is zero.
    """
    options = {"name": "sgd", "learning_rate": 0.1, "gradient_clip": 0.1}
    whole, loss = one_step(tmp_path, posts(12), 12, **options)
    split, mean = one_step(tmp_path, posts(12), 5, accumulate=3, **options)
    assert mean == pytest.approx(loss, abs=1e-6)
    for (key, one), other in zip(whole.named_parameters(), split.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5, msg=key)


def test_clipping_bounds_the_norm_of_all_gradients_together(tmp_path: Path) -> None:
    """SGD without momentum moves the weights by rate · clip at most; null does not hold them."""
    torch.manual_seed(0)
    start, _ = one_step(tmp_path, posts(6), 6, name="sgd", learning_rate=1e-12)
    moved = {}
    for clip in (0.01, 1e6, None):
        options = {"name": "sgd", "learning_rate": 1.0, "momentum": 0, "weight_decay": 0}
        model, _ = one_step(tmp_path, posts(6), 6, **options, gradient_clip=clip)
        both = zip(model.parameters(), start.parameters(), strict=True)
        moved[clip] = sum(float(((a - b) ** 2).sum().detach()) for a, b in both) ** 0.5
    assert moved[0.01] == pytest.approx(0.01, rel=1e-3)
    assert moved[None] == pytest.approx(moved[1e6], rel=1e-5)
    assert moved[None] > 0.05
