"""The optimizer, its parameter groups and schedule, and a moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from config.train import OptimizerName, OptimizerSettings, ScheduleName
from fusion.models import FusionModel
from fusion.models.base import Group, Stage

ParameterGroup: TypeAlias = dict[str, Any]
Factor: TypeAlias = Callable[[int], float]

# Gradients that are 0 but for rounding, as of attention's key biases, stay small against this: they
# would else be blown up to full steps, and differ between one process and several.
_EPSILON = 1e-7
# The defaults of torch's OneCycleLR: 1 / div_factor, and that divided by final_div_factor.
_ONE_CYCLE_START, _ONE_CYCLE_END = 1 / 25, 1 / 250_000


def parameter_groups(model: nn.Module, settings: OptimizerSettings) -> list[ParameterGroup]:
    """Return every parameter that learns in exactly one group, with its learning rate and decay.

    Matrices and filters decay; biases, norms and learned vectors do not. A model that is no
    `FusionModel` is one stage.
    """
    stages, undecayed = _stages(model)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        rate = _rate(name, stages, settings)
        decays = parameter.ndim > 1 and name not in undecayed
        key = (rate, settings.weight_decay if decays else 0.0)
        groups.setdefault(key, []).append(parameter)
    # The highest rate first: it is the one that the log shows.
    ordered = sorted(groups.items(), key=lambda item: (-item[0][0], -item[0][1]))
    return [
        # The name comes along into the checkpoint: another optimizer cannot go on from it.
        {"params": p, "lr": rate, "weight_decay": decay, "optimizer": settings.name}
        for (rate, decay), p in ordered
    ]


def _stages(model: nn.Module) -> tuple[tuple[Stage, ...], frozenset[str]]:
    if isinstance(model, FusionModel):
        return model.stages(), model.undecayed()
    return (Stage("fusion", ("",)),), frozenset()


def _rate(name: str, stages: tuple[Stage, ...], settings: OptimizerSettings) -> float:
    places = [i for i, stage in enumerate(stages) if any(_within(name, n) for n in stage.names)]
    if len(places) != 1:
        raise ValueError(f"parameter {name} is in {len(places)} stages of its model, not in one")
    group: Group = stages[places[0]].group
    rates: Mapping[Group, float | None] = {
        "modality": settings.group_rates.modality,
        "fusion": settings.group_rates.fusion,
        "head": settings.group_rates.head,
    }
    rate = rates[group]
    rate = settings.learning_rate if rate is None else rate
    return rate * settings.layer_decay ** (len(stages) - 1 - places[0])


def _within(name: str, part: str) -> bool:
    return not part or name == part or name.startswith(f"{part}.")


def warm_up_cosine(step: int, steps: int, warm_up: float) -> float:
    """Return a step's factor of the learning rate: linear up from 0, a cosine down to 0.

    ``warm_up`` is the share of the steps that go up.
    """
    up = max(1, round(steps * warm_up))
    if step < up:
        return (step + 1) / up
    done = (step - up) / max(1, steps - up)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def restarts(step: int, steps: int, warm_up: float, cycles: int) -> float:
    """Return the factor of the learning rate at a step: `warm_up_cosine` for each cycle in turn.

    Source: arXiv 1704.00109 (snapshot ensembles), with a warm-up in each cycle.
    """
    cycle = min(cycles - 1, step * cycles // max(1, steps))
    first, end = (-(-c * steps // cycles) for c in (cycle, cycle + 1))
    return warm_up_cosine(step - first, end - first, warm_up)


def cycle_ends(epochs: int, cycles: int) -> tuple[int, ...]:
    """Return the epochs, from 1, at whose ends the learning rate is at its lowest."""
    return tuple(-(-c * epochs // cycles) for c in range(1, cycles + 1))


def one_cycle(step: int, steps: int, warm_up: float) -> float:
    """Return the factor of the learning rate at a step: cosines from 1/25 to 1 to 1/250,000.

    Momentum stays as it is.

    Source: arXiv 1708.07120, with the cosines and ends of torch's OneCycleLR.
    """
    top, last = warm_up * steps - 1, steps - 1
    if step <= top:
        return _cosine_between(_ONE_CYCLE_START, 1.0, step / top if top > 0 else 1.0)
    return _cosine_between(1.0, _ONE_CYCLE_END, (step - top) / max(1, last - top))


def _cosine_between(start: float, end: float, done: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * min(1.0, done)))


def warm_up_steps(step: int, steps: int, settings: OptimizerSettings) -> float:
    """Return the learning rate's factor: linear up, then ``step_factor`` at each ``steps_at``."""
    passed = sum(step >= round(share * steps) for share in settings.steps_at)
    return _warm_up(step, steps, settings) * settings.step_factor**passed


def _warm_up(step: int, steps: int, settings: OptimizerSettings) -> float:
    return min(1.0, (step + 1) / max(1, round(steps * settings.warm_up)))


SCHEDULES: Mapping[ScheduleName, Callable[[OptimizerSettings, int], Factor]] = {
    "cosine": lambda s, steps: partial(restarts, steps=steps, warm_up=s.warm_up, cycles=s.cycles),
    "one_cycle": lambda s, steps: partial(one_cycle, steps=steps, warm_up=s.warm_up),
    "step": lambda s, steps: partial(warm_up_steps, steps=steps, settings=s),
    "constant": lambda s, steps: partial(_warm_up, steps=steps, settings=s),
}

OPTIMIZERS: Mapping[
    OptimizerName, Callable[[list[ParameterGroup], OptimizerSettings], torch.optim.Optimizer]
] = {
    "adamw": lambda groups, s: torch.optim.AdamW(groups, lr=s.learning_rate, eps=_EPSILON),
    "adam": lambda groups, s: torch.optim.Adam(groups, lr=s.learning_rate, eps=_EPSILON),
    "sgd": lambda groups, s: torch.optim.SGD(groups, lr=s.learning_rate, momentum=s.momentum),
    "rmsprop": lambda groups, s: torch.optim.RMSprop(
        groups, lr=s.learning_rate, momentum=s.momentum, eps=_EPSILON
    ),
}


def build_optimizer(
    model: nn.Module, settings: OptimizerSettings, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """Return the optimizer that settings name and its schedule over ``steps`` steps.

    The schedule is a function of the step alone, so that a resumed run goes on just where it was.
    """
    optimizer = OPTIMIZERS[settings.name](parameter_groups(model, settings), settings)
    factor = SCHEDULES[settings.schedule](settings, steps)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def average_of(model: nn.Module, decay: float) -> AveragedModel:
    """Return an exponential moving average of a model's state; `update_parameters` moves it.

    It warms up: after n steps the decay is at most (1 + n) / (10 + n), so that the untrained
    weights fade early. Counters of batches are copied.
    """

    def move(averages: Any, values: Any, steps: Any) -> None:
        if averages[0].is_floating_point():
            count = int(steps)
            warmed = min(decay, (1 + count) / (10 + count))
            lerp: Any = get_ema_multi_avg_fn(warmed)  # type: ignore[no-untyped-call]
            lerp(averages, values, steps)
        else:
            torch._foreach_copy_(averages, values)

    average = AveragedModel(model, multi_avg_fn=move, use_buffers=True)
    average.update_parameters(model)  # the first update copies: the average begins with the start
    return average
