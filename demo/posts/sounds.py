"""Sounds: synthetic, mono, 16 kHz."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

SAMPLE_RATE_HZ = 16_000

Wave: TypeAlias = npt.NDArray[np.float64]


def _time(duration_s: float) -> Wave:
    return np.arange(int(duration_s * SAMPLE_RATE_HZ)) / SAMPLE_RATE_HZ


def _sweep(frequency_hz: Wave) -> Wave:
    """Return a sine of changing frequency."""
    return np.sin(2 * np.pi * np.cumsum(frequency_hz) / SAMPLE_RATE_HZ)


def _bell(rng: np.random.Generator, time: Wave) -> Wave:
    base, wave = rng.uniform(350, 600), np.zeros_like(time)
    gap = rng.uniform(0.6, 0.9)
    for start in np.arange(0, float(time[-1]), gap):
        since = np.clip(time - start, 0, None)
        strike = np.where(time >= start, np.exp(-3.0 * since), 0.0)
        for partial, part in ((1.0, 1.0), (2.0, 0.6), (2.76, 0.5), (5.4, 0.3)):
            wave += part * strike * np.sin(2 * np.pi * base * partial * since)
    return wave


def _siren(rng: np.random.Generator, time: Wave) -> Wave:
    rate, phase = rng.uniform(1.0, 1.8), rng.uniform(0, 2 * np.pi)
    middle = rng.uniform(850, 1100)
    return _sweep(middle + 0.45 * middle * np.sin(2 * np.pi * rate * time + phase))


def _drums(rng: np.random.Generator, time: Wave) -> Wave:
    gap, wave = rng.uniform(0.18, 0.28), np.zeros_like(time)
    for beat, start in enumerate(np.arange(0, float(time[-1]), gap)):
        since = np.clip(time - start, 0, None)
        hit = np.where(time >= start, np.exp(-26 * since), 0.0)
        noise = rng.normal(0, 1, len(time)) if beat % 2 else 0.0
        wave += hit * (np.sin(2 * np.pi * (60 + 50 * np.exp(-30 * since)) * since) + 0.5 * noise)
    return wave


def _birds(rng: np.random.Generator, time: Wave) -> Wave:
    wave = np.zeros_like(time)
    start = rng.uniform(0, 0.1)
    while start < time[-1]:
        length = rng.uniform(0.06, 0.12)
        inside = (time >= start) & (time < start + length)
        step = (time[inside] - start) / length
        low, high = rng.uniform(2500, 3300), rng.uniform(4000, 5500)
        wave[inside] += np.sin(np.pi * step) * _sweep(low + (high - low) * step)
        start += length + rng.uniform(0.03, 0.12)
    return wave


def _rain(rng: np.random.Generator, time: Wave) -> Wave:
    return 0.6 * np.diff(rng.normal(0, 1, len(time) + 1))


def _music_box(rng: np.random.Generator, time: Wave) -> Wave:
    wave, base, gap = np.zeros_like(time), rng.uniform(1000, 1300), rng.uniform(0.13, 0.18)
    for step, start in enumerate(np.arange(0, float(time[-1]), gap)):
        since = np.clip(time - start, 0, None)
        note = base * 2 ** ((0, 4, 7, 12)[step % 4] / 12)
        wave += np.where(time >= start, np.exp(-14 * since), 0.0) * np.sin(2 * np.pi * note * since)
    return wave


def _hum(rng: np.random.Generator, time: Wave) -> Wave:
    base = rng.uniform(130, 220)
    return 0.5 * np.sin(2 * np.pi * base * time) + 0.3 * np.sin(4 * np.pi * base * time)


SOUNDS: dict[str, Callable[[np.random.Generator, Wave], Wave]] = {
    "bell": _bell,
    "siren": _siren,
    "drums": _drums,
    "birds": _birds,
    "rain": _rain,
    "music box": _music_box,
    "hum": _hum,
}


def sound(
    rng: np.random.Generator, keys: Sequence[str], duration_s: float, noise: float = 0.0
) -> npt.NDArray[np.float32]:
    """Return the sounds one after the other, a hum where none is named.

    float32 ``(samples,)`` at 16 kHz, at most 0.7 in size.
    """
    names = list(keys) or ["hum"]
    parts = []
    for name in names:
        wave = SOUNDS[name](rng, _time(duration_s / len(names)))
        parts.append(wave / (np.abs(wave).max() + 1e-9) * rng.uniform(0.35, 0.65))
    whole = np.concatenate(parts)
    whole += rng.normal(0, 0.003 + 0.1 * noise, len(whole))
    clipped: npt.NDArray[np.float32] = np.clip(whole, -0.7, 0.7).astype(np.float32)
    return clipped
