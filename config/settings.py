"""Typed, frozen settings. Unknown keys are refused; units are in the names.

Loaded once by :func:`config.load.load_settings` and passed in; nothing reads settings at import.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    Field,
    field_validator,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from common.retry import RetryPolicy
from common.urls import redact
from config.base import ExtractorName, PositiveInt, Seconds, Section
from config.cache import CacheSettings
from config.features import (
    AudioSettings,
    FeatureSettings,
    ImageSettings,
    OcrSettings,
    TextSettings,
    VideoSettings,
    VisualSettings,
)
from config.http import HttpSettings
from config.infer import RunSettings
from config.operations import MonitorSettings, Threshold, WatchdogSettings

__all__ = [
    "AudioSettings",
    "BrokerSettings",
    "CacheSettings",
    "DecodeSettings",
    "EmbeddedSettings",
    "ExtractorName",
    "ExtractorPlacement",
    "FeatureSettings",
    "FetchSettings",
    "FieldMap",
    "FusionSettings",
    "HttpSettings",
    "ImageSettings",
    "KingSettings",
    "LogSettings",
    "MonitorSettings",
    "OcrSettings",
    "PositiveInt",
    "Seconds",
    "Section",
    "Settings",
    "StoreSettings",
    "TextSettings",
    "Threshold",
    "VideoSettings",
    "VisualSettings",
    "WatchdogSettings",
    "WorkerSettings",
]


class BrokerSettings(Section):
    """The message queue."""

    url: str = "embedded://"
    queue: str = "insighttag.posts"
    prefetch: PositiveInt = 32
    """Messages held unacknowledged: the daemon's whole intake."""
    heartbeat_s: PositiveInt = 10
    socket_timeout_s: Seconds = 5
    visibility_timeout_s: Seconds = 60
    """Redis only: after this time without a sign of life of their consumer, messages are
    delivered again. A consumer that lives renews its hold, however long a post takes."""
    delivery_limit: PositiveInt = 20
    """RabbitMQ only: deliveries after which the broker itself dead-letters a message."""

    @field_validator("url")
    @classmethod
    def _scheme(cls, value: str) -> str:
        # `king.broker.connect.BROKERS` alone knows which schemes there are.
        if not re.match(r"[a-z][a-z0-9+.-]*://", value):
            raise ValueError(
                f"{redact(value)!r} is no broker; use amqp://, redis:// or embedded://"
            )
        return value


class FieldMap(Section):
    """Our names -> the platform's dotted paths in a post document."""

    id: str = "_id"
    text: str = "text"
    images: str = "images"
    videos: str = "videos"
    audios: str = "audios"
    labels: str = "labels"
    author: str | None = None
    """Author of the post: `scripts/build_trainval_data.py` keeps an author on one side."""
    created: str | None = None
    """Creation time of the post, for `monitor`, `pull_posts`: a date, ISO text, or Unix seconds."""


class StoreSettings(Section):
    """MongoDB: where posts are read and tags are written."""

    url: str = "embedded://"
    database: str = "insighttag"
    collection: str = "posts"
    jobs_collection: str = "jobs"
    fields: FieldMap = FieldMap()
    result_path: str = "insight"
    """The sub-document of a post that tags are written to."""
    timeout_s: Seconds = 10
    batch_size: PositiveInt = 200

    @field_validator("url")
    @classmethod
    def _scheme(cls, value: str) -> str:
        if not value.startswith(("mongodb://", "mongodb+srv://", "embedded://")):
            raise ValueError(f"{redact(value)!r} is no database; use mongodb:// or embedded://")
        return value


class FetchSettings(Section):
    """Limits of the downloader, the only process that opens post URLs."""

    connections: PositiveInt = 16
    connect_timeout_s: Seconds = 5
    read_timeout_s: Seconds = 15
    total_timeout_s: Seconds = 60
    max_bytes: PositiveInt = 200 * 1024 * 1024
    max_redirects: Annotated[int, Field(ge=0)] = 5
    max_media: PositiveInt = 20
    """Media of one post; those beyond it are left out and named in the log."""
    allow_private_hosts: bool = False
    spool: Path = Path("workshop/spool")
    user_agent: str = "InsightTag/1"


class DecodeSettings(Section):
    """Decoder processes and what a media file may be."""

    processes: PositiveInt = 2
    deadline_s: Seconds = 60
    memory_mb: PositiveInt = 4096
    """Address space that one decoder may grow by; past it, the decoder is replaced."""
    max_pixels: PositiveInt = 100_000_000
    max_duration_s: Seconds = 3600
    """Longer videos and sounds are read up to here."""
    max_audio_s: Seconds = 300
    """Sound of one file that is turned into patches."""


