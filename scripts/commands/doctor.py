"""``insighttag doctor``: everything that would keep the daemon from tagging, and how to fix it.

Starts nothing and changes nothing: embedded services that are down stay down.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import shutil
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from common.cli import flag, option, print_json, say
from common.errors import ConfigError, TaggingError, one_line
from common.progress import notice
from common.tables import print_table
from common.urls import redact, split_address
from config.settings import Settings
from scripts.commands.common import AsJson, Config, Overrides, ago, settings_of
from scripts.commands.status import king_health
from scripts.commands.weights import about

# A server of this platform answers in milliseconds. At half, one over a slow line is called down;
# at double, somebody who waits for the doctor wonders whether it hangs.
_WAIT_S = 2.0
_GIB = 1 << 30
_FIELDS = ("text", "images", "videos", "audios", "labels")

# Packages without which InsightTag does not start, and extras by what they are for.
_PACKAGES = ("torch", "torchvision", "transformers", "timm", "av", "openvino")
_EXTRAS = {
    "export": "onnxscript",
    "heic": "pi-heif",
    "otel": "opentelemetry-sdk",
    "ray": "ray",
    "s3": "s3fs",
    "tune": "optuna",
}


@dataclass(frozen=True)
class Check:
    """The outcome of one check; a warning lets posts be tagged, a failure does not."""

    name: str
    state: Literal["ok", "warning", "failed"]
    said: str
    remedy: str = ""


def doctor(
    posts: Annotated[int, option("Look at this many of the newest posts.", min=1)] = 1000,
    quick: Annotated[
        bool, flag("--quick", "Load no models, and do not compare the bundle with them.")
    ] = False,
    as_json: AsJson = False,
    config: Config = None,
    overrides: Overrides = None,
) -> None:
    """Check what the daemon needs, and say how to fix each fault.

    Packages, devices, broker, database, how posts are read by store.fields, weights, bundle, disk
    space, ports, the King. Exit code 0: posts can be tagged; 1: they cannot; 2: the settings are
    wrong.
    """
    from deploy import embedded

    asked = settings_of(config, overrides)
    settings = embedded.peek(asked)

    def wait_for(what: str, url: str) -> None:
        notice(f"{what} {redact(url)}: waiting at most {_WAIT_S:g} s", enabled=not as_json)

    checks = [*_installed(), *_devices(settings), *_hwaccel(settings)]
    checks.append(_broker(settings, wait_for))
    shapes, post_checks = _posts(settings, posts, wait_for)
    weights = [about("settings", need) for need in _needs(settings)]
    checks += [*post_checks, *_weights(weights), _bundle(settings, weights, quick=quick)]
    checks += [*_disk(settings), *_ports(settings), _king(settings)]
    if as_json:
        print_json({**shapes, "weights": weights, "checks": [asdict(check) for check in checks]})
    else:
        if shapes["posts"]:
            _print_shapes(settings, shapes)
        _print(checks)
    if any(check.state == "failed" for check in checks):
        raise typer.Exit(1)


def _print(checks: list[Check]) -> None:
    for check in checks:
        say(f"{check.state:<8} {check.name}: {check.said}\n")
        if check.remedy:
            say(f"         -> {check.remedy}\n")
    counts = Counter(check.state for check in checks)
    say(f"{counts['failed']} failed, {counts['warning']} warnings, {counts['ok']} ok\n")


def _installed() -> Iterator[Check]:
    versions = {name: _version(name) for name in _PACKAGES}
    missing = [name for name, version in versions.items() if version is None]
    said = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    if missing:
        yield Check("packages", "failed", f"not installed: {', '.join(missing)}", "make env")
    else:
        yield Check("packages", "ok", f"Python {platform.python_version()}, {said}")
    absent = [name for name, package in _EXTRAS.items() if _version(package) is None]
    if absent:
        how = f"where you use them: pip install '.[{','.join(absent)}]'"
        yield Check("extras", "ok", f"not installed: {', '.join(absent)}", how)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices(settings: Settings) -> Iterator[Check]:
    import torch

    named = dict.fromkeys(
        [e.device for e in settings.workers.extractors] + [settings.fusion.device]
    )
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(count)]
    available = {"cpu", *(f"cuda:{i}" for i in range(count))}
    missing = [device for device in named if device not in available]
    if missing:
        said = f"{', '.join(missing)}: not found; this machine has {', '.join(gpus) or 'no GPU'}"
        keys = "workers.extractors[].device and fusion.device"
        yield Check("devices", "failed", said, f"set {keys} to cpu, or install a driver of CUDA")
        return
    cores = len(os.sched_getaffinity(0))
    yield Check(
        "devices", "ok", f"{', '.join(named)} used; {cores} cores, {', '.join(gpus) or 'no GPU'}"
    )
    if count and set(named) == {"cpu"}:
        remedy = "set workers.extractors to [{device: cuda:0}]"
        yield Check("devices", "warning", f"{gpus[0]} is not used", remedy)


def _hwaccel(settings: Settings) -> Iterator[Check]:
    from extractors.media.hwaccel import open_gpu_decoder
    from extractors.media.video import Refused

    key, hwaccel = "decode.hwaccel", settings.decode.hwaccel
    if hwaccel == "none":
        return
    try:
        open_gpu_decoder()
    except Refused as error:
        remedy = f"install a driver of CUDA, or set {key} to none; a container needs the driver's "
        remedy += "video capability (NVIDIA_DRIVER_CAPABILITIES=compute,utility,video)"
        yield Check(key, "warning", f"{hwaccel}: {error}; the CPU decodes videos", remedy)
    else:
        yield Check(key, "ok", f"{hwaccel}: the GPU decodes videos that are worth it")


def _broker(settings: Settings, wait_for: Callable[[str, str], None]) -> Check:
    from deploy.embedded import SCHEME
    from king.broker.connect import queue_counts

    broker = settings.broker
    if broker.url.startswith(SCHEME):
        return Check("broker", "ok", "embedded, not running: starts with the first command")
    wait_for("broker", broker.url)
    try:
        counts = queue_counts(broker.model_copy(update={"socket_timeout_s": _WAIT_S}))
    except TaggingError as error:
        remedy = "start it, or set broker.url; embedded:// needs no server"
        return Check("broker", "failed", one_line(error), remedy)
    return Check("broker", "ok", f"{redact(broker.url)}: {counts[0]} wait in {broker.queue}")


def _posts(
    settings: Settings, limit: int, wait_for: Callable[[str, str], None]
) -> tuple[dict[str, Any], list[Check]]:
    """Return how the newest posts are read, and the checks of database and fields."""
    from deploy.embedded import SCHEME
    from king.store.queries import open_queries

    empty: dict[str, Any] = {"posts": None, "ids": {}, "fields": {}}
    store = settings.store
    if store.url.startswith(SCHEME):
        said = "embedded, not running: starts with the first command"
        return empty, [Check("database", "ok", said)]
    wait_for("database", store.url)
    try:
        with open_queries(store.model_copy(update={"timeout_s": _WAIT_S})) as queries:
            shapes = _shapes(settings, queries.newest(limit))
    except TaggingError as error:
        remedy = "start it, or set store.url; embedded:// needs no server"
        return empty, [Check("database", "failed", one_line(error), remedy)]
    where = f"{store.database}.{store.collection}"
    checks = [Check("database", "ok", f"{redact(store.url)} answers")]
    return shapes, [*checks, *_fields(shapes, where)]


def _shapes(settings: Settings, documents: Iterator[Mapping[str, Any]]) -> dict[str, Any]:
    """Count the fields of documents that can be read, and those that cannot."""
    from king.store.documents import NoIdError, dig, id_text, read_fields

    fields = settings.store.fields
    posts_with: Counter[str] = Counter()
    unread: Counter[tuple[str, str]] = Counter()
    ids: Counter[str] = Counter()
    total = 0
    for document in documents:
        total += 1
        value = dig(document, fields.id)
        try:
            id_text(value)
        except NoIdError as error:
            unread["id", str(error)] += 1
        else:
            ids[type(value).__name__] += 1
        post, left_out = read_fields("", document, fields)
        posts_with.update({f"{media.kind}s" for media in post.media})
        posts_with.update(name for name in ("text", "labels") if getattr(post, name))
        unread.update({(field, shape) for field, _, shape in left_out})
    posts_with["id"] = sum(ids.values())
    by_field = {
        name: {
            "path": getattr(fields, name),
            "posts": posts_with[name],
            "unread": {shape: n for (field, shape), n in unread.items() if field == name},
        }
        for name in ("id", *_FIELDS)
    }
    return {"posts": total, "ids": dict(ids), "fields": by_field}


def _fields(shapes: Mapping[str, Any], where: str) -> Iterator[Check]:
    total, fields = shapes["posts"], shapes["fields"]
    if not total:
        remedy = "set store.database and store.collection to where the platform's posts are"
        yield Check("posts", "warning", f"{where} holds no document", remedy)
        return
    read = [name for name in _FIELDS[:-1] if fields[name]["posts"]]
    if not read:
        paths = ", ".join(f"{name}: {fields[name]['path']}" for name in _FIELDS[:-1])
        said = f"none of {total:,} has text or media where store.fields looks ({paths})"
        yield Check("posts", "failed", said, "set store.fields to the paths of your documents")
    for name, field in fields.items():
        for shape, count in field["unread"].items():
            said = f"{count:,} of {total:,} posts: {field['path']}: {shape}: not read"
            remedy = f"set store.fields.{name} to the path inside, as {field['path']}.KEY"
            if name == "id":
                remedy = "set store.fields.id to a field with IDs that fit"
            yield Check(f"store.fields.{name}", "warning", said, remedy)


def _print_shapes(settings: Settings, shapes: Mapping[str, Any]) -> None:
    store = settings.store
    say(f"{shapes['posts']} posts of {store.database}.{store.collection}\n")
    types = ", ".join(f"{count} {name}" for name, count in Counter(shapes["ids"]).most_common())
    say(f"IDs: {types or 'none'}\n")
    rows = [
        (
            name,
            field["path"],
            field["posts"],
            "\n".join(f"{count} posts: {shape}" for shape, count in field["unread"].items()),
        )
        for name, field in shapes["fields"].items()
    ]
    print_table("", ("field", "path", "posts that have it", "does not fit"), rows)
    say("\n")


def _needs(settings: Settings) -> list[Any]:
    from extractors.models.catalog import needs

    return needs(settings.features)


def _weights(weights: list[dict[str, Any]]) -> Iterator[Check]:
    for each in weights:
        name = f"weights of {', '.join(each['for'])}"
        if each["here"]:
            yield Check(name, "ok", f"{each['encoder']}: {each['here']}")
            continue
        kind, _, source = each["from"].partition(": ")
        remedy = f"insighttag weights get {each['encoder']}"
        remedy += "; or features.preset: small, whose weights pip brings"
        if kind == "trained here":
            remedy = (
                "insighttag train POSTS --out FOLDER, with its FOLDER/settings.yaml, needs none; "
                f"or train-net writes {source} (docs/training.md)"
            )
        yield Check(name, "failed", f"{each['encoder']}: missing", remedy)


def _bundle(settings: Settings, weights: list[dict[str, Any]], *, quick: bool) -> Check:
    from extractors.suite import ExtractorSuite
    from fusion.bundle.bundle import load_bundle
    from fusion.bundle.folder import ABOUT

    folder = settings.fusion.bundle
    if not (folder / ABOUT).is_file():
        remedy = "insighttag train POSTS --out FOLDER makes one; then fusion.bundle: FOLDER/bundle"
        return Check("bundle", "failed", f"fusion.bundle: {folder}: no bundle there", remedy)
    try:
        bundle = load_bundle(folder)
    except TaggingError as error:
        return Check("bundle", "failed", one_line(error), "insighttag bundle rollback EARLIER")
    said = f"{folder}: {bundle.name} {bundle.version}, {len(bundle.labels)} tags"
    if quick or not all(each["here"] for each in weights):
        why = "--quick" if quick else "weights are missing"
        return Check("bundle", "ok", f"{said}; not compared with the encoders: {why}")
    notice("loading the encoders to compare them with the bundle; --quick leaves it out")
    suite = ExtractorSuite(settings.features)
    try:
        suite.load()
        ours = suite.fingerprints
    except ConfigError as error:
        return Check("bundle", "failed", one_line(error), "set features as the bundle was trained")
    finally:
        suite.close()
    from common.fingerprint import mismatch

    needed = bundle.manifest.fingerprints
    wrong = [line for key in needed if (line := mismatch({key: needed[key]}, ours)) is not None]
    if wrong:
        remedy = "set features as the bundle was trained with, or train one with these"
        return Check("bundle", "failed", f"{folder}: {'; '.join(wrong)}", remedy)
    return Check("bundle", "ok", f"{said}; fits the encoders")


def _disk(settings: Settings) -> Iterator[Check]:
    """Check the folders that fill up."""
    fetch, url = settings.fetch, settings.cache.url
    folders = {"fetch.spool": (fetch.spool, fetch.connections * fetch.max_bytes)}
    if url is not None and ("://" not in url or url.startswith("file://")):
        folders["cache.url"] = (Path(url.removeprefix("file://")), settings.cache.max_mb << 20)
    folders["king.health_file"] = (settings.king.health_file.parent, 1 << 20)
    for key, (folder, most_bytes) in folders.items():
        existing = folder.absolute()
        while not existing.exists():
            existing = existing.parent
        free = shutil.disk_usage(existing).free
        said = f"{folder}: {free / _GIB:.1f} GiB free"
        if not (existing.is_dir() and os.access(existing, os.W_OK)):
            remedy = f"make {existing} writable for this user, or set {key}"
            yield Check(key, "failed", f"{folder}: {existing} cannot be written", remedy)
        elif free < most_bytes:
            most = f"{said}, and it may grow to {most_bytes / _GIB:.1f} GiB"
            state: Literal["failed", "warning"] = (
                "failed" if key == "fetch.spool" and free < fetch.max_bytes else "warning"
            )
            limits = "fetch.connections or fetch.max_bytes" if "fetch" in key else "cache.max_mb"
            yield Check(
                key, state, most, f"make room, set {key} to another disk, or lower {limits}"
            )
        else:
            yield Check(key, "ok", said)


def _ports(settings: Settings) -> Iterator[Check]:
    addresses = {"http.port": (settings.http.host, settings.http.port)}
    if settings.king.metrics is not None:
        addresses["king.metrics"] = split_address(settings.king.metrics)
    king = king_health(settings)
    for key, (host, port) in addresses.items():
        refused = _refused(host, port)
        if refused is None:
            yield Check(key, "ok", f"{host}:{port} is free")
        elif key == "king.metrics" and king is not None and king["alive"]:
            yield Check(key, "ok", f"{host}:{port} is taken; a King runs")
        else:
            remedy = f"fine if that is insighttag serve; otherwise set {key} to another port"
            if key == "king.metrics":
                remedy = f"stop the program that listens there, or set {key} to another port"
            yield Check(key, "warning", f"{host}:{port}: {refused}", remedy)


def _refused(host: str, port: int) -> str | None:
    """Return why a server could not listen on an address; None if it could."""
    with contextlib.suppress(socket.gaierror):
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                return error.strerror
            return None
    return "no such host"


def _king(settings: Settings) -> Check:
    king = king_health(settings)
    if king is None:
        return Check("king", "ok", "not running: insighttag work starts it")
    seen = ago(king["updated_at"], time.time())
    if king["alive"]:
        return Check("king", "ok", f"{king.get('phase')}, pid {king['pid']}, seen {seen}")
    if king.get("phase") == "stopped":
        return Check("king", "ok", f"stopped {seen}")
    said = f"died: pid {king['pid']}, last seen {seen}"
    remedy = "insighttag work starts it again and continues with the posts in progress"
    return Check("king", "warning", said, remedy)
