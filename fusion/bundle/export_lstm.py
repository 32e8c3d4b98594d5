"""LSTMs that can be exported with any number of tokens.

`torch.export` unrolls an `nn.LSTM` over the tokens of its example, which fixes their number.
Therefore an LSTM becomes one operator for ONNX, written as its own LSTM, and a `scan` for torch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

Kind: TypeAlias = Literal["onnx", "torch"]
_One: TypeAlias = Callable[..., torch.Tensor]


def exportable(module: nn.Module, kind: Kind) -> nn.Module:
    """Return a copy of a module whose LSTMs can be exported; without LSTMs the module itself."""
    if not any(isinstance(part, nn.LSTM) for part in module.modules()):
        return module
    changed = copy.deepcopy(module)
    one: _One = torch.ops.insighttag.lstm if kind == "onnx" and _operator() else _scanned
    for parent in list(changed.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.LSTM):
                setattr(parent, name, ExportableLSTM(child, one))
    return changed


class ExportableLSTM(nn.Module):
    """An `nn.LSTM` of one layer, batch first, with the same weights."""

    def __init__(self, lstm: nn.LSTM, one: _One) -> None:
        super().__init__()
        if lstm.num_layers != 1 or not lstm.batch_first or not lstm.bias or lstm.proj_size:
            raise ValueError("only LSTMs of one layer with bias, batch first, are exported")
        self.both = lstm.bidirectional
        self._one = one
        for name, value in lstm.named_parameters():
            self.register_buffer(name, value.detach().clone())

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Map ``(posts, n, dim)`` to ``(posts, n, hidden)``, twice as wide if bidirectional."""
        ahead = self._one(tokens, *self._weights(""))
        if not self.both:
            return ahead, None
        back = self._one(tokens.flip(1), *self._weights("_reverse")).flip(1)
        return torch.cat([ahead, back], dim=2), None

    def _weights(self, suffix: str) -> list[torch.Tensor]:
        names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
        return [self.get_buffer(f"{name}{suffix}") for name in names]


def _scanned(
    tokens: torch.Tensor,
    w_in: torch.Tensor,
    w_hidden: torch.Tensor,
    b_in: torch.Tensor,
    b_hidden: torch.Tensor,
) -> torch.Tensor:
    """Run one direction; torch's gates are input, forget, cell, output."""
    from torch._higher_order_ops.scan import scan

    gates = (tokens @ w_in.T + b_in + b_hidden).transpose(0, 1)  # (n, posts, 4·hidden)

    def step(
        state: tuple[torch.Tensor, torch.Tensor], gate: torch.Tensor
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
        hidden, cell = state
        enter, forget, new, out = (gate + hidden @ w_hidden.T).chunk(4, -1)
        cell = torch.sigmoid(forget) * cell + torch.sigmoid(enter) * torch.tanh(new)
        hidden = torch.sigmoid(out) * torch.tanh(cell)
        return (hidden, cell), hidden.clone()

    start = tokens.new_zeros(tokens.shape[0], w_hidden.shape[1])
    _, states = scan(step, (start, start.clone()), gates, dim=0)
    result: torch.Tensor = states.transpose(0, 1)  # (n, posts, hidden) -> (posts, n, hidden)
    return result


@lru_cache(maxsize=1)
def _operator() -> bool:
    """Make ``insighttag::lstm``; once in a process."""

    def lstm(
        tokens: torch.Tensor,
        w_in: torch.Tensor,
        w_hidden: torch.Tensor,
        b_in: torch.Tensor,
        b_hidden: torch.Tensor,
    ) -> torch.Tensor:
        start = tokens.new_zeros(1, tokens.shape[0], w_hidden.shape[1])
        weights = [w_in, w_hidden, b_in, b_hidden]
        states: torch.Tensor = torch.lstm(
            tokens, [start, start.clone()], weights, True, 1, 0.0, False, False, True
        )[0]
        return states

    def shape(
        tokens: torch.Tensor,
        w_in: torch.Tensor,
        w_hidden: torch.Tensor,
        b_in: torch.Tensor,
        b_hidden: torch.Tensor,
    ) -> torch.Tensor:
        return tokens.new_empty(tokens.shape[0], tokens.shape[1], w_hidden.shape[1])

    # By its schema, and not by its annotations, which are text in this module.
    schema = "(Tensor tokens, Tensor w_in, Tensor w_hidden, Tensor b_in, Tensor b_hidden) -> Tensor"
    made = torch.library.custom_op("insighttag::lstm", lstm, mutates_args=(), schema=schema)
    made.register_fake(shape)
    return True


def onnx_translations() -> Mapping[Any, Any]:
    """Return ``insighttag::lstm`` as ONNX writes it: gates are input, output, forget, cell."""
    _operator()
    from onnxscript import opset18

    op: Any = opset18

    def gates(weights: Any) -> Any:
        enter, forget, new, out = op.Split(weights, num_outputs=4, axis=0)
        return op.Concat(enter, out, forget, new, axis=0)

    def lstm(tokens: Any, w_in: Any, w_hidden: Any, b_in: Any, b_hidden: Any) -> Any:
        states, _, _ = op.LSTM(
            op.Transpose(tokens, perm=[1, 0, 2]),
            op.Unsqueeze(gates(w_in), [0]),
            op.Unsqueeze(gates(w_hidden), [0]),
            op.Unsqueeze(op.Concat(gates(b_in), gates(b_hidden), axis=0), [0]),
            hidden_size=w_hidden.shape[1],
        )  # (n, 1, posts, hidden)
        return op.Transpose(op.Squeeze(states, [1]), perm=[1, 0, 2])

    return {torch.ops.insighttag.lstm.default: lstm}