class ExtractorPlacement(Section):
    """One group of extractor processes: a device and the extractors that it hosts."""

    device: Annotated[str, Field(pattern=r"^(cpu|cuda:\d+)$")] = "cpu"
    extractors: tuple[ExtractorName, ...] = ("video", "image", "audio", "text", "ocr")
    processes: PositiveInt = 1
    threads: PositiveInt = 2
    """CPU threads of each process."""


class FusionSettings(Section):
    """The fusion process and the bundle it serves."""

    bundle: Path = Path("workshop/weights/insight")
    image_as_frames: bool = False
    """Images join the video's frames; must be what the bundle was trained with."""
    device: Annotated[str, Field(pattern=r"^(cpu|cuda:\d+)$")] = "cpu"
    threads: PositiveInt = 1
    batch_size: PositiveInt = 64
    reload_s: Seconds = 5
    """Interval at which the bundle folder is checked for a newer bundle."""


class WorkerSettings(Section):
    """The worker pool."""

    extractors: tuple[ExtractorPlacement, ...] = (ExtractorPlacement(),)
    slots: PositiveInt = 16
    """Shared-memory slots; each holds what was decoded from one media file."""
    start_timeout_s: Seconds = 600
    """Loading of models may take this long."""
    task_timeout_s: Seconds = 120
    """A task that a device worker has begun may take this long."""
    shutdown_timeout_s: Seconds = 10
    recycle_tasks: Annotated[int, Field(ge=0)] = 200_000
    """A decoder or device worker is replaced after this many tasks; 0: never."""
    recycle_growth_mb: Annotated[int, Field(ge=0)] = 2048
    """Or after growing by this much since it warmed up; 0 never."""
    share_batches: bool = True
    """Posts share the passes of a model, which GPUs like. Kernels round a little differently for
    other batch sizes: without, a post's features are the same to the last bit in every run."""

    @model_validator(mode="after")
    def _hosted(self) -> WorkerSettings:
        hosted = {name for group in self.extractors for name in group.extractors}
        absent = [n for n in ("video", "image", "audio", "text") if n not in hosted]
        if absent:
            raise ValueError(f"no process hosts the extractors {', '.join(absent)}")
        return self


class KingSettings(Section):
    """The coordinator."""

    attempts: PositiveInt = 5
    """Tries at one post, crashes included, before it is a dead letter."""
    backoff_s: Seconds = 2
    backoff_max_s: Seconds = 300
    post_deadline_s: Seconds = 300
    """A post in flight longer than this fails this attempt."""
    drain_timeout_s: Seconds = 30
    health_file: Path = Path("workshop/run/king.json")
    lease_s: Seconds = 60
    """A job of another King is taken over when its lease is older than this."""
    reconcile_s: Annotated[float, Field(ge=0)] | None = 300
    """Interval at which a King looks for posts that have neither a result nor a job and publishes
    them, a batch at a time; 0 or null never does. It reads the posts without
    ``<result_path>.status``: an index on that path keeps it cheap in a large collection."""

    @property
    def retry(self) -> RetryPolicy:
        """Return the policy for attempts at one post."""
        return RetryPolicy(self.attempts, self.backoff_s, self.backoff_max_s)


class EmbeddedSettings(Section):
    """Files of the embedded broker and database."""

    folder: Path = Path("workshop/embedded")


class LogSettings(Section):
    """structlog output on standard error."""

    format: Literal["auto", "json", "pretty"] = "auto"
    """`auto` is pretty on a terminal, JSON elsewhere."""
    level: Literal["debug", "info", "warning", "error"] = "info"


class Settings(BaseSettings):
    """All settings of the daemon and the online commands."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        env_prefix="INSIGHTTAG_",
        env_nested_delimiter="__",
        protected_namespaces=(),
    )

    broker: BrokerSettings = BrokerSettings()
    store: StoreSettings = StoreSettings()
    fetch: FetchSettings = FetchSettings()
    decode: DecodeSettings = DecodeSettings()
    features: FeatureSettings = FeatureSettings()
    workers: WorkerSettings = WorkerSettings()
    cache: CacheSettings = CacheSettings()
    fusion: FusionSettings = FusionSettings()
    king: KingSettings = KingSettings()
    watchdog: WatchdogSettings = WatchdogSettings()
    monitor: MonitorSettings = MonitorSettings()
    http: HttpSettings = HttpSettings()
    embedded: EmbeddedSettings = EmbeddedSettings()
    log: LogSettings = LogSettings()
    infer: RunSettings = RunSettings()
    """`infer_net.py` with these settings: raw media to tags, without queue and workers."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what is passed in: `config.load` merges the sources, so that it can name them."""
        return (init_settings,)
