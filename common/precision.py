"""Devices, CPU threads and precision: bfloat16 where the hardware has it, float32 elsewhere."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from common.errors import ConfigError

if TYPE_CHECKING:
    import torch

Precision = Literal["auto", "bf16", "fp16", "fp32"]
Arithmetic = Literal["bf16", "fp16", "fp32"]

_BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})


@lru_cache(maxsize=1)
def cpu_has_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Return True when this CPU multiplies bfloat16 in hardware; emulated, it is slow."""
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return not _BF16_FLAGS.isdisjoint(flags.split())


def resolve_precision(precision: Precision, device: str, *, setting: str) -> Arithmetic:
    """Return the arithmetic on a device (``cpu`` or ``cuda:N``); ``auto`` is decided here.

    Raises ConfigError, naming the setting, when the device cannot do what is wanted.
    """
    if precision == "auto":
        if device == "cpu":
            return "bf16" if cpu_has_bf16() else "fp32"
        import torch

        with torch.cuda.device(device):  # it asks about the current one
            return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if precision == "fp16" and device == "cpu":
        raise ConfigError(f"{setting}: fp16 needs a CUDA device; use auto, bf16 or fp32 on the CPU")
    return precision


def require_device(device: str) -> torch.device:
    """Return a torch device; ConfigError when this machine does not have it."""
    import torch

    chosen = torch.device(device)
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device {device}: this machine has {torch.cuda.device_count()} CUDA devices"
        )
    return chosen


def set_threads(threads: int | None) -> None:
    """Limit torch's CPU threads of this process; None leaves them."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def torch_dtype(arithmetic: Arithmetic) -> torch.dtype:
    """Return the torch dtype of an arithmetic."""
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[arithmetic]


def autocast(device: str, arithmetic: Arithmetic) -> AbstractContextManager[Any]:
    """Use mixed precision for one forward pass; do nothing for fp32."""
    if arithmetic == "fp32":
        return nullcontext()
    import torch

    return torch.autocast(device.partition(":")[0], dtype=torch_dtype(arithmetic))


def copy_in_half(model: torch.nn.Module, arithmetic: Arithmetic, *, whole: bool) -> Any:
    """Return a copy of a float32 model with parameters in half precision; the rest is copied.

    Args:
        model: It stays as it is, and so do its buffers that are not saved: positions of rotary
            embeddings lose their last digits in half precision.
        arithmetic: ``bf16`` or ``fp16``.
        whole: Everything that is saved. Otherwise the weights of products and convolutions alone,
            for passes under `autocast`, which would cast them again each time; subclasses of these
            layers may compute on their weights, which stay float32.
    """
    from torch import nn

    layers = [
        module for module in model.modules() if whole or type(module) in (nn.Linear, nn.Conv2d)
    ]
    dtype = torch_dtype(arithmetic)
    memo: dict[int, Any] = {}  # what deepcopy takes as copied already: float32 is not held twice
    for module in layers:
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point():
                memo[id(parameter)] = nn.Parameter(parameter.detach().to(dtype), False)
        for name, buffer in module.named_buffers(recurse=False):
            saved = name not in module._non_persistent_buffers_set
            if saved and buffer.is_floating_point():
                memo[id(buffer)] = buffer.to(dtype)
    return copy.deepcopy(model, memo)
