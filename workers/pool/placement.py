"""Numbers of workers for this host: which processes, where, how many slots, which batches.

What the settings name stays. For what they leave open (``workers: auto``, the default) there are
two sources, and the log says which one it was:

- ``workers.host_file``, where ``insighttag tune-host`` has measured this host with these encoders;
- a quick rule from the cores and the GPUs (`quick_rule`).

Nothing here imports torch: the King is placed by it.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import psutil
import yaml

from common.errors import ConfigError, one_line, path_error
from common.files import locked, write_whole
from common.fingerprint import digest
from common.processes import cores
from config.features import FeatureSettings
from config.load import read_yaml, validate
from config.section import Section
from config.settings import Settings, WorkerSettings
from extractors.parts import slot_bytes

_Section = TypeVar("_Section", bound=Section)
Values = Mapping[str, Any]
"""Settings as a YAML file has them, only those that a source chooses."""

_HEAD = (
    "# Numbers of workers as `insighttag tune-host` measured them, by host and encoders; the\n"
    "# daemon takes them for keys that its settings leave open. Delete the file to forget them.\n"
)
_LOCK_S = 10.0

_SLOTS_PER_CORE = 8
"""Decoded files that wait or are read: 16 on two cores. At half, encoders with large batches wait
for decoders; at double, memory is full of frames, and nothing is faster."""
_LEAST_SLOTS = 16
_MEMORY_OF_SLOTS = 1 / 8
"""Of the host's memory at most, when all slots are full, which files of any kind hardly do."""
_GIB_PER_ENCODERS = 4
"""Memory for each process of encoders: ViT-L/16, BERT and their activations take two to three."""

_CORES_PER_OCR, _MOST_OCR = 4, 8
"""OCR on a GPU has a process for each four cores, and at most eight on each GPU. What the CPU does
around its networks takes 31 ms of a post of two pictures and two frames, decoding 120: two thirds
of a core out of four. For every two cores, processes would wait for decoders; for every eight, they
would need more than Python's lock gives them. Eight take as many posts as an H100's encoders."""

ENCODERS = ("video", "image", "audio", "text", "asr")


@dataclass(frozen=True, slots=True)
class Host:
    """The machine, as far as placement goes by it.

    Attributes:
        cpu: Model of the processor.
        cpus: Cores that this process may use.
        gpus: Model of each CUDA device that torch will see.
    """

    cpu: str
    cpus: int
    memory_gib: int
    gpus: tuple[str, ...] = ()

    @property
    def signature(self) -> str:
        """Return what numbers were measured for; another host has another one."""
        counts = {name: self.gpus.count(name) for name in self.gpus}
        gpus = ", ".join(f"{count} x {name}" for name, count in counts.items())
        return f"{self.cpu}, {self.cpus} cores, {self.memory_gib} GiB; {gpus or 'no GPU'}"


@dataclass(frozen=True, slots=True)
class Placement:
    """Settings with all numbers of workers.

    Attributes:
        source: ``settings``, ``rule``, or the file that had them; of the keys that were left open.
    """

    settings: Settings
    source: str


def this_host() -> Host:
    """Look at this machine, in milliseconds."""
    memory_gib = round(psutil.virtual_memory().total / 2**30)
    return Host(_cpu_model(), cores(), memory_gib, _gpus(os.environ.get("CUDA_VISIBLE_DEVICES")))


def place(settings: Settings, host: Host | None = None) -> Placement:
    """Fill in the numbers that the settings leave open.

    Raises:
        ConfigError: `workers.host_file` cannot be read.
    """
    host = host or this_host()
    rule = chosen(quick_rule(settings, host), "the rule")
    if _names_all(settings):
        return Placement(filled(settings, rule), "settings")
    file = settings.workers.host_file
    measured = read_measured(file, host, settings.features) if file is not None else None
    if measured is None:
        return Placement(filled(settings, rule), "rule")
    # What was not measured, as fusion without a bundle, is the rule's.
    return Placement(filled(filled(settings, chosen(measured, str(file))), rule), str(file))


