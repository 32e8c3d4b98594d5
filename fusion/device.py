"""Which precision a device is good at, and CPU threads."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from pathlib import Path

import torch

from config.errors import ConfigError
from config.settings import Precision


@lru_cache(maxsize=1)
def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 natively; where it does not, bf16 is slower."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    flags = next((line for line in lines if line.startswith("flags")), "")
    return bool({"avx512_bf16", "amx_bf16"} & set(flags.split()))


def resolve_precision(precision: Precision, device: str) -> Precision:
    """What ``auto`` means on a device: bf16 where it is native, else fp32."""
    if precision != "auto":
        return precision
    if device.startswith("cuda"):
        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    return "bf16" if cpu_has_bf16() else "fp32"


def autocast(precision: Precision, device: str) -> AbstractContextManager[object]:
    """The autocast region of a forward pass; nothing for fp32."""
    resolved = resolve_precision(precision, device)
    if resolved == "fp32":
        return nullcontext()
    dtype = torch.bfloat16 if resolved == "bf16" else torch.float16
    return torch.autocast(device.partition(":")[0], dtype=dtype)


def require_device(device: str) -> torch.device:
    """A torch device that is there.

    Raises:
        ConfigError: The device does not exist on this machine.
    """
    wanted = torch.device(device)
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device {device}: this machine has {torch.cuda.device_count()} CUDA devices"
        )
    return wanted


def set_threads(threads: int | None) -> None:
    """Limit torch's CPU threads of this process; None leaves them."""
    if threads is not None:
        torch.set_num_threads(threads)
