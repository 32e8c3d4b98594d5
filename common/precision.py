"""Devices, CPU threads and precision: bfloat16 where the hardware has it, float32 elsewhere."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

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
