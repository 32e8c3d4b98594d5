"""The optimizer, its schedule, and a moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from config.train import OptimizerSettings


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Decay matrices and filters, not biases, norms and learned vectors; every parameter once."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def warm_up_cosine(step: int, steps: int, warm_up: float) -> float:
    """Factor of the learning rate at a step: linear up, then a cosine down to 0.

    Args:
        step: From 0.
        steps: Of the whole run.
        warm_up: Share of the steps that go up.
    """
    up = max(1, round(steps * warm_up))
    if step < up:
        return (step + 1) / up
    done = (step - up) / max(1, steps - up)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def build_optimizer(
    model: nn.Module, settings: OptimizerSettings, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW and its schedule over ``steps`` steps."""
    groups = parameter_groups(model, settings.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warm_up_cosine(step, steps, settings.warm_up)
    )
    return optimizer, schedule


class MovingAverage:
    """Exponential moving average of a model's state; it warms up, so that early steps count less.

    Buffers that are no floats (counters) are copied.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay = decay
        self._steps = 0
        self._state = {k: v.detach().clone() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take one step of the model into the average."""
        self._steps += 1
        decay = min(self._decay, (1 + self._steps) / (10 + self._steps))
        for key, value in model.state_dict().items():
            kept = self._state[key]
            if kept.is_floating_point():
                kept.lerp_(value, 1 - decay)
            else:
                kept.copy_(value)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Give the model the averaged weights while the block runs."""
        own = {k: v.detach().clone() for k, v in model.state_dict().items()}
        model.load_state_dict(self._state)
        try:
            yield
        finally:
            model.load_state_dict(own)

    def state_dict(self) -> dict[str, object]:
        """For the checkpoint."""
        return {"steps": self._steps, "state": self._state}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """From the checkpoint."""
        steps, tensors = state["steps"], state["state"]
        if not isinstance(steps, int) or not isinstance(tensors, dict):
            raise TypeError("no state of a moving average")
        self._steps = steps
        for key, value in tensors.items():
            self._state[key].copy_(value)