def summary(settings: Settings, host: Host | None = None) -> dict[str, Any]:
    """Return the numbers of a pool for a log line, and which source has the same ones."""
    host = host or this_host()
    opened = Settings(
        features=settings.features,
        workers=WorkerSettings(host_file=settings.workers.host_file),
    )
    sources = {"rule": chosen(quick_rule(opened, host), "the rule")}
    measured = place(opened, host)
    sources = {measured.source: measured.settings, **sources}

    def numbers(each: Settings) -> tuple[Any, ...]:
        return each.decode.processes, each.workers.extractors, each.workers.slots

    same = (name for name, each in sources.items() if numbers(each) == numbers(settings))
    return {
        "source": next(same, "settings"),
        "decoders": settings.decode.processes,
        "extractors": [
            f"{'+'.join(group.extractors)}: {group.processes} x {group.threads} threads, "
            f"{group.device}"
            for group in settings.workers.extractors
        ],
        "slots": settings.workers.slots,
        "fusion": settings.fusion.device,
    }


def quick_rule(settings: Settings, host: Host) -> Values:
    """Return numbers by the cores and the GPUs alone.

    - CPU: a process of one thread for each core, with all encoders and OCR, so that any post
      keeps every core busy, and a decoder for every two cores, two at least. Where memory does not
      hold that many copies of the encoders: as many processes of two threads as it does hold, and
      OCR, which is small, in processes of its own for half of the cores.
    - GPUs: one process with the encoders on each, decoders on half of the cores, fusion on the
      first. OCR has a process on its GPU for every four cores, or processes on three eighths of the
      cores where `features.ocr.engine` is one for CPUs.
    """
    cpus, gpus = host.cpus, len(host.gpus)
    if gpus:
        groups = [group(f"cuda:{i}", ENCODERS, 1, 2) for i in range(gpus)]
        if settings.features.ocr.on_gpu:
            each = min(_MOST_OCR, max(1, cpus // _CORES_PER_OCR // gpus))
            groups += [group(f"cuda:{i}", ("ocr",), each, 1) for i in range(gpus)]
        else:
            groups.append(group("cpu", ("ocr",), max(1, 3 * cpus // 8), 1))
        decoders = max(2, cpus // 2)
    else:
        copies, decoders = max(1, host.memory_gib // _GIB_PER_ENCODERS), max(2, cpus // 2)
        if copies >= cpus:
            groups = [group("cpu", (*ENCODERS, "ocr"), cpus, 1)]
        else:
            groups = [
                group("cpu", ENCODERS, min(math.ceil(cpus / 2), copies), min(cpus, 2)),
                group("cpu", ("ocr",), math.ceil(cpus / 2), 1),
            ]
    return {
        "decode": {"processes": decoders},
        "workers": {"extractors": groups, "slots": slots_for(settings, host)},
        "fusion": {"device": "cuda:0" if gpus else "cpu"},
    }


def group(device: str, extractors: Sequence[str], processes: int, threads: int) -> dict[str, Any]:
    """Return an entry of `workers.extractors`."""
    return {
        "device": device,
        "extractors": list(extractors),
        "processes": processes,
        "threads": threads,
    }


def slots_for(settings: Settings, host: Host) -> int:
    """Return the shared-memory slots: eight for each core, within an eighth of the memory."""
    fitting = int(_MEMORY_OF_SLOTS * host.memory_gib * 2**30 / slot_bytes(settings))
    return max(_LEAST_SLOTS, min(_SLOTS_PER_CORE * host.cpus, fitting))


def features_key(features: FeatureSettings) -> str:
    """Return a digest of the encoders and their preprocessing, without the batch sizes."""
    values = features.model_dump(mode="json", exclude={"preset"})
    for section in values.values():
        if isinstance(section, dict):
            section.pop("batch_size", None)
    return str.__str__(digest(values))  # plain text for YAML


def read_measured(file: Path, host: Host, features: FeatureSettings) -> Values | None:
    """Return the values that were measured on this host with these encoders; None: never.

    Raises:
        ConfigError: The file cannot be read, or is none of ours.
    """
    for entry in _entries(file):
        if entry.get("host") == host.signature and entry.get("features") == features_key(features):
            values = entry.get("settings")
            if isinstance(values, dict):
                return values
            raise _broken(file, "an entry has no `settings`")
    return None


def write_measured(
    file: Path, host: Host, features: FeatureSettings, values: Values, about: Mapping[str, Any]
) -> None:
    """Put values into the file, in the place of older ones of this host with these encoders.

    Raises:
        ConfigError: The file cannot be written, or is none of ours.
    """
    key = {"host": host.signature, "features": features_key(features)}
    try:
        with locked(file.with_name(f".{file.name}.lock"), _LOCK_S):
            others = [e for e in _entries(file) if any(e.get(k) != key[k] for k in key)]
            content = {"hosts": [*others, {**key, **about, "settings": dict(values)}]}
            write_whole(file, _HEAD + yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
    except TimeoutError as error:
        raise ConfigError(f"workers.host_file: {file} is being written by another") from error
    except OSError as error:
        raise path_error(f"workers.host_file: {file}: cannot be written", error) from error


def chosen(values: Values, source: str) -> Settings:
    """Return values as settings; only what they name counts as set.

    Raises:
        ConfigError: One of them is wrong.
    """
    return validate(Settings, values, source)


def filled(section: _Section, values: _Section) -> _Section:
    """Return settings with those keys of others that they do not set themselves."""
    taken: dict[str, Any] = {}
    for key in values.model_fields_set:
        ours, theirs = getattr(section, key), getattr(values, key)
        if isinstance(theirs, Section):
            taken[key] = filled(ours, theirs)
        elif key not in section.model_fields_set:
            taken[key] = theirs
    return section.model_copy(update=taken)


def _names_all(settings: Settings) -> bool:
    """Tell whether the settings themselves have every number that a rule gives."""
    return (
        "processes" in settings.decode.model_fields_set
        and {"extractors", "slots"} <= settings.workers.model_fields_set
    )


def _entries(file: Path) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    try:
        entries = read_yaml(file).get("hosts")
    except ConfigError as error:
        raise _broken(file, one_line(error).removeprefix(f"{file}: ")) from error
    if not isinstance(entries, list) or not all(isinstance(each, dict) for each in entries):
        raise _broken(file, "it must hold a list `hosts`")
    return entries


def _broken(file: Path, what: str) -> ConfigError:
    return ConfigError(f"workers.host_file: {file}: {what}; delete it, and insighttag tune-host")


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        text = ""
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1].strip() if match else os.uname().machine


def _gpus(visible: str | None) -> tuple[str, ...]:
    """Return the models of the CUDA devices, by the driver's files: torch is not asked.

    None where torch is built without CUDA, or `visible` (CUDA_VISIBLE_DEVICES) hides them all.
    """
    nodes = [each for each in Path("/dev").glob("nvidia*") if each.name[6:].isdigit()]
    if not nodes or not _torch_has_cuda():
        return ()
    about = [
        each.read_text(encoding="utf-8", errors="replace")
        for each in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    ]
    models = [re.search(r"^Model:\s*(.+)$", text, re.MULTILINE) for text in about]
    names = [match[1].strip() if match else "GPU" for match in models][: len(nodes)]
    names += ["GPU"] * (len(nodes) - len(names))
    if visible is None:
        return tuple(names)
    numbers = [each.strip() for each in visible.split(",") if each.strip()]
    if "-1" in numbers:  # CUDA ignores what follows the first wrong number
        numbers = numbers[: numbers.index("-1")]
    in_range = [int(n) for n in numbers if n.isdigit() and int(n) < len(names)]
    named = [names[0] for n in numbers if not n.isdigit()]  # by UUID, as for a part of a GPU
    return tuple([names[n] for n in in_range] + named)


def _torch_has_cuda() -> bool:
    """Tell how the installed torch was built, by its file of versions."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    try:
        text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    except OSError:
        return False
    return re.search(r"^cuda\b[^=]*=\s*['\"]", text, re.MULTILINE) is not None
