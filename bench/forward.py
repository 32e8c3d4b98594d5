"""Hold the encoders' forward passes against plain torch, and against what the device can multiply.

Of each encoder: items/s as our extractor runs it (its preprocessing, precision and copies
included), with ``engine: compile`` too, of the same network in plain eager float32, in pure bf16,
compiled bf16 where that works, and the arithmetic limit: the FLOP/s of a large matrix product in
the arithmetic that ours takes, over the FLOP of an item. On a CPU one thread, and CPU time, since
other work on the machine takes caches away; on a GPU the time by the clock. The best of some runs.
Weights do not change the cost, so that those which are not here are random. OCR, which has no plain
counterpart, reads a picture of 960x720 with one line.

Run: ``python bench/forward.py [--device cpu] [--runs N] [--batch N] [--compile] [--small]``; needs
the packages of ``pip install '.[small]'``.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs as a plain script too
os.environ["OMP_NUM_THREADS"] = "1"

import cv2
import numpy as np
import torch
from floors import finish
from results_file import FOLDER
from torch.utils.flop_counter import FlopCounterMode

from common.precision import resolve_precision
from common.tables import print_table
from config.features import ExtractorName, FeatureSettings
from extractors.models.audio import build_encoder
from extractors.models.catalog import needs
from extractors.models.text import TextEncoder
from extractors.models.visual import make_backbone
from extractors.suite import ExtractorSuite

WORDS = "a red bus waits in front of the old town hall while people cross the wet street"
CASES: dict[str, tuple[ExtractorName, ...]] = {
    "small": ("image", "audio", "text", "ocr"),
    "classic": ("image", "audio"),
}
_PATCHES = 10
_SIDE = {"cpu": 1024, "cuda": 8192}
"""Of the matrices of the limit: larger ones are no faster; half of it is, by a tenth, slower."""
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def features_of(preset: str) -> FeatureSettings:
    """Return the settings of a preset, with random weights where none can be had."""
    if preset == "tiny":
        from tests.support.tiny_models import tiny_features

        return tiny_features()
    chosen: dict[str, Any] = {"preset": preset, "audio": {"weights": "random:0"}}
    if preset == "classic":
        chosen["image"] = {"weights": "random:0"}
    return FeatureSettings.model_validate(chosen)


def items(features: FeatureSettings, name: str, rows: int) -> list[Any]:
    """Return one batch of items for an extractor, as decoders give them."""
    chance = np.random.default_rng(0)
    side = features.image.image_size
    match name:
        case "image":
            return [chance.integers(0, 256, (1, side, side, 3), np.uint8) for _ in range(rows)]
        case "audio":
            size = (_PATCHES, 96, 64)
            count = max(1, rows // _PATCHES)
            return [chance.normal(-2, 2, size).astype(np.float32) for _ in range(count)]
        case "text":
            return [" ".join(chance.permutation(WORDS.split())) for _ in range(rows)]
    page = np.full((720, 960, 3), 255, np.uint8)
    cv2.putText(page, "Summer sale, two for one", (80, 360), 0, 1.5, (0, 0, 0), 3)
    return [(page,) for _ in range(rows)]


class Clock:
    """Times calls on a device."""

    def __init__(self, device: str, runs: int) -> None:
        self.device, self._runs = device, runs

    def per_s(self, call: Callable[[], Any], count: int) -> float:
        """Return how many of `count` items a call does in a second; the best of the runs."""
        call()
        return count / min(self._once(call) for _ in range(self._runs))

    def _once(self, call: Callable[[], Any]) -> float:
        if self.device == "cpu":
            began = time.process_time()
            call()
            return time.process_time() - began
        torch.cuda.synchronize(self.device)
        began = time.perf_counter()
        call()
        torch.cuda.synchronize(self.device)
        return time.perf_counter() - began


def product_flops(clock: Clock, arithmetic: str, side: int) -> float:
    """Return the FLOP/s of a matrix product in an arithmetic."""
    one = torch.randn(side, side, device=clock.device, dtype=_DTYPES[arithmetic])
    other = torch.randn_like(one)
    return clock.per_s(lambda: one @ other, 1) * 2 * side**3


def plain_network(features: FeatureSettings, name: str, device: str) -> tuple[Any, Any]:
    """Return a network in float32, laid out as torch makes it, and a maker of its inputs."""
    whole = {"precision": "fp32"}
    encoder: Any
    match name:
        case "image":
            settings = features.image.model_copy(update=whole)
            encoder = make_backbone("image", settings, device)
            shape: tuple[int, ...] = (3, settings.image_size, settings.image_size)
        case "audio":
            encoder = build_encoder(features.audio.model_copy(update=whole), device)
            shape = (1, 96, 64)
        case _:
            encoder = TextEncoder(features.text.model_copy(update=whole), device)
    encoder.load()
    network = encoder.model.to(memory_format=torch.contiguous_format)
    if name != "text":
        return network, lambda rows, dtype: (torch.randn(rows, *shape, device=device, dtype=dtype),)
    ids = encoder.tokenize(WORDS)
    ids += [encoder.pad_id] * (-len(ids) % 32)  # as the extractor pads them

    def tokens(rows: int, _dtype: Any) -> tuple[Any, ...]:
        batch = torch.tensor([ids] * rows, device=device)
        return batch, torch.ones_like(batch)

    return network, tokens


def plain_rates(
    clock: Clock, network: Any, inputs: Any, rows: int, *, compiled: bool
) -> dict[str, float | None]:
    """Return items/s of a network in plain torch; None for what does not work here."""
    bf16 = copy.deepcopy(network).to(torch.bfloat16)
    whole, half = inputs(rows, torch.float32), inputs(rows, torch.bfloat16)
    rates: dict[str, float | None] = {
        "eager_fp32_per_s": clock.per_s(lambda: network(*whole), rows),
        "bf16_per_s": clock.per_s(lambda: bf16(*half), rows),
        "bf16_compiled_per_s": None,
    }
    if compiled:
        try:
            fast: Any = torch.compile(bf16)
            rates["bf16_compiled_per_s"] = clock.per_s(lambda: fast(*half), rows)
        except Exception as error:  # noqa: BLE001 - inductor's share no base class
            print(f"torch.compile: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
    return rates


def flop_of(network: Any, inputs: Any) -> int:
    """Return the FLOP of one item, of products and convolutions."""
    with FlopCounterMode(display=False) as counter:
        network(*inputs(1, torch.float32))
    return int(counter.get_total_flops())


@torch.inference_mode()
def measure(
    preset: str, name: ExtractorName, clock: Clock, batch: int | None, *, compiled: bool
) -> dict[str, Any]:
    """Return the row of an extractor, loaded alone."""
    features, device = features_of(preset), clock.device
    usual = {"text": 32, "ocr": 4}.get(name, 16 if preset != "classic" else 4)
    count = batch or (usual if device == "cpu" else 128)
    section = getattr(features, name)
    if name != "ocr":  # so that a batch is one pass
        section = section.model_copy(update={"batch_size": max(count, section.batch_size)})
        features = features.model_copy(update={name: section})
    examples = items(features, name, count)
    rows = len(examples) * (_PATCHES if name == "audio" else 1)

    def our_rate(features: FeatureSettings) -> float:
        suite = ExtractorSuite(features, device, (name,), threads=1)
        suite.load()
        rate = clock.per_s(lambda: suite.run(name, examples), rows)
        suite.close()
        return rate

    ours = our_rate(features)
    [arch] = [need.arch for need in needs(features) if name in need.modalities] or [name]
    row: dict[str, Any] = {
        "preset": preset,
        "for": name,
        "encoder": arch,
        "device": device.partition(":")[0],
        "batch": rows,
        "ms": round(1000 / ours, 2 if ours < 1000 else 4),
        "items_per_s": round(ours, 2),
    }
    if name == "ocr":
        return row
    arithmetic = resolve_precision(section.precision, device, setting=f"features.{name}")
    if compiled:
        section = section.model_copy(update={"engine": "compile"})
        rate = our_rate(features.model_copy(update={name: section}))
        row["ours_compiled_per_s"] = round(rate, 2)
    network, inputs = plain_network(features, name, device)
    rates = plain_rates(clock, network, inputs, rows, compiled=compiled)
    flop = flop_of(network, inputs)
    limit = product_flops(clock, arithmetic, _SIDE[row["device"]]) / flop
    best = max(rate for rate in rates.values() if rate is not None)
    rounded = {key: rate and round(rate, 2) for key, rate in rates.items()}
    return {
        **row,
        "arithmetic": arithmetic,
        "gflop": round(flop / 1e9, 3),
        **rounded,
        "limit_per_s": round(limit, 1),
        "share_of_limit": round(ours / limit, 3),
        "over_eager_fp32": round(ours / (rates["eager_fp32_per_s"] or 1), 2),
        "over_best_plain": round(ours / best, 2),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="forward",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = "cuda:0" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help=f"cpu or cuda:N (default {default})")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--batch", type=int, help="items of a batch, instead of the usual number")
    parser.add_argument("--compile", action="store_true", help="torch.compile on a CPU too")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of forward.json")
    parser.add_argument("--small", action="store_true", help="two runs of the tests' tiny models")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    cases = {"tiny": ("image", "text")} if options.small else CASES
    clock = Clock(options.device, 2 if options.small else options.runs)
    compiled = options.compile or options.device != "cpu"
    rows = []
    for preset, names in cases.items():
        for name in names:
            rows.append(measure(preset, name, clock, options.batch, compiled=compiled))  # type: ignore[arg-type]
            print(rows[-1], file=sys.stderr)
    rates = (
        "items_per_s",
        "ours_compiled_per_s",
        "eager_fp32_per_s",
        "bf16_per_s",
        "bf16_compiled_per_s",
    )
    columns = ("encoder", "device", *rates, "limit_per_s", "share_of_limit")
    print_table("items/s", columns, [[row.get(c) for c in columns] for row in rows])
    return finish("forward", options.runs, rows, options.out, check=not options.small)


if __name__ == "__main__":
    sys.exit(main())
