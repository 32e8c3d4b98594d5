"""Videos decoded by an NVIDIA GPU (NVDEC), by FFmpeg's ``hwaccel``: `decode.hwaccel`.

Frames stay on the GPU but for the chosen ones. These come back in the planes that FFmpeg's own
decoder gives, with the same values: the standards of `CODECS` define each pixel. So nothing after
the decoder differs, and the setting is no part of the features' fingerprint. What the GPU does not
decode, whole and without an error, is `Refused`, and the CPU decodes it.

This code has never run on a GPU; its tests put frames of the CPU into the GPU's layout.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import av
import av.logging
import structlog
from av.codec.hwaccel import HWAccel

from common.errors import MediaError
from extractors.media.containers import Container, Stream, open_container, reason
from extractors.media.sniff import FileType
from extractors.media.video import Frame, PacketIndex, Refused, plan_runs

CODECS = ("h264", "hevc", "vp8", "vp9")
"""Not AV1: PyAV opens it with libdav1d, which has no ``hwaccel``. Nor MPEG-2 and MPEG-4, whose
standards leave rounding to the decoder."""

LEAST_PIXELS = 1280 * 720
"""Of a picture. In a single stream an H100 took 1.6 ms for one of 720p, downloads included, a core
takes 0.6: a GPU takes work from the cores before it is faster. At half, a core takes 0.3 ms, and
there is little to take; at double, 720p is left out. No threshold was measured on a GPU."""

LEAST_FRAMES = 100
"""To decode for the chosen ones. They take a core 60 ms at 720p in H.264, and reading the file once
more for the GPU 6, to which comes NVDEC's own start. At half, that may be all of the gain; at
double, clips of up to 8 s are left out."""

_PLANES = {"nv12": "yuv420p", "p010le": "yuv420p10le"}
"""Layout of the GPU -> that of the CPU: the same values, with a plane for each of the colours."""

_log = structlog.get_logger()


class GpuDecoder:
    """The decoder of the GPU that this process sees."""

    def __init__(self) -> None:
        """Open the GPU; FFmpegError where that fails."""
        self._hwaccel = HWAccel("cuda", allow_software_fallback=False, is_hw_owned=True)
        # Files share CUDA's primary context, which ends with its last user: another one takes long.
        self._context = self._hwaccel.create(av.Codec("h264", "r"))

    def open(self, path: Path, file_type: FileType) -> Container:
        """Open a file whose video the GPU is to decode."""
        try:
            return open_container(path, file_type, self._hwaccel)
        except (MediaError, RuntimeError) as error:
            raise Refused(str(error)) from error

    def download(self, frame: Frame) -> Frame:
        """Return a decoded frame in memory, in the planes of the CPU's decoder."""
        layout = (frame.sw_format or frame.format).name
        if layout not in _PLANES:
            raise Refused(f"frames are {layout}")
        try:
            return frame.reformat(format=_PLANES[layout], threads=1)
        except (av.error.FFmpegError, ValueError) as error:
            raise Refused(reason(error)) from error


def worth_it(stream: Stream, index: PacketIndex, chosen: list[int]) -> bool:
    """Tell whether the GPU may decode the chosen frames of a video faster than a core.

    Key frames alone are not: each would wait for the one before, and of theirs the CPU may leave
    the loop filter out (`decode_frames`), a GPU not.
    """
    codec = stream.codec_context
    if codec.name not in CODECS or stream.metadata.get("alpha_mode") == "1":
        return False
    runs = plan_runs(index, chosen)
    return (
        codec.width * codec.height >= LEAST_PIXELS
        and sum(run.last - run.first + 1 for run in runs) >= LEAST_FRAMES
        and any(run.first != run.last for run in runs)
    )


@cache
def gpu_decoder(pid: int) -> GpuDecoder | None:
    """Return the GPU's decoder for a process; None, said once in its log, where there is none.

    It takes the process since CUDA does not work across a fork.
    """
    del pid
    try:
        return open_gpu_decoder()
    except Refused as error:
        _log.warning("decode.no_hwaccel", hwaccel="cuda", reason=str(error), use="CPU")
        return None


def open_gpu_decoder() -> GpuDecoder:
    """Open the GPU's decoder; Refused says why there is none."""
    av.logging.set_level(av.logging.ERROR)  # the error number alone says nothing
    try:
        with av.logging.Capture():
            return GpuDecoder()
    # PyAV's word for an FFmpeg that was built without it is NotImplementedError.
    except (av.error.FFmpegError, NotImplementedError) as error:
        said = getattr(error, "log", None)
        raise Refused(f"{reason(error)}: {said[2].strip()}" if said else reason(error)) from error
    finally:
        av.logging.set_level(av.logging.PANIC)
