"""Devices, CPU threads and precision: bfloat16 where the hardware has it, float32 elsewhere."""

from __future__ import annotations

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
_LARGEST_FLOAT16 = 65504.0


@lru_cache(maxsize=1)
def cpu_has_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Return True when this CPU multiplies bfloat16 in hardware; emulated, it is slow."""
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return not _BF16_FLAGS.isdisjoint(flags.split())


def resolve_precision(wanted: Precision, device: str, *, setting: str) -> Arithmetic:
    """Return the arithmetic on a device (``cpu`` or ``cuda:N``); ``auto`` is decided here.

    Raises ConfigError, naming the setting, when the device cannot do what is wanted.
    """
    if wanted == "auto":
        if device == "cpu":
            return "bf16" if cpu_has_bf16() else "fp32"
        import torch

        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if wanted == "fp16" and device == "cpu":
        raise ConfigError(f"{setting}: fp16 needs a CUDA device; use auto, bf16 or fp32 on the CPU")
    return wanted


def torch_dtype(arithmetic: Arithmetic) -> torch.dtype:
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[arithmetic]


def cast_weights(model: torch.nn.Module, arithmetic: Arithmetic) -> None:
    """Store linear and convolution weights in the arithmetic's dtype, in place.

    Autocast would cast them again in every forward pass; casting once gives the same numbers, half
    the memory and a third more speed on single pictures. Norms, embeddings and subclasses, which
    may compute on their weights, stay float32.
    """
    if arithmetic == "fp32":
        return
    from torch import nn

    exact = {nn.Linear, nn.Conv2d}
    for module in model.modules():
        if type(module) in exact:
            module.to(torch_dtype(arithmetic))


def autocast(device: str, arithmetic: Arithmetic) -> AbstractContextManager[Any]:
    """Mixed precision for one forward pass; does nothing for fp32."""
    if arithmetic == "fp32":
        return nullcontext()
    import torch

    return torch.autocast(device.partition(":")[0], dtype=torch_dtype(arithmetic))


def to_float16(tensor: torch.Tensor) -> torch.Tensor:
    """Return float16 on the CPU; values beyond its range are clamped, NaN stays NaN."""
    import torch

    clamped = tensor.float().clamp(-_LARGEST_FLOAT16, _LARGEST_FLOAT16)
    return clamped.to(torch.float16).cpu()


def require_device(device: str) -> torch.device:
    """Return a torch device; ConfigError when this machine does not have it."""
    import torch

    wanted = torch.device(device)
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device {device}: this machine has {torch.cuda.device_count()} CUDA devices"
        )
    return wanted


def set_threads(threads: int | None) -> None:
    """Limit torch's CPU threads of this process; None leaves them."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
