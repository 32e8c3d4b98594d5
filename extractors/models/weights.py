"""Sources of weights: ``pretrained`` (a hub), a PATH, or ``random:SEED`` (tests).

A hub's own client would retry for half a minute where there is no network, so a short probe goes
before it.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import structlog

from common.errors import ConfigError, one_line
from common.files import file_digest
from common.pth import load_weights

if TYPE_CHECKING:
    import torch

_PROBE_S = 3.0  # to connect, and to answer: slow satellite links take 1; hubs answer in 0.2
# Of the whole probe: name resolution has a time-out of its own that requests cannot set. Double
# makes a start without network feel hung; half gives up on slow resolvers.
_PROBE_TOTAL_S = 8.0

Loaded = TypeVar("Loaded")

_log = structlog.get_logger()


@dataclass(frozen=True)
class Weights:
    """A ``weights`` setting, parsed: a PATH, ``random:SEED``, or neither for ``pretrained``."""

    path: Path | None = None
    seed: int | None = None

    @property
    def pretrained(self) -> bool:
        return self.path is None and self.seed is None


def parse_weights(value: str, *, setting: str) -> Weights:
    """Read the value of a ``weights`` setting."""
    if value == "pretrained":
        return Weights()
    if value.startswith("random:"):
        digits = value.removeprefix("random:")
        seed = int(digits) if digits.isdecimal() else -1
        if not 0 <= seed < 2**63:
            raise ConfigError(f"{setting}: {value!r} must be random:SEED, SEED a whole number")
        _log.warning("extractors.random_weights", setting=setting, seed=seed, use="tests only")
        return Weights(seed=seed)
    path = Path(value).expanduser()
    if not path.exists():
        raise ConfigError(
            f"{setting}: {value}: no such file; give pretrained, a path to weights, or random:SEED"
        )
    return Weights(path=path)


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Make weights on the CPU deterministic inside the block; other randomness is untouched."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0 if seed is None else seed)
        yield


def read_state_dict(
    path: Path, *, setting: str, allow_pickle: bool = False
) -> dict[str, torch.Tensor]:
    """Read the ``.safetensors`` or ``.pth`` state dict that a setting names.

    Nothing in the file is executed, unless ``allow_pickle``, the key next to that setting, lets it
    be a whole pickled model.
    """
    allowing = f"{setting.rpartition('.')[0]}.allow_pickle"
    try:
        return load_weights(path, allow_pickle=allow_pickle, setting=allowing)
    except ConfigError as error:
        raise ConfigError(f"{setting}: {error}") from error


def tensors_digest(state: Mapping[str, torch.Tensor]) -> str:
    """Return the hex sha256 over names, shapes, dtypes and values of a state dict."""
    import torch

    total = hashlib.sha256()
    for key in sorted(state):
        tensor = state[key].detach().cpu().contiguous()
        total.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def weights_digest(weights: Weights, state: Any) -> str:
    """Return a digest of the files for a PATH, of the tensors for pretrained weights.

    In a transformers folder these are the files of tensors. Random weights are named by their
    seed: initialisation may differ in the last bit between processors, which is no other model.
    """
    if weights.seed is not None:
        return f"random:{weights.seed}"
    if weights.path is None:
        return tensors_digest(state)
    if not weights.path.is_dir():
        return file_digest(weights.path)
    found = (sorted(weights.path.glob(name)) for name in ("*.safetensors", "*.bin"))
    return file_digest(*next(filter(None, found), []))


def reachable(url: str) -> bool:
    """Return True if the host of a URL answers within seconds; respects proxy variables."""
    import requests

    parts = urlsplit(url)
    answered = threading.Event()

    def probe() -> None:
        with suppress(requests.RequestException):
            requests.head(f"{parts.scheme}://{parts.netloc}", timeout=_PROBE_S)
            answered.set()

    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(_PROBE_TOTAL_S)
    return answered.is_set()


def from_cache_or_hub(
    load: Callable[[bool], Loaded], *, name: str, remedy: str, host: str | None = None
) -> Loaded:
    """Load from a cache, so that cached weights need no network, and otherwise from a hub.

    `load` takes True for the cache alone, False for the hub; `name` (setting and weights) and
    `remedy` are for the error. The host is Hugging Face's by default.
    """
    from huggingface_hub import constants

    try:
        return load(True)
    except (OSError, ValueError):
        pass  # not cached: the error of the hub says more
    if constants.HF_HUB_OFFLINE or not reachable(host or constants.ENDPOINT):
        raise ConfigError(f"{name} is not on this machine and its hub cannot be reached: {remedy}")
    try:
        return load(False)
    except Exception as error:  # hub clients and readers of weights share no base class
        reason = one_line(error, 300)
        raise ConfigError(f"{name} cannot be loaded: {reason}; or {remedy}") from error


def hub_file(repo: str, names: Sequence[str], *, setting: str) -> Path:
    """Return the local path of the first of some files of a Hugging Face repository."""
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    def load(local: bool) -> Path:
        for name in names:
            try:
                return Path(hf_hub_download(repo, name, local_files_only=local))
            except EntryNotFoundError as error:  # and LocalEntryNotFoundError, for the cache
                missing = error
        raise missing

    return from_cache_or_hub(
        load,
        name=f"{setting}: {repo}/{names[0]}",
        remedy=f"set {setting} to the path of that file, or put it into the cache "
        f"{constants.HF_HUB_CACHE}",
    )


def release_file(url: str, *, setting: str) -> Path:
    """Return the local path of a released file, in torch hub's cache."""
    from torch import hub

    folder = Path(hub.get_dir()) / "checkpoints"
    path = folder / Path(urlsplit(url).path).name

    def load(local: bool) -> Path:
        if local:
            path.stat()
        else:
            folder.mkdir(parents=True, exist_ok=True)
            prefix = path.stem.rpartition("-")[2]
            hub.download_url_to_file(url, str(path), hash_prefix=prefix, progress=os.isatty(2))
        return path

    return from_cache_or_hub(
        load,
        host=url,
        name=f"{setting}: {path.name}",
        remedy=f"get {url} and put it into {folder}, or set {setting} to its path",
    )


def load_strictly(
    network: torch.nn.Module, state: Mapping[str, torch.Tensor], what: str, *, assign: bool = False
) -> None:
    """Load a state dict that must fit; ConfigError says `what` does not, and torch's reason."""
    try:
        network.load_state_dict(state, assign=assign)
    except RuntimeError as error:
        raise ConfigError(f"{what}: {first_finding(error)}") from error


def first_finding(error: BaseException) -> str:
    """Return the first thing that torch finds wrong with a state dict; it lists every key."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    finding = lines[1] if len(lines) > 1 and lines[0].startswith("Error(s)") else "".join(lines[:1])
    return finding[:200]
