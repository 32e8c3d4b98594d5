"""JSON Schemas of the settings, for editors: each key with its type, default and description.

The description is the docstring under the key. Keys whose names say enough in the code have theirs
in `WORDS`, since an editor shows only the key.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from inspect import get_annotations
from types import MappingProxyType
from typing import Any

from config.section import Section

WORDS: Mapping[str, str] = MappingProxyType(
    {
        "arch": "Name of the encoder in its library; docs/encoders.md.",
        "batch_size": "Inputs that the model takes at once.",
        "connect_timeout_s": "Seconds to connect.",
        "deadline_s": "Seconds that one task may take.",
        "device": "cpu, or cuda:N of this host.",
        "dropout": "Share of values set to zero at random in training.",
        "enabled": "Whether it is used.",
        "epochs": "Passes over the training posts.",
        "feed_forward": "Width of the layer between two attentions.",
        "fields": "Our names of a post's parts -> the platform's dotted paths.",
        "folder": "Folder of its files.",
        "heads": "Heads of each attention layer.",
        "heartbeat_s": "Seconds between two heartbeats.",
        "interval_s": "Seconds between two checks.",
        "join": "Width of the layer that joins both parts.",
        "labels": "File of the label map: index -> name.",
        "layers": "Number of layers.",
        "learning_rate": "The highest learning rate.",
        "modality_width": "Width of each modality's vector.",
        "name": "Its name.",
        "port": "TCP port.",
        "precision": "auto, fp32, bf16 or fp16.",
        "processes": "Number of processes.",
        "progress": "Show progress bars.",
        "projection": "Width that inputs are projected to.",
        "read_timeout_s": "Seconds without a byte after which a download has failed.",
        "reduction": "Factor by which the gate is narrower than what it weighs.",
        "threads": "CPU threads; null, where allowed: the library decides.",
        "timeout_s": "Seconds that one operation may take.",
        "url": "Its URL; embedded:// starts one on this machine.",
        "weights": "pretrained, package, a path, or random:SEED; docs/encoders.md.",
        "width": "Width of the model.",
        "AsymmetricSettings.gamma_negative": "Strength for negatives; 0 is the plain loss.",
        "AsymmetricSettings.gamma_positive": "Strength for positives; 0 is the plain loss.",
        "BackboneTrainSettings.task": "The encoder that is trained.",
        "BackboneSettings.arch": "timm's name of the model; of texts tfidf or bert.",
        "BrokerSettings.queue": "Name of the queue.",
        "BrokerSettings.socket_timeout_s": "Seconds that one operation of the broker may take.",
        "BundleSettings.name": "Name of the bundle: `model` of every result.",
        "DataSettings.modalities": "Modalities that the model sees.",
        "DecodeSettings.max_pixels": "Larger pictures and frames are refused.",
        "ExtractorPlacement.extractors": "Encoders that these processes load.",
        "FetchSettings.allow_private_hosts": "Allow URLs with private addresses.",
        "FetchSettings.connections": "Downloads at once.",
        "FetchSettings.max_bytes": "Larger files are refused.",
        "FetchSettings.max_redirects": "More redirects of one download are refused.",
        "FetchSettings.spool": "Folder of the files between download and decoding.",
        "FetchSettings.total_timeout_s": "Seconds that one download may take.",
        "FetchSettings.user_agent": "Header User-Agent of downloads.",
        "FieldMap.audios": "Sounds: URLs or objects with a URL.",
        "FieldMap.id": "ID of the post.",
        "FieldMap.images": "Pictures: URLs or objects with a URL.",
        "FieldMap.labels": "True tags, if any.",
        "FieldMap.text": "Text of the post.",
        "FieldMap.videos": "Videos: URLs or objects with a URL.",
        "FusionSettings.bundle": "Folder of the bundle that is served.",
        "HttpSettings.max_body_bytes": "Larger requests are refused.",
        "HttpSettings.max_json_bytes": "Larger JSON bodies are refused.",
        "HttpSettings.max_text_chars": "Longer texts are refused.",
        "HttpSettings.queue_s": "Seconds that a request waits while `posts` others are running.",
        "InferSettings.bundle": "Folder of the bundle.",
        "KingSettings.backoff_max_s": "Longest pause between two tries.",
        "KingSettings.backoff_s": "Pause before the second try; doubled before each further one.",
        "KingSettings.drain_timeout_s": "Seconds for posts in flight to finish on SIGTERM.",
        "KingSettings.health_file": "State of the daemon, for status and watchdog.",
        "LogSettings.level": "The least important lines that are written.",
        "LossSettings.name": "Name of the loss.",
        "MbtSettings.bottlenecks": "Tokens through which modalities exchange what they know.",
        "MonitorSettings.backlog": "Untagged posts older than `backlog_age_s`.",
        "MonitorSettings.dead_letters": "Dead letters.",
        "MonitorSettings.failed_ratio": "Share of failed results in `window_s`.",
        "MonitorSettings.latency_s": "Seconds that the database takes to answer.",
        "MonitorSettings.overdue_jobs": "Jobs that are due for longer than `overdue_s`.",
        "MonitorSettings.queue_depth": "Waiting messages.",
        "MonitorSettings.replica_lag_s": "Seconds that the slowest replica is behind.",
        "OcrSettings.max_chars": "More text of one picture is cut off.",
        "OptimizerSettings.name": "Name of the optimizer.",
        "OptimizerSettings.step_factor": "Factor of the learning rate at each step of `step`.",
        "StoreSettings.batch_size": "Posts that are read or written together.",
        "StoreSettings.collection": "Collection of the posts.",
        "StoreSettings.database": "Name of the database.",
        "StoreSettings.jobs_collection": "Collection of attempts and dead letters.",
        "TagEntry.name": "Name of the tag.",
        "TagTexts.tags": "The tags, in the order of their IDs.",
        "TextSettings.max_tokens": "Longer texts are cut off.",
        "Threshold.critical": "Critical from this value on; null: never.",
        "Threshold.warning": "Warn from this value on; null: never.",
        "TokenLimits": "Maximum number of tokens of this stream.",
        "TrainerSettings.fix_random_seed": "Draw the same random numbers in every run.",
        "TwoWaySettings.negative": "Temperature over negatives.",
        "TwoWaySettings.positive": "Temperature over positives.",
        "WatchdogSettings.program": "Name of the King's program under supervisord, or of its unit.",
        "WatchdogSettings.restart_window_s": "Seconds over which restarts are counted.",
        "WatchdogSettings.rpc_timeout_s": "Seconds for supervisord to answer.",
        "WorkerSettings.extractors": "Groups of extractor processes.",
        "WorkerSettings.shutdown_timeout_s": "Seconds for workers to end before they are killed.",
        "train": "Data file of the training posts.",
    }
)
"""``Section.key``, ``Section`` for all of its keys, or ``key`` in any section -> its words."""

VERSION = "https://json-schema.org/draft/2020-12/schema"


def schema_of(model: type[Section], title: str) -> dict[str, Any]:
    """Return the JSON Schema of a file of settings."""
    schema = model.model_json_schema()
    others = schema.pop("$defs", {})
    known = {each.__name__: each for each in _below(Section)}
    for name, section in {**others, model.__name__: schema}.items():
        for key, about in section.get("properties", {}).items():
            about.pop("title", None)
            inner = known.get(str(about.get("$ref", "")).rpartition("/")[2])
            if inner is not None:
                about.pop("default", None)  # its keys have theirs
            text = words_of(known[name], key) or (inner.__doc__ if inner is not None else None)
            if text:
                about["description"] = " ".join(text.split())
        if "description" in section:
            section["description"] = " ".join(section["description"].split())
    return {"$schema": VERSION, **schema, "title": title, "$defs": dict(sorted(others.items()))}


def words_of(section: type[Section], key: str) -> str | None:
    """Return the docstring under a key, or its entry in `WORDS`."""
    if text := section.model_fields[key].description:
        return text
    owner = next(base for base in section.__mro__ if key in get_annotations(base))
    names = (f"{owner.__name__}.{key}", owner.__name__, key)
    return next((WORDS[name] for name in names if name in WORDS), None)


def _below(section: type[Section]) -> Iterator[type[Section]]:
    for each in section.__subclasses__():
        yield each
        yield from _below(each)
