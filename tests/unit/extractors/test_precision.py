"""Choice of the arithmetic, and the accuracy of half precision."""

from pathlib import Path

import pytest
import torch

from common.errors import ConfigError
from common.precision import cpu_has_bf16, require_device, resolve_precision
from extractors.models.base import autocast, cast_weights, to_float16


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("processor : 0\nflags : fpu avx2 avx512f avx512_bf16 sse\n", True),
        ("flags\t\t: fpu amx_bf16 amx_tile\n", True),
        ("flags : fpu avx2 avx512f avx512_vnni\n", False),
        ("Features : fp asimd\n", False),
        ("", False),
    ],
)
def test_bf16_is_read_off_the_processor(tmp_path: Path, text: str, expected: bool) -> None:
    """Only processors that multiply bfloat16 in hardware count."""
    file = tmp_path / "cpuinfo"
    file.write_text(text)
    assert cpu_has_bf16(file) is expected
    assert cpu_has_bf16(tmp_path / "none") is False


def test_auto_follows_the_processor() -> None:
    """Auto is bf16 exactly where the CPU has it; what is asked for by name is honoured."""
    expected = "bf16" if cpu_has_bf16() else "fp32"
    assert resolve_precision("auto", "cpu", setting="s") == expected
    assert resolve_precision("fp32", "cpu", setting="s") == "fp32"
    assert resolve_precision("bf16", "cpu", setting="s") == "bf16"
    with pytest.raises(ConfigError, match=r"features.image.precision: fp16"):
        resolve_precision("fp16", "cpu", setting="features.image.precision")


def test_casting_weights_once_changes_no_number() -> None:
    """Weights stored in bf16 give bit for bit what autocast gives on float32 weights."""
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3),
        torch.nn.Flatten(),
        torch.nn.LayerNorm(288),
        torch.nn.Linear(288, 4),
    )
    inputs = torch.rand(2, 3, 8, 8)
    with torch.no_grad(), autocast("cpu", "bf16"):
        before = model(inputs)
        cast_weights(model, "bf16")
        after = model(inputs)
    assert model[0].weight.dtype == torch.bfloat16
    assert model[2].weight.dtype == torch.float32
    assert torch.equal(before, after)


def test_float16_is_clamped_not_overflown() -> None:
    """Large values stay finite; NaN stays visible."""
    found = to_float16(torch.tensor([1e9, -1e9, 1.5, float("nan")]))
    assert found.tolist()[:3] == [65504.0, -65504.0, 1.5]
    assert torch.isnan(found[3])


def test_a_device_that_is_not_there_is_named() -> None:
    assert require_device("cpu").type == "cpu"
    with pytest.raises(ConfigError, match="device cuda:99: this machine has"):
        require_device("cuda:99")
