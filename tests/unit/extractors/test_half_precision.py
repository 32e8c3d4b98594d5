"""How much of a network runs in half precision: as much as leaves its vectors those of float32."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import structlog
import torch

from config.features import AudioSettings
from extractors.models.base import Encoder, Rows
from extractors.models.weights import Weights

ROWS = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)


class Plain(torch.nn.Module):
    """A layer between what is left in half precision, and what is not."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(8, 8)
        torch.nn.init.orthogonal_(self.layer.weight)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layer(rows)
        return out


class FarAway(Plain):
    """Its differences are small next to its values, in which half precision keeps three digits."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("far", torch.full((8,), 1000.0))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        near: torch.Tensor = super().forward(rows) + self.get_buffer("far") - 1000.0
        return near


class Fine(Plain):
    """Its products are of large numbers that nearly cancel."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        far = torch.full_like(rows, 1000.0)
        return super().forward(rows + far) - super().forward(far)


class OfOneNetwork(Encoder):
    """Rows of numbers in, vectors out."""

    kind = "test"

    def __init__(self, network: torch.nn.Module) -> None:
        settings = AudioSettings(arch="one", weights="random:0", precision="bf16", engine="torch")
        super().__init__("features.audio", settings, "cpu")
        self._given, self.dim = network, 8

    def _build(self, weights: Weights) -> Any:
        return self._given

    def _call(self, *inputs: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self._network(self._as_network(inputs[0]))
        return out

    def _examples(self) -> Sequence[Sequence[Rows]]:
        return [[ROWS[:2]], [ROWS[2:]]]


@pytest.mark.parametrize(
    ("network", "parameters", "said"),
    [
        (Plain, torch.bfloat16, []),
        (FarAway, torch.bfloat16, ["bf16 in products"]),
        (Fine, torch.float32, ["bf16 in products", "fp32"]),
    ],
)
def test_half_precision_where_vectors_stay(
    network: type[Plain], parameters: torch.dtype, said: list[str]
) -> None:
    encoder = OfOneNetwork(network())
    with torch.inference_mode():
        expected = encoder._given(torch.from_numpy(ROWS)).numpy()
    with structlog.testing.capture_logs() as logs:
        encoder.load()
    uses = [line["use"] for line in logs if line["event"] == "extractors.half_differs"]
    assert uses == said
    assert {each.dtype for each in encoder.model.parameters()} == {parameters}
    found = encoder.run(ROWS).astype(np.float32)
    cosines = (found * expected).sum(1) / np.linalg.norm(found, axis=1)
    assert (cosines / np.linalg.norm(expected, axis=1)).min() >= 0.999


class TooLarge(Plain):
    """It says in half precision that memory is full."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        if rows.dtype != torch.float32:
            raise torch.cuda.OutOfMemoryError("full")
        return super().forward(rows)


def test_full_memory_is_no_reason_for_float32() -> None:
    with pytest.raises(torch.cuda.OutOfMemoryError):
        OfOneNetwork(TooLarge()).load()
