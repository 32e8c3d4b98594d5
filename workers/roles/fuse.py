"""The fusion process: features -> tags, and the swap to a newer bundle between two batches."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from common.errors import BundleError, TaggingError, one_line
from common.fingerprint import mismatch, packed, unpacked
from common.post import Stream
from config.settings import FusionSettings
from workers.pool.channel import Channel
from workers.protocol import BundleLoaded, Command, Expect, FuseTask, Task
from workers.roles.loop import Context, serve
from workers.roles.tasks import Outcome, run_fuse

if TYPE_CHECKING:
    from fusion.infer.inferer import Inferer

_log = structlog.get_logger()

_FILES = ("bundle.yaml", "model.safetensors", "labels.json")
_Signature = tuple[tuple[int, int, int], ...]


class _Fusion:
    def __init__(self, settings: FusionSettings, device: str) -> None:
        self._settings = settings
        self._device = device
        self._inferer: Inferer | None = None
        self._seen: _Signature = ()
        self._expected: Mapping[Stream, str] | None = None
        self._look_at = 0.0
        self._announced = ""

    def load(self) -> Mapping[str, str]:
        self._seen = _signature(self._settings.bundle)
        self._inferer = open_bundle(self._settings, self._device)
        self._look_at = time.monotonic() + self._settings.reload_s
        self._announced = self._inferer.version
        return {
            "name": self._inferer.name,
            "version": self._inferer.version,
            "fingerprints": packed(self._inferer.fingerprints),
        }

    def run(self, tasks: Sequence[Task]) -> list[Outcome]:
        if self._inferer is None:
            raise RuntimeError("fusion runs before it has loaded")
        return run_fuse(self._inferer, [task for task in tasks if isinstance(task, FuseTask)])

    def between_batches(self, channel: Channel[Command]) -> float | None:
        now = time.monotonic()
        if now >= self._look_at:
            self._swap()
            self._look_at = time.monotonic() + self._settings.reload_s
        if self._inferer is not None and self._inferer.version != self._announced:
            self._announced = self._inferer.version
            channel.send_wait(BundleLoaded(self._inferer.name, self._inferer.version))
        return max(0.0, self._look_at - time.monotonic())

    def control(self, message: Command) -> None:
        if isinstance(message, Expect):
            self._expected = unpacked(message.fingerprints)

    def close(self) -> None:
        if self._inferer is not None:
            self._inferer.close()

    def _swap(self) -> None:
        """Serve the bundle that is in the folder now, if it is a new and good one."""
        seen = _signature(self._settings.bundle)
        if seen == self._seen or len(seen) < len(_FILES) or self._expected is None:
            return
        self._seen = seen  # a bad one is logged once, not at every look
        before = self._inferer
        try:
            new = open_bundle(self._settings, self._device)
        except TaggingError as error:
            _log.error("workers.bundle_refused", reason=one_line(error))
            return
        wrong = mismatch(new.fingerprints, self._expected)
        if wrong is not None:
            new.close()
            _log.error("workers.bundle_refused", version=new.version, reason=wrong)
            return
        self._inferer = new
        if before is not None:
            before.close()
        _log.info("workers.bundle_swapped", name=new.name, version=new.version)


def open_bundle(settings: FusionSettings, device: str) -> Inferer:
    """Load the bundle that the settings name.

    Raises:
        BundleError: It is missing, broken, or was trained with the other switch.
    """
    from fusion.infer.inferer import Inferer

    inferer = Inferer.load(
        settings.bundle, device=device, threads=settings.threads, batch_size=settings.batch_size
    )
    if inferer.image_as_frames != settings.image_as_frames:
        inferer.close()
        raise BundleError(
            f"fusion.image_as_frames is {settings.image_as_frames}, but bundle "
            f"{settings.bundle} was trained with {inferer.image_as_frames}"
        )
    return inferer


def _signature(bundle: Path) -> _Signature:
    """Return what changes whenever the bundle's files do, or the link to them."""
    files: list[tuple[int, int, int]] = []
    for name in _FILES:
        try:
            stat = (bundle / name).stat()
        except OSError:
            continue
        files.append((stat.st_ino, stat.st_mtime_ns, stat.st_size))
    return tuple(files)


def run(context: Context) -> None:
    """Serve fuse tasks."""
    serve(context, _Fusion(context.settings.fusion, context.launch.device))
